"""What control groups leave of the machine, of both versions, however deep a process is in them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from compressor import machine
from compressor.machine import available_memory, available_processors, use_threads
from serve.engine import config
from serve.engine.config import EngineConfig

MB = 2**20


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A mount without groups, of a machine with 1000 MB and eight processors."""
    monkeypatch.setattr(machine, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(machine, "MOUNT", tmp_path)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000 * MB))
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: range(8))
    return tmp_path


def write(folder: Path, **files: object) -> None:
    """Files whose names have points where the arguments' have two underscores."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def test_without_groups_all_is_available(groups: Path) -> None:
    assert (available_memory(), available_processors()) == (1000 * MB, 8)
    write(groups, own="0::/")
    assert (available_memory(), available_processors()) == (1000 * MB, 8)


def test_the_narrowest_group_counts(groups: Path) -> None:
    """systemd's kind: the limits lie below the root, the slice's here is nearer than the service's."""
    write(groups, own="0::/system.slice/serve.service")
    stat = f"anon 1\ninactive_file {30 * MB}\nactive_file {50 * MB}"
    write(groups / "system.slice", memory__max=500 * MB, memory__current=450 * MB, memory__stat=stat)
    own = groups / "system.slice" / "serve.service"
    write(own, memory__max=200 * MB, memory__current=20 * MB, memory__stat="inactive_file 0")
    assert available_memory() == 80 * MB
    write(groups / "system.slice", memory__max="max", cpu__max="max 100000")
    assert available_memory() == 180 * MB
    write(own, memory__current=900 * MB, cpu__max="250000 100000")
    assert (available_memory(), available_processors()) == (0, 3)


def test_version_1(groups: Path) -> None:
    """A container reads the path that it has outside, and sees its own group where the root would be."""
    write(groups, own="4:memory:/docker/abc\n2:cpu,cpuacct:/docker/abc\n1:name=systemd:/x\n0::/")
    stat = f"inactive_file 1\ntotal_inactive_file {5 * MB}"
    usage, none = {"memory__usage_in_bytes": 70 * MB, "memory__stat": stat}, 2**63 - 4096
    write(groups / "memory", memory__limit_in_bytes=none, **usage)
    write(groups / "cpu", cpu__cfs_quota_us=-1, cpu__cfs_period_us=100000)
    assert (available_memory(), available_processors()) == (1000 * MB, 8)
    write(groups / "memory", memory__limit_in_bytes=100 * MB)
    write(groups / "cpu", cpu__cfs_quota_us=50000)
    assert (available_memory(), available_processors()) == (35 * MB, 1)


def test_the_cache_and_the_threads_keep_to_them(groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(groups, own="0::/pod")
    limits = {"memory__max": 108 * MB, "memory__current": 100 * MB, "memory__stat": "inactive_file 0"}
    write(groups / "pod", **limits, cpu__max="300000 100000")
    assert config._budget(EngineConfig(), per_token=2**20, longest=4096, states=0) == 2 * MB
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    chosen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    use_threads(None)
    use_threads(6)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # OMP_NUM_THREADS=2, say
    use_threads(None)
    assert chosen == [3, 6]
