"""Whole attention heads and whole rows of the MLP as what a mask drops; our extension of PST's score.

A head is its rows of q, k and v and its columns of the output projection; with grouped queries, all heads that share
a key head stand or fall together. A neuron of the MLP is its rows of the projections up and its column of the one
down. What a group is worth is the mean score of its weights; of every block the same share is dropped, so no block
runs dry. As the columns that would read a dropped head or neuron are zero too, its bias says nothing any more.

Shapes: O out_features, I in_features, G groups of a block.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compressor.masks import keep_highest


@dataclass(frozen=True)
class Block:
    """Names of the parts of one transformer block, as the method calls them."""

    query: str
    key: str
    value: str
    out: str
    up: tuple[str, ...]
    down: str


_FAMILIES = (
    Block(
        "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
        ("intermediate.dense",), "output.dense",
    ),
    Block("attn.c_attn.q", "attn.c_attn.k", "attn.c_attn.v", "attn.c_proj", ("mlp.c_fc",), "mlp.c_proj"),
    Block(
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Structures:
    """The blocks of a model, and the share of heads and neurons to drop.

    Args:
        groups: key heads of a block; a group is what shares one.
        pruned: the share of groups and of neurons that the final mask drops.
    """

    blocks: tuple[Block, ...]
    groups: int
    pruned: float

    @classmethod
    def of(cls, names: Collection[str], config: Any, pruned: float) -> Structures:
        """Finds the blocks among the names of the linears' parts.

        Raises:
            ValueError: the model's blocks are not of a kind that is known, or part of one is left dense.
        """
        blocks = [block for family in _FAMILIES for block in _blocks(family, names)]
        if not blocks or 6 * len(blocks) + len(blocks) * (len(blocks[0].up) - 1) != len(names):
            raise ValueError(
                "rows and heads can be pruned in models built like BERT, GPT-2 and Llama, with no layer ignored; "
                "take the pattern 2:4 or a share such as 50% for others"
            )
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        return cls(tuple(blocks), heads, pruned)

    def masks(self, scores: Mapping[str, Tensor], grown: float) -> Iterator[tuple[str, Tensor]]:
        """(name, mask [O, I]) of every part; `grown` is the share of the final sparsity that is wanted by now."""
        for block in self.blocks:
            rows = (block.query, block.key, block.value)
            yield from self._coupled(scores, rows, block.out, self.groups, grown)
            yield from self._coupled(scores, block.up, block.down, scores[block.down].shape[1], grown)

    def _coupled(
        self, scores: Mapping[str, Tensor], rows: tuple[str, ...], columns: str, groups: int, grown: float
    ) -> Iterator[tuple[str, Tensor]]:
        """Masks of what writes groups by rows, and of what reads them by columns."""
        worth = torch.zeros(groups, device=scores[columns].device)
        entries = 0
        for score_G in (*(scores[name].view(groups, -1) for name in rows), _by_column(scores[columns], groups)):
            worth += score_G.sum(1)
            entries += score_G.shape[1]
        kept_G = keep_highest(worth / entries, groups - int(self.pruned * grown * groups))
        for name in rows:
            height, width = scores[name].shape
            yield name, kept_G.repeat_interleave(height // groups).unsqueeze(1).expand(height, width).contiguous()
        height, width = scores[columns].shape
        yield columns, kept_G.repeat_interleave(width // groups).expand(height, width).contiguous()


def _by_column(score: Tensor, groups: int) -> Tensor:
    return score.t().reshape(groups, -1)


def _blocks(family: Block, names: Collection[str]) -> Iterator[Block]:
    end = f".{family.query}"
    for prefix in (name.removesuffix(end) for name in names if name.endswith(end)):
        yield Block(
            f"{prefix}.{family.query}",
            f"{prefix}.{family.key}",
            f"{prefix}.{family.value}",
            f"{prefix}.{family.out}",
            tuple(f"{prefix}.{part}" for part in family.up),
            f"{prefix}.{family.down}",
        )
