"""Schedules at their corners, and how a budget becomes a number of steps."""

import math
from itertools import pairwise

import pytest

from compressor.retraining.schedules import Budget, Plan, learning_rate, ramp


def test_warm_up_then_cosine() -> None:
    assert learning_rate(0.0, 1.0, 0.1, 0.0) == 0.0
    assert learning_rate(0.05, 1.0, 0.1, 0.0) == pytest.approx(0.5)
    assert learning_rate(0.1, 1.0, 0.1, 0.0) == 1.0
    assert learning_rate(0.55, 1.0, 0.1, 0.0) == pytest.approx(0.5)
    assert learning_rate(1.0, 1.0, 0.1, 0.2) == pytest.approx(0.2)
    assert learning_rate(0.0, 1.0, 0.0, 0.0) == 1.0


@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_other_schedules(schedule: str) -> None:
    middle = learning_rate(0.55, 2.0, 0.1, 0.5, schedule)
    assert middle == pytest.approx(1.5 if schedule == "linear" else 2.0)
    assert learning_rate(1.0, 2.0, 0.1, 0.5, schedule) == pytest.approx(1.0 if schedule == "linear" else 2.0)


def test_the_published_gpt2_schedule() -> None:
    """Warm-up 2,000 of 40,000, cosine from 2e-4 to 2e-5 at 38,000, linear to 0."""

    def rate(step: int) -> float:
        return learning_rate(step / 40_000, 2e-4, 0.05, 0.1, "cosine", 0.05)

    assert rate(2_000) == pytest.approx(2e-4) and rate(20_000) == pytest.approx(1.1e-4)
    assert rate(38_000) == pytest.approx(2e-5) and rate(39_000) == pytest.approx(1e-5)
    assert rate(40_000) == pytest.approx(0.0, abs=1e-12)


def test_ramp_then_constant() -> None:
    assert [ramp(progress, 2.0, 0.25) for progress in (0.0, 0.125, 0.25, 1.0)] == [0.0, 1.0, 2.0, 2.0]


def test_a_token_budget_is_a_number_of_steps() -> None:
    plan = Plan(Budget(tokens=1000), tokens_per_step=300)
    assert plan.total == 4
    assert [plan.progress(step) for step in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]
    for step in range(4):
        assert not plan.done(step)
        plan.took(step, 100.0)
    assert plan.total == 4 and plan.done(4)


def test_a_time_budget_is_fixed_after_a_few_steps() -> None:
    plan = Plan(Budget(seconds=100.0), tokens_per_step=1)
    assert plan.progress(0) == plan.progress(0.5) == 0.0 and not plan.done(0)
    plan.took(0, 8.0)
    for step in range(1, 4):
        plan.took(step, 2.0)
    assert plan.fixed and plan.total == 4 + 43
    for step in range(4, 10):
        plan.took(step, 2.0)
    assert plan.total == 47


def test_a_slow_machine_shortens_the_plan_and_progress_does_not_jump() -> None:
    plan = Plan(Budget(seconds=100.0), tokens_per_step=1)
    step, seen = 0, [0.0]
    while not plan.done(step):
        plan.took(step, 1.0 if step < 20 else 3.0)
        step += 1
        seen.append(plan.progress(step))
    assert seen == sorted(seen) and seen[-1] == 1.0
    assert max(b - a for a, b in pairwise(seen[5:])) < 0.06
    assert plan.spent_seconds == pytest.approx(100.0, rel=0.1)


def test_a_fast_machine_does_not_lengthen_it() -> None:
    plan = Plan(Budget(seconds=100.0), tokens_per_step=1)
    step = 0
    while not plan.done(step):
        plan.took(step, 2.0 if step < 10 else 0.5)
        step += 1
    assert step == 50


def test_the_first_step_may_take_more_than_the_budget(caplog: pytest.LogCaptureFixture) -> None:
    plan = Plan(Budget(seconds=1.0), tokens_per_step=1)
    plan.took(0, 60.0)
    assert plan.done(1) and math.isclose(plan.progress(1), 1.0)
    assert "1 steps fit into 1 s at 60.00 s each: too few for a schedule" in caplog.text


def test_few_steps_are_told_and_enough_are_not(caplog: pytest.LogCaptureFixture) -> None:
    for seconds, told in ((12.0, False), (9.0, True)):
        plan = Plan(Budget(seconds=seconds), tokens_per_step=1)
        for step in range(int(seconds)):
            plan.took(step, 1.0)
        assert ("too few" in caplog.text) is told


@pytest.mark.parametrize("given", [{}, {"tokens": 1, "seconds": 1.0}, {"tokens": 0}, {"seconds": -1.0}])
def test_a_budget_is_one_positive_number(given: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="give one of them"):
        Budget(**given)  # type: ignore[arg-type]
