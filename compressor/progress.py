"""Progress for the command line: a bar with an ETA on a terminal, JSON lines otherwise."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_QUIET_SECONDS = 5.0


def _format(figures: dict[str, Any]) -> str:
    return "  ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in figures.items()
    )


@contextmanager
def reporter() -> Iterator[Callable[[str, int, int, dict[str, Any]], None]]:
    """Yields `report(stage, done, total, figures)`."""
    if not sys.stderr.isatty():
        yield _JsonLines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    with Progress(
        TextColumn("{task.description:>10}"),
        BarColumn(bar_width=30),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
        console=Console(stderr=True),
    ) as progress:
        tasks: dict[str, TaskID] = {}

        def report(stage: str, done: int, total: int, figures: dict[str, Any]) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total, figures="")
            progress.update(tasks[stage], completed=done, total=total, figures=_format(figures))

        yield report


class _JsonLines:
    """One JSON object a line on standard error: at a stage's start and end, and every few seconds between."""

    def __init__(self) -> None:
        self._stage = ""
        self._start = self._last = 0.0

    def __call__(self, stage: str, done: int, total: int, figures: dict[str, Any]) -> None:
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._start, self._last = stage, now, 0.0
        if done < total and now - self._last < _QUIET_SECONDS:
            return
        self._last = now
        elapsed = now - self._start
        line: dict[str, Any] = {"stage": stage, "done": done, "total": total, "elapsed_s": round(elapsed, 1)}
        if 0 < done < total:
            line["eta_s"] = round(elapsed / done * (total - done), 1)
        rounded = {key: round(value, 5) if isinstance(value, float) else value for key, value in figures.items()}
        print(json.dumps(line | rounded), file=sys.stderr, flush=True)
