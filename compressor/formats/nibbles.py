"""Two 4-bit grid values in one byte: the earlier value in the low nibble, each stored as `value + 8`."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_nibbles(values: Tensor) -> Tensor:
    """[O, N] int8 in -8..7, N even -> [O, N / 2] uint8."""
    pairs = (values.to(torch.int16) + 8).to(torch.uint8).unflatten(1, (-1, 2))
    return pairs[:, :, 0] | (pairs[:, :, 1] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """[O, N / 2] uint8 -> [O, N] int8 in -8..7."""
    return (torch.stack((packed & 15, packed >> 4), dim=2).to(torch.int8) - 8).flatten(1)
