"""Labelled examples as what a step is trained on: classes or numbers behind a head, or texts to write.

A batch is padded to its own longest example. A text to write is trained by next-token prediction on the answer alone,
with label smoothing as GPT-2's data-to-text results have it; logits are formed for the answer's positions only.

A teacher, a model that is fine-tuned for the task already, adds its answers: a * T^2 * KL(teacher || model) + (1 - a) *
loss of the labels, over classes or over the words of an answer; of a number, its squared error to the teacher's.

Shapes: B examples of a micro-batch, L tokens of the longest, T predicted tokens, K classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressor.retraining.distillation import Head, chunks_of, head_of, hidden_states
from compressor.tasks.encoding import Answers, Labelled


@dataclass(frozen=True)
class Teacher:
    """A dense model that is fine-tuned for the same task, by the same tokens.

    Args:
        kl_weight: a.
        temperature: T, of classes and words.
    """

    model: nn.Module
    kl_weight: float = 0.5
    temperature: float = 1.0

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Frozen, where the student is and in its dtype."""
        self.model.to(device).eval().requires_grad_(False)
        for parameter in self.model.parameters():  # buffers keep theirs: rotary frequencies must not be rounded
            parameter.data = parameter.data.to(dtype)

    def mixed(self, loss: Tensor, logits_TK: Tensor, taught_TK: Tensor) -> tuple[Tensor, dict[str, float]]:
        """The loss of the labels with the teacher's part, and that part for watching: T^2 * KL."""
        student, teacher = (F.log_softmax(x.float() / self.temperature, -1) for x in (logits_TK, taught_TK))
        kl = F.kl_div(student, teacher, log_target=True, reduction="batchmean") * self.temperature**2
        return torch.lerp(loss, kl, self.kl_weight), {"kl": float(kl.detach())}


class LabelledSentences:
    """Cross-entropy over classes, or squared error of a number."""

    def __init__(self, encoded: Labelled, teacher: Teacher | None = None) -> None:
        self.encoded, self.teacher = encoded, teacher

    @property
    def count(self) -> int:
        return len(self.encoded.ids)

    @property
    def tokens(self) -> int:
        return self.encoded.length

    def size(self, examples: Tensor) -> int:
        return len(examples)

    @property
    def lengths(self) -> list[int]:
        return [len(row) for row in self.encoded.ids]

    def identity(self) -> Iterable[Tensor]:
        return (*_ragged(self.encoded.ids), self.encoded.labels, *_weights_of(self.teacher))

    def prepare(self, model: nn.Module, dtype: torch.dtype) -> None:
        if self.teacher is not None:
            self.teacher.prepare(next(model.parameters()).device, dtype)

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
        if self.teacher is not None:
            with torch.no_grad():
                taught_BK = self.teacher.model(**batch).logits.float()
            if self.encoded.regression:
                loss = torch.lerp(loss, F.mse_loss(logits_BK, taught_BK), self.teacher.kl_weight)
            else:
                loss, more = self.teacher.mixed(loss, logits_BK, taught_BK)
                metrics |= more
        (loss * weight).backward()
        return {"total": float(loss.detach()), **metrics}


class WrittenAnswers:
    """Next-token prediction of the answers to prompts."""

    def __init__(self, encoded: Answers, label_smoothing: float = 0.1, teacher: Teacher | None = None) -> None:
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing {label_smoothing} given; it must lie in [0, 1)")
        self.encoded, self.label_smoothing, self.teacher = encoded, label_smoothing, teacher
        self._head: Head | None = None
        self._taught: Head | None = None

    @property
    def count(self) -> int:
        return len(self.encoded.prompts)

    @property
    def tokens(self) -> int:
        return self.encoded.length

    def size(self, examples: Tensor) -> int:
        return sum(len(self.encoded.targets[place]) for place in examples.tolist())

    @property
    def lengths(self) -> list[int]:
        return [len(start) + len(end) for start, end in zip(self.encoded.prompts, self.encoded.targets, strict=True)]

    def identity(self) -> Iterable[Tensor]:
        return (*_ragged(self.encoded.prompts), *_ragged(self.encoded.targets), *_weights_of(self.teacher))

    def prepare(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._head = head_of(model)
        if self.teacher is not None:
            self.teacher.prepare(next(model.parameters()).device, dtype)
            self._taught = head_of(self.teacher.model)

    def backward(self, model: nn.Module, examples: Tensor, weight: float) -> dict[str, float]:
        if self._head is None:
            raise RuntimeError("prepare() comes before backward()")
        device = next(model.parameters()).device
        ids_BL, answers_BL = (tensor.to(device) for tensor in self.encoded.batch(examples.tolist()))
        chosen = answers_BL[:, 1:]
        labels_T, hidden_TH = ids_BL[:, 1:][chosen], hidden_states(model, ids_BL)[:, :-1][chosen]
        taught_TH = None
        if self.teacher is not None:
            with torch.no_grad():
                taught_TH = hidden_states(self.teacher.model, ids_BL)[:, :-1][chosen]
        gradient, sums = torch.empty_like(hidden_TH), Counter[str]()
        for start, end in chunks_of(len(labels_T), self._head, hidden_TH):  # never the logits of all answers
            leaf_CH = hidden_TH[start:end].detach().requires_grad_()
            rows = slice(start, end)
            loss, metrics = self._loss(leaf_CH, labels_T[rows], None if taught_TH is None else taught_TH[rows])
            share = (end - start) / len(labels_T)
            (loss * weight * share).backward()
            assert leaf_CH.grad is not None
            gradient[rows] = leaf_CH.grad
            sums.update({name: value * share for name, value in {"total": float(loss.detach()), **metrics}.items()})
        hidden_TH.backward(gradient)
        return dict(sums)

    def _loss(self, hidden_CH: Tensor, labels_C: Tensor, taught_CH: Tensor | None) -> tuple[Tensor, dict[str, float]]:
        """Mean over a chunk, and its parts for watching."""
        assert self._head is not None
        logits = self._head(hidden_CH).float()
        loss = F.cross_entropy(logits, labels_C, label_smoothing=self.label_smoothing)
        metrics = {"ce": float(F.cross_entropy(logits.detach(), labels_C))}
        if taught_CH is None or self.teacher is None or self._taught is None:
            return loss, metrics
        with torch.no_grad():
            taught = self._taught(taught_CH)
        loss, more = self.teacher.mixed(loss, logits, taught)
        return loss, metrics | more


def _ragged(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Rows of different lengths as two tensors."""
    return torch.tensor([token for row in rows for token in row]), torch.tensor([len(row) for row in rows])


def _weights_of(teacher: Teacher | None) -> Iterable[Tensor]:
    return () if teacher is None else teacher.model.state_dict().values()


def objective_for(encoded: Labelled | Answers, label_smoothing: float, teacher: Teacher | None = None) -> Any:
    """The objective of a task's encoded examples."""
    if isinstance(encoded, Labelled):
        return LabelledSentences(encoded, teacher)
    return WrittenAnswers(encoded, label_smoothing, teacher)
