"""CAST's optimiser against its formula, and what its run leaves."""

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from compressor.calibration import weight_of
from compressor.masks import check_n_m
from compressor.retraining import Budget, CastSettings, TextDistillation, retrain, text_loss
from compressor.retraining.cast import Cast
from compressor.retraining.optimizers import AdamSettings
from tests.retraining import FP32, gpt2, linears_of, llama, masks_of, text

ADAM = AdamSettings(beta1=0.9, beta2=0.95, eps=1e-8)


def one_linear(**settings: float) -> tuple[nn.Linear, Cast]:
    torch.manual_seed(0)
    linear = nn.Linear(8, 6, bias=False)
    linears: dict[str, nn.Module] = {"a": linear}
    cast = Cast(linears, masks_of(linears), {}, CastSettings(**settings), ADAM, torch.float32)  # type: ignore[arg-type]
    return linear, cast


def test_steps_follow_the_formula() -> None:
    linear, cast = one_linear(l1_decay=1e-2, row_parts=2)
    mask = cast.sparse["a"].mask
    assert mask is not None
    w, a = linear.weight.detach().double().clone(), torch.ones(6, 2).double()
    mu, v, mu_a, v_a = (torch.zeros_like(x) for x in (w, w, a, a))
    for step in range(1, 4):
        x, target = torch.randn(5, 8), torch.randn(5, 6)
        ((linear(x) - target) ** 2).sum().backward()
        entry = cast.sparse["a"]
        entry.take_gradient(several=False)
        takeover, rate = step / 4, 1e-2
        cast.update(step - 1, takeover, rate, 1.0)
        wide = a.repeat_interleave(4, dim=1)
        effective = (w * wide).requires_grad_()
        ((x.double() @ effective.t() - target.double()) ** 2).sum().backward()
        g_effective = effective.grad
        assert g_effective is not None
        g, g_a = g_effective * wide, (g_effective * w).unflatten(1, (2, 4)).sum(-1)
        mu = 0.9 * mu + 0.1 * g
        u = torch.where(mask, mu, (1 - takeover) * mu + takeover * 1e-2 * w.sign())
        v = 0.95 * v + 0.05 * u * u
        w = w - rate * (u / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
        mu_a, v_a = 0.9 * mu_a + 0.1 * g_a, 0.95 * v_a + 0.05 * g_a * g_a
        a = a - rate * (mu_a / (1 - 0.9**step)) / ((v_a / (1 - 0.95**step)).sqrt() + 1e-8)
        torch.testing.assert_close(entry.master.double(), w, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(cast.scales["a"].master.double(), a, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            linear.weight.detach().double(), w * a.repeat_interleave(4, dim=1), rtol=1e-5, atol=1e-6
        )


def test_the_loss_before_is_that_of_the_pruned_model() -> None:
    model = llama()
    pruned, linears = copy.deepcopy(model), linears_of(model)
    with torch.no_grad():
        for name, mask in masks_of(linears).items():
            weight_of(pruned.get_submodule(name)).mul_(mask)
    report = retrain(
        model, TextDistillation(text(), copy.deepcopy(model)), linears, masks_of(linears), Budget(tokens=64),
        loop=FP32, settings=CastSettings(), method="cast", validation=text(8),
    )  # fmt: skip
    assert report.validation_loss_before == pytest.approx(text_loss(pruned, text(8)))


def test_the_decay_takes_masked_weights_to_about_the_final_rate() -> None:
    _, cast = one_linear(l1_decay=4e-7, refresh_every=0)
    entry = cast.sparse["a"]
    kept_before = entry.masked()
    steps = 200
    for step in range(steps):
        entry.gradient = torch.zeros(6, 8)
        cast.update(step, min(1.0, (step + 1) / steps), 1e-2 * (1 - step / steps) + 1e-6, 1.0)
    assert entry.mask is not None
    assert float(entry.master[~entry.mask].abs().max()) < 1e-3
    torch.testing.assert_close(entry.masked(), kept_before)


@pytest.mark.parametrize("build", [llama, gpt2])
def test_the_forward_is_dense_until_the_end(build: Callable[[], nn.Module]) -> None:
    model = build()
    dense = copy.deepcopy(model)
    linears = linears_of(model)
    shares: list[float] = []

    def watch(step: int, total: int, metrics: object) -> None:
        weight = weight_of(next(iter(linears.values())))
        shares.append(float((weight != 0).float().mean()))

    report = retrain(
        model, TextDistillation(text(), dense), linears, masks_of(linears), Budget(tokens=200 * 64),
        loop=replace(FP32, learning_rate=1e-2),
        settings=CastSettings(l1_decay=3e-3), method="cast", validation=text(8), progress=watch,
    )  # fmt: skip
    assert min(shares) > 0.9
    for module in linears.values():
        check_n_m(weight_of(module))
    assert report.metrics["mean_masked"] < 0.15 * report.metrics["mean_kept"]
    assert report.validation_loss < report.validation_loss_before + 0.3  # type: ignore[operator]
