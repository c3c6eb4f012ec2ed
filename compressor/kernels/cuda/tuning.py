"""The fastest of several settings of a GPU operator for one shape, measured once per device and kept on disk."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch

from compressor.machine import cache_folder

logger = logging.getLogger(__name__)
Setting = TypeVar("Setting", bound=Hashable | dict[str, int])
Result = TypeVar("Result")
_WARM_UP, _RUNS = 3, 20
_measured: set[str] = set()
"""The places of settings that this process has searched for."""


def tuned(key: str, settings: Sequence[Setting], run: Callable[[Setting], Result]) -> Result:
    """What `run` gives with the fastest setting for `key`, which names the version of the library that runs.

    Settings that fail are left out; a stored one that fails is searched for anew, once. Inside a captured graph nothing
    is measured.
    """
    known = _known()
    place = f"{torch.cuda.get_device_name()}/{torch.__version__}/{torch.version.cuda}/{key}"
    if known.get(place) in range(len(settings)):  # otherwise there is none, or one of another version's
        try:
            return run(settings[int(known[place])])
        except Exception as error:
            if place in _measured or torch.cuda.is_current_stream_capturing():
                raise
            logger.warning("the setting stored for %s fails (%s): another is searched for", key, error)
    elif torch.cuda.is_current_stream_capturing():
        return run(settings[0])
    known[place] = _fastest(key, settings, run)
    _measured.add(place)
    _write(known)
    return run(settings[known[place]])


def _fastest(key: str, settings: Sequence[Setting], run: Callable[[Setting], object]) -> int:
    times: dict[int, float] = {}
    reason: Exception | None = None
    for number, setting in enumerate(settings):
        try:
            times[number] = _milliseconds(lambda one=setting: run(one))  # type: ignore[misc]
        except Exception as error:  # too much shared memory, or a layout that a library does not take
            logger.debug("%s: setting %s is left out: %s", key, setting, error)
            reason = error
    if not times:
        raise RuntimeError(f"no setting of {key} runs on this device: {reason}")
    return min(times, key=lambda number: times[number])


def _milliseconds(run: Callable[[], object]) -> float:
    for _ in range(_WARM_UP):
        run()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(_RUNS):
        run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def _file() -> Path:
    return cache_folder() / "gpu-settings.json"


@cache
def _known() -> dict[str, Any]:
    """What this process knows: what the file said when it was first asked, and what was measured since."""
    return _read()


def _read() -> dict[str, Any]:
    try:
        found = json.loads(_file().read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(known: dict[str, Any]) -> None:
    """Adds what is known to the file, in which other ranks keep what they measured."""
    file = _file()
    part = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(_read() | known, indent=1))
        part.replace(file)
    except OSError as error:
        logger.warning("the settings found for this GPU cannot be kept (%s)", error)
