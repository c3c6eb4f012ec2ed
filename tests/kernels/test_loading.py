"""Which library and which instruction set: each in a process of its own, since both are chosen once."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from compressor import kernels

SHOW = "from compressor import kernels; print(kernels.isa(), kernels.describe())"


def run(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """`python -c code` with these environment variables."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_without_the_library_torch_does_the_work_and_it_is_said_once() -> None:
    code = f"""
import torch
{SHOW}
from compressor.formats import FORMATS, QuantizedWeight
from compressor.kernels import attention, fused
packed = FORMATS["int4"](32)
tensors = packed.pack(QuantizedWeight(torch.ones(2, 32, dtype=torch.int8), torch.ones(2, 1)))
prepared = packed.prepare(tensors)
print(packed.linear(torch.ones(1, 32), prepared).tolist(), fused.silu_and_mul(torch.zeros(1, 4)).tolist())
"""
    result = run(code, HALFWEIGHT_KERNELS="none")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "torch no compiled kernels: packed weights are unpacked for torch",
        "[[32.0, 32.0]] [[0.0, 0.0]]",
    ]
    assert result.stderr.count("the CPU kernels (libhalfweight_kernels.so) are not installed") == 1


def test_a_library_that_does_not_load_is_not_fatal(tmp_path) -> None:  # type: ignore[no-untyped-def]
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    result = run(SHOW, HALFWEIGHT_KERNELS=str(broken))
    assert result.returncode == 0 and result.stdout.startswith("torch ")
    assert "do not load" in result.stderr


def test_an_unknown_instruction_set_is_a_mistake_with_the_accepted_ones() -> None:
    result = run(SHOW, HALFWEIGHT_ISA="avx1024")
    assert result.returncode == 1
    message = result.stderr.splitlines()[-1]
    assert message.startswith("ValueError: HALFWEIGHT_ISA=avx1024 is not to be had here; accepted: ")
    assert message.endswith(",".join(kernels.supported_isas()))


@pytest.mark.parametrize("isa", [name for name in kernels.supported_isas() if name != kernels.isa()])
def test_every_instruction_set_passes_the_same_tests(isa: str) -> None:
    assert run(SHOW, HALFWEIGHT_ISA=isa).stdout.startswith(f"{isa} CPU kernels with {isa} ")
    files = [f"tests/kernels/test_{name}.py" for name in ("linear", "steps", "decoder_layers")]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not fake and not compile", *files],
        env={**os.environ, "HALFWEIGHT_ISA": isa, "HALFWEIGHT_TEST_EXAMPLES": "8"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
