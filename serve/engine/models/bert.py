"""BERT, RoBERTa and those of their shape, over a flat batch of tokens: no linear ever computes padding.

The sequences' tokens lie one after another; only attention lays them side by side. Linears come from the checkpoint in
whatever format it stores them, q/k/v as one.

Shapes: T tokens of all sequences, B sequences, S tokens of the longest, C hidden size, H heads, D head size, N numbers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from serve.engine.models.decoder import Norm


class Places:
    """Where each sequence's tokens lie in the flat batch."""

    def __init__(self, lengths: list[int]) -> None:
        sizes_B = torch.tensor(lengths)
        starts_B = sizes_B.cumsum(0) - sizes_B
        steps_S = torch.arange(max(lengths))
        self.first_B = starts_B
        self.real_BS = steps_S < sizes_B[:, None]
        self.flat_BS = (starts_B[:, None] + steps_S) * self.real_BS
        self.positions_T = steps_S.expand(len(lengths), -1)[self.real_BS]
        self.sequences_T = torch.arange(len(lengths)).repeat_interleave(sizes_B)
        self.mask_B11S = None if min(lengths) == max(lengths) else self.real_BS[:, None, None]


class BertLayer(nn.Module):
    def __init__(
        self, heads: int, qkv: nn.Module, out: nn.Module, norm: Norm, up: nn.Module, down: nn.Module, last_norm: Norm
    ) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out, self.norm = qkv, out, norm
        self.up, self.down, self.last_norm = up, down, last_norm

    def forward(self, x_TC: Tensor, places: Places) -> Tensor:
        x_TC = self.norm(self.out(self._attended(x_TC, places)) + x_TC)[0]
        hidden: Tensor = self.last_norm(self.down(F.gelu(self.up(x_TC))) + x_TC)[0]
        return hidden

    def _attended(self, x_TC: Tensor, places: Places) -> Tensor:
        """What every token takes from the others of its sequence."""
        q_BHSD, k_BHSD, v_BHSD = (
            part[places.flat_BS].unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(x_TC).chunk(3, dim=1)
        )
        mixed_BHSD = F.scaled_dot_product_attention(q_BHSD, k_BHSD, v_BHSD, places.mask_B11S)
        return mixed_BHSD.transpose(1, 2).flatten(2)[places.real_BS]


class Bert(nn.Module):
    """Token ids to hidden states; with a head, of its first token to logits.

    Args:
        words: embedding of tokens.
        positions: [P, C] table, from the first token's position on.
        types: [K, C] table of token types.
        head: two linears with a tanh between them, or nothing.
    """

    def __init__(
        self,
        words: nn.Module,
        positions: Tensor,
        types: Tensor,
        norm: Norm,
        layers: list[BertLayer],
        head: tuple[nn.Module, nn.Module] | None,
    ) -> None:
        super().__init__()
        self.words, self.norm, self.layers = words, norm, nn.ModuleList(layers)
        self.positions: Tensor
        self.types: Tensor
        self.register_buffer("positions", positions)
        self.register_buffer("types", types)
        self.head = None if head is None else nn.ModuleList(head)

    def forward(self, ids_T: Tensor, types_T: Tensor, places: Places) -> Tensor:
        """[T, C]."""
        known_T = types_T.clamp(max=len(self.types) - 1)
        x_TC = self.words(ids_T).to(self.types.dtype) + self.types[known_T] + self.positions[places.positions_T]
        x_TC = self.norm(x_TC)[0]
        for layer in self.layers:
            x_TC = layer(x_TC, places)
        return x_TC

    def logits(self, hidden_TC: Tensor, places: Places) -> Tensor:
        """[B, N] from the first token of each sequence."""
        assert self.head is not None
        dense, out = self.head
        found: Tensor = out(torch.tanh(dense(hidden_TC[places.first_B])))
        return found
