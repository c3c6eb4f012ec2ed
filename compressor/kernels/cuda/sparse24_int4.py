"""2:4 int4 on NVIDIA GPUs: a Triton kernel that reads the stored layout and expands it in registers.

A program loads, for BLOCK_N rows and BLOCK_K columns, one byte of values and half a byte of positions per four weights,
spreads them to the four columns, and feeds a tensor-core product; memory sees 3 bits a weight and the scales. A step of
K never leaves its group, so a scale is one multiplication of the step's sum. With few tokens K is split among programs,
whose sums are added by a second operation: no atomics, so results repeat and CUDA graphs may hold it.

Shapes: M tokens, N out_features, K in_features, S splits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from compressor.kernels.cuda.tuning import tuned

BLOCK_M = (16, 32, 64)
BLOCK_K = (128, 64, 32)
_TILES = ((32, 4), (64, 4), (128, 4), (128, 8))
"""(rows of a program, warps)."""
_SPLITS = (1, 2, 4, 8)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _expanded(packed, meta):  # type: ignore[no-untyped-def]
    """[N, K] float16 grid values of packed [N, K / 4] and meta [N, K / 8]."""
    nibbles = tl.interleave(meta & 15, meta >> 4)  # [N, K / 4]
    first, second = nibbles & 3, nibbles >> 2
    low, high = (packed & 15).to(tl.float16) - 8.0, (packed >> 4).to(tl.float16) - 8.0
    zero = tl.zeros_like(low)
    c0 = tl.where(first == 0, low, zero)
    c1 = tl.where(first == 1, low, tl.where(second == 1, high, zero))
    c2 = tl.where(first == 2, low, tl.where(second == 2, high, zero))
    c3 = tl.where(second == 3, high, zero)
    return tl.interleave(tl.interleave(c0, c2), tl.interleave(c1, c3))


@triton.jit(do_not_specialize=["M", "STEPS", "SPLITS"])  # type: ignore[untyped-decorator,unused-ignore]
def _kernel(  # type: ignore[no-untyped-def]
    x, packed, meta, scale, out, M, N, K, GROUP, STEPS, SPLITS,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    inside_n, inside_m = rows_n < N, rows_m < M
    groups = tl.cdiv(K, GROUP)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(split, STEPS, SPLITS):
        k = step * BLOCK_K
        columns = k + tl.arange(0, BLOCK_K)
        quads = k // 4 + tl.arange(0, BLOCK_K // 4)
        pairs = k // 8 + tl.arange(0, BLOCK_K // 8)
        x_tile = tl.load(
            x + rows_m[:, None].to(tl.int64) * K + columns[None, :],
            mask=inside_m[:, None] & (columns < K)[None, :], other=0.0,
        )  # fmt: skip
        p_tile = tl.load(
            packed + rows_n[:, None].to(tl.int64) * (K // 4) + quads[None, :],
            mask=inside_n[:, None] & (quads < K // 4)[None, :], other=0x88,
        )  # fmt: skip
        m_tile = tl.load(
            meta + rows_n[:, None].to(tl.int64) * ((K + 7) // 8) + pairs[None, :],
            mask=inside_n[:, None] & (pairs < (K + 7) // 8)[None, :], other=0x44,
        )  # fmt: skip
        s_tile = tl.load(scale + rows_n * groups + k // GROUP, mask=inside_n, other=0.0).to(tl.float32)
        w_tile = _expanded(p_tile, m_tile).to(x_tile.dtype)
        total += tl.dot(x_tile, tl.trans(w_tile)) * s_tile[None, :]
    places = (split * M + rows_m)[:, None].to(tl.int64) * N + rows_n[None, :]
    tl.store(out + places, total, mask=inside_m[:, None] & inside_n[None, :])


def supports(in_features: int, group_size: int) -> bool:
    """Whether the kernel takes a weight: a step of at least 32 columns must fit into a group."""
    return in_features % 4 == 0 and (group_size == -1 or group_size % 32 == 0)


def candidates(group_size: int, tokens: int) -> list[dict[str, int]]:
    """The settings that a group allows; K is split only where few tokens leave the processors idle.

    Each pair of block sizes is compiled, which takes a second: they are the few that have a chance.
    """
    steps = [k for k in BLOCK_K if group_size == -1 or group_size % k == 0][:2]
    return [
        {"BLOCK_N": n, "BLOCK_K": k, "SPLITS": splits, "num_warps": warps, "num_stages": 3}
        for n, warps in _TILES
        for k in steps
        for splits in (_SPLITS if tokens <= BLOCK_M[-1] else _SPLITS[:1])
    ]


def launch(x: Tensor, tensors: tuple[Tensor, Tensor, Tensor], group_size: int, setting: dict[str, int]) -> Tensor:
    """[M, N] in x's dtype by one setting; x is [M, K], contiguous, fp16 or bf16."""
    packed, meta, scale = tensors
    (tokens, columns), rows = x.shape, packed.shape[0]
    block_m = next((size for size in BLOCK_M if tokens <= size), BLOCK_M[-1])
    sizes = {key: value for key, value in setting.items() if key != "SPLITS"} | {"BLOCK_M": block_m}
    out = torch.empty(setting["SPLITS"], tokens, rows, dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(rows, setting["BLOCK_N"]), triton.cdiv(tokens, block_m), setting["SPLITS"])
    group = columns if group_size == -1 else group_size
    steps = triton.cdiv(columns, setting["BLOCK_K"])
    splits = setting["SPLITS"]
    _kernel[grid](x, packed, meta, scale, out, tokens, rows, columns, group, steps, splits, **sizes)
    return (out[0] if splits == 1 else out.sum(0)).to(x.dtype)


@torch.library.custom_op("halfweight::sparse24_int4_triton", mutates_args=())
def _linear(x: Tensor, packed: Tensor, meta: Tensor, scale: Tensor, group_size: int) -> Tensor:
    tokens = x.shape[0]
    bucket = 1 << max(tokens - 1, 0).bit_length()  # one search for all batches up to a power of two
    key = f"sparse24_int4 {triton.__version__}/{bucket}/{packed.shape[0]}/{x.shape[1]}/{group_size}/{x.dtype}"
    tensors = (packed, meta, scale)
    with torch.cuda.device_of(x):  # where Triton launches and the search measures
        return tuned(key, candidates(group_size, tokens), lambda one: launch(x, tensors, group_size, one))


@_linear.register_fake
def _(x: Tensor, packed: Tensor, meta: Tensor, scale: Tensor, group_size: int) -> Tensor:
    return x.new_empty(x.shape[0], packed.shape[0])


def linear(x: Tensor, packed: Tensor, meta: Tensor, scale: Tensor, group_size: int) -> Tensor:
    """[..., N] in x's dtype from x [..., K] and stored tensors."""
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    out: Tensor = _linear(flat, packed, meta, scale, group_size)
    return out.unflatten(0, x.shape[:-1])
