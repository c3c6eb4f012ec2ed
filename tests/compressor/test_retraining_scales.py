"""Scales learn end to end; grid values stay."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressor.calibration import weight_of
from compressor.formats import make_format
from compressor.quantizers import IntegerGrid, rtn, snap
from compressor.retraining import TextDistillation
from compressor.retraining.loop import LoopSettings
from compressor.retraining.scales import GroupScales, ScaleSettings, train_scales
from compressor.scheme import Scheme
from tests.retraining import gpt2, linears_of, llama, masks_of, text

SCHEME = Scheme("sparse24_int4", 16)
SETTINGS = ScaleSettings(samples=64, batch=4, learning_rate=5e-3)
FP32 = LoopSettings(precision="fp32")


def rounded(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, IntegerGrid], dict[str, Tensor]]:
    """Its linears, pruned and rounded; their grids and grid values."""
    linears, fmt = linears_of(model), make_format(SCHEME)
    masks, grids, values = masks_of(linears), {}, {}
    assert fmt.grid is not None
    for name, module in linears.items():
        found = rtn(weight_of(module).detach() * masks[name], None, SCHEME)
        assert found.scale is not None
        weight_of(module).data.copy_(found.dequantized())
        grids[name], values[name] = IntegerGrid(found.scale.float(), *fmt.grid), found.values
    return linears, grids, values


def dtypes(grids: dict[str, IntegerGrid]) -> dict[str, torch.dtype]:
    return dict.fromkeys(grids, torch.bfloat16)


@pytest.mark.parametrize("build", [llama, gpt2])
def test_the_loss_falls_and_only_scales_change(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    torch.set_num_threads(1)
    model = build()
    teacher = copy.deepcopy(model)
    linears, grids, values = rounded(model)
    others = {name: p.detach().clone() for name, p in model.named_parameters() if "norm" in name or "embed" in name}
    steps: list[int] = []
    scales, before, after = train_scales(
        model, TextDistillation(text(), teacher, kl_weight=0.1), linears, grids, dtypes(grids), SETTINGS,
        loop=FP32, validation=text(8), work_dir=tmp_path, progress=lambda step, *_: steps.append(step),
    )  # fmt: skip
    assert before is not None and after is not None and after < before and steps[-1] == 16
    fmt, changed = make_format(SCHEME), 0
    for name, module in linears.items():
        found = snap(weight_of(module).detach().float(), scales[name], fmt)
        assert torch.equal(found.values, values[name])
        assert torch.equal(found.dequantized(), weight_of(module).detach())
        changed += int((scales[name].float() != grids[name].scale).sum())
    assert changed > 0
    assert all(torch.equal(model.get_parameter(name), before_) for name, before_ in others.items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_gradient_of_a_scale_is_autograds() -> None:
    generator = torch.Generator().manual_seed(0)
    module, fmt = nn.Linear(32, 8, bias=False), make_format(SCHEME)
    found = rtn(torch.randn(8, 32, generator=generator), None, Scheme("int4", 16))
    assert found.scale is not None and fmt.grid is not None
    module.weight.data.copy_(found.dequantized())
    grid = IntegerGrid(found.scale.float(), *fmt.grid)
    entry = GroupScales.of("a", module, grid, torch.float32, torch.device("cpu"))
    x, y = torch.randn(5, 32, generator=generator), torch.randn(5, 8, generator=generator)
    d = torch.zeros(8, 2, requires_grad=True)
    weight = (found.values.unflatten(1, (2, 16)) * (found.scale.float() * (1 + d))[:, :, None]).flatten(1)
    (x @ weight.T - y).square().sum().backward()
    for times in (1, 2):  # micro-batches add up
        (module(x) - y).square().sum().backward()
        entry.take_gradient(several=True)
        assert entry.gradient is not None and d.grad is not None
        torch.testing.assert_close(entry.gradient, times * d.grad)


def test_scales_that_training_makes_worse_stay(caplog: pytest.LogCaptureFixture) -> None:
    torch.set_num_threads(1)
    model = llama()
    objective = TextDistillation(text(), copy.deepcopy(model), kl_weight=1.0)
    linears, grids, _ = rounded(model)
    stood = {name: weight_of(module).detach().clone() for name, module in linears.items()}
    wild = ScaleSettings(samples=16, batch=4, learning_rate=3.0)
    scales, before, after = train_scales(
        model, objective, linears, grids, dtypes(grids), wild, loop=FP32, validation=text(8)
    )
    assert before == after and "made it worse" in caplog.text
    for name, module in linears.items():
        assert torch.equal(weight_of(module), stood[name])
        assert torch.equal(scales[name].float(), grids[name].scale)


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    """From its last snapshot, to the same scales to the bit."""
    torch.set_num_threads(1)

    def run(folder: Path | None, stop: int | None = None) -> dict[str, Tensor]:
        model = llama()
        objective = TextDistillation(text(), copy.deepcopy(model), kl_weight=0.5)
        linears, grids, _ = rounded(model)

        def progress(step: int, *_: object) -> None:
            if step == stop:
                raise KeyboardInterrupt

        found, *_ = train_scales(
            model, objective, linears, grids, dtypes(grids), SETTINGS, loop=FP32, work_dir=folder,
            progress=progress,
        )  # fmt: skip
        return found

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stop=5)
    assert list((tmp_path / "snapshots").iterdir())
    again, whole = run(tmp_path), run(None)
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_what_a_stage_left_that_began_elsewhere_is_no_obstacle(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A retraining by time that is done again never ends on the same weights."""
    torch.set_num_threads(1)
    found = []
    for shift in (0.0, 1e-3):
        model = llama()
        objective = TextDistillation(text(), copy.deepcopy(model), kl_weight=0.5)
        for module in linears_of(model).values():
            weight_of(module).data += shift
        linears, grids, _ = rounded(model)
        scales, *_ = train_scales(
            model, objective, linears, grids, dtypes(grids), SETTINGS, loop=FP32, work_dir=tmp_path
        )
        found.append(scales)
    assert "starting anew" in caplog.text
    assert any(not torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_activations_are_computed_again_where_the_run_before_did() -> None:
    torch.set_num_threads(1)
    results, runs = [], []
    for saving in (False, True):
        model = llama()
        objective = TextDistillation(text(), copy.deepcopy(model), kl_weight=0.5)
        linears, grids, _ = rounded(model)
        block, calls = model.get_submodule("model.layers.0"), list[int]()

        def counted(*given: Any, run: Any = block.forward, calls: list[int] = calls, **named: Any) -> Any:
            calls.append(1)
            return run(*given, **named)

        block.forward = counted
        loop = LoopSettings(precision="fp32", checkpoint_activations=saving, batch=4, micro_batch=2)
        scales, *_ = train_scales(model, objective, linears, grids, dtypes(grids), SETTINGS, loop=loop)
        results.append(scales)
        runs.append(len(calls))
    assert runs[1] - runs[0] == 32  # 16 steps of two micro-batches
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_settings_are_checked() -> None:
    for wrong in ({"samples": 0}, {"learning_rate": 0.0}, {"batch": 0}):
        with pytest.raises(ValueError, match="must be above 0"):
            ScaleSettings(**wrong)  # type: ignore[arg-type]
