"""Going back to the last good snapshot at a lower rate, and giving up with a reason."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from compressor.retraining import DivergedError, TextDistillation
from compressor.retraining.rollback import Guard
from tests.retraining import FP32, llama, run


def test_a_bad_step_goes_back_at_half_the_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = {12}
    plain = TextDistillation.backward
    calls = 0

    def backward(self: TextDistillation, *arguments: object) -> dict[str, float]:
        nonlocal calls
        calls += 1
        found = plain(self, *arguments)  # type: ignore[arg-type]
        return {**found, "total": float("nan")} if calls in bad else found

    monkeypatch.setattr(TextDistillation, "backward", backward)
    rates: list[tuple[int, float]] = []
    report = run(
        llama(),
        loop=replace(FP32, checkpoint_minutes=60),
        work_dir=tmp_path,
        progress=lambda step, total, metrics: rates.append((step, metrics["learning_rate"])),
    )
    assert report.steps == 30
    steps = [step for step, _ in rates]
    assert steps == [*range(1, 12), *range(1, 31)], "from the snapshot of the start"
    assert rates[11][1] == pytest.approx(rates[0][1] / 2)
    (event,) = json.loads((tmp_path / "snapshots" / "rollbacks.json").read_text())
    assert event["step"] == 11 and event["back_to"] == 0 and "examples" in event["reason"]
    lines = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(range(1, 31))


def test_it_gives_up_with_reason_and_position(tmp_path: Path) -> None:
    teacher = llama()
    teacher.model.embed_tokens.weight.data[13] = float("nan")
    tokens = torch.full((4, 16), 13)
    with pytest.raises(DivergedError, match=r"loss nan.* step 0, examples .*after going back 2 times .* to 0.25"):
        run(llama(), teacher, tokens=tokens, loop=replace(FP32, rollbacks=2), work_dir=tmp_path)


def test_losses_that_stay_high_are_bad_and_a_hard_text_is_not() -> None:
    guard = Guard(explosion=3.0, limit=1, cut=0.5)
    for step in range(40):
        guard.check(step, 2.0 + 1.5 * (step % 2), 1.0, [step])
    guard.check(40, 30.0, 1.0, [3505])
    for step in range(41, 60):
        guard.check(step, 2.0 + 1.5 * (step % 2), 1.0, [step])
    guard.check(60, 29.0, 1.0, [0])
    guard.check(61, 30.0, 1.0, [1])
    known = list(guard.losses)
    message = r"losses 29, 30, 31 where the 32 before had a median of .* at step 62, examples \[7\]"
    with pytest.raises(DivergedError, match=message):
        guard.check(62, 31.0, 1.0, [7])
    resumed = Guard(explosion=3.0, limit=1, cut=0.5, losses=known)
    with pytest.raises(DivergedError, match=message):
        resumed.check(62, 31.0, 1.0, [7])


def test_a_second_failure_after_the_same_snapshot_asks_for_an_older_one() -> None:
    guard = Guard(explosion=3.0, limit=3, cut=0.5)
    manifest = {"step": 10}
    assert guard.record(DivergedError("a"), 15, manifest) == 0
    assert guard.record(DivergedError("b"), 16, manifest) == 1
    assert guard.rate_factor == 0.25
