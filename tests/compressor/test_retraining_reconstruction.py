"""Blocks learn to give what the dense ones give; masks stay."""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compressor.calibration import weight_of
from compressor.formats import make_format
from compressor.quantizers import IntegerGrid, rtn, snap
from compressor.retraining import text_loss
from compressor.retraining.reconstruction import (
    KeptBlocks,
    ReconstructionSettings,
    _relative,
    reconstruct,
)
from compressor.scheme import Scheme
from tests.retraining import gpt2, linears_of, llama, masks_of, opt, text

SETTINGS = ReconstructionSettings(samples=24, passes=8, batch=4, learning_rate=3e-2)


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


def test_rounded_weights_train_on_their_grid() -> None:
    """Straight-through: what comes out lies on the grid, keeps its zeros, and gives more nearly what it gave before."""
    torch.set_num_threads(1)
    model = llama()
    linears = linears_of(model)
    masks, scheme = masks_of(linears), Scheme("sparse24_int4", 16)
    fmt = make_format(scheme)
    scales = {}
    for name, module in linears.items():
        module.weight.data.mul_(masks[name])
        scale = rtn(module.weight, None, scheme).scale
        assert scale is not None and fmt.grid is not None
        scales[name] = scale
    grids = {name: IntegerGrid(scale.float(), *fmt.grid) for name, scale in scales.items()}
    gentle = dataclasses.replace(SETTINGS, learning_rate=3e-3)
    errors = reconstruct(model, copy.deepcopy(model), linears, masks, text(), gentle, grids=grids, precision="fp32")
    assert all(0 < after < 0.8 * before for before, after in errors)
    for name, module in linears.items():
        weight = module.weight.detach()
        assert not bool(weight[~masks[name]].any())
        assert torch.equal(snap(weight, scales[name], fmt).dequantized(), weight)


def test_a_block_that_training_makes_worse_stays_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    torch.set_num_threads(1)
    model = llama()
    linears = linears_of(model)
    masks = masks_of(linears)
    pruned = {name: weight_of(module).detach() * masks[name] for name, module in linears.items()}
    wild = dataclasses.replace(SETTINGS, learning_rate=1e3)
    errors = reconstruct(model, copy.deepcopy(model), linears, masks, text(), wild, precision="fp32")
    assert all(after == before for before, after in errors)
    assert all(torch.equal(weight_of(module), pruned[name]) for name, module in linears.items())
    assert "lower reconstruction's learning_rate" in caplog.text


def test_every_token_counts_alike() -> None:
    """The first token of many models is a hundred times as large as the others, which must not drown in it."""
    target = torch.ones(1, 4, 8)
    target[:, 0] = 1000.0
    output = target.clone()
    output[:, 1] = 0.0
    assert float(_relative(output, target)) == pytest.approx(0.25)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="must be above 0"):
        ReconstructionSettings(passes=0)
    for wrong in ({"warmup": 1.0}, {"clip": -1.0}):
        with pytest.raises(ValueError, match="warmup of reconstruction must lie"):
            ReconstructionSettings(**wrong)


def test_a_clip_of_zero_is_none() -> None:
    torch.set_num_threads(1)
    errors = []
    for clip in (0.0, 1e9):
        model, settings = llama(), dataclasses.replace(SETTINGS, clip=clip)
        linears = linears_of(model)
        errors.append(reconstruct(model, llama(), linears, masks_of(linears), text(), settings, precision="fp32"))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("killed_after", [1, 2])
def test_a_killed_run_goes_on_with_the_next_block(killed_after: int, tmp_path: Path) -> None:
    torch.set_num_threads(1)

    class Killed(Exception):
        pass

    def kill(done: int, *_: object) -> None:
        if done == killed_after:
            raise Killed

    def run(model: nn.Module, identity: str, report: Any = None) -> tuple[Any, list[int]]:
        seen: list[int] = []
        errors = reconstruct(
            model, llama(), linears_of(model), masks_of(linears_of(llama())), text(), SETTINGS, precision="bf16",
            kept=KeptBlocks(tmp_path, identity), report=report or (lambda done, *_: seen.append(done)),
        )  # fmt: skip
        return errors, seen

    whole = llama()
    errors, _ = run(whole, "undisturbed")
    with pytest.raises(Killed):
        run(llama(), "this run", kill)
    resumed = llama()
    assert run(resumed, "this run") == (errors, list(range(killed_after + 1, 3)))
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in resumed.state_dict().items())
    assert run(llama(), "another run")[1] == [1, 2]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".safetensors"] * 2
