"""2:4 positions: which two of every four consecutive weights are kept, as 4 bits a group.

A group of four stores two slots in ascending order, `i0 | i1 << 2`; group 2j lies in the low nibble of byte j, group
2j + 1 in the high one. Groups with more than two zeros still store two slots: non-zero positions first, then the lowest
free ones, so that equal weights give equal bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _slots(occupied: int) -> tuple[int, int] | None:
    """The two slots kept where the set bits of `occupied` are non-zero positions; None if there are more than two."""
    used = [i for i in range(4) if occupied >> i & 1]
    if len(used) > 2:
        return None
    free = [i for i in range(4) if i not in used]
    first, second = sorted([*used, *free[: 2 - len(used)]])
    return first, second


_BY_OCCUPANCY = [_slots(bits) for bits in range(16)]
_FIRST = torch.tensor([slots[0] if slots else 0 for slots in _BY_OCCUPANCY])
_SECOND = torch.tensor([slots[1] if slots else 0 for slots in _BY_OCCUPANCY])
_FITS = torch.tensor([slots is not None for slots in _BY_OCCUPANCY])
_EMPTY_GROUP = 0 | 1 << 2


def compress24(values: Tensor) -> tuple[Tensor, Tensor]:
    """Splits a 2:4 weight into kept values and positions.

    Args:
        values: [O, I], I a multiple of 4, at most two non-zeros in each four.

    Returns:
        kept [O, I / 2] in the order of their positions, and meta [O, ceil(I / 8)] uint8.

    Raises:
        ValueError: where a group has more than two non-zeros.
    """
    grouped = values.unflatten(1, (-1, 4))
    first, second, fits = (table.to(values.device) for table in (_FIRST, _SECOND, _FITS))
    weights = torch.tensor([1, 2, 4, 8], device=values.device)
    occupied = ((grouped != 0) * weights).sum(-1)
    if not bool(fits[occupied].all()):
        bad = int((~fits[occupied]).sum())
        raise ValueError(f"{bad} groups of four hold more than two non-zeros: the weight is not 2:4 sparse")
    slots = torch.stack((first[occupied], second[occupied]), dim=2)
    kept = grouped.gather(2, slots).flatten(1)
    codes = slots[:, :, 0] | slots[:, :, 1] << 2
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1), value=_EMPTY_GROUP)
    pairs = codes.to(torch.uint8).unflatten(1, (-1, 2))
    return kept, pairs[:, :, 0] | pairs[:, :, 1] << 4


def expand24(kept: Tensor, meta: Tensor) -> Tensor:
    """The inverse of `compress24`: kept [O, I / 2], meta [O, ceil(I / 8)] -> [O, I]."""
    codes = torch.stack((meta & 15, meta >> 4), dim=2).flatten(1)[:, : kept.shape[1] // 2].long()
    slots = torch.stack((codes & 3, codes >> 2), dim=2)
    grouped = torch.zeros(*codes.shape, 4, dtype=kept.dtype, device=kept.device)
    return grouped.scatter_(2, slots, kept.unflatten(1, (-1, 2))).flatten(1)


def check_positions(meta: Tensor) -> None:
    """Raises ValueError unless every group stores two slots in ascending order."""
    low, high = (meta & 3) < (meta >> 2 & 3), (meta >> 4 & 3) < (meta >> 6)
    if not bool((low & high).all()):
        raise ValueError("weight_meta holds positions that are not two ascending slots of four")
