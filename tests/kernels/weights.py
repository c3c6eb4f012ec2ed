"""Random packed weights, and how far a linear may be from float64."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from compressor.formats import FORMATS, Format, QuantizedWeight

QUANTISED = ["sparse24_int4", "sparse24_int8", "int4", "int8"]
WITH_KERNEL = [*QUANTISED, "sparse24"]
KEPT_PAIRS = torch.tensor([[i, j] for i in range(4) for j in range(i + 1, 4)])


@dataclass(frozen=True)
class Packed:
    """A weight in both layouts, and dequantised."""

    format: Format
    kernel: ModuleType
    stored: dict[str, Tensor]
    prepared: dict[str, Tensor]
    weight: Tensor
    """[O, I] float64"""


def random_weight(
    name: str, out_features: int, in_features: int, group: int, half: torch.dtype, seed: int = 0
) -> Packed:
    """A random weight of a format; its grid's ends occur, and every pair of positions."""
    generator = torch.Generator().manual_seed(seed)
    packed_format = FORMATS[name](group, half)
    low, high = packed_format.grid or (-128, 127)
    values = torch.randint(low, high + 1, (out_features, in_features), generator=generator).to(torch.int8)
    if packed_format.sparse:
        pairs = KEPT_PAIRS[torch.randint(6, (out_features, in_features // 4), generator=generator)]
        mask = torch.zeros(out_features, in_features // 4, 4, dtype=torch.bool).scatter_(2, pairs, True)
        values *= mask.flatten(1)
    if packed_format.grid is None:
        quantized = QuantizedWeight((values.float() * 0.013).to(half))
    else:
        scale = torch.rand(out_features, packed_format.groups(in_features), generator=generator) * 0.1 + 0.001
        quantized = QuantizedWeight(values, scale.to(half))
    stored = packed_format.pack(quantized)
    kernel = import_module(f"compressor.kernels.{name}")
    weight = packed_format.unpack_quantized(stored).dequantized().double()
    return Packed(packed_format, kernel, stored, kernel.prepare(stored, group), weight)


def rounding(dtype: torch.dtype) -> float:
    """Relative error of one rounding to a dtype."""
    return torch.finfo(dtype).eps / 2


def bound(x: Tensor, weight: Tensor, y: Tensor, group: int, exact: bool) -> Tensor:
    """[T, O]: the largest error that the arithmetic allows a linear x [T, I] with weight [O, I] and result y.

    One rounding of the result, fp32 sums, and, with int8 activations, half a step of their group's scale an element.
    """
    wide, magnitude = x.double(), weight.abs()
    columns = x.shape[1]
    total = wide.abs() @ magnitude.T
    error = rounding(x.dtype) * y.abs() + 2 * columns**0.5 * 2**-23 * total + 1e-30
    if x.dtype == torch.float16:
        error = error + 6e-8  # its denormals
    if exact:
        return error
    size = group if group > 0 else 128
    padded = torch.nn.functional.pad(wide, (0, -columns % size)).unflatten(1, (-1, size))
    step = padded.abs().amax(2) / 127
    by_group = torch.nn.functional.pad(magnitude, (0, -columns % size)).unflatten(1, (-1, size)).sum(2)
    return error + 0.501 * step @ by_group.T + columns * 1e-35
