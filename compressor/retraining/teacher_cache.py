"""What the teacher says of each block of text, kept on disk, so that it runs once for several students.

Two kinds. `hidden` keeps the teacher's last hidden states in the dtype that computes: exact, H numbers a token, and the
teacher's head is run again. `top-k` keeps the k most likely next tokens and their log-probabilities: smaller where k is
well under H / 3, and the loss then treats all other tokens as one (distillation.py).

A block is filled when a student first asks for it. Its checksum is written after it, so a block that a crash left half
written counts as absent.

Shapes: N blocks of text, P predicting positions of a block, H hidden size, k kept tokens.
"""

import hashlib
import os
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from compressor.machine import cache_folder

KINDS = ("off", "hidden", "top-k")
_RESERVE = 1 << 30


class TeacherCache:
    """Tensors of each block of text, by name.

    Args:
        key: what the content depends on, as a hash; another key is another folder.
        blocks: N.
        layout: for each tensor the shape of one block's and its dtype.

    Raises:
        ValueError: the disk has no room for all of it.
    """

    def __init__(
        self,
        key: str,
        blocks: int,
        layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        folder: Path | None = None,
    ) -> None:
        self.folder = (folder or cache_folder() / "teacher") / key[:32]
        self._dtypes = {name: dtype for name, (_, dtype) in layout.items()}
        self._check_room(blocks, layout)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._files = {
            name: _open(self.folder / f"{name}.npy", (blocks, *shape), _stored(dtype))
            for name, (shape, dtype) in layout.items()
        }
        self._sums = _open(self.folder / "checksums.npy", (blocks,), np.dtype(np.uint32))

    def _check_room(self, blocks: int, layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        if (self.folder / "checksums.npy").exists():
            return
        size = blocks * sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in layout.values())
        home = next(parent for parent in self.folder.parents if parent.exists())
        free = shutil.disk_usage(home).free
        if size + _RESERVE > free:
            raise ValueError(
                f"the teacher cache takes {size / 1e9:.1f} GB and {home} has {free / 1e9:.1f} GB free; give a smaller "
                "teacher_top_k, another HALFWEIGHT_CACHE, or teacher_cache off"
            )

    def get(self, block: int) -> dict[str, Tensor] | None:
        """A block's tensors, or None where it is absent or damaged."""
        if self._sums[block] == 0:
            return None
        rows = {name: np.array(file[block]) for name, file in self._files.items()}
        if self._sums[block] != _checksum(rows):
            return None
        return {name: torch.from_numpy(row).view(self._dtypes[name]) for name, row in rows.items()}

    def put(self, block: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep a block's tensors."""
        rows = {
            name: tensors[name].to("cpu", dtype).contiguous().view(_as_integers(dtype)).numpy()
            for name, dtype in self._dtypes.items()
        }
        for name, row in rows.items():
            self._files[name][block] = row
        self._sums[block] = _checksum(rows)


def cache_key(teacher: nn.Module, tokens: Tensor, *more: object) -> str:
    """Hash of the teacher's weights, the text, and what else decides the content."""
    digest = hashlib.sha256(repr(more).encode())
    for name, tensor in [*sorted(teacher.state_dict().items()), ("tokens", tokens)]:
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _open(file: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.memmap:
    if not file.exists():
        part = file.with_name(f".{file.name}.{os.getpid()}.part")
        np.lib.format.open_memmap(part, mode="w+", dtype=dtype, shape=shape).flush()
        part.replace(file)
    return np.lib.format.open_memmap(file, mode="r+")


def _as_integers(dtype: torch.dtype) -> torch.dtype:
    return torch.int16 if dtype.itemsize == 2 else torch.int32


def _stored(dtype: torch.dtype) -> np.dtype:
    return np.dtype(np.int16 if dtype.itemsize == 2 else np.int32)


def _checksum(rows: Mapping[str, "np.ndarray"]) -> int:
    total = 1
    for row in rows.values():
        total = zlib.crc32(row.tobytes(), total)
    return total or 1
