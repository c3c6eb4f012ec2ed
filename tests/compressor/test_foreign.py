"""Checkpoints that others quantised, as dense models to start from."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compressor.checkpoint import Checkpoint, CheckpointError
from compressor.exports import export_checkpoint
from compressor.foreign import READERS, dequantise
from compressor.models import fetch_model, load_model
from compressor.pipeline import compress
from compressor.recipe import parse_recipe

LAYER = "model.layers.1.mlp.up_proj"


def words(values: Tensor, dim: int, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """4-bit values in 32-bit words along a dimension, one field after the other, by plain arithmetic."""
    parts = values.long().unflatten(dim, (-1, 8)).unbind(dim + 1)
    total = sum(parts[place] << (4 * field) for field, place in enumerate(order))
    assert isinstance(total, Tensor)
    return torch.where(total >= 2**31, total - 2**32, total).to(torch.int32)


def random_parts() -> tuple[Tensor, Tensor, Tensor]:
    """Values [O, I] in 0..15, zero points [O, G] in 1..15, scales [O, G]: 16 rows, 64 inputs, groups of 32."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 16, (16, 64), generator=generator)
    zeros = torch.randint(1, 16, (16, 2), generator=generator)
    return values, zeros, torch.rand(16, 2, generator=generator).half()


def test_gptq_with_zero_points_and_act_order() -> None:
    values, zeros, scales = random_parts()
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1)) // 32
    wanted = (values - zeros[:, order]).float() * scales.float()[:, order]
    parts = {
        "qweight": words(values.t(), 0), "qzeros": words(zeros.t() - 1, 1),
        "scales": scales.t(), "g_idx": order.to(torch.int32),
    }  # fmt: skip
    assert torch.equal(READERS["gptq"](parts, {"bits": 4}), wanted)
    parts["qzeros"] = words(zeros.t(), 1)
    assert torch.equal(READERS["gptq"](parts, {"bits": 4, "checkpoint_format": "gptq_v2"}), wanted)
    del parts["g_idx"]
    plain = (values - zeros.repeat_interleave(32, 1)).float() * scales.float().repeat_interleave(32, 1)
    assert torch.equal(READERS["gptq"](parts, {"bits": 4, "checkpoint_format": "gptq_v2"}), plain)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptq_zero_points_of_zero_borrow_from_the_next(bits: int) -> None:
    """GPTQModel takes one from every field of a word at once, so a zero point of 0 takes one more from the next."""
    fields, generator = 32 // bits, torch.Generator().manual_seed(2)
    zeros = torch.randint(0, 2**bits, (3, 2 * fields), generator=generator)
    zeros[0, 0] = zeros[1, 3] = zeros[2, -1] = 0
    shifts = bits * torch.arange(fields)
    whole = (zeros.unflatten(1, (-1, fields)) << shifts).sum(-1) - int((1 << shifts).sum())
    stored = torch.where(whole % 2**32 >= 2**31, whole % 2**32 - 2**32, whole % 2**32).to(torch.int32)
    parts = {
        "qweight": torch.zeros(3, 2 * fields, dtype=torch.int32), "qzeros": stored,
        "scales": torch.ones(3, 2 * fields, dtype=torch.float16),
    }  # fmt: skip
    found = READERS["gptq"](parts, {"bits": bits})
    assert torch.equal(found, -zeros.float().t().repeat_interleave(fields, 1))


def test_awq() -> None:
    values, zeros, scales = random_parts()
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    parts = {"qweight": words(values.t(), 1, order), "qzeros": words(zeros.t(), 1, order), "scales": scales.t()}
    wanted = (values - zeros.repeat_interleave(32, 1)).float() * scales.float().repeat_interleave(32, 1)
    assert torch.equal(READERS["awq"](parts, {"bits": 4, "version": "gemm"}), wanted)
    with pytest.raises(CheckpointError, match="accepted here: gemm"):
        READERS["awq"](parts, {"bits": 4, "version": "gemv"})


