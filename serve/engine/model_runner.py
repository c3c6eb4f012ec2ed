"""Runs the decoder over what the scheduler chose: builds the step's tensors, computes, and gives the logits to sample
from.

Shapes: T tokens of the step, S sequences, C hidden size, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from compressor.kernels.attention import cache_dtype_of, empty_cache
from serve.engine.config import GIB, CachePlan
from serve.engine.models.decoder import Decoder, StepInputs
from serve.engine.scheduler import Scheduled

logger = logging.getLogger(__name__)

# Rows of logits computed at once when a whole prompt is scored: bounds memory at 64 rows of the vocabulary.
SCORED_ROWS = 64


class Runner(Protocol):
    """What the engine asks of a model; every method computes in inference mode."""

    def run(self, step: list[Scheduled]) -> Tensor: ...
    def sample_logits(self, hidden_TC: Tensor, step: list[Scheduled]) -> Tensor: ...
    def prompt_logits(self, hidden_TC: Tensor, offset: int, count: int) -> list[Tensor]: ...


def sampling_rows(step: list[Scheduled]) -> list[int]:
    """The row of every item that samples: the last token of a sequence, and each draft after it."""
    rows, end = [], -1
    for item in step:
        end += item.count
        if item.samples:
            rows.append(end)
    return rows


class ModelRunner:
    def __init__(self, model: Decoder, plan: CachePlan) -> None:
        self.model = model
        self.plan = plan
        # The decoder itself, or the program compiled from it: exchanged between two steps, once it is ready.
        self.forward: Callable[[StepInputs, list[Tensor], list[Tensor]], Tensor] = model
        config = model.config
        shape = (plan.num_blocks, plan.block_size, config.num_kv_heads, config.head_dim)
        dtype = cache_dtype_of(plan.dtype)
        try:
            self.k_caches, self.v_caches = (
                [empty_cache(*shape, dtype) for _ in range(config.num_layers)] for _ in range(2)
            )
        except RuntimeError:  # torch's way to say that there is not so much memory
            raise ValueError(
                f"there is no memory for a KV cache of {plan.num_bytes / GIB:.2f} GiB; lower --kv-cache-gb"
            ) from None

    @torch.inference_mode()
    def run(self, step: list[Scheduled]) -> Tensor:
        """Hidden states [T, C] of the step's tokens, in the order of `step`."""
        return self.forward(self.build_inputs(step), self.k_caches, self.v_caches)

    @torch.inference_mode()
    def sample_logits(self, hidden_TC: Tensor, step: list[Scheduled]) -> Tensor:
        """Logits [S', V] of every item that samples."""
        rows = sampling_rows(step)
        if len(rows) < hidden_TC.shape[0]:
            hidden_TC = hidden_TC[rows]
        return self.model.logits(hidden_TC)

    @torch.inference_mode()
    def prompt_logits(self, hidden_TC: Tensor, offset: int, count: int) -> list[Tensor]:
        """Logits of `count` rows from `offset`, some rows at a time."""
        rows = hidden_TC[offset : offset + count]
        return [self.model.logits(part) for part in rows.split(SCORED_ROWS)]

    def build_inputs(self, step: list[Scheduled]) -> StepInputs:
        total = sum(item.count for item in step)
        token_ids, positions, slots = (np.empty(total, np.int64) for _ in range(3))
        tables = np.zeros((len(step), max(len(item.seq.block_table) for item in step)), np.int32)
        starts, contexts = np.zeros(len(step) + 1, np.int32), np.empty(len(step), np.int32)
        at, size = 0, self.plan.block_size
        for i, item in enumerate(step):
            seq, start, end = item.seq, item.start, item.start + item.count
            tables[i, : len(seq.block_table)] = seq.block_table
            if item.count == 1:
                token_ids[at] = seq.tokens[start] if item.draft is None else item.draft
                positions[at] = start
                slots[at] = seq.block_table[start // size] * size + start % size
            else:
                place = np.arange(start, end)
                token_ids[at : at + item.count], positions[at : at + item.count] = seq.tokens[start:end], place
                slots[at : at + item.count] = tables[i, place // size] * np.int64(size) + place % size
            at += item.count
            starts[i + 1], contexts[i] = at, end
        return StepInputs(*map(torch.from_numpy, (token_ids, positions, slots, tables, starts, contexts)))
