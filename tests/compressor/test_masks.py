"""Masks: exact counts, deterministic ties, agreement of the fast path with a plain sort."""

import pytest
import torch

from compressor import kernels
from compressor.kernels.training import refresh
from compressor.masks import MaskShape, check_mask, check_n_m, flip_rate, keep_highest, keep_highest_of_rows, n_m_mask


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


@pytest.mark.parametrize("text", ["2:4", "1:4", "4:8", "1:2", "37.5%"])
def test_a_shape_makes_masks_that_it_accepts(text: str) -> None:
    shape, weight = MaskShape.parse(text), torch.randn(16, 32, generator=torch.Generator().manual_seed(3))
    mask = shape.mask(weight.abs())
    shape.check(mask)
    shape.check_weight(weight * mask)
    assert str(shape) == text
    assert int(mask.sum()) == shape.kept(weight.numel())
    with pytest.raises(ValueError, match=r"non-zero|not zero"):
        shape.check_weight(weight)
    mask[0, 0] = ~mask[0, 0]
    with pytest.raises(ValueError, match="keep"):
        shape.check(mask)
    with pytest.raises(ValueError, match=r"torch\.bool"):
        shape.check(mask.int())


@pytest.mark.parametrize("text", ["", "4:2", "2:2", "0:4", "unstructured", "0%", "100%", "50", "-5%", "2:4:8"])
def test_other_patterns_are_refused_with_the_accepted_ones(text: str) -> None:
    with pytest.raises(ValueError, match="accepted: 2:4, another n:m"):
        MaskShape.parse(text)


@pytest.mark.parametrize(
    ("text", "fits"), [("2:4", True), ("1:4", True), ("1:2", True), ("2:8", True), ("4:8", False), ("50%", False)]
)
def test_what_the_formats_of_two_of_four_hold(text: str, fits: bool) -> None:
    shape = MaskShape.parse(text)
    assert shape.fits_24 == fits
    mask = shape.mask(torch.randn(64, 64, generator=torch.Generator().manual_seed(4)))
    if fits:
        check_n_m(mask.int())
        return
    with pytest.raises(ValueError, match="more than 2 non-zero"):
        check_n_m(mask.int())


def test_an_unstructured_mask_keeps_the_highest_and_breaks_ties_by_position() -> None:
    score = torch.tensor([[1.0, 5.0, 1.0], [7.0, 1.0, 1.0]])
    assert keep_highest(score, 4).tolist() == [[True, True, True], [True, False, False]]
    assert not keep_highest(score, 0).any()
    assert keep_highest(score, 6).all()
    with pytest.raises(ValueError, match="7 of 6"):
        keep_highest(score, 7)


def test_the_highest_of_rows_are_as_many_in_each() -> None:
    score = torch.tensor([[9.0, 8.0, 7.0, 6.0], [1.0, 2.0, 3.0, 4.0], [5.0, 5.0, 5.0, 5.0]])
    mask = keep_highest_of_rows(score, 7)
    assert mask.tolist() == [[True, True, True, False], [False, False, True, True], [True, True, False, False]]
    assert keep_highest_of_rows(score, 12).all() and not keep_highest_of_rows(score, 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_chooses_the_same_mask(dtype: torch.dtype) -> None:
    """Ties among them; sums and flips as torch counts them, over more than one thread's piece."""
    if not kernels.available():
        pytest.skip("the kernels are not compiled here")
    master = torch.randn(70, 1004)
    master[:9] = master[:9].round()
    old = n_m_mask(torch.randn(master.shape))
    expected = n_m_mask(master.abs())
    mask, visible = old.clone(), torch.zeros(master.shape, dtype=dtype)
    changed, kept, total = refresh(master, mask, visible)
    assert torch.equal(mask, expected)
    assert torch.equal(visible, (master * expected).to(dtype))
    assert changed == int((old != expected).sum())
    assert (kept, total) == pytest.approx((float((master * expected).abs().sum()), float(master.abs().sum())), rel=1e-5)
