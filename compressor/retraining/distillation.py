"""Loss against the dense teacher, in chunks of tokens, with no full logits copy of either model.

    L = a * KL(teacher || student) * T^2 + (1 - a) * CE          per-token mean, full vocabulary (AST, eq. 4)

Both models run to their last hidden states only. For a chunk of tokens the two heads give logits, the loss and its
gradient with respect to the student's logits are formed at once (softmax differences, no graph),
and pushed back through the head; the chunk's logits are then gone. Peak: a few chunks by V floats.

Shapes: T tokens of the batch, C tokens of a chunk, H hidden size, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor import kernels
from compressor.calibration import evaluating
from compressor.kernels import training

# Logits held per buffer: 16 MB in fp32, so the dozen passes over a chunk stay in a server CPU's cache.
_CHUNK_LOGITS = 1 << 22

# Probabilities of "all other tokens" below this are rounding errors of the sum over the kept ones.
_REST = 1e-6

Head = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class TopK:
    """A teacher's most likely next tokens: log-probabilities [T, k] and ids [T, k]; all others count as one token."""

    log_p: Tensor
    ids: Tensor

    def __getitem__(self, rows: slice) -> "TopK":
        return TopK(self.log_p[rows], self.ids[rows])


@dataclass(frozen=True)
class Loss:
    """Per-token means; `total` is what was differentiated."""

    total: float
    kl: float
    ce: float


def hidden_states(model: nn.Module, ids_BL: Tensor) -> Tensor:
    """Last hidden states [B, L, H], what the head reads."""
    body: Any = getattr(model, "base_model", None)
    output = body(input_ids=ids_BL, use_cache=False)
    hidden: Tensor = output.last_hidden_state
    return hidden


def block_outputs(model: nn.Module, ids_BL: Tensor) -> tuple[Tensor, ...]:
    """Outputs of all blocks [B, L, H]; the last is what the head reads."""
    body: Any = getattr(model, "base_model", None)
    outputs: tuple[Tensor, ...] = body(input_ids=ids_BL, use_cache=False, output_hidden_states=True).hidden_states[1:]
    return outputs


def head_of(model: nn.Module) -> Head:
    """The model's map from hidden states to logits, checked against its own forward pass."""
    get_head = getattr(model, "get_output_embeddings", None)
    module: Any = None if get_head is None else get_head()
    if module is None:
        raise ValueError(f"{type(model).__name__} has no LM head; a causal language model is needed")
    cap = getattr(getattr(model, "config", None), "final_logit_softcapping", None)

    def head(hidden: Tensor) -> Tensor:
        logits: Tensor = module(hidden)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    _check_head(model, head)
    return head


@torch.no_grad()
def _check_head(model: nn.Module, head: Head) -> None:
    """A model that scales or shifts its logits in a way unknown here would be distilled wrongly: refuse it."""
    ids = torch.arange(4, device=next(model.parameters()).device).unsqueeze(0)
    ours = head(hidden_states(model, ids)).float()
    theirs = model(input_ids=ids, use_cache=False).logits.float()
    if not torch.allclose(ours, theirs, rtol=2e-2, atol=2e-2 * float(theirs.abs().max())):
        raise ValueError(f"the logits of {type(model).__name__} are not its head applied to its last hidden states")


def chunked_loss(
    student_TH: Tensor,
    student_head: Head,
    labels_T: Tensor,
    *,
    teacher_TH: Tensor | None = None,
    teacher_head: Head | None = None,
    top_k: TopK | None = None,
    kl_weight: float = 0.0,
    temperature: float = 1.0,
    weight: float = 1.0,
) -> tuple[Loss, Tensor]:
    """The loss and its gradient with respect to the student's hidden states; head gradients are left on the head.

    Args:
        top_k: in place of the teacher's hidden states and head.
        kl_weight: a; above 0 needs the teacher.
        weight: what the gradient is multiplied by (one over the number of micro-batches).
    """
    count, gradient = student_TH.shape[0], torch.empty_like(student_TH)
    kl_sum = ce_sum = 0.0
    for start, end in chunks_of(count, student_head, student_TH):
        hidden = student_TH[start:end].detach().requires_grad_()
        with torch.enable_grad():
            logits_CV = student_head(hidden)
        teacher_CV: Tensor | TopK | None = None
        if kl_weight > 0 and top_k is not None:
            teacher_CV = top_k[start:end]
        elif kl_weight > 0:
            assert teacher_TH is not None and teacher_head is not None
            with torch.no_grad():
                teacher_CV = teacher_head(teacher_TH[start:end])
        kl, ce, slope_CV = _loss_and_slope(
            logits_CV.detach(), teacher_CV, labels_T[start:end], kl_weight, temperature, weight / count
        )
        logits_CV.backward(slope_CV)
        assert hidden.grad is not None
        gradient[start:end] = hidden.grad
        kl_sum, ce_sum = kl_sum + kl, ce_sum + ce
    kl, ce = kl_sum / count, ce_sum / count
    return Loss(kl_weight * kl + (1.0 - kl_weight) * ce, kl, ce), gradient


