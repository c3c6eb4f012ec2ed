"""When a run has gone wrong, and what is remembered of it: the reasons to go back to a snapshot at a lower rate.

A step is bad when its loss or gradient is not finite, or when its loss and those of the two steps before it are far
above what came before them: one alone is a hard text, which small batches meet now and then. The record of what
happened lies beside the snapshots, for a run that is killed after going back must not start at the old rate again.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

_REMEMBERED = 32
_NATS = 3.0
_IN_A_ROW = 3


class DivergedError(ArithmeticError):
    """The loss or a gradient is not finite, or the loss exploded; raised before the weights are touched."""


@dataclass
class Guard:
    """Watches losses, and counts how often the run went back.

    Args:
        explosion: three losses in a row are bad above so many times the median of the 32 before, if by 3 nats at
            least; 0 turns it off.
        limit: how often a run may go back.
        cut: what the rate is multiplied by each time.
        file: where the record is kept; None keeps it in memory.
        writes: whether this process writes the file; the others of a launcher only read it.
    """

    explosion: float
    limit: int
    cut: float
    file: Path | None = None
    writes: bool = True
    losses: list[float] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.file is not None and self.file.is_file():
            self.events = json.loads(self.file.read_text())

    @property
    def rate_factor(self) -> float:
        """What the rate is multiplied by from here on."""
        return self.cut ** len(self.events)

    def check(self, step: int, loss: float, norm: float, examples: Sequence[int]) -> None:
        """Accept a step, or raise DivergedError."""
        where = f"at step {step}, examples {list(examples)}"
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise DivergedError(f"loss {loss}, gradient norm {norm} {where}")
        self.losses = [*self.losses, loss][-_REMEMBERED - _IN_A_ROW :]
        before, last = self.losses[:_REMEMBERED], self.losses[_REMEMBERED:]
        if not self.explosion or len(last) < _IN_A_ROW:
            return
        usual = median(before)
        if min(last) > max(self.explosion * usual, usual + _NATS):
            found = ", ".join(f"{each:.3g}" for each in last)
            raise DivergedError(f"losses {found} where the {_REMEMBERED} before had a median of {usual:.3g} {where}")

    def record(self, error: DivergedError, step: int, back_to: Mapping[str, Any] | None) -> int:
        """Note that the run goes back; returns to how many snapshots before the newest.

        Raises:
            DivergedError: there is no snapshot, or the run went back often enough.
        """
        advice = "lower learning_rate, or look at that text"
        if back_to is None:
            raise DivergedError(f"{error}: stopped before the update; {advice}") from error
        if len(self.events) >= self.limit:
            raise DivergedError(
                f"{error}: stopped before the update, after going back {len(self.events)} times at rates down to "
                f"{self.rate_factor:g} of the recipe's; {advice}"
            ) from error
        again = any(event["back_to"] == back_to["step"] for event in self.events)
        self.events.append({"step": step, "back_to": back_to["step"], "reason": str(error)})
        if self.file is not None and self.writes:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            part = self.file.with_name(f".{self.file.name}.part")
            part.write_text(json.dumps(self.events, indent=1))
            os.replace(part, self.file)
        return 1 if again else 0
