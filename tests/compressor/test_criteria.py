"""The criteria by hand-made examples, and their contract."""

import pytest
import torch

from compressor.calibration import LayerStats
from compressor.criteria import CRITERIA
from compressor.masks import check_mask, n_m_mask


def stats(norms: list[float]) -> LayerStats:
    return LayerStats(torch.tensor(norms), tokens=10)


@pytest.mark.parametrize("name", sorted(CRITERIA))
def test_a_criterion_scores_every_weight_and_gives_a_mask(name: str) -> None:
    weight = torch.randn(6, 8, dtype=torch.bfloat16)
    score = CRITERIA[name](weight, stats([1.0] * 8))
    assert score.shape == weight.shape
    assert bool((score >= 0).all())
    check_mask(n_m_mask(score))


def test_magnitude_keeps_the_largest() -> None:
    mask = n_m_mask(CRITERIA["magnitude"](torch.tensor([[1.0, -4.0, 2.0, -3.0]]), None))
    assert mask.tolist() == [[False, True, False, True]]


def test_wanda_weighs_by_the_loudness_of_the_input() -> None:
    mask = n_m_mask(CRITERIA["wanda"](torch.tensor([[1.0, -4.0, 2.0, -3.0]]), stats([10.0, 0.1, 10.0, 0.1])))
    assert mask.tolist() == [[True, False, True, False]]


def test_wanda_refuses_missing_or_foreign_statistics() -> None:
    with pytest.raises(ValueError, match="needs calibration"):
        CRITERIA["wanda"](torch.randn(2, 4), None)
    with pytest.raises(ValueError, match="input features"):
        CRITERIA["wanda"](torch.randn(2, 4), stats([1.0] * 8))
