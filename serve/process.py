"""What processes ask of the C library: threads that sleep when they have nothing to do, memory back, a common end."""

from __future__ import annotations

import ctypes
import gc
import os
import signal

SPINS = "5000"
PR_SET_PDEATHSIG = 1


def share_processors() -> None:
    """Before torch is imported: let threads that wait for the next operator sleep soon, unless the user says otherwise.

    libgomp lets them spin for milliseconds, on the processor that the event loop needs to send the last token.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def end_with_parent() -> None:
    """Be killed when the process that started this one ends, however it ends; on Linux."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def settle() -> None:
    """When all is loaded: it stays, so later collections need not look through a million objects."""
    gc.collect()
    gc.freeze()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc keeps what loading has freed
    if trim is not None:
        trim(0)
