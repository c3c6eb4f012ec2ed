"""Which package may import which, and what a command may not load just to print its help."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_import_directions_hold() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([str(linter), "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "command",
    [
        ["compressor", "--help"],
        ["compressor", "inspect", "--help"],
        ["serve", "--help"],
        ["benchmarks", "--help"],
        ["benchmarks", "compare", "--help"],
    ],
    ids=" ".join,
)
def test_help_loads_nothing_heavy(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", *command], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert command[0] in loaded
    heavy = loaded & {"torch", "transformers", "numpy", "pandas", "fastapi", "openai"}
    assert not heavy
    assert "usage" in done.stdout
