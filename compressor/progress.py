"""Progress for the command line: bars with an ETA on a terminal, JSON lines otherwise."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_QUIET_SECONDS = 5.0

Reporter = Callable[[str, int, int, dict[str, Any]], None]


def _format(figures: dict[str, Any]) -> str:
    return "  ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in figures.items()
    )


@contextmanager
def reporter() -> Iterator[Reporter]:
    """Yields `report(stage, done, total, figures)`. A figure stays until its stage reports another value."""
    if not sys.stderr.isatty():
        yield _JsonLines()
        return
    from rich.console import Console

    with bars(Console(stderr=True)) as report:
        yield report


@contextmanager
def bars(console: Any) -> Iterator[Reporter]:
    """One bar a stage, and under them the newest stage's figures."""
    from rich.console import Group
    from rich.live import Live
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.text import Text

    progress = Progress(
        TextColumn("{task.description:>10}"),
        BarColumn(bar_width=30),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )
    tasks: dict[str, TaskID] = {}
    known: dict[str, dict[str, Any]] = {}
    line = Text("")

    def report(stage: str, done: int, total: int, figures: dict[str, Any]) -> None:
        if stage not in tasks:
            tasks[stage] = progress.add_task(stage, total=total)
        known[stage] = {**known.get(stage, {}), **figures}
        progress.update(tasks[stage], completed=done, total=total)
        line.plain = f"           {_format(known[stage])}" if known[stage] else ""

    with Live(Group(progress, line), console=console, refresh_per_second=4):
        yield report


class _JsonLines:
    """One JSON object a line on standard error: at a stage's start and end, and every few seconds between."""

    def __init__(self) -> None:
        self._stage = ""
        self._start = self._last = 0.0
        self._known: dict[str, Any] = {}

    def __call__(self, stage: str, done: int, total: int, figures: dict[str, Any]) -> None:
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._start, self._last, self._known = stage, now, 0.0, {}
        self._known |= figures
        if done < total and now - self._last < _QUIET_SECONDS:
            return
        self._last = now
        elapsed = now - self._start
        line: dict[str, Any] = {"stage": stage, "done": done, "total": total, "elapsed_s": round(elapsed, 1)}
        if 0 < done < total:
            line["eta_s"] = round(elapsed / done * (total - done), 1)
        rounded = {key: round(value, 5) if isinstance(value, float) else value for key, value in self._known.items()}
        print(json.dumps(line | rounded), file=sys.stderr, flush=True)
