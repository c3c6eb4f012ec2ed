"""The masked Adam against its formulas, written out plainly; the fault of the published code must not come back."""

import math

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from compressor import kernels
from compressor.formats import make_format
from compressor.kernels.training import sum_squares
from compressor.masks import n_m_mask
from compressor.quantizers import IntegerGrid, rtn, snap
from compressor.retraining import optimizers
from compressor.retraining.distribution import Distribution
from compressor.retraining.optimizers import AdamSettings, Trained, adam_step, train_dense, train_linear
from compressor.scheme import Scheme

pytestmark = pytest.mark.usefixtures("either_path")


def entry_of(settings: AdamSettings, module: nn.Module | None = None) -> Trained:
    torch.manual_seed(0)
    module = module or nn.Linear(16, 6, bias=False)
    weight = module.weight.t() if isinstance(module, Conv1D) else module.weight
    return train_linear("w", module, n_m_mask(weight.detach().abs()), settings)


def plainly(w: torch.Tensor, mask: torch.Tensor, gradients: list[torch.Tensor], form: str) -> torch.Tensor:
    """methods.md, section 1, step by step."""
    b1, b2, eps, wd, rate, decay = 0.9, 0.95, 1e-8, 0.1, 1e-2, 0.5
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for t, g in enumerate(gradients, start=1):
        pulled = decay * (~mask) * w
        if form == "coupled":
            g = g + pulled
        m = b1 * m + (1 - b1) * g
        u = m + pulled if form == "decoupled" else m
        square = u if form == "decoupled" else g
        v = b2 * v + (1 - b2) * square * square
        w = w * (1 - rate * wd) - rate / (1 - b1**t) * u / ((v / (1 - b2**t)).sqrt() + eps)
    return w


@pytest.mark.parametrize("form", optimizers.FORMS)
@pytest.mark.parametrize("module", [nn.Linear(16, 6, bias=False), Conv1D(6, 16)])
@pytest.mark.parametrize(("block", "together"), [(1 << 18, False), (40, False), (40, True)])
def test_steps_follow_the_formula(
    form: str, module: nn.Module, block: int, together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizers, "_BLOCK", block)
    settings = AdamSettings(weight_decay=0.1, form=form)
    entry = entry_of(settings, module)
    assert entry.mask is not None
    gradients = [torch.randn(6, 16) for _ in range(5)]
    expected = plainly(entry.master.clone(), entry.mask, gradients, form)
    for step, gradient in enumerate(gradients, start=1):
        entry.parameter.grad = (2 * gradient.t() if isinstance(module, Conv1D) else 2 * gradient).contiguous()
        entry.take_gradient(several=False)
        assert entry.parameter.grad is None
        if together:
            optimizers._update_together([entry], settings, step, 1e-2, 0.5, 0.5)
        else:
            adam_step(entry, settings, step=step, rate=1e-2, decay=0.5, scale=0.5)
    torch.testing.assert_close(entry.master, expected)
    torch.testing.assert_close(entry.visible, expected * entry.mask)


@pytest.mark.parametrize("form", optimizers.FORMS)
def test_a_zero_gradient_step_shrinks_masked_weights_and_leaves_kept_ones_untouched(form: str) -> None:
    settings = AdamSettings(form=form)
    entry = entry_of(settings)
    before, mask = entry.master.clone(), entry.mask
    assert mask is not None and mask.dtype is torch.bool
    entry.gradient = torch.zeros_like(before)
    adam_step(entry, settings, step=1, rate=1e-6, decay=1e-4)
    assert torch.equal(entry.master[mask], before[mask])
    assert bool((entry.master[~mask].abs() < before[~mask].abs()).all())


def test_the_gradient_reaches_masked_entries() -> None:
    linear = nn.Linear(16, 6, bias=False)
    settings = AdamSettings()
    entry = entry_of(settings, linear)
    entry.publish()
    assert entry.mask is not None and not bool(linear.weight[~entry.mask].any())
    x = torch.randn(9, 16)
    linear(x).square().sum().backward()
    entry.take_gradient(several=False)
    before = entry.master.clone()
    adam_step(entry, settings, step=1, rate=1e-3, decay=0.0)
    moved = entry.master != before
    assert bool(moved[~entry.mask].all()) and bool(moved[entry.mask].all())
    assert not bool(linear.weight[~entry.mask].any())


def test_gradients_of_micro_batches_add_up_in_fp32() -> None:
    parameter = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    entry = train_dense("b", parameter, AdamSettings())
    for value in (256.0, 1.0, 1.0):
        parameter.grad = torch.full_like(parameter, value)
        entry.take_gradient(several=True)
    assert entry.gradient is not None and entry.gradient.flatten().tolist() == [258.0] * 4
    assert Distribution().gradient_norm([entry]) == pytest.approx(516.0)
    entry.gradient[0, 1] = math.inf
    assert not math.isfinite(Distribution().gradient_norm([entry]))


def test_the_master_keeps_what_bf16_cannot_hold() -> None:
    linear = nn.Linear(16, 6, bias=False).to(torch.bfloat16)
    settings = AdamSettings()
    entry = entry_of(settings, linear)
    for step in range(1, 11):
        entry.gradient = torch.ones(6, 16)
        adam_step(entry, settings, step=step, rate=1e-5, decay=0.0)
    assert entry.master.dtype is torch.float32
    moved = entry.master - linear.weight.detach().float() * entry.mask  # type: ignore[operator]
    assert 0 < float(moved[entry.mask].abs().max()) < 1e-2


