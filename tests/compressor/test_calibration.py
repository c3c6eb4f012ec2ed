"""Calibration statistics against direct computation, for nn.Linear and Conv1D, whole model and block by block."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM
from transformers.pytorch_utils import Conv1D

from compressor.calibration import calibrate, calibrate_blocks, weight_of


def llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=3,
            num_attention_heads=2, num_key_value_heads=1,
        )
    )  # fmt: skip


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=3, n_head=2, n_positions=32))


def opt() -> nn.Module:
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=50, hidden_size=16, ffn_dim=32, num_hidden_layers=3, num_attention_heads=2,
            max_position_embeddings=32, word_embed_proj_dim=16,
        )
    )  # fmt: skip


def linears_of(model: nn.Module) -> dict[str, nn.Module]:
    kinds = (nn.Linear, Conv1D)
    return {name: m for name, m in model.named_modules() if isinstance(m, kinds) and "lm_head" not in name}


def batches(count: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 50, (2, 8), generator=generator) for _ in range(count)]


def inputs_seen(model: nn.Module, linears: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    """What every linear receives, by running the model with a plain list per linear."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in linears}
    handles = [
        module.register_forward_hook(lambda _m, args, _out, name=name: seen[name].append(args[0].flatten(0, -2)))
        for name, module in linears.items()
    ]
    with torch.no_grad():
        for batch in batches():
            model.eval()(input_ids=batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


@pytest.fixture(params=[llama, gpt2, opt])
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    built: nn.Module = request.param()
    return built


def test_norms_are_those_of_the_inputs(model: nn.Module) -> None:
    linears = linears_of(model)
    stats = calibrate(model.train(), batches(), linears)
    assert model.training
    for name, x in inputs_seen(model, linears).items():
        torch.testing.assert_close(stats[name].input_norm, x.norm(dim=0))
        assert stats[name].tokens == x.shape[0] == 32
        assert stats[name].input_norm.shape == weight_of(linears[name]).shape[-1:]


def test_block_by_block_equals_the_whole_model_when_nothing_changes(model: nn.Module) -> None:
    linears = linears_of(model)
    expected = inputs_seen(model, linears)
    seen = {}
    for stats in calibrate_blocks(model, batches(), linears, hessian=True):
        seen |= stats
    assert seen.keys() == linears.keys()
    for name, x in expected.items():
        torch.testing.assert_close(seen[name].input_norm, x.norm(dim=0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(seen[name].hessian, x.t() @ x, rtol=1e-4, atol=1e-5)


def test_a_change_to_a_block_reaches_the_blocks_behind_it(model: nn.Module) -> None:
    linears = linears_of(model)
    torch.manual_seed(1)
    walked = {}
    for stats in calibrate_blocks(model, batches(), linears):
        walked |= stats
        for name in stats:
            linears[name].weight.data.mul_(0.5)
    for name, x in inputs_seen(model, linears).items():
        if block_inputs(name):
            torch.testing.assert_close(walked[name].input_norm, x.norm(dim=0), rtol=1e-4, atol=1e-5)


def block_inputs(name: str) -> bool:
    """Linears that read the block's normalised input directly see it whole before the block changes."""
    return name.endswith(("q_proj", "k_proj", "v_proj", "c_attn"))


def test_the_model_is_as_before(model: nn.Module) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = model.eval()(input_ids=batches()[0]).logits
    list(calibrate_blocks(model, batches(), linears_of(model)))
    torch.testing.assert_close(model(input_ids=batches()[0]).logits, expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_16_bit_weights_compute_in_fp32_where_the_processor_has_nothing_for_them(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    for probe in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, probe, lambda: False)
    model.to(torch.bfloat16)
    linears = linears_of(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen: set[torch.dtype] = set()
    for module in linears.values():
        module.register_forward_hook(lambda _m, args, _out: seen.add(args[0].dtype))
    walked = {}
    for stats in calibrate_blocks(model, batches(), linears, hessian=True):
        walked |= stats
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    whole = calibrate(model, batches(), linears)
    assert seen == {torch.float32}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for name, x in inputs_seen(model.float(), linears).items():
        torch.testing.assert_close(walked[name].input_norm, x.norm(dim=0), rtol=0.03, atol=0.01)
        torch.testing.assert_close(whole[name].input_norm, walked[name].input_norm)


def test_bad_input_is_refused() -> None:
    model = llama()
    linears = linears_of(model)
    with pytest.raises(ValueError, match="no calibration tokens"):
        calibrate(model, [], linears)
    with pytest.raises(ValueError, match="no calibration token reached"):
        calibrate(model, batches(), linears | {"spare": nn.Linear(4, 4)})
    with pytest.raises(ValueError, match="lies outside the blocks"):
        next(calibrate_blocks(model, batches(), linears | {"lm_head": model.lm_head}))
    with pytest.raises(ValueError, match="no list of transformer blocks"):
        next(calibrate_blocks(nn.Sequential(nn.Linear(4, 4)), batches(), {"0": nn.Linear(4, 4)}))
    model.model.layers[0].input_layernorm.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        calibrate(model, batches(), linears)
