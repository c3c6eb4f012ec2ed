"""What retraining on a CPU does beside matrix products: the loss, the norm of the gradients and the optimiser's step.

Each passes once over memory.
"""

from __future__ import annotations

import torch
from torch import Tensor


def adam_step(
    master: Tensor,
    momentum: Tensor,
    variance: Tensor,
    gradient: Tensor,
    mask: Tensor | None,
    visible: Tensor | None,
    *,
    scale: float,
    rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    mask_decay: float,
    step: int,
    decoupled: bool,
    prunes: bool,
    scales: Tensor | None = None,
    grid: tuple[int, int] = (0, 0),
) -> None:
    """Adam in place on tensors of one shape, with AST's decay of masked weights (retraining/optimizers.py).

    Args:
        master: fp32, like `momentum` and `variance`; contiguous.
        gradient: bf16, fp16 or fp32; it is multiplied by `scale`.
        mask: bool, of kept weights.
        visible: what the forward sees, written anew: the master or, with `prunes`, the kept part of it; contiguous.
        step: counts from 1, for the bias corrections.
        decoupled: the decay enters after the momentum, not before.
        scales: fp32 [O, G]; what the forward sees is then rounded to whole multiples of its group's scale.
        grid: the least and the greatest multiple.

    Raises:
        RuntimeError: sizes, dtypes or layouts that do not fit.
    """
    torch.ops.halfweight.adam_step(
        master,
        momentum,
        variance,
        gradient,
        None if mask is None else mask.view(torch.uint8),
        visible,
        scales,
        grid[0],
        grid[1],
        scale,
        rate,
        beta1,
        beta2,
        eps,
        weight_decay,
        mask_decay,
        1.0 - beta1**step,
        (1.0 - beta2**step) ** 0.5,
        decoupled,
        prunes,
    )


def refresh(master: Tensor, mask: Tensor, visible: Tensor | None) -> tuple[int, float, float]:
    """Choose a 2:4 mask anew by |W|, as `n_m_mask` does, in place.

    Args:
        master: fp32 [O, I], I a multiple of 4; contiguous.
        mask: bool [O, I].
        visible: what the forward sees, M*W, written anew; contiguous.

    Returns:
        How many bits of the mask changed; sums of |w| of the kept weights and of all.

    Raises:
        RuntimeError: sizes, dtypes or layouts that do not fit.
    """
    changed, kept, total = torch.ops.halfweight.refresh(master, mask.view(torch.uint8), visible)
    return changed, kept, total


def distil(
    student: Tensor, teacher: Tensor | None, labels: Tensor, *, kl_weight: float, temperature: float, scale: float
) -> tuple[Tensor, Tensor]:
    """Loss a * T^2 * KL + (1 - a) * CE of rows of logits (retraining/distillation.py), and its slope.

    Args:
        student: logits [C, V], bf16, fp16 or fp32.
        teacher: the same of the teacher; None for cross-entropy alone.
        labels: int64 [C].
        kl_weight: a.
        scale: what the slope is multiplied by.

    Returns:
        d(sum of the loss)/d(student) * scale [C, V] in the student's dtype, and T^2 * KL and CE of every row [C, 2].

    Raises:
        RuntimeError: shapes or dtypes that do not fit, or a label that is no column.
    """
    slope, sums = torch.ops.halfweight.distil(student, teacher, labels, kl_weight, temperature, scale)
    return slope, sums


def sum_squares(x: Tensor) -> float:
    """Sum of the squares of bf16, fp16 or fp32 values; the same bits for any number of threads."""
    total: float = torch.ops.halfweight.sum_squares(x)
    return total