def chunks_of(count: int, head: Head, hidden_TH: Tensor) -> list[tuple[int, int]]:
    """Equal chunks, so that no small rest wastes a pass over the head's weights."""
    with torch.no_grad():
        vocabulary = head(hidden_TH[:1]).shape[-1]
    number = max(1, -(-count * vocabulary // _CHUNK_LOGITS))
    size = -(-count // number)
    return [(start, min(start + size, count)) for start in range(0, count, size)]


@torch.no_grad()
def _loss_and_slope(
    student_CV: Tensor,
    teacher_CV: Tensor | TopK | None,
    labels_C: Tensor,
    kl_weight: float,
    temperature: float,
    scale: float,
) -> tuple[float, float, Tensor]:
    """Sums of KL (times T^2) and CE over the chunk, and scale * d(loss sum)/d(student logits) in their dtype."""
    if kernels.available() and student_CV.device.type == "cpu" and not isinstance(teacher_CV, TopK):
        slope, sums = training.distil(
            student_CV, teacher_CV, labels_C, kl_weight=kl_weight, temperature=temperature, scale=scale
        )
        kl, ce = sums.sum(0, dtype=torch.float64).tolist()
        return kl, ce, slope
    kl, ce, slope = _loss_and_slope_by_torch(student_CV, teacher_CV, labels_C, kl_weight, temperature)
    return kl, ce, slope.mul_(scale).to(student_CV.dtype)


def _loss_and_slope_by_torch(
    student_CV: Tensor, teacher_CV: Tensor | TopK | None, labels_C: Tensor, kl_weight: float, temperature: float
) -> tuple[float, float, Tensor]:
    ce, slope = 0.0, None
    if kl_weight < 1.0 or temperature != 1.0:
        log_q = torch.log_softmax(student_CV, dim=-1, dtype=torch.float32)
        ce = -float(_picked(log_q, labels_C).sum())
        if kl_weight < 1.0:
            slope = log_q.exp_()
            slope[torch.arange(len(labels_C), device=slope.device), labels_C] -= 1.0
            slope.mul_(1.0 - kl_weight)
    if teacher_CV is None:
        assert slope is not None
        return 0.0, ce, slope
    log_q = _log_softmax(student_CV, temperature)
    if temperature == 1.0:
        ce = -float(_picked(log_q, labels_C).sum())
    compare = _against_top_k if isinstance(teacher_CV, TopK) else _against_all
    kl, kl_slope = compare(teacher_CV, log_q, temperature)  # type: ignore[arg-type]
    kl, kl_slope = kl * temperature**2, kl_slope.mul_(kl_weight * temperature)
    return kl, ce, kl_slope if slope is None else slope.add_(kl_slope)


def _against_all(teacher_CV: Tensor, log_q_CV: Tensor, temperature: float) -> tuple[float, Tensor]:
    """KL summed over the chunk and its slope; `log_q_CV` is used up."""
    log_p = _log_softmax(teacher_CV, temperature)
    p = log_p.exp()
    kl = float(torch.linalg.vecdot(p, log_p.sub_(log_q_CV)).sum())
    return kl, log_q_CV.exp_().sub_(p)


def _against_top_k(teacher: TopK, log_q_CV: Tensor, _temperature: float) -> tuple[float, Tensor]:
    """KL between distributions over the k kept tokens and one that stands for all others.

    Slope q - p on kept tokens, q * (1 - p_rest / q_rest) on others: those keep their proportions.
    """
    log_p, ids = teacher.log_p.to(torch.float32), teacher.ids.to(torch.int64)
    log_q, p = log_q_CV.gather(-1, ids), log_p.exp()
    q_CV = log_q_CV.exp_()
    p_rest = (1.0 - p.sum(-1)).clamp_min(_REST)
    q_rest = (1.0 - q_CV.gather(-1, ids).sum(-1)).clamp_min(_REST)
    kl = float((p * (log_p - log_q)).sum() + (p_rest * (p_rest / q_rest).log()).sum())
    kept = q_CV.gather(-1, ids) - p
    return kl, q_CV.mul_((1.0 - p_rest / q_rest).unsqueeze(-1)).scatter_(-1, ids, kept)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    if temperature == 1.0:
        return torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    return torch.log_softmax(logits.to(torch.float32) / temperature, dim=-1)


def _picked(log_q_CV: Tensor, labels_C: Tensor) -> Tensor:
    return log_q_CV.gather(-1, labels_C.unsqueeze(-1)).squeeze(-1)


def next_tokens(ids_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Mask-free next-token prediction: which positions predict, and what, both flat."""
    positions = torch.ones_like(ids_BL, dtype=torch.bool)
    positions[:, -1] = False
    return positions.flatten(), ids_BL[:, 1:].reshape(-1)


@torch.no_grad()
def text_loss(model: nn.Module, blocks_NL: Tensor, batch: int = 4) -> float:
    """Mean next-token cross-entropy (nats) over token blocks; exp of it is the perplexity at window L."""
    with evaluating(model):
        head = head_of(model)
        device = next(model.parameters()).device
        sums = [_text_loss_sum(model, head, ids.to(device)) for ids in blocks_NL.split(batch)]
    return sum(sums) / blocks_NL[:, 1:].numel()


def _text_loss_sum(model: nn.Module, head: Head, ids_BL: Tensor) -> float:
    positions, labels = next_tokens(ids_BL)
    hidden = hidden_states(model, ids_BL).flatten(0, 1)[positions]
    total = 0.0
    for start, end in chunks_of(len(labels), head, hidden):
        log_q = torch.log_softmax(head(hidden[start:end]), dim=-1, dtype=torch.float32)
        total -= float(_picked(log_q, labels[start:end]).sum())
    return total
