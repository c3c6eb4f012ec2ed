"""What a serving process asks of the C library: threads that sleep when they have nothing to do, and memory back."""

from __future__ import annotations

import ctypes
import gc
import os

SPINS = "5000"


def share_processors() -> None:
    """Before torch is imported: let threads that wait for the next operator sleep soon, unless the user says otherwise.

    libgomp lets them spin for milliseconds, on the processor that the event loop needs to send the last token.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def settle() -> None:
    """When all is loaded: it stays, so later collections need not look through a million objects."""
    gc.collect()
    gc.freeze()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc keeps what loading has freed
    if trim is not None:
        trim(0)
