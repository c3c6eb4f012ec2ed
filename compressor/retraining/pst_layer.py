"""One linear under PST: the small matrices that train, the score they give, and their gradients.

    W' = W0 + beta * U V                                    U [O, r] ~ N(0, 1), V [r, I] = 0
    S  = |W'| + alpha1 * A B + alpha2 * (R + C)             A [O, r] ~ N(0, 1), B, R [O, 1], C [1, I] = 0
    y  = (M * W') x + b                                     M from S, straight-through: dL/dS = G * W'

with G = dL/d(M * W'). The module's parameter holds M * W', so the gradient that autograd leaves on it *is* G. A hook
turns G into the gradients of the small matrices, block of rows by block of rows, and drops it at once: never does
more than one layer's G exist, and neither W0 nor the bias has a gradient buffer.

Shapes: O out_features, I in_features, r rank, B rows of a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from compressor.calibration import is_conv1d, weight_of
from compressor.retraining.optimizers import Trained, Transform

TERMS = ("magnitude", "low_rank", "rows_columns")

# Entries handled at a time: the working set of a block stays in a core's cache.
_BLOCK = 1 << 17
_NORMAL = ("u", "a")


@dataclass
class Small(Trained):
    """A small fp32 matrix that is its own parameter, with whatever else its layer must find again after a restart."""

    beside: dict[str, Tensor] = field(default_factory=dict)

    def state(self) -> dict[str, Tensor]:
        return super().state() | {f"{self.name}/{kind}": tensor for kind, tensor in self.beside.items()}

    def publish(self, rows: slice = slice(None)) -> None:
        """Nothing to do: parameter and master are the same memory."""


def small(name: str, values: Tensor) -> Small:
    """A trained fp32 matrix."""
    parameter = nn.Parameter(values, requires_grad=False)
    zeros = torch.zeros_like(values), torch.zeros_like(values)
    return Small(name, parameter, False, parameter.data, *zeros)


def clock() -> tuple[Small, Tensor]:
    """Progress [1] as a snapshot keeps it, and the entry that carries it; nothing that trains."""
    entry, spent = small("clock", torch.zeros(0, 0)), torch.zeros(1, dtype=torch.float64)
    entry.beside["progress"] = spent
    return entry, spent


@dataclass(frozen=True)
class Terms:
    """What makes up W' and S; alpha1, alpha2 and beta as in the paper."""

    weight_rank: int
    score_rank: int
    alpha1: float
    alpha2: float
    beta: float
    score: tuple[str, ...]
    straight_through: bool


