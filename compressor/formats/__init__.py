"""Packed weight formats: the contract of `docs/format.md`, one file each.

A format says how the values of one weight lie on disk (`spec`, `pack`, `unpack`) and how they are multiplied
(`prepare`, `linear`). A new format is one file and one line in `FORMATS`; it works through `unpack` the moment it is
written, and gets its kernel later.
"""

from __future__ import annotations

import torch

from compressor.formats.dense import Dense
from compressor.formats.format import Format, QuantizedWeight, Tensors
from compressor.formats.fp8 import Fp8
from compressor.formats.int4 import Int4
from compressor.formats.int8 import Int8
from compressor.formats.sparse24 import Sparse24
from compressor.formats.sparse24_fp8 import Sparse24Fp8
from compressor.formats.sparse24_int4 import Sparse24Int4
from compressor.formats.sparse24_int8 import Sparse24Int8
from compressor.scheme import Scheme

FORMATS: dict[str, type[Format]] = {
    "dense": Dense,
    "fp8": Fp8,
    "int8": Int8,
    "int4": Int4,
    "sparse24": Sparse24,
    "sparse24_fp8": Sparse24Fp8,
    "sparse24_int8": Sparse24Int8,
    "sparse24_int4": Sparse24Int4,
}

__all__ = ["FORMATS", "Format", "QuantizedWeight", "Tensors", "make_format"]


def make_format(scheme: Scheme) -> Format:
    """The format of a scheme; raises ValueError for a name that is not in `FORMATS`."""
    if scheme.format not in FORMATS:
        raise ValueError(f"unknown format {scheme.format!r}; accepted: {', '.join(FORMATS)}")
    return FORMATS[scheme.format](scheme.group_size, getattr(torch, scheme.dtype))
