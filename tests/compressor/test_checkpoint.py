"""Checkpoints are untrusted input: each kind of damage is refused, and named."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor.checkpoint import Checkpoint, CheckpointError, CheckpointWriter, copy_companions, write_manifest
from compressor.cli import main
from compressor.inspection import verify
from compressor.output import OutputFolder

LINEAR = "model.layers.0.mlp.up_proj"  # in int4, whose scales may be negative
TABLE = "model.embed_tokens"  # in int8


@pytest.fixture(scope="module")
def packed(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "model"
    recipe = ["--recipe", "one-shot-2of4-int4", "--set", "sparsity.criterion=magnitude"]
    assert main([str(tiny_llama), "--out", str(out), *recipe]) == 0
    return out


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    shutil.copytree(packed, tmp_path / "model")
    return tmp_path / "model"


def edit_config(folder: Path, change: Callable[[dict[str, object]], None]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Alters stored tensors and signs the folder again, as an attacker would."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    write_manifest(folder)


def test_an_intact_checkpoint_opens(packed: Path) -> None:
    checkpoint = Checkpoint.open(packed)
    assert checkpoint.packed
    assert set(checkpoint.module(LINEAR)) == {"weight_packed", "weight_meta", "weight_scale"}
    fused = checkpoint.linear([f"model.layers.0.self_attn.{part}_proj" for part in "qkv"])
    assert fused["weight_packed"].shape == (64 + 32 + 32, 16)


def test_a_flipped_bit_is_found(copy: Path) -> None:
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-50] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not match its SHA-256"):
        Checkpoint.open(copy)
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not match its SHA-256"):
        verify(copy)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.input_layernorm.weight"])
def test_verify_finds_what_is_not_finite(copy: Path, name: str, value: float) -> None:
    edit_tensors(copy, lambda tensors: tensors[name][3:4].fill_(value))
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)} holds NaN or infinity"):
        verify(copy)


def test_verify_finds_positions_that_are_no_two_of_four(copy: Path) -> None:
    """A third value in a group has no place in the format."""
    edit_tensors(copy, lambda tensors: tensors[f"{LINEAR}.weight_meta"].view(-1)[-1:].fill_(0x45))
    with pytest.raises(CheckpointError, match=f"{LINEAR}.*two ascending slots of four"):
        verify(copy)


def test_a_truncated_shard_is_found(copy: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated or altered"):
        Checkpoint.open(copy)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "manifest.json", "tokenizer.json"])
def test_a_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        Checkpoint.open(copy)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "", "..", "./3"])
def test_names_that_leave_the_folder_are_refused(copy: Path, name: object) -> None:
    (copy / "model.safetensors").rename(copy / "shard.safetensors")
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    write_manifest(copy)
    with pytest.raises(CheckpointError, match="names a file"):
        Checkpoint.open(copy)


@pytest.mark.parametrize("name", ["../outside.json", "sub/../../x.json", "/etc/passwd", "", ".hidden", 3])
def test_manifests_that_leave_the_folder_are_refused(copy: Path, name: object) -> None:
    files = json.loads((copy / "manifest.json").read_text())["files"]
    text = json.dumps({"version": 1, "files": files | {"name": {"bytes": 1, "sha256": ""}}})
    (copy / "manifest.json").write_text(text.replace('"name"', json.dumps(str(name))))
    with pytest.raises(CheckpointError, match=r"names a file|is missing"):
        Checkpoint.open(copy)


def test_what_nobody_needs_may_be_edited(copy: Path) -> None:
    """The model card before a push to the hub; and what else lies in a folder of the folder is checked."""
    (copy / "1_Pooling").mkdir()
    (copy / "1_Pooling" / "config.json").write_text("{}")
    (copy / "LICENSE").write_text("MIT")
    write_manifest(copy)
    (copy / "README.md").write_text("edited")
    (copy / "LICENSE").write_text("MIT, 2026")
    (copy / "recipe.yaml").unlink()
    assert Checkpoint.open(copy).packed
    (copy / "1_Pooling" / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"1_Pooling/config\.json does not match"):
        Checkpoint.open(copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"files": {"config.json": 3}}))
    with pytest.raises(CheckpointError, match="it is damaged"):
        Checkpoint.open(copy)


def test_an_index_of_older_shards_is_passed_over(tiny_llama: Path, tmp_path: Path) -> None:
    """As transformers does, and as it leaves a folder into which it saved in shards and then whole."""
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "model-00001.safetensors"}}))
    assert Checkpoint.open(folder).names() == Checkpoint.open(tiny_llama).names()


def test_companions(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    files = {"tokenizer.json", "LICENSE", "1_Pooling/config.json", "additional_chat_templates/tool_use.jinja"}
    for name in files | {"config.json", "README.md", "onnx/config.json", "model.safetensors.index.json"}:
        (tmp_path / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / name).write_text(name)
    copy_companions(tmp_path / "model", tmp_path / "out")
    found = {str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*") if file.is_file()}
    assert found == files


def test_links_out_of_the_folder_are_refused(copy: Path) -> None:
    moved = copy.parent / "elsewhere.safetensors"
    (copy / "model.safetensors").rename(moved)
    (copy / "model.safetensors").symlink_to(moved)
    with pytest.raises(CheckpointError, match="not a regular file"):
        Checkpoint.open(copy)


def test_an_unknown_version_says_what_to_do(copy: Path) -> None:
    edit_config(copy, lambda config: config["quantization_config"].update(version=99))  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match=r"version 99.*install"):
        Checkpoint.open(copy)


def test_other_quantisers_are_refused_by_name(copy: Path) -> None:
    edit_config(copy, lambda config: config.update(quantization_config={"quant_method": "awq"}))
    with pytest.raises(CheckpointError, match="quantised by 'awq'"):
        Checkpoint.open(copy)


@pytest.mark.parametrize(
    ("module", "part", "value", "message"),
    [
        (LINEAR, "weight_meta", 0xFF, "positions"),
        (LINEAR, "weight_meta", 0x00, "positions"),
        (LINEAR, "weight_scale", float("nan"), "NaN"),
        (TABLE, "weight_scale", -1.0, "negative"),
    ],
)
def test_values_that_break_the_format_are_refused(
    copy: Path, module: str, part: str, value: float, message: str
) -> None:
    edit_tensors(copy, lambda tensors: tensors[f"{module}.{part}"].view(-1)[:1].fill_(value))
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(copy).module(module)


def test_wrong_shapes_and_missing_tensors_are_refused(copy: Path) -> None:
    edit_tensors(copy, lambda tensors: tensors.update({f"{LINEAR}.weight_meta": tensors[f"{LINEAR}.weight_meta"][:3]}))
    with pytest.raises(CheckpointError, match=LINEAR):
        Checkpoint.open(copy).module(LINEAR)
    edit_tensors(copy, lambda tensors: tensors.pop(f"{LINEAR}.weight_meta"))
    with pytest.raises(CheckpointError, match=LINEAR):
        Checkpoint.open(copy).module(LINEAR)


def test_a_scheme_that_differs_from_the_tensors_is_refused(copy: Path) -> None:
    def widen(config: dict[str, object]) -> None:
        for group in config["quantization_config"]["config_groups"].values():  # type: ignore[index]
            group["group_size"] = 32

    edit_config(copy, widen)
    write_manifest(copy)
    with pytest.raises(CheckpointError, match="expected"):
        Checkpoint.open(copy).module(LINEAR)


def test_shards_are_split_and_read_back(tmp_path: Path) -> None:
    tensors = {f"part{i}.weight": torch.full((10, 10), float(i)) for i in range(5)}
    with OutputFolder(tmp_path / "out") as output:
        writer = CheckpointWriter(output, max_shard_bytes=900)
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        writer.finish({"model_type": "llama"})
    shards = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert shards == [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    checkpoint = Checkpoint.open(tmp_path / "out")
    assert all(torch.equal(checkpoint.tensor(name), tensor) for name, tensor in tensors.items())
    (tmp_path / "out" / shards[0]).unlink()
    with pytest.raises(CheckpointError, match="missing"):
        Checkpoint.open(tmp_path / "out")


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', "[" * 100_000, "\xff"])
def test_broken_configurations_are_refused(copy: Path, text: str) -> None:
    (copy / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Checkpoint.open(copy)


WRITES_SHARDS = """
import re, sys, torch
from compressor.checkpoint import ShardWriter
from pathlib import Path
def peak():  # ru_maxrss would count the process that started this one
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
model = [torch.ones(8 << 20, dtype=torch.uint8) for _ in range(24)]
before = peak()
writer = ShardWriter(Path(sys.argv[1]), max_shard_bytes=64 << 20)
for i, weight in enumerate(model):
    writer.add(f"weight_{i}", weight + 1)
writer.close()
print(peak() - before)
"""


def test_writing_takes_less_memory_than_one_shard(tmp_path: Path) -> None:
    """The bound is 1.2 times the largest shard beyond the model; tensors wait on disk, so it takes much less.

    glibc is told to give large pieces back at once: else it may keep a shard's worth of freed tensors. The smaller of
    two runs: what the system adds to a peak when memory is busy comes and goes.
    """
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    peaks = []
    for run in ("first", "second"):
        folder = tmp_path / run
        folder.mkdir()
        command = [sys.executable, "-c", WRITES_SHARDS, folder]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        largest = max(file.stat().st_size for file in folder.glob("*.safetensors"))
        assert len(list(folder.glob("*.safetensors"))) == 3 and largest > 60e6
        peaks.append(int(done.stdout))
    assert min(peaks) < 0.5 * largest
