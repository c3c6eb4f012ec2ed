"""Masks from scores, and the checks on them. Pure functions, nothing here knows a model.

A mask is a `torch.bool` tensor of the weight's shape, True where the weight is kept. Its shape says which masks are
possible: n of every m consecutive entries of the last dimension (the input features of one output row), or a share of
the whole layer. Ties go to the earlier position, so a mask is a function of its scores alone and bytes are
reproducible.

Shapes: O out_features, I in_features, G = number of groups of m, B = rows of one block.
"""

from __future__ import annotations

import math
import re
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

# Entries handled at a time: the working set of a 2:4 selection stays in a core's cache.
_BLOCK = 1 << 18
_N_M = re.compile(r"(\d{1,4}):(\d{1,4})")
_SHARE = re.compile(r"(\d{1,2}(?:\.\d+)?)\s*%")
ACCEPTED = "2:4, another n:m such as 1:4 or 4:8, or the share of a layer's weights to prune such as 50%"


@dataclass(frozen=True)
class MaskShape:
    """Which masks are possible.

    Args:
        n: entries kept of every m consecutive ones of a row.
        m: length of a group.
        pruned: unstructured, the share of a layer's weights that is pruned wherever they stand; n and m then count
            nothing.
    """

    n: int = 2
    m: int = 4
    pruned: float | None = None

    @classmethod
    def parse(cls, text: str) -> MaskShape:
        """`2:4`, `4:8` or `50%`; raises ValueError for anything else."""
        if match := _N_M.fullmatch(text.strip()):
            n, m = int(match[1]), int(match[2])
            if 0 < n < m:
                return cls(n, m)
        elif (match := _SHARE.fullmatch(text.strip())) and float(match[1]) > 0:
            return cls(0, 0, float(match[1]) / 100)
        raise ValueError(f"sparsity pattern {text!r} is not understood; accepted: {ACCEPTED}")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" if self.pruned is None else f"{self.pruned * 100:g}%"

    @property
    def by_row(self) -> bool:
        """Whether rows are independent, so that parts of a layer can be pruned alone."""
        return self.pruned is None

    @property
    def fits_24(self) -> bool:
        """Whether at most two of any four consecutive weights are kept, as the 2:4 formats store them."""
        return self.by_row and ((self.n <= 2 and self.m % 4 == 0) or (self.n, self.m) == (1, 2))

    def check_width(self, in_features: int) -> None:
        """Refuse a layer that has no mask of this shape."""
        if self.by_row:
            check_groups(in_features, self.n, self.m)

    @property
    def sparsity(self) -> float:
        """The share that is dropped."""
        return 1.0 - self.n / self.m if self.pruned is None else self.pruned

    def kept(self, entries: int) -> int:
        """How many entries of a layer are kept."""
        return entries // self.m * self.n if self.pruned is None else entries - math.floor(self.pruned * entries)

    def mask(self, score: Tensor) -> Tensor:
        """Keep the highest scores, as many as the shape wants."""
        return n_m_mask(score, self.n, self.m) if self.by_row else keep_highest(score, self.kept(score.numel()))

    def check(self, mask: Tensor) -> None:
        """Raise when a mask is not boolean or does not keep exactly what the shape wants."""
        if self.by_row or mask.dtype is not torch.bool:
            return check_mask(mask, self.n, self.m)
        kept, wanted = int(mask.sum()), self.kept(mask.numel())
        if kept != wanted:
            raise ValueError(f"the mask keeps {kept} of {mask.numel()} weights; {self} pruned keeps {wanted}")

    def check_weight(self, weight: Tensor) -> None:
        """Raise when a weight holds more non-zeros than the shape keeps."""
        if self.by_row:
            return check_n_m(weight, self.n, self.m)
        used, wanted = int((weight != 0).sum()), self.kept(weight.numel())
        if used > wanted:
            raise ValueError(f"{used} of {weight.numel()} weights are not zero; {self} pruned keeps {wanted} at most")


TWO_OF_FOUR = MaskShape()


def keep_highest(score: Tensor, count: int) -> Tensor:
    """The mask of the `count` highest scores of a whole tensor. Scores must be finite."""
    flat = score.detach().reshape(-1)
    if not 0 <= count <= flat.numel():
        raise ValueError(f"{count} of {flat.numel()} entries cannot be kept")
    if count == 0:
        return torch.zeros(score.shape, dtype=torch.bool, device=score.device)
    lowest = flat.kthvalue(flat.numel() - count + 1).values
    mask = flat > lowest
    tied = (flat == lowest).nonzero().squeeze(1)
    mask[tied[: count - int(mask.sum())]] = True
    return mask.view(score.shape)


