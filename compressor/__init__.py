"""Compress language models into 2:4 sparsity with int4, int8 or bf16 values, and read them back.

`import compressor` registers the checkpoint format with transformers as soon as transformers is imported, so that
`AutoModelForCausalLM.from_pretrained(OUT)` works; it imports neither torch nor transformers by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from compressor.registration import register_when_transformers_loads

if TYPE_CHECKING:
    from torch import nn

__version__ = "0.1.0"

register_when_transformers_loads()


def keep_masks(model: nn.Module, pattern: str = "2:4") -> Callable[[], None]:
    """Keeps the pruned weights of a model at zero while it is trained; see `compressor.finetuning.keep_masks`."""
    from compressor import finetuning

    return finetuning.keep_masks(model, pattern)
