"""The contract that every packed format fulfils.

Shapes: O out_features, I in_features, G groups a row (I / group_size). Every stored tensor is [O, proportional to I],
so fusing q/k/v and tensor parallelism are plain slices: `pack(rows) == pack(all)[rows]`, and the same for blocks of
inputs that are aligned to the group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from compressor import kernels
from compressor.kernels import cuda
from compressor.kernels.linear import linear as kernel_linear

Tensors = Mapping[str, Tensor]
Spec = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight snapped to its grid.

    Args:
        values: [O, I]; grid values (int8, or e4m3 numbers as float32) where `scale` is given, the weights themselves
            otherwise. Zeros are pruned.
        scale: [O, G] in the format's dtype, or None for formats without scales.
    """

    values: Tensor
    scale: Tensor | None = None

    def dequantized(self) -> Tensor:
        """[O, I] float32: `values * scale`, without -0.0."""
        if self.scale is None:
            return self.values.float()
        values = self.values.to(torch.float32, copy=True)
        groups = values.unflatten(1, (self.scale.shape[1], -1))
        return groups.mul_(self.scale.float()[:, :, None]).add_(0.0).flatten(1)


@dataclass(frozen=True)
class Format:
    """Parameters of a packed format, and its operations.

    Args:
        group_size: inputs that share one scale; -1 means the whole row.
        dtype: dtype of unquantised values and of scales.
    """

    group_size: int = -1
    dtype: torch.dtype = torch.bfloat16

    name: ClassVar[str]
    sparse: ClassVar[bool] = False
    """Whether two of four consecutive weights are kept."""
    grid: ClassVar[tuple[int, int] | None] = None
    """Smallest and largest grid value; None where values are floats."""
    scaled: ClassVar[bool] = False
    """Whether values are multiplied by a scale for each group."""
    largest: ClassVar[float] = 1.0
    """The magnitude that a scale maps the largest weight of a group to."""

    @property
    def lopsided(self) -> bool:
        """Whether the grid reaches further below zero than above, so that a negative scale gives another grid."""
        return self.grid is not None and -self.grid[0] > self.grid[1]

    def rounded(self, values: Tensor) -> Tensor:
        """Floats, already divided by their scales, at the nearest values that the format stores; may change them."""
        return values if self.grid is None else values.round_().clamp_(*self.grid)

    def groups(self, in_features: int) -> int:
        """G, the number of scales a row."""
        return 1 if self.group_size == -1 else in_features // self.group_size

    def check(self, out_features: int, in_features: int) -> None:
        """Raises ValueError when a weight of this shape cannot take the format."""
        if out_features < 1 or in_features < 1:
            raise ValueError(f"a weight of shape [{out_features}, {in_features}] is empty")
        if self.sparse and in_features % 4:
            raise ValueError(f"in_features {in_features} is not a multiple of 4, which 2:4 sparsity needs")
        if self.scaled and self.group_size != -1 and in_features % self.group_size:
            accepted = [size for size in (128, 64, 32, 16) if in_features % size == 0]
            raise ValueError(
                f"in_features {in_features} is not a multiple of group_size {self.group_size}; "
                f"usable here: {', '.join(map(str, [*accepted, -1]))} (-1: one scale a row)"
            )
        if self.scaled and self.group_size != -1 and self.group_size % 8:
            raise ValueError(f"group_size {self.group_size} is not a multiple of 8")

    def spec(self, out_features: int, in_features: int) -> Spec:
        """{name: (shape, dtype)} of the stored tensors; raises ValueError as `check` does."""
        raise NotImplementedError

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """Stored tensors of a weight; raises ValueError for values that the format cannot hold."""
        raise NotImplementedError

    def unpack(self, tensors: Tensors) -> Tensor:
        """[O, I] in `dtype`: the exact inverse of `pack` up to one rounding of `value * scale`."""
        return self.unpack_quantized(tensors).dequantized().to(self.dtype)

    def unpack_quantized(self, tensors: Tensors) -> QuantizedWeight:
        """The exact inverse of `pack`."""
        raise NotImplementedError

    def shape_of(self, tensors: Tensors) -> tuple[int, int]:
        """(O, I) of stored tensors."""
        raise NotImplementedError

    def bits_per_weight(self, out_features: int, in_features: int) -> float:
        """Stored bits, scales and positions included, over O * I."""
        spec = self.spec(out_features, in_features)
        total = sum(dtype.itemsize * 8 * shape[0] * shape[1] for shape, dtype in spec.values())
        return total / (out_features * in_features)

    def validate(self, tensors: Tensors) -> None:
        """Raises ValueError when stored tensors break the format: names, shapes, dtypes, positions or scales."""
        try:
            out_features, in_features = self.shape_of(tensors)
        except (KeyError, IndexError):
            raise ValueError(f"{self.name}: tensors {sorted(tensors)} are not those of the format") from None
        spec = self.spec(out_features, in_features)
        found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        if found != spec:
            raise ValueError(f"{self.name}: expected {spec}, found {found}")
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
                raise ValueError(f"{self.name}: {name} holds NaN or infinity")
        if "weight_scale" in tensors:
            self._check_signs(tensors["weight_scale"])

    def checked_scale(self, weight: QuantizedWeight) -> Tensor:
        """The scale of a quantised weight as [O, G] in `dtype`.

        Raises:
            ValueError: it is missing, not finite, negative where the grid has no use for that, or takes a value beyond
                `dtype`.
        """
        scale, groups = weight.scale, self.groups(weight.values.shape[1])
        if scale is None or scale.shape != (weight.values.shape[0], groups):
            found = None if scale is None else tuple(scale.shape)
            raise ValueError(f"expected a scale of shape {(weight.values.shape[0], groups)}, found {found}")
        scale = scale.to(self.dtype)
        if not bool(torch.isfinite(scale).all()):
            raise ValueError(f"scales must be finite in {self.dtype}")
        self._check_signs(scale)
        largest = weight.values.unflatten(1, (groups, -1)).abs().amax(2).float() * scale.float()
        if not bool(torch.isfinite(largest.to(self.dtype)).all()):
            raise ValueError(f"values times their scales go beyond {self.dtype}")
        return scale

    def _check_signs(self, scale: Tensor) -> None:
        if not self.lopsided and bool((scale < 0).any()):
            raise ValueError(f"{self.name}: weight_scale holds negative values")

    def prepare(self, tensors: Tensors) -> dict[str, Tensor]:
        """Kernel layout of stored tensors where a kernel serves them on their device, else the tensors themselves."""
        if all(tensor.is_cuda for tensor in tensors.values()):
            return cuda.prepare(self.name, tensors, self.shape_of(tensors), self.group_size)
        on_cpu = all(tensor.device.type == "cpu" for tensor in tensors.values())
        if not on_cpu or not kernels.available() or not self.has_kernel():
            return dict(tensors)
        return self.kernel().prepare(tensors, self.group_size)

    @classmethod
    def has_kernel(cls) -> bool:
        """Whether there is a module that serves this format; without one it runs through `unpack`."""
        return find_spec(f"compressor.kernels.{cls.name}") is not None

    def kernel(self) -> ModuleType:
        """The module of `compressor.kernels` that serves this format."""
        return import_module(f"compressor.kernels.{self.name}")

    def linear(self, x: Tensor, tensors: Tensors, bias: Tensor | None = None, low_rank: Tensor | None = None) -> Tensor:
        """[..., O] in x's dtype from x [..., I] and tensors in the stored or the kernel layout.

        `low_rank` is what `compressor.kernels.low_rank.prepare` returned; only the kernel layout takes it.
        """
        if x.is_cuda and (y := cuda.linear(self.name, x, tensors, self.group_size)) is not None:
            return y if bias is None else y + bias.to(y.dtype)
        if self.stored(tensors):
            return F.linear(x, self.unpack(tensors).to(x.dtype), None if bias is None else bias.to(x.dtype))
        return kernel_linear(x, tensors, bias, low_rank)

    def rows(self, tensors: Tensors, ids: Tensor) -> Tensor:
        """[..., I] in `dtype`: the rows `ids` of the weight, for embeddings, in the stored or the kernel layout."""
        flat = ids.reshape(-1)
        if self.stored(tensors):
            rows = self.unpack({name: tensor[flat] for name, tensor in tensors.items()})
        else:
            rows = self.kernel().rows(tensors, flat)
        return rows.to(self.dtype).unflatten(0, ids.shape)

    def stored(self, tensors: Tensors) -> bool:
        """Whether tensors are in the stored layout (and not in a kernel's)."""
        return "weight_packed" in tensors or "weight" in tensors


def checked_grid(values: Tensor, grid: tuple[int, int]) -> Tensor:
    """Grid values as int8; raises ValueError where they are not integers of the grid."""
    if values.is_floating_point() and not bool((values == values.round()).all()):
        raise ValueError("values are not on an integer grid (or hold NaN); quantise the weight first")
    if bool((values < grid[0]).any()) or bool((values > grid[1]).any()):
        raise ValueError(f"values leave the grid {grid[0]}..{grid[1]}")
    return values.to(torch.int8)


def checked_floats(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values in `dtype` with -0.0 as 0; raises ValueError on NaN or infinity, overflow included."""
    converted = values.to(dtype)
    if not bool(torch.isfinite(converted).all()):
        raise ValueError(f"the weight holds NaN, infinity or values beyond {dtype}")
    return torch.where(converted == 0, torch.zeros((), dtype=dtype, device=converted.device), converted)
