"""Modules that compute from packed tensors; no dequantised copy of a weight outlives a call.

Buffers are named by the format's specification, so a state dict is the stored checkpoint. `prepare()` swaps the stored
layout for the kernel's, once, after loading.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from compressor.formats import make_format
from compressor.formats.low_rank import has_low_rank, low_rank_linear, low_rank_spec
from compressor.kernels import blob, low_rank
from compressor.scheme import Scheme

_BRANCH = "low_rank_kernel"
"""Name of the low-rank branch in the kernel's layout."""


class PackedModule(nn.Module):
    """A weight [O, I] in a packed format, as buffers.

    Args:
        out_features: O.
        in_features: I.
        scheme: the format and its parameters.
        extra: further stored tensors, {name: (shape, dtype)}.
    """

    def __init__(self, out_features: int, in_features: int, scheme: Scheme) -> None:
        super().__init__()
        self.out_features = out_features
        self.in_features = in_features
        self.scheme = scheme
        self.format = make_format(scheme)
        spec = self.format.spec(out_features, in_features)
        if scheme.low_rank is not None:
            spec |= low_rank_spec(scheme.low_rank, out_features, in_features)
        for name, (shape, dtype) in spec.items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The buffers by name, in the stored or the kernel layout."""
        return {name: buffer for name, buffer in self._buffers.items() if buffer is not None}

    @property
    def weight_bytes(self) -> int:
        """Bytes that the module holds for its weight, low-rank branch and bias."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.tensors.values())

    def assign(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes stored tensors without copying; raises ValueError where names, shapes or dtypes differ."""
        expected = {name: (tuple(buffer.shape), buffer.dtype) for name, buffer in self.tensors.items()}
        found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        if found != expected:
            raise ValueError(f"expected tensors {expected}, found {found}")
        for name, tensor in tensors.items():
            self._buffers[name] = tensor

    def prepare(self) -> None:
        """Replaces the stored weight by the kernel's layout, and frees it. Calling it again does nothing."""
        names = [name for name in self.tensors if name.startswith("weight")]
        stored = {name: self.tensors[name] for name in names}
        if not self.format.stored(stored):
            return
        prepared = self.format.prepare(stored)
        for name in names:
            del self._buffers[name]
        for name, tensor in prepared.items():
            self.register_buffer(name, tensor)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.scheme.format}"


class CompressedLinear(PackedModule):
    """`y = x W^T + S (X x) + b` from packed tensors.

    Args:
        in_features: I.
        out_features: O.
        scheme: the format of W, and of the low-rank branch if there is one.
        bias: whether there is a bias [O].
    """

    def __init__(self, in_features: int, out_features: int, scheme: Scheme, *, bias: bool = False) -> None:
        super().__init__(out_features, in_features, scheme)
        dtype = getattr(torch, scheme.dtype)
        self.register_buffer("bias", torch.empty(out_features, dtype=dtype) if bias else None)
        self._has_low_rank = has_low_rank(self.tensors)

    def prepare(self) -> None:
        """Also joins the low-rank branch to the kernel's linear, unless its projection was trained."""
        super().prepare()
        tensors = self.tensors
        if self.scheme.low_rank is None or "low_rank_a" in tensors or blob.NAME not in tensors or _BRANCH in tensors:
            return
        branch = low_rank.prepare(tensors, self.scheme.low_rank.segment)
        for name in [name for name in tensors if name.startswith("low_rank")]:
            del self._buffers[name]
        self.register_buffer(_BRANCH, branch)
        self._has_low_rank = False

    def forward(self, x: Tensor) -> Tensor:
        """[..., O] in x's dtype from x [..., I]."""
        tensors = self.tensors
        y = self.format.linear(x, tensors, tensors.get("bias"), tensors.get(_BRANCH))
        return y + low_rank_linear(x, tensors) if self._has_low_rank else y

    def unpacked(self) -> Tensor:
        """[O, I]: the weight, for code that inspects models; only before `prepare`."""
        return self.format.unpack(self.tensors)


class CompressedEmbedding(PackedModule):
    """Rows of a packed table [num_embeddings, embedding_dim].

    Args:
        factor: what rows are multiplied by, as Gemma does; in the dtype of the rows.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, scheme: Scheme, *, factor: float = 1.0) -> None:
        super().__init__(num_embeddings, embedding_dim, scheme)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.factor = float(torch.tensor(factor, dtype=getattr(torch, scheme.dtype), device="cpu"))

    def forward(self, ids: Tensor) -> Tensor:
        """[..., embedding_dim] in the scheme's dtype from ids [...]."""
        rows = self.format.rows(self.tensors, ids)
        return rows if self.factor == 1.0 else rows * self.factor


def tie(head: CompressedLinear, embedding: CompressedEmbedding) -> None:
    """Makes an LM head read the embedding's tensors, in whichever layout they are."""
    for name in [name for name in head.tensors if name != "bias"]:
        del head._buffers[name]
    for name, tensor in embedding.tensors.items():
        head.register_buffer(name, tensor)


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(O, I) of an `nn.Linear` or of GPT-2's `Conv1D`, whose weight is stored transposed."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if type(module).__name__ == "Conv1D" and isinstance(module.weight, Tensor):
        in_features, out_features = module.weight.shape
        return out_features, in_features
    raise ValueError(f"{type(module).__name__} is not a linear layer; accepted: nn.Linear, Conv1D")
