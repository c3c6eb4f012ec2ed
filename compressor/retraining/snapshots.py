"""Snapshots of a run: what a killed run needs to go on as if nothing had happened.

A snapshot is a folder of safetensors and one manifest. It is written under a temporary name, flushed to disk, the
manifest last, and renamed: a folder with its final name is whole. No pickle. The manifest carries the run's identity
(hashes of model, text and settings), and a run refuses to go on from another one's snapshot.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from compressor.output import sync

log = logging.getLogger(__name__)

_MANIFEST, _TENSORS, _WEIGHTS = "manifest.json", "state", "quantized-from.safetensors"


def _alone() -> None:
    """One process waits for nobody."""


def _remove(snapshot: Path) -> None:
    """Under another name, so that a kill leaves none that is half there."""
    hidden = snapshot.with_name(f".{snapshot.name}.old")
    shutil.rmtree(hidden, ignore_errors=True)
    if snapshot.is_dir():
        os.replace(snapshot, hidden)
        shutil.rmtree(hidden, ignore_errors=True)


@dataclass(frozen=True)
class Snapshots:
    """The snapshots of one run under `folder`; the last `keep` stay.

    Args:
        rank: of this process; the first writes what all hold.
        parts: how many processes each hold, write and read a part of their own.
        wait: until all processes are here.
    """

    folder: Path
    identity: str
    keep: int = 2
    rank: int = 0
    parts: int = 1
    wait: Callable[[], None] = _alone

    @property
    def _file(self) -> str:
        part = f"-{self.rank + 1:05d}-of-{self.parts:05d}" if self.parts > 1 else ""
        return f"{_TENSORS}{part}.safetensors"

    def save(self, step: int, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Write one snapshot whole or not at all, then drop the oldest."""
        final = self.folder / f"step-{step:08d}"
        scratch = self.folder / f".{final.name}.part"
        if self.rank == 0:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
        self.wait()
        if self.rank == 0 or self.parts > 1:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, scratch / self._file)
            sync(scratch / self._file)
        self.wait()
        if self.rank == 0:
            self._finish(scratch, final, {"identity": self.identity, "step": step, "parts": self.parts, **record})
        self.wait()

    def _finish(self, scratch: Path, final: Path, manifest: Mapping[str, Any]) -> None:
        (scratch / _MANIFEST).write_text(json.dumps(manifest, indent=1))
        sync(scratch / _MANIFEST)
        _remove(final)
        os.replace(scratch, final)
        sync(self.folder)
        for old in self.steps()[: -self.keep]:
            _remove(old)

    def drop_newest(self) -> None:
        """Forget the newest snapshot: going on from it failed."""
        self.wait()
        if self.rank == 0:
            _remove(self.steps()[-1])
        self.wait()

    def steps(self) -> list[Path]:
        """Whole snapshots, oldest first."""
        return sorted(path.parent for path in self.folder.glob(f"step-*/{_MANIFEST}"))

    def clear_others(self) -> None:
        """Remove the snapshots of another run: for a short stage, which starts elsewhere where what comes before it
        was done again.
        """
        manifest = self._newest()
        if manifest is not None and manifest["identity"] != self.identity:
            log.warning("%s holds another run; starting anew", self.folder)
            self.clear()

    def _newest(self) -> dict[str, Any] | None:
        found = self.steps()
        return json.loads((found[-1] / _MANIFEST).read_text()) if found else None

    def latest(self) -> dict[str, Any] | None:
        """The newest manifest, or None; raises when it belongs to another run."""
        manifest = self._newest()
        if manifest is None:
            return None
        if manifest["identity"] != self.identity:
            raise ValueError(
                f"{self.folder} holds a run of another model, text or recipe; give another work folder, "
                "delete it, or run the command it was started with"
            )
        if manifest["parts"] != self.parts:
            raise ValueError(
                f"{self.folder} was written by {manifest['parts']} processes with a part each; go on with as many"
            )
        return manifest

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the newest snapshot into `tensors`, which name exactly what was saved."""
        with safe_open(self.steps()[-1] / self._file, framework="pt") as file:
            if set(file.keys()) != set(tensors):
                raise ValueError(f"the snapshot in {self.folder} does not hold the tensors of this run; delete it")
            for name, tensor in tensors.items():
                tensor.copy_(file.get_tensor(name))

    def save_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Keep the weights that the quantised share starts from, beside the snapshots of the run."""
        if self.rank:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        scratch = self.folder / f".{_WEIGHTS}.part"
        save_file(dict(weights), scratch)
        sync(scratch)
        os.replace(scratch, self.folder / _WEIGHTS)

    def load_weights(self, device: torch.device) -> dict[str, Tensor]:
        """The weights that the quantised share started from, where they train."""
        weights: dict[str, Tensor] = load_file(self.folder / _WEIGHTS, device=str(device))
        return weights

    def clear(self) -> None:
        """Remove the run's snapshots, once its result is safe elsewhere."""
        shutil.rmtree(self.folder, ignore_errors=True)
