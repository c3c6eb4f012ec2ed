"""Blocks of text as training examples: next-token prediction and distillation from the dense teacher.

Shapes: N blocks of text, L tokens in a block, B blocks of a micro-batch, P = L - 1 predicting positions of a block,
T = B * P, H hidden size, k kept tokens.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from compressor.retraining.distillation import (
    Head,
    TopK,
    block_outputs,
    chunked_loss,
    chunks_of,
    head_of,
    hidden_states,
    next_tokens,
)
from compressor.retraining.teacher_cache import KINDS, TeacherCache, cache_key

DISTILL = ("kl", "hidden")


class TextDistillation:
    """a*KL(teacher || student) * T^2 + (1-a)*CE over blocks of text.

    Args:
        tokens_NL: the blocks.
        teacher: the dense model; not needed when `kl_weight` is 0.
        kl_weight: a.
        temperature: T of the published code; the paper's formula has none (1).
        cache: what is kept on disk of the teacher: "off", "hidden" or "top-k" (teacher_cache.py).
        top_k: tokens kept with "top-k".
        distill: "kl", or "hidden": in place of KL the squared error of every block's output as a share of the
            teacher's (SquareHead, arXiv 2310.06927, but token by token and bounded: the first ones are a thousand times
            larger), which the paper found to be worse.
        hidden_weight: of that error as a further term, beside KL and CE.
    """

    def __init__(
        self,
        tokens_NL: Tensor,
        teacher: nn.Module | None,
        *,
        kl_weight: float = 1.0,
        temperature: float = 1.0,
        cache: str = "off",
        top_k: int = 64,
        distill: str = "kl",
        hidden_weight: float = 0.0,
    ) -> None:
        if tokens_NL.dim() != 2 or tokens_NL.shape[0] < 1 or tokens_NL.shape[1] < 2:
            raise ValueError(
                f"text of shape {tuple(tokens_NL.shape)} given; blocks [N, L] of at least 2 tokens are needed"
            )
        if kl_weight > 0 and teacher is None:
            raise ValueError(f"kl_weight {kl_weight} given without a dense teacher; give one, or kl_weight 0")
        if cache not in KINDS:
            raise ValueError(f"teacher_cache {cache!r} given; accepted are {', '.join(KINDS)}")
        if distill not in DISTILL:
            raise ValueError(f"distill {distill!r} given; accepted are {', '.join(DISTILL)}")
        if hidden_weight < 0 or (hidden_weight > 0 and teacher is None):
            raise ValueError(f"hidden_weight {hidden_weight} given; it needs the dense teacher, and is not negative")
        if (distill == "hidden" or hidden_weight > 0) and cache != "off":
            raise ValueError(
                "distill 'hidden' and hidden_weight compare every block, which no teacher cache holds; give "
                "teacher_cache off"
            )
        if distill == "hidden" and kl_weight > 0:  # in place of KL
            kl_weight, self._ce_weight, self._hidden_weight = 0.0, 1.0 - kl_weight, hidden_weight + kl_weight
        else:
            self._ce_weight, self._hidden_weight = 1.0, hidden_weight
        self.tokens_NL, self.kl_weight, self.temperature = tokens_NL, kl_weight, temperature
        self._kind, self._top_k = cache, top_k
        self._teacher = teacher if kl_weight > 0 or self._hidden_weight > 0 else None
        self._heads: tuple[Head, Head | None] | None = None
        self._cache: TeacherCache | None = None

    @property
    def count(self) -> int:
        return len(self.tokens_NL)

    @property
    def tokens(self) -> int:
        return self.tokens_NL.shape[1]

    def size(self, examples: Tensor) -> int:
        return len(examples)

    @property
    def lengths(self) -> None:
        """Blocks are all alike."""

    def identity(self) -> Iterable[Tensor]:
        return (self.tokens_NL,)

    def prepare(self, model: nn.Module, dtype: torch.dtype) -> None:
        teacher = self._teacher
        if teacher is not None:
            teacher.to(next(model.parameters()).device).eval().requires_grad_(False)
            for parameter in teacher.parameters():
                parameter.data = parameter.data.to(dtype)
            if self._kind != "off":
                self._cache = self._open_cache(teacher, dtype)
        self._heads = head_of(model), None if teacher is None else head_of(teacher)

    def _open_cache(self, teacher: nn.Module, dtype: torch.dtype) -> TeacherCache:
        hidden = self._kind == "hidden"
        kept = dtype if hidden else (self._top_k, self.temperature)
        key = cache_key(teacher, self.tokens_NL, self._kind, kept)
        positions = self.tokens - 1
        with torch.no_grad():
            width = hidden_states(teacher, self.tokens_NL[:1, :2].to(next(teacher.parameters()).device)).shape[-1]
        if hidden:
            return TeacherCache(key, self.count, {"hidden": ((positions, width), dtype)})
        shape = (positions, self._top_k)
        return TeacherCache(key, self.count, {"log_p": (shape, torch.float16), "ids": (shape, torch.int32)})

    def backward(self, model: nn.Module, examples: Tensor, weight: float) -> dict[str, float]:
        if self._heads is None:
            raise RuntimeError("prepare() comes before backward()")
        ids_BL = self.tokens_NL[examples].to(next(model.parameters()).device)
        positions, labels = next_tokens(ids_BL)
        if self._hidden_weight > 0:
            return self._backward_hidden(model, ids_BL, weight)
        teacher_TH, top_k = self._teacher_says(ids_BL, examples)
        student_TH = hidden_states(model, ids_BL).flatten(0, 1)[positions]
        loss, gradient = chunked_loss(
            student_TH,
            self._heads[0],
            labels,
            teacher_TH=teacher_TH,
            teacher_head=self._heads[1],
            top_k=top_k,
            kl_weight=self.kl_weight,
            temperature=self.temperature,
            weight=weight,
        )
        student_TH.backward(gradient)
        return {"total": loss.total, "kl": loss.kl, "ce": loss.ce}

    def _backward_hidden(self, model: nn.Module, ids_BL: Tensor, weight: float) -> dict[str, float]:
        assert self._teacher is not None and self._heads is not None
        with torch.no_grad():
            theirs = block_outputs(self._teacher, ids_BL)
        ours = block_outputs(model, ids_BL)
        apart = torch.stack([_apart(mine, other) for mine, other in zip(ours, theirs, strict=True)]).mean()
        positions, labels = next_tokens(ids_BL)
        student_TH = ours[-1].flatten(0, 1)[positions]
        loss, gradient = chunked_loss(
            student_TH,
            self._heads[0],
            labels,
            teacher_TH=theirs[-1].flatten(0, 1)[positions],
            teacher_head=self._heads[1],
            kl_weight=self.kl_weight,
            temperature=self.temperature,
            weight=weight * self._ce_weight,
        )
        torch.autograd.backward([student_TH, apart], [gradient, apart.new_tensor(self._hidden_weight * weight)])
        far = float(apart.detach())
        total = self._hidden_weight * far + self._ce_weight * loss.total
        return {"total": total, "hidden": far, "kl": loss.kl, "ce": loss.ce}

    @torch.no_grad()
    def _teacher_says(self, ids_BL: Tensor, examples: Tensor) -> tuple[Tensor | None, TopK | None]:
        """The teacher's hidden states [T, H], or the most likely tokens that a cache holds."""
        if self._teacher is None:
            return None, None
        if self._cache is None:
            return hidden_states(self._teacher, ids_BL)[:, :-1].flatten(0, 1), None
        found = [self._cache.get(int(block)) for block in examples]
        if any(block is None for block in found):
            for number, block in zip(examples.tolist(), self._ask(ids_BL), strict=True):
                self._cache.put(number, block)
            # Read back, so that the first student sees what later ones will: values as they are stored.
            found = [self._cache.get(int(block)) for block in examples]
        rows = {
            name: torch.cat([block[name] for block in found if block is not None]).to(ids_BL.device)
            for name in found[0] or ()
        }
        if self._kind == "hidden":
            return rows["hidden"].to(next(self._teacher.parameters()).dtype), None
        return None, TopK(rows["log_p"], rows["ids"])

    def _ask(self, ids_BL: Tensor) -> Iterable[dict[str, Tensor]]:
        """What the cache keeps of each block, freshly computed."""
        assert self._teacher is not None and self._heads is not None and self._heads[1] is not None
        for hidden_PH in hidden_states(self._teacher, ids_BL)[:, :-1]:
            if self._kind == "hidden":
                yield {"hidden": hidden_PH}
                continue
            kept = [
                torch.log_softmax(self._heads[1](hidden_PH[start:end]).float() / self.temperature, -1).topk(self._top_k)
                for start, end in chunks_of(len(hidden_PH), self._heads[1], hidden_PH)
            ]
            yield {"log_p": torch.cat([one.values for one in kept]), "ids": torch.cat([one.indices for one in kept])}


def _apart(mine_BLH: Tensor, other_BLH: Tensor) -> Tensor:
    """How far the states of a block are apart: mean over tokens of d / (1 + d), d = |mine - other|^2 / |other|^2.

    Bounded, for a token whose state is near zero would outweigh all others.
    """
    other = other_BLH.float()
    d = (mine_BLH.float() - other).square().sum(-1) / other.square().sum(-1)
    return (1.0 - 1.0 / (1.0 + d)).mean()
