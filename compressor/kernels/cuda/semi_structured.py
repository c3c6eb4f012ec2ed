"""2:4 with bf16, fp16 or int8 values on NVIDIA GPUs, by the sparse tensor cores that torch's own operators reach.

Our stored positions are, nibble by nibble, what CUTLASS calls its metadata: only their order differs, which
`torch.sparse` computes. So nothing is unpacked on the way. cuSPARSELt compresses by itself, from a dense weight that
lives for one call, and is asked which of its algorithms is fastest for a shape.

Shapes: O out_features, I in_features.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.sparse._semi_structured_conversions import _calculate_meta_reordering_scatter_offsets

from compressor.formats.positions import expand24
from compressor.kernels.cuda.tuning import tuned

MULTIPLES = {torch.bfloat16: (32, 64), torch.float16: (32, 64), torch.int8: (16, 128)}
"""{dtype of the values: what O and I must be multiples of}."""
PACKED, META, COMPRESSED, ROWS = "semi_packed", "semi_meta", "semi_compressed", "semi_rows"
_TOKENS = 8
"""The sparse products take a multiple of this many tokens; the rest is padding."""
_ALGORITHMS = tuple(range(40))


def supports(out_features: int, in_features: int, dtype: torch.dtype) -> bool:
    """Whether a weight has a size that the sparse products take."""
    if dtype not in MULTIPLES:
        return False
    rows, columns = MULTIPLES[dtype]
    return out_features % rows == 0 and in_features % columns == 0


def cutlass_layout(kept: Tensor, meta: Tensor) -> tuple[Tensor, Tensor]:
    """(values [O, I / 2], metadata) as CUTLASS reads them, from stored values and positions [O, I / 8]."""
    kind = torch.int32 if kept.dtype == torch.int8 else torch.int16
    words = meta.contiguous().view(kind)  # four or eight quads, the first in the lowest bits
    rows, width = words.shape
    offsets = _calculate_meta_reordering_scatter_offsets(rows, width, kind, words.device)
    reordered = words.new_empty(words.numel()).scatter_(0, offsets, words.reshape(-1))
    return kept.contiguous(), reordered.view(words.shape)


def prepare(kept: Tensor, meta: Tensor) -> dict[str, Tensor]:
    """The layout of the library at hand, from stored values and positions on a GPU."""
    if torch.backends.cusparselt.is_available():
        dense = expand24(kept, meta)
        return {COMPRESSED: torch._cslt_compress(dense), ROWS: kept.new_empty(kept.shape[0], 0)}
    packed, reordered = cutlass_layout(kept, meta)
    return {PACKED: packed, META: reordered}


def linear(x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """[M, O] in x's dtype from x [M, I]; the product is in the values' dtype."""
    tokens, given = x.shape[0], x.dtype
    weight = tensors[PACKED] if PACKED in tensors else tensors[COMPRESSED]
    padded = torch.nn.functional.pad(x.to(weight.dtype), (0, 0, 0, -tokens % _TOKENS))
    if PACKED in tensors:
        out: Tensor = torch._sparse_semi_structured_linear(padded, weight, tensors[META])
        return out[:tokens].to(given)
    rows, columns = tensors[ROWS].shape[0], x.shape[1]

    def product(algorithm: int) -> Tensor:
        return torch._cslt_sparse_mm(weight, padded.t(), alg_id=algorithm)

    key = f"cusparselt/{padded.shape[0]}/{rows}/{columns}/{weight.dtype}"
    return product(tuned(key, _ALGORITHMS, product)).t()[:tokens].to(given)
