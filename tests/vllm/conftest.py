"""vLLM in an environment of its own: HALFWEIGHT_VLLM_PYTHON, or the one that `make vllm` sets up."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from serve.runtimes.vllm import cpus_of_ranks

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("consumer.py")
Ask = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def vllm_python() -> str:
    """A Python that has vLLM; skips where there is none."""
    python = os.environ.get("HALFWEIGHT_VLLM_PYTHON") or str(ROOT / ".venv-vllm" / "bin" / "python")
    if not Path(python).is_file():
        pytest.skip("no vLLM: run `make vllm`, or set HALFWEIGHT_VLLM_PYTHON")
    return python


@pytest.fixture(scope="session")
def ask(vllm_python: str, tmp_path_factory: pytest.TempPathFactory) -> Ask:
    """`ask(folders, windows, **engine)`: what vLLM says after each token of the windows, by folder."""

    def run(
        folders: Sequence[Path],
        windows: list[list[int]],
        adapter: Path | None = None,
        stock_int4: bool = False,
        **engine: Any,
    ) -> dict[str, Any]:
        place = tmp_path_factory.mktemp("vllm")
        settings = {"enforce_eager": True, **engine}
        ranks = engine.get("tensor_parallel_size", 1) * engine.get("pipeline_parallel_size", 1)
        names = [str(folder) for folder in folders]
        request = {"folders": names, "windows": windows, "engine": settings, "adapter": adapter and str(adapter)}
        request["stock_int4"] = stock_int4
        (place / "request.json").write_text(json.dumps(request))
        # One rank runs in this one process, which imports vLLM once for all folders.
        environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": str(int(ranks > 1)), "VLLM_NO_USAGE_STATS": "1"}
        if ranks > 1:
            environment["VLLM_CPU_OMP_THREADS_BIND"] = cpus_of_ranks(ranks, sorted(os.sched_getaffinity(0)))
        command = [vllm_python, str(SCRIPT), str(place / "request.json"), str(place / "answer.json")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        found: dict[str, Any] = json.loads((place / "answer.json").read_text())
        return found

    return run
