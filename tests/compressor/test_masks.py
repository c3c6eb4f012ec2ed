"""n:m masks: exact counts, deterministic ties, agreement of the fast path with a plain sort."""

import pytest
import torch

from compressor.masks import check_mask, check_n_m, flip_rate, n_m_mask


def by_sort(score: torch.Tensor, n: int, m: int) -> torch.Tensor:
    groups = score.reshape(-1, m)
    mask = torch.zeros_like(groups, dtype=torch.bool)
    for row in range(groups.shape[0]):
        order = sorted(range(m), key=lambda i: (-float(groups[row, i]), i))
        mask[row, order[:n]] = True
    return mask.view(score.shape)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (3, 4), (4, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mask_equals_a_plain_sort_and_breaks_ties_by_position(n: int, m: int, dtype: torch.dtype) -> None:
    score = torch.randint(0, 4, (7, 24), generator=torch.Generator().manual_seed(0)).to(dtype)
    mask = n_m_mask(score, n, m)
    assert torch.equal(mask, by_sort(score, n, m))
    check_mask(mask, n, m)


def test_blocks_do_not_change_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    score = torch.randn(33, 64, generator=torch.Generator().manual_seed(1))
    whole = n_m_mask(score)
    monkeypatch.setattr("compressor.masks._BLOCK", 20)
    assert torch.equal(n_m_mask(score), whole)


def test_transposed_scores_are_grouped_along_their_last_dimension() -> None:
    score = torch.randn(8, 12, generator=torch.Generator().manual_seed(2))
    assert torch.equal(n_m_mask(score.t().contiguous().t()), n_m_mask(score))


def test_check_n_m_counts_the_broken_groups() -> None:
    weight = torch.randn(4, 16)
    with pytest.raises(ValueError, match="16 of 16 groups"):
        check_n_m(weight)
    check_n_m(weight * n_m_mask(weight.abs()))
    check_n_m(torch.zeros(4, 16))


@pytest.mark.parametrize("width", [6, 1, 0])
def test_shapes_without_groups_are_refused(width: int) -> None:
    if width == 0:
        assert n_m_mask(torch.zeros(3, 0)).shape == (3, 0)
        return
    with pytest.raises(ValueError, match="multiple of 4"):
        n_m_mask(torch.zeros(3, width))


def test_impossible_sparsity_is_refused() -> None:
    with pytest.raises(ValueError, match="5:4"):
        n_m_mask(torch.zeros(3, 8), 5, 4)


def test_an_integer_mask_is_refused() -> None:
    mask = n_m_mask(torch.randn(2, 8))
    with pytest.raises(ValueError, match=r"torch\.bool"):
        check_mask(mask.int())
    mask[0, 0] = ~mask[0, 0]
    with pytest.raises(ValueError, match="1 groups"):
        check_mask(mask)


def test_flip_rate() -> None:
    old = torch.tensor([True, True, False, False])
    assert flip_rate(old, torch.tensor([True, False, True, False])) == 0.5
    assert flip_rate(old, old) == 0.0
