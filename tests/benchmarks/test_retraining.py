"""The retraining benchmark: its arms, one row made for real on a tiny model, and the arithmetic of the headline."""

import math
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from benchmarks import retraining, training_cost
from benchmarks.last_word import Item, _pairs, accuracy
from benchmarks.retraining import check_recipe, digest
from benchmarks.retraining_arms import BUDGETS, Arm, ablation_arms, arms_of, one_shot_arms, packing, published
from compressor import data
from compressor.models import load_model
from compressor.recipe import RECIPES, parse_recipe

WORDS = "the model reads a long text and then it writes the answer slowly for every person who asked about numbers"


def test_every_arm_is_a_recipe_and_stands_once() -> None:
    arms = [*one_shot_arms(), *ablation_arms(), *(arm for budget in BUDGETS for arm in arms_of(budget))]
    assert len({arm.label for arm in arms}) == len(arms)
    for arm in arms:
        recipe = parse_recipe(dict(arm.recipe))
        assert (recipe.retraining is None) == (arm.tokens == 0 or arm.base is not None)


def test_the_published_recipe_is_the_papers_but_for_the_batch() -> None:
    """The grid varies start and rate only."""
    paper = yaml.safe_load((RECIPES / "ast-paper-gpt2.yaml").read_text())["retraining"]
    ours = published("magnitude", paper["loop"]["learning_rate"])["retraining"]
    assert ours["ast"] == paper["ast"]
    own = parse_recipe(published("magnitude", paper["loop"]["learning_rate"])).retraining
    assert own is not None
    for key, value in paper["loop"].items():
        if key not in ("batch", "micro_batch"):
            assert getattr(own.loop, key) == value, key


def row(arm: str, method: str, tokens: int, loss: float, trained: float | None = None) -> dict[str, Any]:
    return {
        "arm": arm, "method": method, "tokens": tokens, "validation_loss_retrained": trained,
        "log_ppl heldout": loss, "log_ppl wikitext": loss + 0.5,
    }  # fmt: skip


def test_the_best_setting_is_chosen_on_training_text_and_gaps_are_to_dense() -> None:
    rows = [
        row("dense", "dense", 0, 3.0),
        row("a", "AST as published", 100_000, 4.0, trained=3.9),
        row("b", "AST as published", 100_000, 3.2, trained=4.5),
        row("c", "ours", 100_000, 3.4, trained=3.6),
        row("d", "ours int4", 100_000, 3.42, trained=3.6),
        row("ablation: full", "x", 50_000, 4.0),
        row("ablation: fixed mask", "y", 50_000, 4.25),
        {"kind": "cost", "arm": "cost", "figures": {"step_time_vs_dense_kd": 1.05}},
    ]
    found = retraining.headline(rows)
    assert found["log_ppl_gap_vs_paper_0.1M"] == pytest.approx(0.4)
    assert found["int4_ppl_increase"] == pytest.approx(math.exp(0.02) - 1)
    assert found["ablation_fixed_mask"] == pytest.approx(0.25)
    assert found["step_time_vs_dense_kd"] == 1.05
    assert "log_ppl_gap_vs_paper_1M" not in found


def test_a_row_is_made_and_measured(
    tiny_llama: Path, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = " ".join([WORDS] * 4 + ["In the end everybody knows about numbers."])
    monkeypatch.setitem(data.NAMED, "heldout", lambda: ([document] * 3, "none"))
    options = Namespace(
        work=tmp_path, model=str(tiny_llama), wikitext=None, speeches=None, tokens=None, json=None, quick=True,
        zero_shot=None, jobs=2, minutes=math.inf,
    )  # fmt: skip
    monkeypatch.setattr(retraining, "_WINDOWS", (64,))
    bench = retraining.Bench(options)
    recipe = published("magnitude", 1e-3)
    recipe["text"] = {"source": str(prose), "length": 32}
    recipe["retraining"]["validation_blocks"] = 2
    rows: list[dict[str, Any]] = []
    bench.add_dense(rows)
    bench.add_dense(rows)
    assert [each["arm"] for each in rows] == ["dense"]
    arms = [Arm(f"tiny, {place} @ 0.1M", "AST as published", 640, recipe) for place in ("first", "second")]
    rows.append(bench.made(arms[0]))
    assert rows[-1]["retraining_tokens"] == 640 and rows[-1]["validation_loss_retrained"] > 0
    assert retraining.to_measure(rows, arms, arms[0]) is None, "not all settings are made"
    assert bench.made(arms[0]) == rows[-1], "the arm is kept, not made again"
    chosen = retraining.to_measure(rows, arms[:1], arms[0])
    assert chosen is rows[-1]
    chosen |= bench.measured(chosen["arm"])
    assert chosen["log_ppl heldout"] > 0 and 0 <= chosen["last_word_accuracy"] <= 1
    assert retraining.to_measure(rows, arms[:1], arms[0]) is None
    assert not list(tmp_path.glob("tmp*")), "what was unpacked to be measured is gone"


def test_last_words_have_stood_before() -> None:
    text = " ".join([WORDS] * 4) + " Who asked about numbers. Nobody knows the ending. Then he left it there."
    found = _pairs(text)
    assert [word for _, word in found] == ["numbers"]
    assert len(found[0][0].split()) >= 50 and found[0][0].endswith("asked about")


def test_accuracy_counts_whole_words(tiny_llama: Path) -> None:
    model = load_model(tiny_llama)
    with torch.no_grad():
        guess = int(model(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1].argmax())
        other = int(model(input_ids=torch.tensor([[5, 6, 7, guess]])).logits[0, -1].argmax())
    items = [Item([5, 6, 7], [guess]), Item([5, 6, 7], [guess, other]), Item([5, 6, 7], [guess, other ^ 1])]
    assert accuracy(model, items)["last_word_accuracy"] == pytest.approx(2 / 3)


def test_steps_of_both_kinds_are_timed(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_cost, "_GROUP", 2)
    ours, dense = training_cost.step_seconds(tiny_llama, torch.randint(0, 200, (8, 16)))
    assert len(ours) == len(dense) == 3 and min(ours + dense) > 0


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"accepted are 0\.1M, 0\.25M, 1M"):
        retraining._wanted(Namespace(budgets="2M", ablation=False, methods=None))
    with pytest.raises(ValueError, match="no method 'adam'"):
        retraining._wanted(Namespace(budgets="0.1M", ablation=False, methods="adam"))


