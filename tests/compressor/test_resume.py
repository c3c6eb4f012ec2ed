"""`kill -9` in the middle, the same command again: the same bytes as without the kill."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from compressor.checkpoint import sha256_of


def command(model: Path, text: Path, out: Path) -> list[str]:
    settings = [
        f"text.source={text}",
        "text.length=64",
        "sparsity.samples=8",
        "retraining.validation_blocks=4",
        "retraining.loop.checkpoint_minutes=0",
        "retraining.loop.quantize_share=0.5",
    ]
    flags = [part for setting in settings for part in ("--set", setting)]
    recipe = ["--recipe", "ast-2of4-int4", "--budget", "8ktok"]
    return [sys.executable, "-m", "compressor", str(model), "--out", str(out), *recipe, *flags]


def test_a_killed_run_goes_on_to_the_same_bytes(tiny_llama: Path, prose: Path, tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(tiny_llama, prose, whole), env=environment, check=True, capture_output=True)
    victim = subprocess.Popen(command(tiny_llama, prose, killed), env=environment, stderr=subprocess.DEVNULL)
    snapshots = tmp_path / ".killed.work" / "snapshots"
    deadline = time.monotonic() + 120
    while not list(snapshots.glob("step-*[1-9]/manifest.json")) and victim.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    victim.send_signal(signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert not killed.exists()
    again = subprocess.run(
        command(tiny_llama, prose, killed), env=environment, check=True, capture_output=True, text=True
    )
    assert '"stage": "retrain"' in again.stderr
    assert sha256_of(killed / "model.safetensors") == sha256_of(whole / "model.safetensors")
    assert {entry.name for entry in tmp_path.iterdir()} == {"whole", "killed"}
