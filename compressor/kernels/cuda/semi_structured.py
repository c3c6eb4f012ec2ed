"""2:4 with bf16, fp16, int8 or fp8 values on NVIDIA GPUs, by the sparse tensor cores that torch's operators reach.

Our stored positions are, nibble by nibble, what CUTLASS calls its metadata: only their order differs, which
`torch.sparse` computes. So nothing is unpacked on the way. cuSPARSELt compresses by itself, from a dense weight that
lives for one call, and is asked which of its algorithms is fastest for a shape.

Values of 8 bits meet activations that are rounded to 8 bits with a scale per token; their sums, which are exact in
int32, are multiplied by both scales. That needs one scale a row: those of groups cannot be taken out of a sum.

Shapes: M tokens, O out_features, I in_features.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor
from torch.sparse._semi_structured_conversions import _calculate_meta_reordering_scatter_offsets

from compressor.formats.positions import expand24
from compressor.kernels.cuda.tuning import tuned

logger = logging.getLogger(__name__)

FP8 = torch.float8_e4m3fn
MULTIPLES = {torch.bfloat16: (32, 64), torch.float16: (32, 64), torch.int8: (32, 128), FP8: (32, 64)}
"""{dtype of the values: what O and I must be multiples of}."""
PACKED, META, COMPRESSED, ROWS = "semi_packed", "semi_meta", "semi_compressed", "semi_rows"
SCALE = "semi_scale"
"""[O] float32: the scales of the rows of 8-bit values."""
_SUMS = {torch.int8: torch.int32, FP8: torch.float32}
_LARGEST = {torch.int8: 127.0, FP8: 448.0}
_TOKENS = 16
"""The sparse products take a multiple of this many tokens; the rest is padding."""
_ALGORITHMS = tuple(range(40))


def supports(out_features: int, in_features: int, dtype: torch.dtype, capability: tuple[int, int]) -> bool:
    """Whether a weight has a size that the sparse products take, and the device a library for them."""
    multiplied = torch.backends.cusparselt.is_available() or _cutlass_multiplies(dtype, capability)
    if dtype not in MULTIPLES or not multiplied:
        return False
    rows, columns = MULTIPLES[dtype]
    return out_features % rows == 0 and in_features % columns == 0


def _cutlass_multiplies(dtype: torch.dtype, capability: tuple[int, int]) -> bool:
    """torch refuses other devices in the first product, and has no fp8."""
    return dtype != FP8 and capability[0] == 8


def cutlass_layout(kept: Tensor, meta: Tensor) -> tuple[Tensor, Tensor]:
    """(values [O, I / 2], metadata) as CUTLASS reads them, from stored values and positions [O, I / 8]."""
    kind = torch.int32 if kept.dtype == torch.int8 else torch.int16
    words = meta.contiguous().view(kind)  # four or eight quads, the first in the lowest bits
    rows, width = words.shape
    offsets = _calculate_meta_reordering_scatter_offsets(rows, width, kind, words.device)
    reordered = words.new_empty(words.numel()).scatter_(0, offsets, words.reshape(-1))
    return kept.contiguous(), reordered.view(words.shape)


def prepare(kept: Tensor, meta: Tensor, scale: Tensor | None = None) -> dict[str, Tensor] | None:
    """The layout of the library at hand, from stored values and positions, and scales [O, 1] of 8-bit values.

    None where neither library takes such values on this device.
    """
    found = {} if scale is None else {SCALE: scale.float().flatten()}
    if torch.backends.cusparselt.is_available() and _cusparselt_multiplies(kept.dtype, kept.device):
        return found | _compressed(kept, meta)
    if not _cutlass_multiplies(kept.dtype, torch.cuda.get_device_capability(kept.device)):
        return None
    packed, reordered = cutlass_layout(kept, meta)
    return found | {PACKED: packed, META: reordered}


def _compressed(kept: Tensor, meta: Tensor) -> dict[str, Tensor]:
    bits = kept.view(torch.int8) if kept.dtype == FP8 else kept  # to move fp8 about, torch wants to see bytes
    dense = expand24(bits, meta).view(kept.dtype)
    return {COMPRESSED: torch._cslt_compress(dense), ROWS: kept.new_empty(kept.shape[0], 0)}


@cache
def _cusparselt_multiplies(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this version of the library takes such values on this device: asked once, by a small product."""
    rows, columns = MULTIPLES[dtype]
    kept = torch.zeros(rows, columns // 2, dtype=torch.int8, device=device).to(dtype)
    meta = torch.full((rows, columns // 8), 0x44, dtype=torch.uint8, device=device)  # the first two of each four
    x = torch.zeros(_TOKENS, columns, dtype=torch.int8, device=device).to(dtype)
    try:
        _product(x, _compressed(kept, meta), _SUMS.get(dtype, dtype))
    except RuntimeError as error:
        logger.warning("cuSPARSELt does not multiply %s here (%s): another path is taken", dtype, error)
        return False
    return True


def linear(x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """[M, O] in x's dtype, contiguous, from x [M, I]; the product is in the values' dtype."""
    weight = tensors[PACKED] if PACKED in tensors else tensors[COMPRESSED]
    if SCALE not in tensors:
        return _product(x.to(weight.dtype), tensors, weight.dtype).to(x.dtype)
    rounded, token_scale = eight_bits(x, weight.dtype)
    sums = _product(rounded, tensors, _SUMS[weight.dtype])
    return (sums.float() * token_scale * tensors[SCALE]).to(x.dtype)


def eight_bits(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(x in 8 bits [M, I], the factor of each token [M, 1] float32), the token's largest at the end of the range."""
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True).clamp(min=1e-30) / _LARGEST[dtype]
    wide = wide / scale
    return (wide.round() if dtype == torch.int8 else wide).to(dtype), scale


def _product(x: Tensor, tensors: Mapping[str, Tensor], out: torch.dtype) -> Tensor:
    """[M, O] in `out` from x [M, I] in the values' dtype."""
    padded = x.new_zeros(x.shape[0] + -x.shape[0] % _TOKENS, x.shape[1])
    padded[: x.shape[0]] = x
    if PACKED in tensors:
        wanted = None if out == x.dtype else out
        sums: Tensor = torch._sparse_semi_structured_linear(padded, tensors[PACKED], tensors[META], out_dtype=wanted)
    else:
        sums = _cusparselt(padded, tensors[COMPRESSED], tensors[ROWS].shape[0], out)
    return sums[: x.shape[0]].contiguous()  # CUTLASS gives it transposed, and vLLM's operators read memory row by row


@torch.library.custom_op("halfweight::sparse24_cusparselt", mutates_args=())
def _cusparselt(x: Tensor, compressed: Tensor, rows: int, out: torch.dtype) -> Tensor:
    """[M, O]; one operator, so that torch.compile does not look into the search for an algorithm."""

    def product(algorithm: int) -> Tensor:
        wanted = None if out == x.dtype else out  # that of 16-bit values may not be named
        return torch._cslt_sparse_mm(compressed, x.t(), out_dtype=wanted, alg_id=algorithm)

    bucket = 1 << (x.shape[0] - 1).bit_length()  # one search for all batches up to a power of two
    key = f"cusparselt {torch.backends.cusparselt.version()}/{bucket}/{rows}/{x.shape[1]}/{x.dtype}"
    with torch.cuda.device_of(x):  # the search measures on the current device
        return tuned(key, _ALGORITHMS, product).t().contiguous()


@_cusparselt.register_fake
def _(x: Tensor, compressed: Tensor, rows: int, out: torch.dtype) -> Tensor:
    return x.new_empty(x.shape[0], rows, dtype=out)
