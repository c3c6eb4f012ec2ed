"""SLoRB while it trains: what its initialisation preserves, its forward, its grid and its gradient."""

import pytest
import torch
from torch import nn

from compressor.formats.low_rank import low_rank_linear, pack_low_rank
from compressor.low_rank import LowRankBranch, initial_branch, initial_s, on_int8_grid, segment_matrix
from compressor.masks import n_m_mask
from compressor.scheme import LowRank


@pytest.fixture
def pruned() -> tuple[torch.Tensor, torch.Tensor]:
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    return weight, n_m_mask(weight.abs())


def test_mean_init_preserves_every_segment_sum(pruned: tuple[torch.Tensor, torch.Tensor]) -> None:
    weight, mask = pruned
    s = initial_s(weight, mask, 16)
    whole = weight * mask + s @ segment_matrix(32, 16)
    torch.testing.assert_close(whole.unflatten(1, (-1, 16)).sum(-1), weight.unflatten(1, (-1, 16)).sum(-1))


def test_the_other_inits(pruned: tuple[torch.Tensor, torch.Tensor]) -> None:
    weight, mask = pruned
    torch.testing.assert_close(initial_s(weight, mask, 8, "sum"), 8 * initial_s(weight, mask, 8))
    assert not bool(initial_s(weight, mask, 8, "zero").any())
    with pytest.raises(ValueError, match="accepted are mean"):
        initial_s(weight, mask, 8, "random")
    with pytest.raises(ValueError, match="must divide"):
        initial_s(weight, mask, 5)


@pytest.mark.parametrize("segment", [16, 32, 64])
@pytest.mark.parametrize("rows", [3, 40])
def test_the_best_low_rank_start_is_the_truncated_svd(segment: int, rows: int) -> None:
    weight = torch.randn(rows, 256, generator=torch.Generator().manual_seed(1))
    mask = n_m_mask(weight.abs())
    s, x = initial_branch(weight, mask, segment, "svd")
    rank = 256 // segment
    assert s.shape == (rows, rank) and x.shape == (rank, 256)
    missed = float((weight * ~mask - s @ x).square().sum())
    sizes = torch.linalg.svdvals(weight * ~mask)
    assert missed == pytest.approx(float(sizes[rank:].square().sum()), rel=1e-3, abs=1e-6)
    s_mean, segments = initial_branch(weight, mask, segment)
    assert torch.equal(segments, segment_matrix(256, segment))
    assert missed < float((weight * ~mask - s_mean @ segments).square().sum())


@pytest.mark.parametrize("init", ["mean", "sum", "svd"])
def test_where_pruned_weights_are_made_up_for_the_branch_starts_at_zero_and_alive(
    init: str, pruned: tuple[torch.Tensor, torch.Tensor]
) -> None:
    weight, mask = pruned
    s, x = initial_branch(weight * mask, mask, 16, init)
    assert not s.any()
    assert torch.equal(x, segment_matrix(weight.shape[1], 16)), "both at zero would never learn"


def test_segment_sums_equal_a_trained_projection_at_its_start() -> None:
    s, x = torch.randn(5, 4), torch.randn(2, 3, 32)
    fixed = LowRankBranch(s, 8, dtype=torch.float32)
    trained = LowRankBranch(s, 8, dtype=torch.float32, x=segment_matrix(32, 8))
    torch.testing.assert_close(fixed(x), trained(x))
    assert [name for name, _ in fixed.named_parameters()] == ["s"]
    assert trained.x is not None and trained.x.shape == (4, 32)


def test_what_is_trained_is_what_is_stored() -> None:
    s, x = torch.randn(5, 4), torch.randn(3, 32)
    stored = pack_low_rank(LowRank(segment=8, dtype="int8"), s)
    torch.testing.assert_close(LowRankBranch(s, 8, dtype=torch.float32)(x), low_rank_linear(x, stored))


def test_the_int8_grid_is_straight_through() -> None:
    s = torch.randn(5, 4, requires_grad=True)
    snapped = on_int8_grid(s)
    assert not torch.equal(snapped, s)
    snapped.backward(torch.full_like(s, 2.0))
    assert s.grad is not None and bool((s.grad == 2.0).all())


def test_attach_adds_to_the_output_until_detached() -> None:
    linear, x = nn.Linear(16, 5), torch.randn(3, 16)
    plain = linear(x)
    branch = LowRankBranch(torch.randn(5, 2), 8, dtype=torch.float32)
    detach = branch.attach(linear)
    torch.testing.assert_close(linear(x), plain + branch(x))
    detach()
    torch.testing.assert_close(linear(x), plain)
