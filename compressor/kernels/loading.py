"""Finds and loads the compiled kernels, and registers them with torch.

The library is plain C++ behind torch's stable C interface (csrc/torch_shim.h). It lies beside this package in an
installed wheel; an editable install of scikit-build-core keeps it in site-packages while the Python files stay in the
repository. Without it everything still works through `Format.unpack` and torch, slowly; that is said once.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from pathlib import Path

import torch

from compressor.kernels.fakes import register_fakes

log = logging.getLogger(__name__)

NAME = "libhalfweight_kernels.so"
PATH_VARIABLE = "HALFWEIGHT_KERNELS"
"""Environment variable: another library file, or `none` to do without (for tests and for builders)."""


def load() -> ctypes.CDLL | None:
    """The loaded library with its operators registered, or None (said in the log).

    Raises:
        ValueError: HALFWEIGHT_ISA names an instruction set that is not to be had here.
    """
    path = find()
    if path is None:
        log.warning("the CPU kernels (%s) are not installed; compressed weights run unpacked, slowly", NAME)
        return None
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        log.warning("the CPU kernels do not load (%s); compressed weights run unpacked, slowly", error)
        return None
    for function in (loaded.halfweight_register, loaded.halfweight_isa, loaded.halfweight_supported_isas):
        function.restype = ctypes.c_char_p
    refusal = loaded.halfweight_register()
    if refusal is not None:
        message = refusal.decode()
        if message.startswith("HALFWEIGHT_ISA"):
            raise ValueError(message)
        log.warning("the CPU kernels cannot be used (%s); compressed weights run unpacked, slowly", message)
        return None
    # A team of threads that wait for each other needs threads that run at the same time: OpenMP's do.
    loaded.halfweight_allow_teams("backend: OpenMP" in torch.__config__.parallel_info())
    register_fakes()
    return loaded


def find() -> Path | None:
    """The library's file, or None."""
    wanted = os.environ.get(PATH_VARIABLE)
    if wanted:
        return Path(wanted) if wanted != "none" else None
    folders = [Path(__file__).parent, *(Path(entry) / "compressor" / "kernels" for entry in sys.path)]
    return next((folder / NAME for folder in folders if (folder / NAME).is_file()), None)


LIBRARY = load()
"""The library of this process: loaded once, with the package."""
