"""Thousands of mutated configurations and headers: a clear refusal or a checkpoint, never a crash or much memory."""

import copy
import json
import random
import re
import shutil
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from compressor import foreign, models
from compressor.checkpoint import Checkpoint
from compressor.exports import export_checkpoint, import_checkpoint
from compressor.inspection import packed_modules
from compressor.pipeline import compress
from compressor.recipe import parse_recipe
from compressor.scheme import QuantizationConfig

CONFIGS, HEADERS, BYTES, OTHERS, RECORDS = 4000, 1500, 500, 120, 30
VALUES: list[Any] = [
    None, True, -1, 0, 3, 2**63, 1.5, "", "x", "re:", "re:(a+)+$", "re:.*", "../../etc/passwd", "os.system", [], {},
    [[]], {"a": 1}, ["re:model\\.\\d+"], "sparse24_int4", "float16", float("inf"), "a" * 10_000, "re:" + "a" * 1000,
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fuzz") / "out"
    record = {"sparsity": {"criterion": "magnitude"}, "quantization": {"group_size": 32}}
    compress(str(tiny_llama), parse_recipe(record), out, report=lambda *_: None)
    return out


def places(record: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of every value inside nested dicts and lists."""
    items = record.items() if isinstance(record, dict) else enumerate(record) if isinstance(record, list) else ()
    return [path, *(place for key, value in items for place in places(value, (*path, key)))]


def mutated(record: Any, choose: random.Random) -> Any:
    """The record with one value replaced, removed, or given a new key beside it."""
    result = copy.deepcopy(record)
    path = choose.choice(places(result)[1:])
    parent = result
    for key in path[:-1]:
        parent = parent[key]
    kind = choose.randrange(4)
    if kind == 0:
        del parent[path[-1]]
    elif kind == 1 and isinstance(parent, dict):
        parent[choose.choice(["x", "sparsity_config", "__class__", "format", "targets"])] = choose.choice(VALUES)
    elif kind == 2 and isinstance(parent[path[-1]], int):
        parent[path[-1]] = choose.choice([-1, 0, 1, 7, 2**31, 2**63, parent[path[-1]] + 1, parent[path[-1]] * 2])
    else:
        parent[path[-1]] = choose.choice(VALUES)
    return result


def test_configurations(folder: Path) -> None:
    record = json.loads((folder / "config.json").read_text())["quantization_config"]
    choose, refused = random.Random(0), 0
    for _ in range(CONFIGS):
        try:
            config = QuantizationConfig.from_dict(mutated(record, choose))
            config.scheme_of("model.layers.0.self_attn.q_proj")
            assert QuantizationConfig.from_dict(json.loads(json.dumps(config.to_dict()))).to_dict() == config.to_dict()
        except ValueError as error:
            assert str(error)
            refused += 1
    assert CONFIGS // 2 < refused < CONFIGS


def read_everything(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder, verify=False)
    try:
        for name in packed_modules(checkpoint):
            checkpoint.module(name)
    finally:
        checkpoint.close()


def check(folder: Path, size: int) -> bool:
    """Whether the folder was refused; anything but a ValueError is a crash, and memory follows the file's size."""
    tracemalloc.start()
    try:
        read_everything(folder)
    except ValueError as error:
        assert str(error)
        return True
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 20 * size + 2**22
    return False


def test_headers_and_bytes(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    file = broken / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    choose, refused = random.Random(1), 0
    for _ in range(HEADERS):
        text = json.dumps(mutated(header, choose)).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + body)
        refused += check(broken, len(data))
    for _ in range(BYTES):
        changed = bytearray(data)
        for _ in range(choose.randrange(1, 4)):
            changed[choose.randrange(min(len(data), 8 + length))] = choose.randrange(256)
        file.write_bytes(changed[: choose.choice([len(changed), choose.randrange(len(changed))])])
        refused += check(broken, len(data))
    assert refused > (HEADERS + BYTES) // 2


def test_a_huge_shape_allocates_nothing(folder: Path, tmp_path: Path) -> None:
    """A configuration cannot make the reader allocate: shapes come from the file, and the file has to hold them."""
    shutil.copytree(folder, tmp_path / "broken")
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_size": 2**40, "vocab_size": 2**50, "num_hidden_layers": 10**9}
    (tmp_path / "broken" / "config.json").write_text(json.dumps(config))
    assert not check(tmp_path / "broken", (folder / "model.safetensors").stat().st_size)


@contextmanager
def little_memory(most: int) -> Iterator[None]:
    """Fails where the process grew by more than `most` bytes for a moment; torch's tensors count too."""

    def status(key: str) -> int:
        found = re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())
        assert found is not None
        return 1024 * int(found[1])

    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = status("VmRSS")
    yield
    assert status("VmHWM") - before < most


def with_header(data: bytes, choose: random.Random) -> bytes:
    """A safetensors file with a mutated header."""
    length = int.from_bytes(data[:8], "little")
    text = json.dumps(mutated(json.loads(data[8 : 8 + length]), choose)).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


@pytest.mark.parametrize("target", ["gptq", "compressed-tensors"])
def test_checkpoints_of_others(target: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "skeleton", lambda _: nn.Module())  # whose sizes are not believed
    broken, stage = tmp_path / "broken", tmp_path / "stage"
    export_checkpoint(folder, target, broken)
    config, data = json.loads((broken / "config.json").read_text()), (broken / "model.safetensors").read_bytes()
    choose, refused = random.Random(2), 0
    with little_memory(64 * 2**20):
        for _ in range(2 * OTHERS):
            header = choose.random() < 0.6
            record = config["quantization_config"] if header else mutated(config["quantization_config"], choose)
            (broken / "config.json").write_text(json.dumps(config | {"quantization_config": record}))
            (broken / "model.safetensors").write_bytes(with_header(data, choose) if header else data)
            stage.mkdir()
            try:
                if foreign.method_of(json.loads((broken / "config.json").read_text())):
                    foreign.dequantise(broken, stage)
            except ValueError as error:
                assert str(broken) in str(error) or "accepted" in str(error), error
                refused += 1
            shutil.rmtree(stage)
    assert refused > OTHERS // 4


@pytest.mark.parametrize("target", ["dense", "gptq", "onnx", "gguf"])
def test_records_of_exports(target: str, folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    export_checkpoint(folder, target, broken)
    record = json.loads((broken / "halfweight.json").read_text())
    choose, refused = random.Random(3), 0
    with little_memory(128 * 2**20):
        for _ in range(RECORDS):
            (broken / "halfweight.json").write_text(json.dumps(mutated(record, choose)))
            try:
                import_checkpoint(broken, tmp_path / "back", force=True)
            except ValueError as error:
                assert str(error)
                refused += 1
    assert refused > RECORDS // 10
