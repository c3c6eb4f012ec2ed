"""Linears and embeddings as the decoder runs them: straight into one kernel, without a format's name in the way.

`packed_linear` and `packed_embedding` take what the checkpoint stores to the kernel's layout, once. Where no kernel
takes it (none is installed, or an odd group size), `compressor`'s own modules run it by unpacking, slowly but right.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressor.compressed_linear import CompressedEmbedding, CompressedLinear
from compressor.kernels import blob, dense, isa, low_rank
from compressor.precision import compute_dtype

FIXED_ROWS = 16


class KernelLinear(nn.Module):
    """`y = x W^T + S (sums of x) + b` by one operator; `weight` and `low_rank` are in the kernel's layout.

    With `float_out`, as LM heads have it, y is float32 whatever x is.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, low_rank: Tensor | None, float_out: bool = False) -> None:
        super().__init__()
        self.float_out = float_out
        self.weight: Tensor
        self.bias: Tensor | None
        self.low_rank: Tensor | None
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.register_buffer("low_rank", low_rank)

    def forward(self, x: Tensor) -> Tensor:
        x = x.float() if self.float_out else x  # the result has the dtype of x
        out: Tensor = torch.ops.halfweight.linear.default(x, self.weight, self.bias, self.low_rank, False)
        return out


class KernelEmbedding(nn.Module):
    """Rows of a packed table."""

    def __init__(self, weight: Tensor, width: int) -> None:
        super().__init__()
        self.weight: Tensor
        self.register_buffer("weight", weight)
        self.width = width

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = torch.ops.halfweight.rows.default(self.weight, ids, self.width)
        return out

    def head(self) -> KernelLinear:
        """The LM head that is tied to this embedding: the same tensor."""
        return KernelLinear(self.weight, None, None, float_out=True)


class PlainLinear(nn.Module):
    """A linear that the checkpoint stores plainly, by torch: the dense baseline, and the reference in float32."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight: Tensor
        self.bias: Tensor | None
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class FixedRows(nn.Module):
    """A linear that always computes FIXED_ROWS tokens at once, the last of them padding.

    Matrix products choose how to sum by the number of tokens; with a fixed one, a token's result does not depend on
    how many others came with it. Packed linears without a low-rank branch need none of this.
    """

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        padded = F.pad(x, (0, 0, 0, -x.shape[0] % FIXED_ROWS))
        return torch.cat([self.linear(part) for part in padded.split(FIXED_ROWS)])[: x.shape[0]]


def fixed_rows(linear: nn.Module) -> nn.Module:
    """`linear` such that a token's result depends on that token alone."""
    exact = isinstance(linear, KernelLinear) and linear.low_rank is None
    return linear if exact else FixedRows(linear)


class SideBySide(nn.Module):
    """Linears of one input whose formats differ, so that they cannot be one: q, k and v, or gate and up."""

    def __init__(self, linears: list[nn.Module]) -> None:
        super().__init__()
        self.linears = nn.ModuleList(linears)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([linear(x) for linear in self.linears], dim=-1)


class PlainEmbedding(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight: Tensor
        self.register_buffer("weight", weight)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)

    def head(self) -> PlainLinear:
        return PlainLinear(self.weight, None)


def plain_linear(weight: Tensor, bias: Tensor | None, float_out: bool = False) -> nn.Module:
    """A linear [O, I] that the checkpoint stores plainly.

    On processors with AVX2 and no more torch multiplies bf16 by converting it, some five times slower than the kernel,
    which reads bf16 and sums in fp32.
    """
    if _kernel_is_faster(weight):
        return KernelLinear(dense.prepare_blob(weight), bias, None, float_out)
    return PlainLinear(weight, bias)


def plain_embedding(weight: Tensor) -> nn.Module:
    """An embedding [V, C] that the checkpoint stores plainly, in the form that a head tied to it wants."""
    if _kernel_is_faster(weight):
        return KernelEmbedding(dense.prepare_blob(weight), weight.shape[1])
    return PlainEmbedding(weight)


def _kernel_is_faster(weight: Tensor) -> bool:
    slow = weight.device.type == "cpu" and compute_dtype("auto", weight.device) == torch.float32
    return slow and weight.dtype == torch.bfloat16 and isa() in dense.FASTER_ON


def packed_linear(stored: CompressedLinear, float_out: bool = False) -> nn.Module:
    """`stored` for the kernel if there is one; `stored` must hold the checkpoint's tensors."""
    tensors, branch = stored.tensors, stored.scheme.low_rank
    prepared = stored.format.prepare({name: t for name, t in tensors.items() if name.startswith("weight")})
    if blob.NAME not in prepared or "low_rank_a" in tensors:
        return stored
    side = None if branch is None else low_rank.prepare(tensors, branch.segment)
    float_out = float_out and stored.format.grid is not None  # floats that meet bf16 weights would cost them the tiles
    return KernelLinear(prepared[blob.NAME], tensors.get("bias"), side, float_out)


def packed_embedding(stored: CompressedEmbedding) -> nn.Module:
    prepared = stored.format.prepare(stored.tensors)
    if blob.NAME not in prepared:
        return stored
    return KernelEmbedding(prepared[blob.NAME], stored.embedding_dim)