def keep_highest_of_rows(score: Tensor, count: int) -> Tensor:
    """The mask of `count` entries, the highest of each row: as many in all rows, but for one more in some."""
    each, more = divmod(count, score.shape[0])
    order = score.detach().sort(dim=-1, descending=True, stable=True).indices
    mask = torch.zeros(score.shape, dtype=torch.bool, device=score.device)
    mask.scatter_(-1, order[:, :each], True)
    if more:
        following = order[:, each : each + 1]
        mask.scatter_(-1, following, keep_highest(score.gather(-1, following), more))
    return mask


def n_m_mask(score: Tensor, n: int = 2, m: int = 4) -> Tensor:
    """Keep the n highest scores of every m consecutive entries of the last dimension.

    Scores must be finite; comparing with NaN has no order.
    """
    check_groups(score.shape[-1], n, m)
    mask = torch.empty(score.shape, dtype=torch.bool, device=score.device)
    score_G4, mask_G4 = score.detach().reshape(-1, m), mask.view(-1, m)
    select = _keep_two_of_four if (n, m) == (2, 4) else _keep_by_rank
    step = max(1, _BLOCK // m if score.device.type == "cpu" else score_G4.shape[0])
    for start in range(0, score_G4.shape[0], step):
        select(score_G4[start : start + step], mask_G4[start : start + step], n)
    return mask


def _keep_two_of_four(score_B4: Tensor, out_B4: Tensor, _n: int) -> None:
    """Six comparisons decide who is in the top two, without a sort.

    An entry is kept when it beats two of the other three; `>=` against later positions and `>`
    against earlier ones makes the order total. Majority of three outcomes is "at least two". The
    outcomes are int32 until four of them are written as the four bytes of one: torch is several times
    slower with bool, and with writes four bytes apart.
    """
    a, b, c, d = (score_B4[:, place].contiguous() for place in range(4))
    pairs = ((a, b), (a, c), (a, d), (b, c), (b, d), (c, d))
    ab, ac, ad, bc, bd, cd = (torch.ge(x, y, out=torch.empty_like(x)).to(torch.int32) for x, y in pairs)
    kept = (
        _majority(ab, ac, ad),
        _majority(1 - ab, bc, bd),
        _majority(1 - ac, 1 - bc, cd),
        _majority(1 - ad, 1 - bd, 1 - cd),
    )
    first, *others = kept if sys.byteorder == "little" else kept[::-1]
    packed = first
    for place, bit in enumerate(others, start=1):
        packed = packed | (bit << (8 * place))
    out_B4.view(torch.int8).view(torch.int32).copy_(packed.unsqueeze(1))


def _majority(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return (x & y) | (z & (x | y))


def _keep_by_rank(score_Bm: Tensor, out_Bm: Tensor, n: int) -> None:
    order = score_Bm.sort(dim=-1, descending=True, stable=True).indices[:, :n]
    out_Bm.zero_()
    out_Bm.scatter_(-1, order, True)


def check_groups(in_features: int, n: int, m: int) -> None:
    """Refuse a shape that has no n:m mask."""
    if not 0 < n <= m:
        raise ValueError(f"sparsity {n}:{m} given; n of m needs 0 < n <= m, for example 2:4")
    if in_features % m:
        raise ValueError(f"{in_features} input features given; {n}:{m} needs a multiple of {m}: leave this layer dense")


def check_n_m(weight: Tensor, n: int = 2, m: int = 4) -> None:
    """Raise when any group of m holds more than n non-zero weights."""
    check_groups(weight.shape[-1], n, m)
    used = (weight != 0).reshape(-1, m).sum(dim=-1)
    broken = int((used > n).sum())
    if broken:
        raise ValueError(
            f"{broken} of {used.numel()} groups hold more than {n} non-zero weights of {m}; "
            f"a {n}:{m} weight has at most {n}: prune it with n_m_mask first"
        )


def check_mask(mask: Tensor, n: int = 2, m: int = 4) -> None:
    """Raise when a mask is not boolean or does not keep exactly n of every m."""
    if mask.dtype is not torch.bool:
        raise ValueError(f"mask of {mask.dtype} given; masks are torch.bool, so that ~mask is its complement")
    check_groups(mask.shape[-1], n, m)
    wrong = int((mask.reshape(-1, m).sum(dim=-1) != n).sum())
    if wrong:
        raise ValueError(f"{wrong} groups of the mask do not keep exactly {n} of {m}")


def flip_rate(old: Tensor, new: Tensor) -> float:
    """Share of entries whose mask bit changed."""
    changed = old.view(torch.int8) ^ new.view(torch.int8)
    return float(changed.to(torch.float32).sum()) / max(1, changed.numel())