def test_compressed_tensors_with_zero_points() -> None:
    values, zeros, scales = random_parts()
    parts = {
        "weight_packed": words(values, 1), "weight_scale": scales, "weight_zero_point": words(zeros, 0),
        "weight_shape": torch.tensor([16, 64]),
    }  # fmt: skip
    wanted = (values - zeros.repeat_interleave(32, 1)).float() * scales.float().repeat_interleave(32, 1)
    assert torch.equal(READERS["compressed-tensors"](parts, {}), wanted)
    parts["weight_zero_point"] = (zeros - 8).to(torch.int8)  # as they were stored before they were packed
    assert torch.equal(READERS["compressed-tensors"](parts, {}), wanted)
    with pytest.raises(CheckpointError, match=r"weight_zero_point is \[16, 1\] for scales of \[16, 2\]"):
        READERS["compressed-tensors"](parts | {"weight_zero_point": torch.zeros(16, 1, dtype=torch.int8)}, {})


def test_compressed_tensors_that_are_not_compressed() -> None:
    """`save_compressed=False` leaves dense weights beside the scales that they were rounded with."""
    weight = torch.randn(16, 64).bfloat16()
    parts = {"weight": weight, "weight_scale": torch.rand(16, 1), "weight_zero_point": torch.zeros(16, 1)}
    assert torch.equal(READERS["compressed-tensors"](parts, {}), weight.float())
    blocks = {"weight": torch.zeros(256, 16384, dtype=torch.int8), "weight_scale": torch.ones(2, 128)}
    with pytest.raises(CheckpointError, match=r"weight_scale is \[2, 128\]"):
        READERS["compressed-tensors"](blocks, {})