class Stub:
    """A bench that makes rows at once; `losses` by label."""

    def __init__(self, folder: Path, losses: dict[str, float]) -> None:
        self.options, self.losses, self.work = Namespace(jobs=3, minutes=math.inf), losses, folder
        self.calls: list[str] = []

    def folder(self, label: str) -> Path:
        return self.work / label

    def made(self, arm: Arm) -> dict[str, Any]:
        self.calls.append(f"made {arm.label}")
        self.folder(arm.label).mkdir(exist_ok=True)
        loss = self.losses[arm.label]
        return {"arm": arm.label, "method": arm.method, "tokens": arm.tokens, "validation_loss_retrained": loss}

    def measured(self, label: str) -> dict[str, Any]:
        assert self.folder(label).is_dir()
        self.calls.append(f"measured {label}")
        return {"log_ppl heldout": 1.0, "last_word_accuracy": 0.5}


def test_the_table_is_filled_side_by_side_and_the_best_setting_is_measured(tmp_path: Path) -> None:
    table = [Arm("a", "m", 10, {}), Arm("b", "m", 10, {}), Arm("c", "n", 10, {}), Arm("packed", "p", 10, {}, base="c")]
    bench = Stub(tmp_path, {"a": 2.0, "b": 1.0, "c": 3.0, "packed": 3.0})
    rows: list[dict[str, Any]] = []
    retraining.fill(rows, table, bench, lambda: None)  # type: ignore[arg-type]
    assert sorted(bench.calls) == sorted([f"made {each.label}" for each in table] + [
        "measured b", "measured c", "measured packed",
    ])  # fmt: skip
    assert bench.calls.index("made packed") > bench.calls.index("measured c")
    assert all(row["made"]["device"] for row in rows)
    calls = len(bench.calls)
    retraining.fill(rows, table, bench, lambda: None)  # type: ignore[arg-type]
    assert len(bench.calls) == calls, "nothing is made twice"


def test_a_row_recorded_on_another_machine_is_made_again_to_be_measured(tmp_path: Path) -> None:
    table = [Arm("a", "m", 10, {}), Arm("b", "m", 10, {})]
    bench = Stub(tmp_path, {"a": 2.0, "b": 1.0})
    rows = [{"arm": "b", "method": "m", "tokens": 10, "validation_loss_retrained": 0.5}]
    retraining.fill(rows, table, bench, lambda: None)  # type: ignore[arg-type]
    assert sorted(bench.calls) == ["made a", "made b", "measured b"]
    assert rows[0]["validation_loss_retrained"] == 0.5, "it was chosen by that"
    assert rows[0]["made_again"]["validation_loss_retrained"] == 1.0  # type: ignore[index]


def test_a_row_that_fails_to_be_measured_can_be_tried_again(tmp_path: Path) -> None:
    bench = Stub(tmp_path, {"a": 2.0})
    bench.measured = lambda label: (_ for _ in ()).throw(ValueError("no room"))  # type: ignore[method-assign]
    rows: list[dict[str, Any]] = []
    with pytest.raises(ValueError, match="no room"):
        retraining.fill(rows, [Arm("a", "m", 10, {})], bench, lambda: None)  # type: ignore[arg-type]
    assert "last_word_accuracy" not in rows[0]


def test_a_row_of_another_recipe_is_not_taken_for_the_arms() -> None:
    arm, other = arms_of("0.1M")[:2]
    check_recipe([{"arm": arm.label}, {"arm": other.label, "recipe": "0"}], arm)
    check_recipe([{"arm": arm.label, "recipe": digest(arm)}], arm)
    with pytest.raises(ValueError, match="was made by another recipe"):
        check_recipe([{"arm": arm.label, "recipe": digest(other)}], arm)


def test_packing_trains_nothing() -> None:
    for name in ("ast-2of4-int4", "ast-2of4-int8"):
        assert not {"reconstruction", "retraining"} & packing(name).keys()
