"""Solvers: exact masks, and a smaller output error than choosing without correcting."""

import pytest
import torch

from compressor.calibration import LayerStats
from compressor.criteria import CRITERIA
from compressor.masks import MaskShape, check_mask, check_n_m, n_m_mask
from compressor.solvers import SOLVERS


def correlated(width: int, tokens: int = 500) -> tuple[torch.Tensor, LayerStats]:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.eye(width) + 0.3 * torch.randn(width, width, generator=generator)
    x = torch.randn(tokens, width, generator=generator) @ mixing
    return x, LayerStats(x.norm(dim=0), tokens, x.t() @ x)


@pytest.mark.parametrize("name", sorted(SOLVERS))
@pytest.mark.parametrize("width", [8, 256, 300])
def test_a_solver_prunes_exactly_and_beats_wanda_on_the_output(name: str, width: int) -> None:
    x, stats = correlated(width, tokens=4 * width)
    weight = torch.randn(24, width, generator=torch.Generator().manual_seed(1))
    original = weight.clone()
    solved, mask = SOLVERS[name](weight, stats)
    assert torch.equal(weight, original)
    check_mask(mask)
    check_n_m(solved)
    assert not bool(solved[~mask].any())
    wanda = weight * n_m_mask(CRITERIA["wanda"](weight, stats))
    error = ((solved - weight) @ x.t()).square().sum()
    assert error < 0.9 * ((wanda - weight) @ x.t()).square().sum()


@pytest.mark.parametrize("pattern", ["1:4", "4:8", "3:6", "50%", "70%"])
@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_other_shapes_are_pruned_exactly_too(name: str, pattern: str) -> None:
    x, stats = correlated(192)
    weight = torch.randn(24, 192, generator=torch.Generator().manual_seed(1))
    shape = MaskShape.parse(pattern)
    solved, mask = SOLVERS[name](weight, stats, shape)
    shape.check(mask)
    assert torch.equal(solved != 0, mask)
    chosen = weight * shape.mask(CRITERIA["wanda"](weight, stats))
    assert ((solved - weight) @ x.t()).square().sum() < 0.9 * ((chosen - weight) @ x.t()).square().sum()


def test_sparsegpt_equals_least_squares_on_the_columns_it_keeps_free() -> None:
    """One group: after pruning, the kept weights solve the least-squares problem (up to damping)."""
    x, stats = correlated(4, tokens=4000)
    weight = torch.tensor([[0.1, 0.1, 3.0, -4.0]])
    solved, mask = SOLVERS["sparsegpt"](weight, stats)
    assert mask.tolist() == [[False, False, True, True]]
    best = torch.linalg.lstsq(x[:, 2:], (x @ weight.t())).solution.t()
    torch.testing.assert_close(solved[:, 2:], best, rtol=0, atol=0.02)


def test_dead_and_dependent_inputs_do_not_break_it() -> None:
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(2))
    x[:, 5] = 0.0
    x[:, 6] = x[:, 7]
    solved, _ = SOLVERS["sparsegpt"](torch.randn(8, 64), LayerStats(x.norm(dim=0), 40, x.t() @ x))
    assert bool(torch.isfinite(solved).all())
    check_n_m(solved)


def test_missing_or_foreign_hessians_are_refused() -> None:
    with pytest.raises(ValueError, match="needs Hessians"):
        SOLVERS["sparsegpt"](torch.randn(2, 4), LayerStats(torch.ones(4), 1))
    with pytest.raises(ValueError, match="Hessian of 8"):
        SOLVERS["sparsegpt"](torch.randn(2, 4), LayerStats(torch.ones(4), 1, torch.eye(8)))
