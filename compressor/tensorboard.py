"""The figures of every stage for TensorBoard, where the package `tensorboard` is installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

Report = Callable[[str, int, int, dict[str, Any]], None]


@contextmanager
def scalars(folder: str | None, report: Report) -> Iterator[Report]:
    """Yields a report that writes the numbers it is given into a folder too; without a folder, `report` itself.

    Raises:
        ValueError: `tensorboard` is not installed.
    """
    if folder is None:
        yield report
        return
    if find_spec("tensorboard") is None:
        raise ValueError(
            "--tensorboard needs the package tensorboard: pip install tensorboard, or leave it out; "
            "`compress plot OUT` draws the same figures without it"
        )
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(folder) as writer:

        def both(stage: str, done: int, total: int, figures: dict[str, Any]) -> None:
            report(stage, done, total, figures)
            for name, value in figures.items():
                if isinstance(value, int | float):
                    writer.add_scalar(f"{stage}/{name}", value, done)

        yield both
