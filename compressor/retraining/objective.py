"""What a step is trained on: examples, and their loss.

The loop draws examples by number and asks for gradients; whether they are blocks of text with a dense teacher (text.py)
or labelled sentences is the objective's. A new objective is one class with these members.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn


class Objective(Protocol):
    """Examples by number, and their loss."""

    @property
    def count(self) -> int:
        """How many examples there are; the loop draws them in a new order for every pass."""
        ...

    @property
    def tokens(self) -> int:
        """Tokens of one example (the most it may have), which budgets count."""
        ...

    def size(self, examples: Tensor) -> int:
        """How many terms the mean loss of some examples is taken over: examples, or tokens to predict."""
        ...

    @property
    def lengths(self) -> Sequence[int] | None:
        """Tokens of each example, so that those of like length are batched together; None where all are alike."""
        ...

    def identity(self) -> Iterable[Tensor]:
        """The data, for the hash by which a run knows its snapshots."""
        ...

    def prepare(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Called once before the first step: check the model, cast what else is run to the compute dtype."""
        ...

    def backward(self, model: nn.Module, examples: Tensor, weight: float) -> dict[str, float]:
        """Add the gradients of the examples' mean loss, times `weight`, to the parameters.

        Args:
            examples: their numbers [B].

        Returns:
            Means over the examples: "total" is what was differentiated, others are for watching. The loop looks
            whether it is finite before it uses the gradients; under fsdp all processes must come this far.
        """
        ...
