"""What a task is: examples in three splits, the kind of answer, and the metrics that count."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

KINDS = ("classification", "regression", "generation")


@dataclass(frozen=True)
class Example:
    """One labelled text.

    Args:
        text: what the model reads.
        pair: the second sentence of tasks that compare two.
        label: the class's index, or the number of a regression.
        references: what a generated text is compared with; the first is what training shows.
    """

    text: str
    pair: str | None = None
    label: float | int = 0
    references: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """A task, ready to train on.

    Args:
        labels: the classes' names; empty for regression and generation.
        metrics: names in METRICS; the first is the one that counts.
        test: what is measured once, at the end; never used to choose anything.
    """

    name: str
    kind: str
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    train: Sequence[Example]
    validation: Sequence[Example]
    test: Sequence[Example]
    licence: str = "unknown"

    @property
    def head_labels(self) -> tuple[str, ...] | None:
        """The classes of the head to train, none of them for a regression; None where texts are written."""
        return None if self.kind == "generation" else self.labels

    def limited(self, train: int | None, test: int | None, seed: int) -> Task:
        """The task with at most so many examples of each, chosen by the seed."""
        return replace(self, train=_some(self.train, train, seed), test=_some(self.test, test, seed))

    def sha256(self) -> str:
        """Hash of every example that is trained on, for the record."""
        digest = hashlib.sha256()
        for example in self.train:
            digest.update(repr(example).encode())
        return digest.hexdigest()


def _some(examples: Sequence[Example], count: int | None, seed: int) -> Sequence[Example]:
    if count is None or count >= len(examples):
        return examples
    return random.Random(seed).sample(list(examples), count)


@dataclass(frozen=True)
class TaskSource:
    """Where examples come from, and in which fields they are.

    Args:
        path: a folder of GLUE's files or of train/validation/test files, one file, or a hub data set id.
        text, pair, label: fields of a custom task.
        kind: of a custom task.
    """

    path: str | None = None
    text: str = "text"
    pair: str | None = None
    label: str = "label"
    kind: str = "classification"


def split_of(key: str, test: int, validation: int) -> str:
    """`train`, `validation` or `test` for everything that shares a key, by its hash; shares are tenths."""
    tenth = int(hashlib.sha256(key.encode()).hexdigest(), 16) % 10
    if tenth < test:
        return "test"
    return "validation" if tenth < test + validation else "train"
