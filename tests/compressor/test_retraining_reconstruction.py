"""Blocks learn to give what the dense ones give; masks stay."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from compressor.calibration import weight_of
from compressor.retraining import text_loss
from compressor.retraining.reconstruction import (
    ReconstructionSettings,
    load_trained,
    reconstruct,
    save_trained,
)
from tests.retraining import gpt2, linears_of, llama, masks_of, opt, text

SETTINGS = ReconstructionSettings(samples=24, passes=8, batch=4, learning_rate=3e-3)


@pytest.mark.parametrize("build", [llama, gpt2, opt])
def test_every_block_comes_nearer_to_the_dense_one(build: Callable[[], nn.Module]) -> None:
    torch.set_num_threads(1)
    model = build()
    teacher = copy.deepcopy(model)
    linears = linears_of(model)
    masks = masks_of(linears)
    pruned = copy.deepcopy(model)
    for name, module in linears_of(pruned).items():
        weight_of(module).data.mul_(masks[name])
    seen: list[int] = []
    errors = reconstruct(
        model, teacher, linears, masks, text(), SETTINGS, precision="fp32", report=lambda done, *_: seen.append(done)
    )
    assert seen == [1, 2] and all(after < 0.8 * before for before, after in errors)
    for name, module in linears.items():
        assert torch.equal(weight_of(module) != 0, masks[name])
    dense, one_shot, rebuilt = (text_loss(net, text(8)) for net in (teacher, pruned, model))
    assert abs(rebuilt - dense) < abs(one_shot - dense)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="must be above 0"):
        ReconstructionSettings(passes=0)


def test_what_was_trained_is_put_back_only_where_it_belongs(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    model = llama()
    masks = masks_of(linears_of(model))
    fresh = copy.deepcopy(model)
    errors = reconstruct(model, copy.deepcopy(model), linears_of(model), masks, text(), SETTINGS, precision="fp32")
    kept = tmp_path / "work" / "reconstructed.safetensors"
    assert load_trained(kept, fresh, masks, "this run") is None
    save_trained(kept, model, masks, "this run", errors)
    before = copy.deepcopy(fresh.state_dict())
    assert load_trained(kept, fresh, masks, "another run") is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in fresh.state_dict().items())
    assert load_trained(kept, fresh, masks, "this run") == errors
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in fresh.state_dict().items())
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]
