"""An output folder that appears whole or not at all.

Work is staged in a hidden sibling of the folder (same file system, so the final rename is atomic), every file is
synced, and the stage is exchanged with the folder in one system call. A lock keeps two runs out of one folder, and
stages that killed runs left behind are swept.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import shutil
from pathlib import Path
from types import TracebackType
from typing import IO

_RECORDS = {"halfweight.json"}, {"manifest.json", "config.json"}, {"model.gguf"}, {"model.onnx"}
"""Files of which a checkpoint, or an export, holds all of one kind."""
_COMPANIONS = r"additional_chat_templates|\d+_\w+"
"""The folders that they may hold."""
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def sync(path: Path) -> None:
    """Flushes a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(first: Path, second: Path) -> bool:
    """Swaps two paths atomically; False where the system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    names = os.fsencode(first), os.fsencode(second)
    return bool(rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0)


def check_replaceable(out: str | os.PathLike[str], *sources: str | os.PathLike[str]) -> None:
    """Raises FileExistsError where a folder is not ours to replace: of other things, or with what is read in it."""
    folder = Path(out).expanduser()
    if not folder.is_dir():
        return
    read = [Path(source).expanduser().resolve() for source in sources if Path(source).expanduser().exists()]
    inside = next((place for place in read if folder.resolve() in (place, *place.parents)), None)
    if inside is not None:
        raise FileExistsError(f"{folder} holds {inside}, which is read. Name another folder with --out.")
    entries = list(folder.iterdir())
    known = all(entry.is_file() or re.fullmatch(_COMPANIONS, entry.name) for entry in entries)
    if entries and not (known and any(files <= {entry.name for entry in entries} for files in _RECORDS)):
        raise FileExistsError(
            f"{folder} holds other things than a checkpoint or export of halfweight, which --force would replace. Name "
            "another folder with --out, or remove it yourself."
        )


class OutputFolder:
    """Context manager: write into `stage`, then `commit()`. Without a commit the output is as it was before.

    Args:
        path: the folder to make.
        force: whether an existing folder is replaced.

    Raises:
        FileExistsError: the folder exists and `force` is not given, or it is the current folder or holds that.
        BlockingIOError: another run is writing it.
        PermissionError: the parent folder cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], *, force: bool = False) -> None:
        self.path = Path(os.path.abspath(Path(path).expanduser()))
        self.stage = self.path.with_name(f".{self.path.name}.staging")
        self._lock_path = self.path.with_name(f".{self.path.name}.lock")
        self._force = force
        self._lock: IO[str] | None = None

    def check(self) -> None:
        """Raises what entering would raise, and leaves nothing behind."""
        here = Path.cwd()
        if self.path.resolve() in (here, *here.parents):
            raise FileExistsError(f"{self.path} holds the current folder. Name another folder with --out.")
        if self.path.exists() and not self._force:
            raise FileExistsError(f"{self.path} exists. Give --force to replace it, or name another folder with --out.")
        if self.path.exists() and not self.path.is_dir():
            raise FileExistsError(f"{self.path} is a file. Name a folder with --out.")
        parent = next(folder for folder in self.path.parents if folder.exists())
        if not os.access(parent, os.W_OK | os.X_OK):
            raise PermissionError(f"{parent} cannot be written by this user. Name another folder with --out.")

    def __enter__(self) -> OutputFolder:
        self.check()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = self._lock_path.open("a+")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.seek(0)
            holder = self._lock.read().strip() or "unknown"
            self._lock.close()
            raise BlockingIOError(
                f"another run (process {holder}) is writing {self.path}. Wait for it, or name another folder."
            ) from None
        self._lock.truncate(0)
        self._lock.write(str(os.getpid()))
        self._lock.flush()
        shutil.rmtree(self.stage, ignore_errors=True)
        return self

    def open_stage(self) -> Path:
        """Makes the empty stage and returns it."""
        shutil.rmtree(self.stage, ignore_errors=True)
        self.stage.mkdir()
        return self.stage

    def commit(self) -> None:
        """Syncs the stage and puts it in the folder's place."""
        for file in self.stage.rglob("*"):
            sync(file)
        sync(self.stage)
        if not self.path.exists():
            self.stage.rename(self.path)
        elif not _exchange(self.stage, self.path):
            retired = self.path.with_name(f".{self.path.name}.retired")
            shutil.rmtree(retired, ignore_errors=True)
            self.path.rename(retired)
            self.stage.rename(self.path)
            shutil.rmtree(retired)
        sync(self.path.parent)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.stage, ignore_errors=True)
        self._lock_path.unlink(missing_ok=True)
        if self._lock is not None:
            self._lock.close()
