"""What can serve a checkpoint: a name, and where its `serve(options, say)` lives. Imported only when chosen."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from serve.options import ServeOptions

RUNTIMES = {
    "torch": "serve.runtimes.torch_compiled:serve",
    "vllm": "serve.runtimes.vllm:serve",
}


def find_runtime(name: str) -> Callable[[ServeOptions, Callable[[str], None]], int]:
    """The `serve` function of a runtime, which tells the user what it does and returns the exit status."""
    if name not in RUNTIMES:
        raise ValueError(f"unknown runtime {name!r}; accepted: {', '.join(RUNTIMES)}")
    module, _, function = RUNTIMES[name].partition(":")
    found: Callable[[ServeOptions, Callable[[str], None]], int] = getattr(import_module(module), function)
    return found
