"""Registers the checkpoint format with transformers the moment transformers loads its quantisers, and not before.

`import compressor` must stay cheap (a command's `--help` takes half a second), while `from_pretrained(OUT)` must work
in any program that imported `compressor`, whichever of the two it imported first.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_TRIGGER = "transformers.quantizers.auto"


def _register() -> None:
    import compressor.hf  # noqa: F401  (its import registers; while it is being imported itself, it does so at its end)


class _LoadThenRegister(Loader):
    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _register()


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _TRIGGER:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _LoadThenRegister(spec.loader)
        return spec


def register_when_transformers_loads() -> None:
    """Registers now if transformers' quantisers are loaded, else as soon as they are. Calling it again does nothing."""
    if _TRIGGER in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
