"""Blocks of text as training examples: next-token prediction and distillation from the dense teacher.

Shapes: N blocks of text, L tokens in a block, B blocks of a micro-batch, T predicting positions, H hidden size.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from compressor.retraining.distillation import Head, chunked_loss, head_of, hidden_states, next_tokens


class TextDistillation:
    """a*KL(teacher || student) * T^2 + (1-a)*CE over blocks of text.

    Args:
        tokens_NL: the blocks.
        teacher: the dense model; not needed when `kl_weight` is 0.
        kl_weight: a.
        temperature: T of the published code; the paper's formula has none (1).
    """

    def __init__(
        self, tokens_NL: Tensor, teacher: nn.Module | None, *, kl_weight: float = 1.0, temperature: float = 1.0
    ) -> None:
        if tokens_NL.dim() != 2 or tokens_NL.shape[0] < 1 or tokens_NL.shape[1] < 2:
            raise ValueError(
                f"text of shape {tuple(tokens_NL.shape)} given; blocks [N, L] of at least 2 tokens are needed"
            )
        if kl_weight > 0 and teacher is None:
            raise ValueError(f"kl_weight {kl_weight} given without a dense teacher; give one, or kl_weight 0")
        self.tokens_NL, self.kl_weight, self.temperature = tokens_NL, kl_weight, temperature
        self._teacher = teacher if kl_weight > 0 else None
        self._heads: tuple[Head, Head | None] | None = None

    @property
    def count(self) -> int:
        return len(self.tokens_NL)

    @property
    def tokens(self) -> int:
        return self.tokens_NL.shape[1]

    def identity(self) -> Iterable[Tensor]:
        return (self.tokens_NL,)

    def prepare(self, model: nn.Module, dtype: torch.dtype) -> None:
        teacher = self._teacher
        if teacher is not None:
            teacher.eval().requires_grad_(False)
            for parameter in teacher.parameters():
                parameter.data = parameter.data.to(dtype)
        self._heads = head_of(model), None if teacher is None else head_of(teacher)

    def backward(self, model: nn.Module, examples: Tensor, weight: float) -> dict[str, float]:
        if self._heads is None:
            raise RuntimeError("prepare() comes before backward()")
        ids_BL = self.tokens_NL[examples].to(next(model.parameters()).device)
        positions, labels = next_tokens(ids_BL)
        teacher_TH = self._teacher_states(ids_BL, positions)
        student_TH = hidden_states(model, ids_BL).flatten(0, 1)[positions]
        loss, gradient = chunked_loss(
            student_TH,
            self._heads[0],
            labels,
            teacher_TH=teacher_TH,
            teacher_head=self._heads[1],
            kl_weight=self.kl_weight,
            temperature=self.temperature,
            weight=weight,
        )
        student_TH.backward(gradient)
        return {"total": loss.total, "kl": loss.kl, "ce": loss.ce}

    @torch.no_grad()
    def _teacher_states(self, ids_BL: Tensor, positions: Tensor) -> Tensor | None:
        if self._teacher is None:
            return None
        return hidden_states(self._teacher, ids_BL).flatten(0, 1)[positions]
