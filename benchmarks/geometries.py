"""The linears of known models, to measure their shapes without their weights."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Geometry:
    """The linears of one layer as (out_features, in_features): q/k/v as one, o, gate/up as one, down."""

    name: str
    layers: int
    group: int
    heads: int
    kv_heads: int
    vocabulary: int
    shapes: tuple[tuple[int, int], ...]

    @property
    def hidden(self) -> int:
        """Size of the hidden state."""
        return self.shapes[1][0]

    @property
    def inner(self) -> int:
        """Inner size of the MLP."""
        return self.shapes[3][1]

    @property
    def head_dim(self) -> int:
        """Size of a head."""
        return self.hidden // self.heads

    @property
    def weights(self) -> int:
        """Weights of a layer."""
        return sum(rows * columns for rows, columns in self.shapes)


LLAMA_2 = Geometry("Llama-2-7B", 32, 128, 32, 32, 32000, ((12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)))
TINYLLAMA = Geometry("TinyLlama-1.1B", 22, 128, 32, 4, 32000, ((2560, 2048), (2048, 2048), (11264, 2048), (2048, 5632)))
SMOLLM2 = Geometry("SmolLM2-135M", 30, 64, 9, 3, 49152, ((960, 576), (576, 576), (3072, 576), (576, 1536)))
