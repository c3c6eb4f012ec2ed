"""Labelled examples as what a step is trained on: classes or numbers behind a head, or texts to write.

A batch is padded to its own longest example. A text to write is trained by next-token prediction on the answer alone,
with label smoothing as GPT-2's data-to-text results have it; logits are formed for the answer's positions only.

Shapes: B examples of a micro-batch, L tokens of the longest, T predicted tokens, K classes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressor.retraining.distillation import Head, head_of, hidden_states
from compressor.tasks.encoding import Answers, Labelled


class LabelledSentences:
    """Cross-entropy over classes, or squared error of a number."""

    def __init__(self, encoded: Labelled) -> None:
        self.encoded = encoded

    @property
    def count(self) -> int:
        return len(self.encoded.ids)

    @property
    def tokens(self) -> int:
        return self.encoded.length

    @property
    def lengths(self) -> list[int]:
        return [len(row) for row in self.encoded.ids]

    def identity(self) -> Iterable[Tensor]:
        return (*_ragged(self.encoded.ids), self.encoded.labels)

    def prepare(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Nothing beside the model runs."""

    def backward(self, model: nn.Module, examples: Tensor, weight: float) -> dict[str, float]:
        device = next(model.parameters()).device
        batch = {name: tensor.to(device) for name, tensor in self.encoded.batch(examples.tolist()).items()}
        labels = self.encoded.labels[examples].to(device)
        logits_BK = model(**batch).logits.float()
        if self.encoded.regression:
            loss = F.mse_loss(logits_BK.squeeze(-1), labels.float())
            metrics = {}
        else:
            loss = F.cross_entropy(logits_BK, labels)
            metrics = {"accuracy": float((logits_BK.argmax(-1) == labels).float().mean())}
        if bool(torch.isfinite(loss)):
            (loss * weight).backward()
        return {"total": float(loss.detach()), **metrics}


class WrittenAnswers:
    """Next-token prediction of the answers to prompts."""

    def __init__(self, encoded: Answers, label_smoothing: float = 0.1) -> None:
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing {label_smoothing} given; it must lie in [0, 1)")
        self.encoded, self.label_smoothing = encoded, label_smoothing
        self._head: Head | None = None

    @property
    def count(self) -> int:
        return len(self.encoded.prompts)

    @property
    def tokens(self) -> int:
        return self.encoded.length

    @property
    def lengths(self) -> list[int]:
        return [len(start) + len(end) for start, end in zip(self.encoded.prompts, self.encoded.targets, strict=True)]

    def identity(self) -> Iterable[Tensor]:
        return (*_ragged(self.encoded.prompts), *_ragged(self.encoded.targets))

    def prepare(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._head = head_of(model)

    def backward(self, model: nn.Module, examples: Tensor, weight: float) -> dict[str, float]:
        if self._head is None:
            raise RuntimeError("prepare() comes before backward()")
        device = next(model.parameters()).device
        ids_BL, answers_BL = (tensor.to(device) for tensor in self.encoded.batch(examples.tolist()))
        hidden_TH = hidden_states(model, ids_BL)[:, :-1][answers_BL[:, 1:]]
        logits = self._head(hidden_TH).float()
        labels_T = ids_BL[:, 1:][answers_BL[:, 1:]]
        loss = F.cross_entropy(logits, labels_T, label_smoothing=self.label_smoothing)
        if bool(torch.isfinite(loss)):
            (loss * weight).backward()
        with torch.no_grad():
            plain = F.cross_entropy(logits, labels_T)
        return {"total": float(loss.detach()), "ce": float(plain)}


def _ragged(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Rows of different lengths as two tensors."""
    return torch.tensor([token for row in rows for token in row]), torch.tensor([len(row) for row in rows])


def objective_for(encoded: Labelled | Answers, label_smoothing: float) -> Any:
    """The objective of a task's encoded examples."""
    if isinstance(encoded, Labelled):
        return LabelledSentences(encoded)
    return WrittenAnswers(encoded, label_smoothing)
