"""Pruning whole models: masks of several shapes, the mask that is given, and which layers are too sensitive."""

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from compressor.calibration import weight_of
from compressor.masks import MaskShape
from compressor.pruning import most_sensitive, prune, sensitivities

BATCHES = [torch.randint(0, 50, (4, 32), generator=torch.Generator().manual_seed(0))]


def quiet(_stage: str, _done: int, _total: int) -> None:
    """Nobody watches."""


def model_and_linears() -> tuple[nn.Module, dict[str, nn.Module]]:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=3, n_head=2, n_positions=32))
    return model, {name: module for name, module in model.named_modules() if isinstance(module, Conv1D)}


def shapes_for(linears: dict[str, nn.Module]) -> dict[str, MaskShape]:
    """2:4 in most, 4:8 and half of all weights in some, and the output projections of attention not at all."""
    patterns = {"mlp.c_fc": "4:8", "mlp.c_proj": "50%"}
    return {
        name: MaskShape.parse(next((text for end, text in patterns.items() if name.endswith(end)), "2:4"))
        for name in linears
        if not name.endswith("attn.c_proj")
    }


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "sparsegpt"])
def test_each_linear_gets_its_own_shape_or_none(criterion: str) -> None:
    model, linears = model_and_linears()
    before = {name: weight_of(module).detach().clone() for name, module in linears.items()}
    shapes, seen = shapes_for(linears), []
    batches = [] if criterion == "magnitude" else BATCHES
    masks, stats = prune(model, batches, linears, shapes, criterion, lambda *progress: seen.append(progress))
    assert masks.keys() == shapes.keys()
    assert seen[-1][1] == seen[-1][2]
    for name, module in linears.items():
        if name in shapes:
            shapes[name].check(masks[name])
            if criterion == "wanda":  # it compares the weights of one output
                kept = masks[name].sum(1)
                assert kept.max() - kept.min() <= 1
        if criterion == "sparsegpt" and name in shapes:
            assert torch.equal(weight_of(module) != 0, masks[name])
        else:
            assert torch.equal(weight_of(module), before[name])
    assert stats.keys() == (set() if criterion == "magnitude" else linears.keys())
    assert all(layer.hessian is None and layer.tokens == 128 for layer in stats.values())


def test_the_given_mask_stays_and_a_dense_weight_is_refused() -> None:
    model, linears = model_and_linears()
    shapes = shapes_for(linears)
    wanted = {}
    for name, shape in shapes.items():
        weight = weight_of(linears[name]).data
        wanted[name] = shape.mask(torch.rand(weight.shape))
        weight.mul_(wanted[name])
    masks, _ = prune(model, [], linears, shapes, "given", quiet)
    assert all(torch.equal(masks[name], mask) for name, mask in wanted.items())
    weight_of(linears["transformer.h.1.mlp.c_proj"]).data.fill_(1.0)
    with pytest.raises(ValueError, match=r"h\.1\.mlp\.c_proj is not pruned to 50%.*--keep-dense"):
        prune(model, [], linears, shapes, "given", quiet)


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "sparsegpt"])
def test_sensitivity_is_the_relative_error_of_the_output(criterion: str) -> None:
    model, linears = model_and_linears()
    shapes, before = shapes_for(linears), copy.deepcopy(model.state_dict())
    found = sensitivities(model, BATCHES, linears, shapes, criterion, quiet)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert found.keys() == shapes.keys()
    name = "transformer.h.0.attn.c_attn"
    inputs: list[Tensor] = []
    handle = linears[name].register_forward_pre_hook(lambda _module, args: inputs.append(args[0]))
    with torch.no_grad():
        model.eval()(input_ids=BATCHES[0])
    handle.remove()
    dense = weight_of(linears[name]).detach().clone()
    masks, _ = prune(model, BATCHES, linears, shapes, criterion, quiet)
    pruned = weight_of(linears[name]).detach() * masks[name]
    error = (inputs[0] @ (dense - pruned).t()).square().sum() / (inputs[0] @ dense.t()).square().sum()
    assert found[name] == pytest.approx(float(error.detach()), rel=1e-3)


def test_the_most_sensitive_that_fit_stay_dense() -> None:
    sensitivity = {"a": 0.9, "b": 0.5, "c": 0.4, "d": 0.1}
    sizes = {"a": 70, "b": 10, "c": 15, "d": 5}
    assert most_sensitive(sensitivity, sizes, 0.25) == ["b", "c"]
    assert most_sensitive(sensitivity, sizes, 0.80) == ["a", "b"]
    assert most_sensitive(sensitivity, sizes, 0.04) == []
