"""Rotary position tables: cosines and sines of every position the model may reach.

Shapes: P positions, D head size; the table is [P, D] float32, cosines in the first half and sines in the second (the
NeoX layout, in which dimension j turns together with j + D/2).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from serve.engine.models.config import Rope


def rotary_table(rope: Rope, head_dim: int, num_positions: int) -> Tensor:
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), _frequencies(rope, head_dim))
    return torch.cat((angles.cos(), angles.sin()), dim=-1).contiguous()


def _frequencies(rope: Rope, head_dim: int) -> Tensor:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = rope.theta**-exponents
    parameters = rope.parameters or {}
    if rope.kind == "linear":
        return frequencies / float(parameters["factor"])
    if rope.kind == "llama3":
        return _llama3(frequencies, **{name: float(parameters[name]) for name in LLAMA3_PARAMETERS})
    return frequencies


LLAMA3_PARAMETERS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def _llama3(
    frequencies: Tensor,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: float,
) -> Tensor:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    wavelengths = 2 * math.pi / frequencies
    turns = original_max_position_embeddings / wavelengths
    blend = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return frequencies * (blend + (1 - blend) / factor)
