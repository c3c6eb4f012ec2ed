"""Rotary position tables: cosines and sines of every position the model may reach.

Shapes: P positions, D head size; the table is [P, D] float32, cosines in the first half and sines in the second (the
NeoX layout, in which dimension j turns together with j + D/2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from serve.engine.models.config import LLAMA3_PARAMETERS, Rope


def rotary_table(rope: Rope, head_dim: int, num_positions: int) -> Tensor:
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), _frequencies(rope, head_dim))
    return torch.cat((angles.cos(), angles.sin()), dim=-1).mul_(_magnitude(rope)).contiguous()


def _frequencies(rope: Rope, head_dim: int) -> Tensor:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = rope.theta**-exponents
    parameters = rope.parameters or {}
    if rope.kind == "linear":
        return frequencies / float(parameters["factor"])
    if rope.kind == "llama3":
        return _llama3(frequencies, **{name: float(parameters[name]) for name in LLAMA3_PARAMETERS})
    if rope.kind == "yarn":
        return _yarn(frequencies, rope.theta, parameters)
    return frequencies  # "dynamic" differs only beyond the context that the model was trained for, which we never reach


def _magnitude(rope: Rope) -> float:
    """YaRN sharpens attention over its longer context by scaling both cosines and sines."""
    if rope.kind != "yarn" or rope.parameters is None:
        return 1.0
    given = rope.parameters.get("attention_factor")
    return float(given) if given is not None else 0.1 * math.log(max(float(rope.parameters["factor"]), 1.0)) + 1.0


def _yarn(frequencies: Tensor, theta: float, parameters: Mapping[str, Any]) -> Tensor:
    """YaRN (Peng et al. 2023): slow dimensions are stretched by `factor`, fast ones kept, a linear ramp between."""
    pairs, length = len(frequencies), float(parameters["original_max_position_embeddings"])

    def pair_with(turns: float) -> float:
        """The pair that turns so many times within the trained context."""
        return pairs * math.log(length / (turns * 2 * math.pi)) / math.log(theta)

    low, high = pair_with(parameters.get("beta_fast") or 32), pair_with(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    slow = ((torch.arange(pairs) - low) / max(high - low, 1e-3)).clamp(0, 1)
    return frequencies * (1 - slow + slow / float(parameters["factor"]))


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
