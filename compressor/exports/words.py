"""Grid values in 32-bit words, as AutoGPTQ and compressed-tensors keep them: earlier values in lower bits, unsigned.

Shapes: O out_features, I in_features; a word holds 8 values of 4 bits or 4 of 8 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.formats.nibbles import pack_nibbles, unpack_nibbles


def to_words(values: Tensor, bits: int) -> Tensor:
    """[O, I] int8 grid values -> [O, I * bits / 32] int32; the zero point is half the range."""
    per_word = 32 // bits
    if values.shape[1] % per_word:
        raise ValueError(f"in_features {values.shape[1]} is no multiple of {per_word}, the values of a 32-bit word")
    unsigned = pack_nibbles(values) if bits == 4 else (values.to(torch.int16) + 128).to(torch.uint8)
    return unsigned.contiguous().view(torch.int32)


def from_words(words: Tensor, bits: int) -> Tensor:
    """The inverse of `to_words`."""
    unsigned = words.contiguous().view(torch.uint8)
    return unpack_nibbles(unsigned) if bits == 4 else (unsigned.to(torch.int16) - 128).to(torch.int8)
