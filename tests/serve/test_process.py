"""What a process asks of the C library before and after it loads a model."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import psutil
import pytest

from serve.engine.sampler import NotFiniteError
from serve.options import ServeOptions
from serve.process import SPINS, settle, share_processors
from serve.runtimes import torch_compiled

READY = """
import json, os, sys
from pathlib import Path
import psutil
from serve.options import ServeOptions
from serve.runtimes.torch_compiled import serve

def ready(_):
    heavy = [name for name in ("transformers", "torch._inductor", "torch._dynamo", "sympy") if name in sys.modules]
    found = {"heavy": heavy, "rss_mb": psutil.Process().memory_info().rss / 1e6, "spins": os.environ["GOMP_SPINCOUNT"]}
    print(json.dumps(found), flush=True)
    os._exit(0)

serve(ServeOptions(Path(sys.argv[1]), port=0, eager=True, kv_cache_gb=0.02), ready)
"""
BOUND_MB = 350
"""What a server may take beside its weights and its KV cache, neither of which the tiny model has to speak of."""


def test_a_ready_server_is_lean(tiny_folder: Callable[[str], Path]) -> None:
    """Neither transformers nor the compiler is imported, memory stays below the bound, and idle threads sleep."""
    command = [sys.executable, "-c", READY, str(tiny_folder("llama"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["heavy"] == []
    assert found["rss_mb"] < BOUND_MB
    assert found["spins"] == os.environ.get("GOMP_SPINCOUNT", SPINS)


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, SPINS), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
    ids=["nothing", "spins", "policy"],
)
def test_what_a_user_says_of_waiting_threads_stays(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], spins: str | None
) -> None:
    monkeypatch.setattr(os, "environ", dict(given))
    share_processors()
    assert os.environ.get("GOMP_SPINCOUNT") == spins


def test_a_child_ends_with_its_parent() -> None:
    child = "from serve.process import end_with_parent; end_with_parent(); print(flush=True); input()"
    parent = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {child!r}]); print(p.pid); p.wait()"
    with subprocess.Popen([sys.executable, "-uc", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        started = psutil.Process(int(process.stdout.readline()))
        process.stdout.readline()
        process.kill()
        psutil.wait_procs([started], timeout=5)
        assert not started.is_running() or started.status() == psutil.STATUS_ZOMBIE


def test_an_engine_that_fails_its_test_is_closed(
    tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Mock()
    engine.self_test.side_effect = NotFiniteError
    monkeypatch.setattr(torch_compiled, "load_engine", lambda _: engine)
    with pytest.raises(NotFiniteError):
        torch_compiled.serve(ServeOptions(tiny_folder("llama"), port=0), print)
    engine.close.assert_called_once()


def test_what_is_loaded_is_not_collected_again() -> None:
    before = gc.get_freeze_count()
    try:
        settle()
        assert gc.get_freeze_count() > before + 1000
    finally:
        gc.unfreeze()
