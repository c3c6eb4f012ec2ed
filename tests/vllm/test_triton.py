"""The Triton kernel of 2:4 int4, interpreted on the CPU, in vLLM's environment: torch's CPU build brings no Triton."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("interpret.py")


@pytest.mark.parametrize("which", ["few", pytest.param("every", marks=[pytest.mark.full, pytest.mark.timeout(1800)])])
def test_interpreted_kernel_is_the_product(vllm_python: str, which: str) -> None:
    done = subprocess.run([vllm_python, str(SCRIPT), which], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    # fp32 sums of exact products, rounded once to fp16
    assert float(done.stdout.split()[-1]) < 1e-3
