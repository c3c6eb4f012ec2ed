"""The kernel layout of a weight: one uint8 matrix, whose bytes `csrc/layout.h` specifies.

Shapes: B row blocks of 16 rows, C chunks of 32 columns, r the 16 rows of a block. Rows and columns are padded with
zeros. One tensor keeps a block's scales beside its weights, so that a thread reads one sequential stream; it has
out_features rows, so that shapes alone tell `torch.compile` everything.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ROWS = 16
CHUNK = 32
HEADER_BYTES = 64
MAGIC = 0x32347768
VERSION = 1
FORMATS = {"sparse24_int4": 0, "sparse24_int8": 1, "sparse24": 2, "int4": 3, "int8": 4, "dense": 5}
HALVES = {torch.bfloat16: 0, torch.float16: 1}
NAME = "weight_kernel"
"""Name of the blob among a layer's tensors."""
COLUMNS = "weight_kernel_columns"
"""Name of a tensor [0, I] without data, whose shape tells `torch.compile` in_features."""
LARGEST_GROUP = 16384  # int32 sums of products of bytes stay exact


@dataclass(frozen=True)
class Header:
    """What a blob says about itself; `group` is 0 for one scale a row, `segment` 0 for a weight over x itself."""

    format: str
    half: torch.dtype
    out_features: int
    in_features: int
    group: int
    segment: int = 0

    @property
    def in_padded(self) -> int:
        return -(-self.in_features // 64) * 64 if self.group == 0 or self.group % 64 == 0 else self.in_features

    def numbers(self) -> list[int]:
        """The header's 16 words."""
        words = [MAGIC, VERSION, FORMATS[self.format], HALVES[self.half], self.out_features, self.in_features]
        return [*words, self.in_padded, self.group, self.segment, *[0] * 7]


def supports(in_features: int, group_size: int) -> bool:
    """Whether the kernels take this group size: a multiple of 32, or one scale a row."""
    return group_size == -1 or (
        group_size % CHUNK == 0 and group_size <= LARGEST_GROUP and in_features % group_size == 0
    )


def prepared(header: Header, chunks: Tensor, scale: Tensor | None) -> dict[str, Tensor]:
    """The tensors of a layer in the kernel layout."""
    columns = torch.empty(0, header.in_features, dtype=torch.uint8)
    return {NAME: write(header, chunks, scale), COLUMNS: columns}


def write(header: Header, chunks: Tensor, scale: Tensor | None) -> Tensor:
    """[O, bytes]: the blob of chunks [B, C, chunk bytes] and scales [O, G]."""
    blocks = chunks.shape[0]
    scales = chunks.new_empty((blocks, 0)) if scale is None else scale_bytes(scale, blocks)
    size = HEADER_BYTES + scales.numel() + chunks.numel()
    blob = torch.zeros(header.out_features, -(-size // header.out_features), dtype=torch.uint8)
    blob.view(-1)[:HEADER_BYTES] = torch.tensor(header.numbers(), dtype=torch.int32).view(torch.uint8)
    body = blob.view(-1)[HEADER_BYTES:size].view(blocks, -1)
    body[:, : scales.shape[1]] = scales
    body[:, scales.shape[1] :] = chunks.flatten(1)
    return blob


def scale_bytes(scale: Tensor, blocks: int) -> Tensor:
    """[B, G * 32 rounded up to 64] uint8: the scales of a block as [G, 16]."""
    by_group = pad(scale, blocks * ROWS, scale.shape[1]).unflatten(0, (blocks, ROWS)).transpose(1, 2)
    flat = by_group.contiguous().flatten(1).view(torch.uint8)
    return pad(flat, blocks, -(-flat.shape[1] // 64) * 64)


def pad(matrix: Tensor, rows: int, columns: int, value: int = 0) -> Tensor:
    """A matrix extended with `value` to [rows, columns]."""
    if matrix.shape == (rows, columns):
        return matrix.contiguous()
    padded = matrix.new_full((rows, columns), value)
    padded[: matrix.shape[0], : matrix.shape[1]] = matrix
    return padded


def blocked(matrix: Tensor, columns_per_chunk: int, header: Header, value: int = 0) -> Tensor:
    """[B, 16, C, columns_per_chunk] of a stored matrix [O, proportional to I], padded with `value`."""
    blocks = -(-header.out_features // ROWS)
    chunks = header.in_padded // CHUNK
    padded = pad(matrix, blocks * ROWS, chunks * columns_per_chunk, value)
    return padded.view(blocks, ROWS, chunks, columns_per_chunk)


def meta_vectors(weight_meta: Tensor, header: Header) -> Tensor:
    """[B, C, 64]: lane byte c holds the positions of quad c and, in its upper nibble, of quad c + 4."""
    # Padding gets positions 0 and 1 of both quads of a byte, like every quad without kept weights.
    stored = blocked(weight_meta, CHUNK // 8, header, value=0x44)
    nibbles = torch.stack([stored & 15, stored >> 4], dim=-1).flatten(-2)
    by_lane = nibbles[..., :4] | (nibbles[..., 4:] << 4)
    return by_lane.transpose(1, 2).flatten(2)


def interleaved(values: Tensor) -> Tensor:
    """[B, C, bytes] of values [B, 16, C, vectors, n]: n consecutive values are a row's lane of each vector."""
    return values.permute(0, 2, 3, 1, 4).contiguous().flatten(2).view(torch.uint8)
