"""`python -m benchmarks pst`: its arms, its paired intervals and its headline, without training anything."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.pst import comparison, headline, main, paired_interval
from benchmarks.pst_arms import DISTILLED, METHODS, RATES, SCORES, PstArm, arms, as_chosen, grid, settings_of
from benchmarks.pst_cost import trainable_share
from benchmarks.record import take_in_recorded

N = 400


def row(method: str, pattern: str, seed: int, right: np.ndarray, **more: Any) -> dict[str, Any]:
    return {
        "arm": f"{method}, {pattern}, seed {seed}", "method": method, "pattern": pattern, "seed": seed,
        "accuracy": float(right.mean()), "test_examples": len(right), "right": np.packbits(right).tobytes().hex(),
        **more,
    }  # fmt: skip


def answers(share: float, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random(N) < share


def test_arms_stand_once_and_have_settings() -> None:
    found = list(arms(("2:4", "90%"), 3, ablation=True))
    assert len({arm.label for arm in found}) == len(found) == 3 * (1 + 2 * 4 + 1 + len(SCORES))
    for arm in found:
        method, loop, settings = settings_of(arm)
        assert loop.learning_rate > 0
        assert settings.score == SCORES.get(arm.method, settings.score)
        assert method in ("pst", "dense", "movement", "magnitude", "lora-magnitude")


def test_the_grid_tries_every_method_at_the_same_rates() -> None:
    tried: dict[str, set[float]] = {}
    found = list(grid())
    assert len({arm.tried for arm in found}) == len(found)
    for arm in found:
        _, loop, settings = settings_of(arm)
        assert (loop.learning_rate, settings.score_rate, settings.weight_rank) == (arm.rate, arm.score_rate, arm.rank)
        tried.setdefault(arm.method, set()).add(arm.rate)
    assert tried.keys() == set(METHODS) - {"magnitude"}
    assert all(rates == set(RATES) for rates in tried.values())


def test_an_arm_takes_what_was_best_in_the_grid_of_its_method() -> None:
    def tried(method: str, rate: float, accuracy: float) -> dict[str, Any]:
        return {
            "kind": "grid", "method": method, "pattern": "2:4", "rate": rate, "score_rate": 0.1, "rank": 64,
            "validation_accuracy": accuracy,
        }  # fmt: skip

    rows = [tried("pst", 1e-3, 0.7), tried("pst", 3e-3, 0.8), tried("movement", 1e-4, 0.95)]
    assert as_chosen(PstArm("pst", "90%", 2), rows) == PstArm("pst", "90%", 2, 3e-3, 0.1, 64)
    assert (
        as_chosen(PstArm("pst |W'|", "2:4", 0), rows).rate == as_chosen(PstArm(DISTILLED, "2:4", 0), rows).rate == 3e-3
    )
    assert as_chosen(PstArm("lora-magnitude", "2:4", 0), rows) == PstArm("lora-magnitude", "2:4", 0)
    rows.append(tried("dense", 3e-5, 0.9))
    assert as_chosen(PstArm("magnitude", "2:4", 0), rows).rate == 3e-5


def test_an_interval_holds_the_difference_and_narrows_where_both_err_alike() -> None:
    base = answers(0.8, 0)
    worse = base.copy()
    worse[np.flatnonzero(base)[:8]] = False  # two points of 400
    mean, low, high = paired_interval([base] * 3, [worse] * 3)
    assert mean == pytest.approx(2.0)
    assert 0.5 < low < 2.0 < high < 3.6
    other = answers(0.78, 1)
    _, wide_low, wide_high = paired_interval([base] * 3, [other] * 3)
    assert wide_high - wide_low > 1.5 * (high - low)


def test_an_interval_holds_what_seeds_differ_by() -> None:
    """Student's with two degrees of freedom, by hand: differences 0, 0 and 2 points, 4.303 x 1.155 / sqrt(3)."""
    base = answers(0.8, 0)
    worse = base.copy()
    worse[np.flatnonzero(base)[:8]] = False
    mean, low, high = paired_interval([base] * 3, [base, base, worse])
    assert mean == pytest.approx(2 / 3)
    assert (high - mean, mean - low) == pytest.approx((2.868, 2.868), abs=0.001)


def test_headline_takes_the_worst_mask_shape_against_movement() -> None:
    cost = {"trained_parameters": 10, "optimizer_bytes": 100}
    full = {"trained_parameters": 100, "optimizer_bytes": 900}
    dense = answers(0.82, 3)
    better = dense.copy()
    better[np.flatnonzero(~dense)[:8]] = True  # two points of 400
    rows = [
        row("dense", "none", 0, dense, **full),
        row("pst", "2:4", 0, answers(0.80, 4), **cost),
        row(DISTILLED, "2:4", 0, better, **cost),
        row("movement", "2:4", 0, answers(0.70, 5), **full),
        row("pst", "50%", 0, answers(0.80, 4), **cost),
        row("movement", "50%", 0, answers(0.70, 5), **full),
        row("pst", "90%", 0, answers(0.60, 6), **cost),
        row("movement", "90%", 0, answers(0.65, 7), **full),
        {"arm": "correlation", "kind": "cost", "figures": {"score_rank_correlation": 0.5}},
        {"arm": "writing: pst", "kind": "writing", "method": "pst", "pattern": "2:4", "trained_parameters": 7},
        {"arm": "grid: pst", "kind": "grid", "method": "pst", "pattern": "2:4", "validation_accuracy": 0.9},
    ]
    found = headline(rows)
    against = comparison(rows, "pst", "movement", "90%")
    assert against is not None
    assert found["pst_vs_movement_accuracy_points"] == against[0] < 0
    assert -8 < found["pst24_from_the_encoder_vs_dense_accuracy_points"] < 4
    assert found["pst24_vs_dense_accuracy_points"] == pytest.approx(2.0)
    assert found["trained_parameters_vs_movement"] == pytest.approx(0.1)
    assert found["score_rank_correlation"] == 0.5
    fewer = [entry for entry in rows if entry.get("pattern") != "50%"]
    assert "pst_vs_movement_accuracy_points" not in headline(fewer), "the worst of some shapes is not the worst"


def test_share_of_bert_base_counts_the_head() -> None:
    assert trainable_share(4) == pytest.approx(0.0136, abs=2e-4)


def test_rows_of_another_run_are_taken_in(tmp_path: Path) -> None:
    file = tmp_path / "pst.json"
    file.write_text(json.dumps({"name": "pst", "rows": [{"arm": "a", "x": 1, "measured": 3}, {"arm": "b"}]}))
    rows = [{"arm": "a", "x": 2}]
    take_in_recorded(rows, file, "pst")
    assert rows == [{"arm": "a", "x": 2, "measured": 3}, {"arm": "b"}]


def test_a_record_that_is_complete_is_only_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "pst.json"
    cost = {"trained_parameters": 10, "optimizer_bytes": 100}
    known = [
        row(arm.method, arm.pattern, arm.seed, answers(0.8, 1), **cost) for arm in arms(("2:4",), 1, ablation=False)
    ]
    file.write_text(json.dumps({"name": "pst", "rows": known}))
    assert main(["--patterns", "2:4", "--seeds", "1", "--json", str(file)]) == 0
    assert "pst24_vs_dense_accuracy_points" in capsys.readouterr().out
    assert torch.tensor([entry["accuracy"] for entry in json.loads(file.read_text())["rows"]]).min() > 0.5


def test_unknown_methods_are_refused() -> None:
    with pytest.raises(ValueError, match="no method 'adam'; accepted: dense, movement, pst"):
        main(["--methods", "dense,adam"])
