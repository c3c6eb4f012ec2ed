"""Schedules as functions of progress, the share of the budget that is spent (0 at the first step, 1 at the end).

A budget counts tokens or seconds. Tokens give the number of steps at once. Seconds give it after a few
steps have been timed: it is then fixed, so that warm-up, cosine and ramps are exact fractions of what is really run.
Should the machine slow down, the plan is shortened (never lengthened), so a run ends near its time with its
schedules complete.
"""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass, field
from typing import Any

log = logging.getLogger(__name__)

SCHEDULES = ("cosine", "linear", "constant")

FEW_STEPS = 10
"""Fewer steps are no schedule: the first runs at a rate of about 0, and masks hardly move."""
_TIMED_STEPS = 4
_LATE = 1.1


@dataclass(frozen=True)
class Budget:
    """Exactly one of tokens, seconds or passes over all examples."""

    tokens: int | None = None
    seconds: float | None = None
    epochs: float | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.tokens, self.seconds, self.epochs) if value is not None]
        if len(given) != 1 or given[0] <= 0:
            raise ValueError(
                f"budget of tokens={self.tokens}, seconds={self.seconds}, epochs={self.epochs} given; give one of "
                "them, above 0, for example 2Mtok, 10m or 3 epochs"
            )

    def resolved(self, examples: int, tokens: int, batch: int) -> Budget:
        """With passes over so many examples as tokens, each example counted at its greatest length."""
        if self.epochs is None:
            return self
        steps = max(1, round(self.epochs * examples / batch))
        return Budget(tokens=steps * batch * tokens)


def learning_rate(
    progress: float, peak: float, warmup: float, final: float, schedule: str = "cosine", cooldown: float = 0.0
) -> float:
    """Linear from 0 over the share `warmup`, then along the schedule to `final` times the peak, then linear to 0.

    Args:
        schedule: "cosine", "linear", or "constant", which stays at the peak.
        cooldown: the last share of the budget, in which the rate goes on linearly to 0 from where the schedule ended.
    """
    if progress < warmup:
        return peak * progress / warmup
    along = min(1.0, (progress - warmup) / (1.0 - warmup - cooldown))
    height = {"cosine": 0.5 * (1.0 + math.cos(math.pi * along)), "linear": 1.0 - along, "constant": 1.0}[schedule]
    left = min(1.0, (1.0 - progress) / cooldown) if cooldown else 1.0
    return peak * (final + (1.0 - final) * height) * left


def ramp(progress: float, value: float, share: float) -> float:
    """Linear from 0 to `value` over `share` of the budget, then constant (AST, eq. 3)."""
    return value if progress >= share else value * progress / share


@dataclass
class Plan:
    """How many steps are run, and what progress a step has made.

    Progress is linear from (anchor_step, anchor_progress) to (total, 1): shortening the plan moves the anchor
    to the current step, so progress never jumps.
    """

    budget: Budget
    tokens_per_step: int
    total: int = 0
    fixed: bool = False
    anchor_step: int = 0
    anchor_progress: float = 0.0
    spent_seconds: float = 0.0
    step_seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.budget.tokens is not None and not self.total:
            self.total, self.fixed = math.ceil(self.budget.tokens / self.tokens_per_step), True

    def progress(self, step: float) -> float:
        """Share of the budget spent before this step (step + 0.5: at its middle); 0 while no step has been timed."""
        if not self.total or step <= self.anchor_step:
            return self.anchor_progress
        if self.total <= self.anchor_step:
            return 1.0
        along = (step - self.anchor_step) / (self.total - self.anchor_step)
        return self.anchor_progress + (1.0 - self.anchor_progress) * min(1.0, along)

    def done(self, step: int) -> bool:
        return bool(self.total) and step >= self.total

    def took(self, step: int, seconds: float) -> None:
        """Account for step number `step`, just finished."""
        self.spent_seconds += seconds
        if self.budget.seconds is None:
            return
        self.step_seconds = [*self.step_seconds, seconds][-2 * _TIMED_STEPS :]
        expected = sorted(self.step_seconds)[len(self.step_seconds) // 2]
        left = self.budget.seconds - self.spent_seconds
        if not self.fixed:
            self.total = step + 1 + max(0, int(left / expected))
            self.fixed = step + 1 >= min(_TIMED_STEPS, self.total)
            if self.fixed:
                few = self.total < FEW_STEPS
                more = ": too few for a schedule, give a longer budget or a smaller batch" if few else ""
                message = "%d steps fit into %.0f s at %.2f s each%s"
                log.log(
                    logging.WARNING if few else logging.INFO, message, self.total, self.budget.seconds, expected, more
                )
        elif self._late(step + 1, left, expected):
            self._shorten(step + 1, left, expected)

    def _late(self, step: int, left: float, expected: float) -> bool:
        return (self.total - step) * expected > max(0.0, left) * _LATE + 2 * expected

    def _shorten(self, step: int, left: float, expected: float) -> None:
        total = step + max(0, int(left / expected))
        log.warning("steps take %.2f s now: %d steps instead of %d", expected, total, self.total)
        self.anchor_progress, self.anchor_step, self.total = self.progress(step), step, total

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON."""
        record = asdict(self)
        del record["budget"], record["tokens_per_step"]
        return record
