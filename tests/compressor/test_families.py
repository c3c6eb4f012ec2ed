"""Every family of models through the whole of `compress`: SparseGPT, a few steps of AST, GPTQ, packing, loading."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from compressor.checkpoint import Checkpoint
from compressor.exports import export_checkpoint, import_checkpoint
from compressor.formats import make_format
from compressor.inspection import packed_modules, verify
from compressor.models import block_linears, load_model, quiet_transformers, skeleton
from compressor.pipeline import compress
from compressor.recipe import parse_recipe
from tests.tiny import make_tiny_model

FAMILIES = {
    "llama": 7, "mistral": 7, "qwen2": 7, "qwen3": 7, "gemma": 7, "gemma2": 7, "gemma3_text": 7, "phi": 6, "phi3": 4,
    "gpt2": 4, "opt": 6, "gpt_neox": 4,
}  # fmt: skip
"""Linears in a block."""


def quiet(*_: object) -> None:
    """Nobody watches."""


@pytest.mark.parametrize("kind", list(FAMILIES))
def test_a_family_is_pruned_retrained_packed_and_loaded(kind: str, prose: Path, tmp_path: Path) -> None:
    folder, out = make_tiny_model(kind, tmp_path / "model"), tmp_path / "out"
    recipe = parse_recipe({
        "text": {"source": str(prose), "length": 32},
        "sparsity": {"criterion": "sparsegpt", "samples": 4},
        "retraining": {
            "budget": "256tok", "validation_blocks": 2,
            "loop": {"batch": 2, "learning_rate": 1e-3, "precision": "fp32", "quantize_share": 0.3, "train": "all"},
            "ast": {"refresh_every": 2},
        },
        "quantization": {"values": "int4", "quantizer": "gptq", "samples": 4, "group_size": 32},
    })  # fmt: skip
    result = compress(str(folder), recipe, out, report=quiet)
    assert result.figures["retraining_tokens"] == 256
    assert verify(out).sparse == 2 * FAMILIES[kind]
    checkpoint, dense = Checkpoint.open(out), load_model(folder, torch.float32).eval()
    stored = {}
    for name in checkpoint.names():
        if checkpoint.scheme_of(name.rpartition(".")[0]) is None or name.endswith(".bias"):
            stored[name] = checkpoint.tensor(name).float()
    for name, scheme in packed_modules(checkpoint).items():
        weight = make_format(scheme).unpack(
            {key: tensor for key, tensor in checkpoint.module(name).items() if key.startswith("weight")}
        )
        turned = type(dense.get_submodule(name)).__name__ == "Conv1D"
        stored[f"{name}.weight"] = (weight.t() if turned else weight).float()
    missing, unexpected = dense.load_state_dict(stored, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected
    dense.tie_weights()
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        packed = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    ids = torch.randint(0, 256, (2, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = dense(ids).logits, packed(ids).logits
    assert bool(torch.isfinite(found).all())
    assert float((found - expected).norm()) < 0.02 * float(expected.norm())


@pytest.mark.parametrize("target", ["dense", "compressed-tensors", "gptq"])
def test_exports_name_the_head_as_the_hub_does(target: str, tmp_path: Path) -> None:
    """transformers 5 calls GPT-NeoX's head lm_head; its checkpoints, transformers 4 and vLLM say embed_out."""
    folder, out = make_tiny_model("gpt_neox", tmp_path / "model"), tmp_path / "out"
    quantization = {"values": "int4", "quantizer": "rtn", "group_size": 32, "embeddings": "int8"}
    compress(
        str(folder), parse_recipe({"sparsity": {"criterion": "magnitude"}, "quantization": quantization}), out,
        report=quiet,
    )  # fmt: skip
    export_checkpoint(out, target, tmp_path / "export")
    names = Checkpoint.open(tmp_path / "export", foreign=True).names()
    assert "embed_out.weight" in names
    assert not [name for name in names if name.startswith("lm_head")]
    import_checkpoint(tmp_path / "export", tmp_path / "back")
    before, after = (load_file(path / "model.safetensors") for path in (out, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "phimoe", "gpt_oss"])
def test_mixtures_of_experts_are_refused(kind: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, num_hidden_layers=1)
    with quiet_transformers(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="mixture-of-experts model; halfweight compresses dense transformers"):
        block_linears(model)


def test_a_mixture_of_experts_is_refused_before_it_is_read(tmp_path: Path) -> None:
    folder = make_tiny_model("mixtral", tmp_path / "model")
    recipe = parse_recipe({"sparsity": {"criterion": "magnitude"}})
    assert skeleton(folder) is not None
    with pytest.raises(ValueError, match="mixture-of-experts"):
        compress(str(folder), recipe, tmp_path / "out", report=quiet)
    assert not (tmp_path / "out").exists()
