"""Thousands of mutated configurations and headers: a clear refusal or a checkpoint, never a crash or much memory."""

import copy
import json
import random
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from compressor.checkpoint import Checkpoint
from compressor.inspection import packed_modules
from compressor.pipeline import compress
from compressor.recipe import parse_recipe
from compressor.scheme import QuantizationConfig

CONFIGS, HEADERS, BYTES = 4000, 1500, 500
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
