"""vLLM's fused and shared layers over packed weights, each by itself: every mixture of formats, on every rank."""

from __future__ import annotations

import json
import subprocess

from tests.vllm.conftest import ROOT


def test_layers_compute_what_the_checkpoint_stores(vllm_python: str) -> None:
    command = [vllm_python, "-m", "tests.vllm.layers"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    # Activations are rounded to int8; a row, scale or bias in the wrong place gives more than 0.05.
    assert {name: error for name, error in found.items() if isinstance(error, str) or error > 0.02} == {}