class ScoredLinear:
    """Rows of one linear with a score of their own: all of them, or q, k or v of a joint projection.

    Args:
        name: of the module, and of the part if there are several.
        rows: which output rows of the module's weight are meant.
    """

    def __init__(self, name: str, module: nn.Module, rows: slice, terms: Terms, generator: torch.Generator) -> None:
        self.name, self.rows, self.terms = name, rows, terms
        weight = module.weight
        assert isinstance(weight, nn.Parameter)
        self._parameter, self._turned = weight, is_conv1d(module)
        self.base = weight_of(module).detach()[rows].clone()
        height, width = self.base.shape
        self.mask = torch.ones(height, width, dtype=torch.bool, device=self.base.device)
        sizes = {"u": (height, terms.weight_rank), "v": (terms.weight_rank, width)}
        if "low_rank" in terms.score:
            sizes |= {"a": (height, terms.score_rank), "b": (terms.score_rank, width)}
        if "rows_columns" in terms.score:
            sizes |= {"r": (height, 1), "c": (1, width)}
        self.factors = {
            key: small(f"{name}.{key}", self._initial(key, size, generator).to(self.base.device))
            for key, size in sizes.items()
        }
        self.factors["u"].beside["mask"] = self.mask
        self.transform: Transform | None = None
        self.movement: Tensor | None = None

    @staticmethod
    def _initial(key: str, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        return torch.randn(size, generator=generator) if key in _NORMAL else torch.zeros(size)

    def cast(self, dtype: torch.dtype) -> None:
        """Keep W0 in the compute dtype."""
        self.base = self.base.to(dtype)

    def _value(self, key: str) -> Tensor:
        return self.factors[key].master

    def blocks(self) -> Iterator[slice]:
        """Rows that are worked on together."""
        height, width = self.base.shape
        step = max(1, _BLOCK // width) if self.base.device.type == "cpu" else height
        return (slice(start, min(start + step, height)) for start in range(0, height, step))

    def weight(self, rows: slice = slice(None)) -> Tensor:
        """W' [B, I] in fp32."""
        return torch.addmm(self.base[rows].float(), self._value("u")[rows], self._value("v"), alpha=self.terms.beta)

    def learned_score(self, rows: slice = slice(None)) -> Tensor:
        """alpha1 * A B + alpha2 * (R + C) [B, I]: what is learned of the score."""
        score = torch.zeros(self.base[rows].shape, device=self.base.device)
        if "rows_columns" in self.terms.score:
            torch.add(self._value("r")[rows], self._value("c"), out=score).mul_(self.terms.alpha2)
        if "low_rank" in self.terms.score:
            score.addmm_(self._value("a")[rows], self._value("b"), alpha=self.terms.alpha1)
        return score

    def score(self) -> Tensor:
        """S [O, I]."""
        score = torch.empty(self.base.shape, device=self.base.device)
        for rows in self.blocks():
            score[rows] = self.learned_score(rows)
            if "magnitude" in self.terms.score:
                score[rows] += self.weight(rows).abs_()
        return score

    def masked(self, rows: slice = slice(None)) -> Tensor:
        """M * W' [B, I] in fp32."""
        return self.weight(rows).mul_(self.mask[rows].view(torch.int8))

    @torch.no_grad()
    def publish(self) -> None:
        """Let the forward see M * W', on its packed grid when a transform is set."""
        seen = self._seen(self._parameter.detach())
        for rows in self.blocks():
            values = self.masked(rows)
            seen[rows].copy_(values if self.transform is None else self.transform(values, rows))

    def _seen(self, tensor: Tensor) -> Tensor:
        return (tensor.t() if self._turned else tensor)[self.rows]

    @torch.no_grad()
    def project(self, gradient: Tensor) -> None:
        """Add what G, as the module's parameter is oriented, means for the small matrices to their gradients."""
        found = {
            key: factor.parameter.grad if factor.parameter.grad is not None else torch.zeros_like(factor.master)
            for key, factor in self.factors.items()
        }
        g_OI = self._seen(gradient)
        for rows in self.blocks():
            self._project_rows(g_OI[rows].float(), rows, found)
        for key, factor in self.factors.items():
            factor.parameter.grad = found[key]

    def _project_rows(self, g_BI: Tensor, rows: slice, found: dict[str, Tensor]) -> None:
        terms = self.terms
        w_BI = self.weight(rows)
        slope_BI = g_BI * w_BI  # dL/dS
        if self.movement is not None:
            self.movement[rows] -= slope_BI
        if "low_rank" in terms.score:
            found["a"][rows].addmm_(slope_BI, self._value("b").t(), alpha=terms.alpha1)
            found["b"].addmm_(self._value("a")[rows].t(), slope_BI, alpha=terms.alpha1)
        if "rows_columns" in terms.score:
            found["r"][rows].add_(slope_BI.sum(1, keepdim=True), alpha=terms.alpha2)
            found["c"].add_(slope_BI.sum(0, keepdim=True), alpha=terms.alpha2)
        # dL/dW' = M * G, and through |W'| in the score sign(W') * dL/dS = |W'| * G.
        factor_BI = self.mask[rows].view(torch.int8).float()
        if "magnitude" in terms.score and terms.straight_through:
            factor_BI += w_BI.abs_()
        g_BI = g_BI * factor_BI
        found["u"][rows].addmm_(g_BI, self._value("v").t(), alpha=terms.beta)
        found["v"].addmm_(self._value("u")[rows].t(), g_BI, alpha=terms.beta)

    def track_movement(self) -> None:
        """Also add up the true -G * W' [O, I], to compare the learned score with; for measurements only."""
        self.movement = torch.zeros(self.base.shape, device=self.base.device)


def part_names(name: str, module: nn.Module) -> list[str]:
    """The linear's own name, or those of q, k and v in GPT-2's joint projection."""
    joint = is_conv1d(module) and name.rpartition(".")[2] == "c_attn" and weight_of(module).shape[0] % 3 == 0
    return [f"{name}.{part}" for part in "qkv"] if joint else [name]


def scored_parts(name: str, module: nn.Module, terms: Terms, generator: torch.Generator) -> list[ScoredLinear]:
    """A linear as one part, or a joint projection as several, each with ranks and threshold of its own."""
    names = part_names(name, module)
    height = weight_of(module).shape[0] // len(names)
    return [
        ScoredLinear(part, module, slice(place * height, (place + 1) * height), terms, generator)
        for place, part in enumerate(names)
    ]


def cubic(progress: float, initial: float, final: float, start: float, end: float) -> float:
    """Sparsity after a share of the budget: `initial` until `start`, `final` in the last `end`, cubic between."""
    if progress <= start:
        return initial
    if progress >= 1.0 - end:
        return final
    along = (progress - start) / (1.0 - start - end)
    return final + (initial - final) * math.pow(1.0 - along, 3)