def test_what_the_forward_sees_passes_the_transform() -> None:
    entry = entry_of(AdamSettings())
    entry.transform = lambda values, rows: values.round()
    entry.publish()
    assert torch.equal(entry.visible, (entry.master * entry.mask).round())  # type: ignore[operator]


def test_the_forward_sees_the_grid_after_every_step() -> None:
    """Groups that lie across the kernel's pieces, values beyond the grid's ends, halves that round to even."""
    linear = nn.Linear(704, 6, bias=False)
    entry = entry_of(AdamSettings(), linear)
    scheme = Scheme("sparse24_int4", 64)
    scale = rtn(0.5 * entry.master, None, scheme).scale
    assert scale is not None
    entry.transform = IntegerGrid(scale.float(), -8, 7)
    entry.gradient = torch.randn(6, 704)
    adam_step(entry, AdamSettings(), step=1, rate=1e-2, decay=0.1)
    expected = snap(entry.master * entry.mask, scale, make_format(scheme)).dequantized()  # type: ignore[operator]
    torch.testing.assert_close(entry.visible, expected, rtol=0, atol=0)


def test_a_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="whose weight is"):
        train_linear("w", nn.Linear(8, 4), torch.ones(4, 4, dtype=torch.bool), AdamSettings())


def test_without_a_mask_it_is_adamw() -> None:
    settings = AdamSettings(weight_decay=0.1)
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 24).view(4, 6)) for _ in range(2))
    entry = train_dense("w", ours, settings)
    reference = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(1, 6):
        theirs.grad = torch.randn(4, 6)
        entry.gradient = theirs.grad.clone()
        reference.step()
        adam_step(entry, settings, step=step, rate=1e-2, decay=0.0)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("form", optimizers.FORMS)
def test_the_kernel_does_what_torch_does_in_any_size_and_dtype(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """37 x 1,004 values: many threads' pieces, and an end that fills no vector."""
    settings = AdamSettings(weight_decay=0.1, form=form)
    found = []
    for available in (kernels.available(), False):
        monkeypatch.setattr(kernels, "available", lambda value=available: value)
        torch.manual_seed(0)
        entry = entry_of(settings, nn.Linear(1004, 37, bias=False).to(torch.bfloat16))
        for step in (1, 2, 3):
            entry.gradient = torch.randn(37, 1004).to(torch.bfloat16)
            adam_step(entry, settings, step=step, rate=1e-3, decay=0.1, scale=0.5)
        found.append((entry.master, entry.momentum, entry.variance, entry.visible.float()))
    for ours, theirs, tolerance in zip(*found, (1e-5, 1e-6, 1e-6, 1e-2), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("form", optimizers.FORMS)
def test_a_step_is_the_same_bits_for_any_number_of_threads(form: str) -> None:
    """A size that threads would not cut at a whole register: what is left of one is rounded otherwise."""
    threads, found = torch.get_num_threads(), []
    settings = AdamSettings(weight_decay=0.1, form=form)
    try:
        for number in (1, 2, 3, 5, 7):
            torch.set_num_threads(number)
            torch.manual_seed(0)
            entry = entry_of(settings, nn.Linear(1004, 301, bias=False))
            for step in range(1, 9):
                entry.gradient = torch.randn(301, 1004, generator=torch.Generator().manual_seed(step))
                adam_step(entry, settings, step=step, rate=1e-3, decay=0.3)
            found.append((entry.master.clone(), entry.momentum.clone(), entry.variance.clone()))
    finally:
        torch.set_num_threads(threads)
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_the_same_bits_for_any_number_of_threads(dtype: torch.dtype) -> None:
    x = torch.randn(333, 1001).to(dtype)
    if not kernels.available():
        pytest.skip("torch's own norm is used")
    threads, sums = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            sums.append(sum_squares(x))
    finally:
        torch.set_num_threads(threads)
    assert len(set(sums)) == 1
    assert sums[0] == pytest.approx(float(x.double().square().sum()), rel=1e-6)
    assert math.isnan(sum_squares(torch.tensor([1.0, math.nan])))


def test_tensors_updated_together_are_what_each_alone_would_be() -> None:
    """As an accelerator does it: sparse weights, norms, decayed ones and one on a packed grid in one call."""
    settings = AdamSettings(weight_decay=0.1)
    found = []
    for together in (False, True):
        torch.manual_seed(0)
        norm, dense = nn.Parameter(torch.ones(8)), nn.Parameter(torch.randn(4, 8))
        entries = [entry_of(settings), entry_of(settings), *(train_dense("d", p, settings) for p in (norm, dense))]
        entries[1].transform = lambda values, _rows: values.round()
        for step in (1, 2):
            generator = torch.Generator().manual_seed(step)
            for entry in entries:
                entry.gradient = torch.randn(entry.master.shape, generator=generator)
            if together:
                optimizers._update_together(entries, settings, step, 1e-2, 0.5, 0.5)
            else:
                optimizers.adam_steps(entries, settings, step=step, rate=1e-2, decay=0.5, scale=0.5)
            assert all(entry.gradient is None for entry in entries)
        found.append([tensor for entry in entries for tensor in (entry.master, entry.visible.clone())])
    for alone, beside in zip(*found, strict=True):
        torch.testing.assert_close(alone, beside)