def test_scales_that_nothing_speaks_of_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    """ModelOpt keeps its record in another file; read as a dense model it would be 8-bit numbers without scales."""
    shutil.copytree(tiny_llama, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors[f"{LAYER}.weight"] = tensors[f"{LAYER}.weight"].to(torch.float8_e4m3fn)
    tensors[f"{LAYER}.weight_scale"] = torch.ones(1)
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"up_proj.weight_scale, but its config.json has no quantization_config"):
        Checkpoint.open(tmp_path / "model")
    config = json.loads((tiny_llama / "config.json").read_text())
    config["compression_config"] = {"quant_method": "compressed-tensors"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="is quantised by 'compressed-tensors'"):
        Checkpoint.open(tmp_path / "model")
    dequantise(tmp_path / "model", tmp_path)
    found = Checkpoint.open(tmp_path)
    assert "compression_config" not in found.config
    assert torch.equal(found.tensor(f"{LAYER}.weight"), tensors[f"{LAYER}.weight"].bfloat16())


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(1,), (16, 1), (16, 2)])
def test_compressed_tensors_unpacked(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    values, scale = torch.arange(-64, 64).repeat(16, 1).to(dtype), torch.rand(shape)
    wanted = values.float() * (scale if len(shape) == 1 else scale.repeat_interleave(128 // shape[1], 1))
    assert torch.equal(READERS["compressed-tensors"]({"weight": values, "weight_scale": scale}, {}), wanted)


@pytest.mark.parametrize("target", ["gptq", "compressed-tensors"])
def test_an_export_is_a_model_to_start_from(target: str, tiny_llama: Path, tmp_path: Path, prose: Path) -> None:
    packed = tmp_path / "packed"
    recipe = parse_recipe({"sparsity": {"criterion": "magnitude"}, "quantization": {"group_size": 32}})
    compress(str(tiny_llama), recipe, packed, report=lambda *_: None)
    export_checkpoint(packed, target, tmp_path / target)
    export_checkpoint(packed, "dense", tmp_path / "dense")
    folder = fetch_model(str(tmp_path / target))
    assert folder != tmp_path / target
    assert fetch_model(str(tmp_path / target)) == folder
    ours, theirs = Checkpoint.open(tmp_path / "dense"), Checkpoint.open(folder)
    assert ours.names() == theirs.names()
    assert all(torch.equal(ours.tensor(name), theirs.tensor(name)) for name in ours.names())
    load_model(folder)
    again = compress(str(tmp_path / target), recipe, tmp_path / "again", report=lambda *_: None)
    assert again.plan.folder == folder


@pytest.mark.parametrize(
    ("tensor", "record", "says"),
    [
        ("model.layers.0.mlp.act.scales", {}, "divides activations by model.layers.0.mlp.act.scales"),
        (None, {"transform_config": {"config_groups": {"u": {}}}}, "rotates activations"),
    ],
)
def test_what_changes_activations_is_refused(
    tensor: str | None, record: dict[str, object], says: str, tiny_llama: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors") | ({tensor: torch.ones(8)} if tensor else {})
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors", **record}
    (folder / "config.json").write_text(json.dumps(config))
    (tmp_path / "stage").mkdir()
    with pytest.raises(CheckpointError, match=says):
        dequantise(folder, tmp_path / "stage")


def test_other_weights_in_the_same_folder_are_read_again(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HALFWEIGHT_CACHE", str(tmp_path / "cache"))
    recipe = parse_recipe({"quantization": {"group_size": 32}})
    compress(str(tiny_llama), recipe, tmp_path / "packed", report=lambda *_: None)
    export_checkpoint(tmp_path / "packed", "gptq", tmp_path / "a" / "gptq")
    first = fetch_model(str(tmp_path / "a" / "gptq"))
    shutil.copytree(tmp_path / "a", tmp_path / "b")  # with its times
    assert fetch_model(str(tmp_path / "b" / "gptq")) != first
    shard = tmp_path / "a" / "gptq" / "model.safetensors"
    os.utime(shard, ns=(10**18, 10**18))
    assert fetch_model(str(tmp_path / "a" / "gptq")) != first


def test_no_room_for_the_dense_folder(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = parse_recipe({"quantization": {"group_size": 32}})
    compress(str(tiny_llama), recipe, tmp_path / "packed", report=lambda *_: None)
    export_checkpoint(tmp_path / "packed", "gptq", tmp_path / "gptq")
    monkeypatch.setenv("HALFWEIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    with pytest.raises(MemoryError, match="set HALFWEIGHT_CACHE"):
        fetch_model(str(tmp_path / "gptq"))


def test_wrong_tensors_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = parse_recipe({"quantization": {"group_size": 32}})
    compress(str(tiny_llama), recipe, tmp_path / "packed", report=lambda *_: None)
    export_checkpoint(tmp_path / "packed", "gptq", tmp_path / "gptq")
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())
    for change, message in (({"bits": 3}, "accepted here"), ({"quant_method": "awq", "version": "gemm"}, "awq")):
        broken = tmp_path / "broken"
        shutil.copytree(tmp_path / "gptq", broken)
        record = config | {"quantization_config": config["quantization_config"] | change}
        (broken / "config.json").write_text(json.dumps(record))
        (tmp_path / "stage").mkdir()
        with pytest.raises(CheckpointError, match=message):
            dequantise(broken, tmp_path / "stage")
        shutil.rmtree(broken)
        shutil.rmtree(tmp_path / "stage")


def test_a_layout_that_is_not_read_is_refused_and_not_cached(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as Marlin's, whose words are called `B`."""
    monkeypatch.setenv("HALFWEIGHT_CACHE", str(tmp_path / "cache"))
    shutil.copytree(tiny_llama, tmp_path / "model")
    tensors = {f"{LAYER}.B": torch.zeros(4, 128, dtype=torch.int32), f"{LAYER}.s": torch.ones(2, 128)}
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    config = json.loads((tiny_llama / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"gptq in a layout .* no tensor named \*\.qweight"):
            fetch_model(str(tmp_path / "model"))
