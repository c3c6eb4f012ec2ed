"""AWQ: the model computes what it did, zeros stay, and rounding costs less."""

from pathlib import Path

import pytest
import torch

from compressor.awq import apply_awq, check_awq
from compressor.calibration import weight_of
from compressor.checkpoint import Checkpoint
from compressor.cli import main
from compressor.inspection import verify
from compressor.masks import check_n_m, n_m_mask
from compressor.models import block_linears, load_model
from compressor.pipeline import compress
from compressor.quantizers import rtn
from compressor.recipe import RecipeError, parse_recipe
from compressor.scheme import Scheme
from tests.tiny import tiny_config


@pytest.mark.parametrize("kind", ["tiny_llama", "tiny_gpt2", "tiny_opt"])
def test_the_function_stays_and_rounding_costs_less(kind: str, request: pytest.FixtureRequest) -> None:
    model = load_model(request.getfixturevalue(kind), torch.float32).eval()
    linears = block_linears(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and "weight" in name:  # norms: some inputs are far more active than others
                parameter.copy_(torch.rand(parameter.shape, generator=generator) ** 4 * 3 + 0.01)
        for module in linears.values():
            weight_of(module).mul_(n_m_mask(weight_of(module).abs()))
    ids = torch.randint(0, 256, (4, 32), generator=generator)
    schemes = dict.fromkeys(linears, Scheme("sparse24_int4", 32))

    def rounding_cost() -> float:
        exact = model(ids).logits
        kept = {name: weight_of(module).clone() for name, module in linears.items()}
        for name, module in linears.items():
            weight_of(module).copy_(rtn(kept[name], None, schemes[name]).dequantized())
        cost = float((model(ids).logits - exact).norm() / exact.norm())
        for name, module in linears.items():
            weight_of(module).copy_(kept[name])
        return cost

    with torch.no_grad():
        before, plain = model(ids).logits, rounding_cost()
        stats = apply_awq(model, [ids], linears, schemes, lambda *_: None)
        assert torch.allclose(model(ids).logits, before, atol=1e-4 * float(before.abs().max()))
        if kind != "tiny_opt":  # its random attention mixes so evenly that end to end nothing is won
            assert rounding_cost() < plain
    assert set(stats) == set(linears)
    assert all(layer.hessian is None for layer in stats.values())
    for module in linears.values():
        check_n_m(weight_of(module))


@pytest.mark.parametrize("quantizer", ["rtn", "gptq", "gptq-act-order"])
def test_the_recipe_entry(tiny_llama: Path, prose: Path, tmp_path: Path, quantizer: str) -> None:
    settings = {"transform": "awq", "quantizer": quantizer, "samples": 4}
    record = {"text": {"source": str(prose), "length": 64}, "quantization": settings}
    result = compress(str(tiny_llama), parse_recipe(record), tmp_path / "out", report=lambda *_: None)
    assert load_model(result.out)(torch.arange(9)[None]).logits.isfinite().all()


def test_what_awq_does_not_know_is_refused() -> None:
    with pytest.raises(ValueError, match="knows llama"):
        check_awq(tiny_config("gemma3_text"))
    post_norm = tiny_config("opt")
    check_awq(post_norm)
    post_norm.do_layer_norm_before = False  # as opt-350m
    with pytest.raises(ValueError, match="this one has them after"):
        check_awq(post_norm)
    branch = {"ast": {"low_rank": {"segment": 16}}}
    with pytest.raises(RecipeError, match="low-rank"):
        parse_recipe({"sparsity": {}, "retraining": branch, "quantization": {"transform": "awq"}})


@pytest.mark.parametrize("transform", ["awq", "null"])
def test_after_retraining_the_mask_stays(tiny_llama: Path, prose: Path, tmp_path: Path, transform: str) -> None:
    """As the AST paper does: AWQ on the retrained 2:4 model. Without it, a branch stored in int4."""
    settings = [
        "retraining.budget=2ktok",
        "text.length=64",
        "retraining.validation_blocks=4",
        "retraining.loop.batch=8",
    ]
    settings += ["sparsity.criterion=magnitude", "quantization.quantizer=rtn", f"text.source={prose}"]
    recipe, branch = (
        ("ast-2of4-int4", []) if transform == "awq" else ("ast-slorb-2of4-int4", ["quantization.low_rank=int4"])
    )
    flags = [part for entry in [*settings, *branch, f"quantization.transform={transform}"] for part in ("--set", entry)]
    assert main([str(tiny_llama), "--recipe", recipe, "--out", str(tmp_path / "out"), *flags]) == 0
    assert verify(tmp_path / "out").sparse == 14
    scheme = Checkpoint.open(tmp_path / "out").scheme_of("model.layers.0.mlp.up_proj")
    assert scheme is not None and (scheme.low_rank is None) == (transform == "awq")
    assert scheme.low_rank is None or scheme.low_rank.dtype == "int4"
    assert load_model(tmp_path / "out")(torch.arange(9)[None]).logits.isfinite().all()
