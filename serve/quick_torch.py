"""Imports torch without its Python rules for tracing shapes: a third of its import time, and serving never traces.

torch registers them (`torch._meta_registrations`) at the end of its import, for compilers and fake tensors. An empty
module takes their place until `complete_torch()` is called, as it is for models that run through transformers. The
compiler of steps runs in a process of its own, which imports torch as usual.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType

RULES = "torch._meta_registrations"


class _Placeholder(ModuleType):
    """Stands for the rules while nobody has asked for them."""


def import_torch() -> None:
    """Imports torch; the rules are left out unless it is imported already."""
    if "torch" not in sys.modules:
        sys.modules[RULES] = _Placeholder(RULES)
    import_module("torch")


def complete_torch() -> None:
    """Registers the rules if they were left out."""
    if isinstance(sys.modules.get(RULES), _Placeholder):
        del sys.modules[RULES]
        import_module(RULES)
