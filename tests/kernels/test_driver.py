"""The kernels' own test program (driver.cpp) under the address and undefined-behaviour sanitizers.

It runs every kernel of every instruction set on unaligned buffers of exactly the needed size. Its build is kept under
`build/`, so that only the first run compiles.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from compressor import kernels

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(900)
def test_the_sanitizers_find_nothing() -> None:
    folder = ROOT / "build" / "sanitized"
    cmake = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert cmake is not None
    configure = [cmake, "-S", ROOT, "-B", folder, "-DHALFWEIGHT_DRIVER=ON", "-DHALFWEIGHT_SANITIZE=ON"]
    build = [cmake, "--build", folder, "--target", "halfweight_driver", "--parallel", "2"]
    for command in (configure, build):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    driver = subprocess.run([folder / "halfweight_driver"], capture_output=True, text=True, timeout=300)
    assert driver.returncode == 0, driver.stdout + driver.stderr[-3000:]
    assert driver.stdout.split("\n")[:-1] == [f"{isa}: ok" for isa in kernels.supported_isas()]
