"""What a GGUF file says of a model is what its folder computes, or the file is refused."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor.exports import export_checkpoint
from compressor.from_gguf import ROPE_FACTORS
from compressor.models import fetch_model, load_model
from tests.compressor.test_exports import packed
from tests.tiny import make_tiny_model

SCALINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "yarn of its own": {"factor": 8.0, "original_max_position_embeddings": 32, "attention_factor": 1.5},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 1024,
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFWEIGHT_CACHE", str(tmp_path / "cache"))


def model_with(folder: Path, scaling: str) -> Path:
    """A tiny Llama with biases in its attention and a rotary scaling."""
    rope = {"rope_type": scaling.partition(" ")[0], "rope_theta": 1000.0, **SCALINGS[scaling]}
    make_tiny_model("llama", folder, attention_bias=True, rope_parameters=rope)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(".bias"):
            tensor.normal_()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("scaling", SCALINGS)
def test_biases_and_rotary_scaling_come_through(scaling: str, tmp_path: Path) -> None:
    folder = packed(model_with(tmp_path / "dense", scaling), tmp_path / "packed", "int8", sparse=False)
    export_checkpoint(folder, "gguf", tmp_path / "gguf")
    found = load_model(fetch_model(str(tmp_path / "gguf" / "model.gguf")), torch.float32)
    expected = load_model(folder, torch.float32)
    ids = torch.arange(200)[None]
    with torch.no_grad():
        assert (found(ids).logits - expected(ids).logits).abs().max() < 0.02 * expected(ids).logits.std()


def rewritten(
    folder: Path, out: Path, *, without: str = "", more: tuple[str, ...] = (), keys: dict[str, int] | None = None
) -> Path:
    """A copy of an exported file with other tensors and keys."""
    reader = gguf.GGUFReader(folder / "model.gguf")
    writer = gguf.GGUFWriter(out, "llama")
    for name, field in reader.fields.items():
        if not name.startswith(("GGUF.", "general.architecture")):
            writer.add_key_value(name, field.contents(), field.types[0], (*field.types, None)[1])
    for name, value in (keys or {}).items():
        writer.add_uint16(name, value)
    for tensor in reader.tensors:
        if not without or without not in tensor.name:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    for name in more:
        writer.add_tensor(name, np.linspace(1.0, 3.0, 8, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"without": "blk.1.ffn"}, "lacks 4 of the tensors of a LlamaForCausalLM, such as model.layers.1.mlp"),
        ({"more": ("blk.0.attn_sinks.weight",)}, "has 1 tensors that a LlamaForCausalLM has no place for"),
        ({"more": (ROPE_FACTORS,)}, "factors .* that are not those of Llama 3"),
        ({"keys": {"split.count": 2}}, "is one of 2 parts of a model. Join them first"),
    ],
)
def test_refused(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    folder = packed(make_tiny_model("llama", tmp_path / "dense"), tmp_path / "packed", "int8", sparse=False)
    export_checkpoint(folder, "gguf", tmp_path / "gguf")
    with pytest.raises(ValueError, match=says):
        fetch_model(str(rewritten(tmp_path / "gguf", tmp_path / "changed.gguf", **change)))
