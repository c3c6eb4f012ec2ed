"""What this process may use of the machine: memory and processors, within the limits of its control groups."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

OWN_GROUPS = Path("/proc/self/cgroup")
MOUNT = Path("/sys/fs/cgroup")

# Names in version 2 of control groups, and in version 1.
_MEMORY = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def available_memory() -> int:
    """Bytes that can be taken without swapping, by the kernel's own estimate, within every limit on this process."""
    return max(0, min([int(psutil.virtual_memory().available), *_memory_left()]))


def available_processors() -> int:
    """Processors that this process may run on, or as many as its quota of their time is worth; at least 1."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([own, *(math.ceil(quota / period) for quota, period in _quotas() if quota > 0)])


def use_threads(chosen: int | None) -> None:
    """Lets torch compute with so many threads; by default with as many as it takes, within this process's quota."""
    import torch

    threads = chosen or min(available_processors(), torch.get_num_threads())
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)


def _memory_left() -> Iterator[int]:
    """Of each group, what its limit leaves; cached files that nobody has read again can be dropped."""
    for group in _groups("memory"):
        for limit, used, dropped in _MEMORY:
            with suppress(OSError, ValueError):  # no such group, or one without a limit
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                yield _number(group / limit) - _number(group / used) + int(stat[dropped])


def _quotas() -> Iterator[tuple[int, int]]:
    """Of each group, the processors' time that it gets, in so much time."""
    for group in _groups("cpu"):
        with suppress(OSError, ValueError):
            quota, period = (group / "cpu.max").read_text().split()
            yield int(quota), int(period)
        with suppress(OSError, ValueError):
            yield _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")


def _number(path: Path) -> int:
    return int(path.read_text())


def _groups(controller: str) -> Iterator[Path]:
    """The folders of this process's groups and of those above them, of version 2 and of version 1's `controller`.

    A container sees its own group in the place of the root, but may read the path that it has outside: the folders on
    that path are not there then.
    """
    try:
        lines = OWN_GROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = MOUNT / controller if controllers else MOUNT
        parts = [part for part in path.split("/") if part not in ("", "..")]
        yield from (root.joinpath(*parts[:depth]) for depth in range(len(parts) + 1))


def cache_folder() -> Path:
    """Where downloads and what was compiled are kept: HALFWEIGHT_CACHE, or `halfweight` in the user's cache folder."""
    given = os.environ.get("HALFWEIGHT_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "halfweight"
