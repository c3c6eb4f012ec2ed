"""What every benchmark writes: one JSON object that says on which machine, with which versions, by which command.

    {"name", "date", "command", "machine", "versions", ...what the benchmark adds..., "rows", "headline"}

`rows` are the measurements; `headline` is a flat object of plain numbers, those that other documents quote.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import os
import platform
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from compressor import __version__

FLAGS = (
    *("avx2", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_vbmi2", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16", "asimddp", "i8mm", "sve"),
)
PACKAGES = ("torch", "transformers")
_BANDWIDTH_BYTES = 1 << 29


def parser(name: str, description: str) -> argparse.ArgumentParser:
    """The parser of one benchmark, with the two flags that all have."""
    result = argparse.ArgumentParser(prog=f"python -m benchmarks {name}", description=description)
    result.add_argument("--quick", action="store_true", help="measure less, in under a minute")
    result.add_argument("--json", type=Path, metavar="FILE", help="write the record")
    return result


def make_record(
    name: str, argv: Sequence[str], rows: Sequence[Mapping[str, Any]], headline: Mapping[str, float], **more: Any
) -> dict[str, Any]:
    """The record of one run. Of an absolute path in `argv` only the name is kept: it is this machine's business.

    Raises:
        ValueError: a headline entry is not a plain finite number.
    """
    for key, value in headline.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"headline {key!r} is {value!r}; only plain finite numbers are accepted")
    return {
        "name": name,
        "date": _now(),
        "command": shlex.join(["python", "-m", "benchmarks", name, *map(_public, argv)]),
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        **more,
        "rows": list(rows),
        "headline": dict(headline),
    }


def _public(argument: str) -> str:
    return Path(argument).name if argument.startswith("/") else argument


def finish(
    name: str, argv: Sequence[str], rows: Sequence[Mapping[str, Any]], headline: Mapping[str, float], file: Path | None
) -> None:
    """Prints the headline, and writes the record where a file is given."""
    for key, value in headline.items():
        print(f"{key:34} {value:.3f}")
    if file:
        write_record(file, make_record(name, argv, rows, headline))
        print(f"wrote {file}")


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Writes the record so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    part.replace(path)


def read_record(path: Path, name: str) -> dict[str, Any]:
    """A record that the benchmark `name` wrote; ValueError where the file is something else."""
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON record of a benchmark: {error}") from None
    if not isinstance(record, dict) or record.get("name") != name:
        raise ValueError(f"{path} is no record of `python -m benchmarks {name}`; give the file of its --json")
    return record


def recorded_rows(path: Path | None, name: str) -> list[dict[str, Any]]:
    """The rows of a record, none where there is none yet: what a benchmark that goes on need not make again."""
    return read_record(path, name)["rows"] if path and path.is_file() else []


def update_record(
    path: Path,
    name: str,
    argv: Sequence[str],
    rows: list[dict[str, Any]],
    headline: Callable[[Sequence[dict[str, Any]]], Mapping[str, float]],
    settings: Mapping[str, Any],
) -> None:
    """Writes the record of a run with what other runs have written to it meanwhile, which `rows` gets too."""
    with alone(path):
        take_in_recorded(rows, path, name)
        write_record(path, make_record(name, argv, rows, headline(rows), settings=settings))


def take_in_recorded(rows: list[dict[str, Any]], path: Path, name: str) -> None:
    """Adds to `rows` what another run has written to the record meanwhile: whole rows, and figures that ours lack."""
    known = {row["arm"]: row for row in rows}
    for row in recorded_rows(path, name):
        if row["arm"] not in known:
            rows.append(row)
            continue
        own = known[row["arm"]]
        for key, value in row.items():
            own.setdefault(key, value)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Inside, no other process that asks too writes the record: from its reading to its replacement."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def check_settings(path: Path | None, name: str, settings: Mapping[str, Any]) -> None:
    """Raises ValueError where the rows of a record were made with other settings: they are not to be compared."""
    recorded = read_record(path, name).get("settings", {}) if path and path.is_file() else {}
    other = [f"{key} {recorded[key]!r}" for key in settings if key in recorded and recorded[key] != settings[key]]
    if other:
        raise ValueError(f"{path} holds rows made with {', '.join(other)}; give another file")


def stamp() -> dict[str, dict[str, Any]]:
    """When and on what a row was made: a record that is added to over days has rows of several machines."""
    import torch

    from compressor import kernels

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "made": {
            "date": _now(),
            "device": gpu or f"{_cpu()}, {kernels.isa()}",
            "threads": torch.get_num_threads(),
        }
    }


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _cpu() -> str:
    return cpu_fields().get("model name") or platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    own = {"python": platform.python_version(), "halfweight": __version__}
    return own | {package: version(package) for package in PACKAGES}


def commit() -> str | None:
    """The commit that runs, with a + where files differ from it; None outside of a clone."""
    folder = Path(__file__).parent
    with suppress(OSError, subprocess.CalledProcessError):
        said = [
            subprocess.run(["git", "-C", folder, *command], capture_output=True, text=True, check=True).stdout.strip()
            for command in (
                ("rev-parse", "--short=12", "HEAD"),
                ("status", "--porcelain", "--untracked-files=no", "--", "*.py", "*.cpp", "*.h"),
            )
        ]
        return said[0] + ("+" if said[1] else "")
    return None


def machine() -> dict[str, Any]:
    """The machine as far as speed depends on it."""
    import torch

    cpu = cpu_fields()
    present = set((cpu.get("flags") or cpu.get("Features") or "").split())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": _cpu(),
        "architecture": platform.machine(),
        "flags": [flag for flag in FLAGS if flag in present],
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": memory,
        "last_level_cache_bytes": last_level_cache(),
        "read_bandwidth_bytes_per_s": round(read_bandwidth(min(_BANDWIDTH_BYTES, memory // 16))),
        "system": f"{platform.system()} {platform.release()}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def cpu_fields() -> dict[str, str]:
    """The first processor of /proc/cpuinfo."""
    try:
        block = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in block.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def last_level_cache() -> int | None:
    """Bytes of the largest cache of processor 0, or None where the system does not say."""
    units = {"K": 1 << 10, "M": 1 << 20}
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text[:-1]) * units[text[-1]] if text[-1] in units else int(text))
    return max(sizes, default=None)


def read_bandwidth(size: int) -> float:
    """Bytes per second that all threads together read from memory: the best of five matrix-vector products.

    The matrix is larger than the caches, so each product reads it from memory once; that is what decoding does too.
    """
    import torch

    columns = 8192
    matrix = torch.ones(max(size // 4 // columns, 1), columns)
    vector = torch.ones(columns)
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        torch.mv(matrix, vector)
        best = min(best, time.perf_counter() - start)
    return matrix.nbytes / best


def machine_sentence(record: Mapping[str, Any]) -> str:
    """One line about the machine of a record."""
    given = record["machine"]
    return (
        f"{given['cpu']}, {given['cores']} cores, {given['memory_bytes'] / 2**30:.0f} GiB, "
        f"{given['read_bandwidth_bytes_per_s'] / 1e9:.0f} GB/s read from memory"
    )
