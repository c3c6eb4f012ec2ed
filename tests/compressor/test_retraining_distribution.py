"""Two processes over gloo do what one does: the same masks, the same loss; and what they refuse."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor import preflight
from compressor.calibration import weight_of
from compressor.recipe import load_recipe
from compressor.retraining import LoopSettings
from compressor.retraining.distribution import Distribution
from tests.retraining import gpt2, linears_of, llama, run

SCRIPT = """
import os, sys
from dataclasses import replace
from pathlib import Path
import torch
torch.set_num_threads(1)
from compressor.retraining import Budget
from compressor.retraining.distribution import leave
from tests.retraining import *
from compressor.retraining import CastSettings

out, build, method, strategy = Path(sys.argv[1]), globals()[sys.argv[2]], sys.argv[3], sys.argv[4]
loop = replace(FP32, learning_rate=1e-2, micro_batch=2, distribution=strategy, checkpoint_minutes=float(sys.argv[5]),
               checkpoint_activations=strategy == "fsdp")
settings = AstSettings(refresh_every=3, masked_start=1.0) if method == "ast" else CastSettings(refresh_every=3)
model, losses = build(), []
def watch(step, total, metrics):
    losses.append(metrics["total"])
    if len(sys.argv) > 6 and step == int(sys.argv[6]):
        os.killpg(0, 9)
report = run(model, loop=loop, settings=settings, method=method, validation=text(8), work_dir=out / "work",
             progress=watch, budget=Budget(tokens=12 * 64))
rank = os.environ.get("RANK", "0")
torch.save({"model": model.state_dict(), "losses": losses, "validation": report.validation_loss}, out / f"{rank}.pt")
leave()
"""


SHARED = """
import sys
from pathlib import Path
import torch
from compressor.retraining.distribution import distribution, leave

spread = distribution()
torch.manual_seed(spread.rank)
weight = torch.nn.Parameter(torch.randn(4, 6, dtype=torch.bfloat16))
mask, turned = torch.rand(4, 6) < 0.5, torch.randn(6, 4).t()
spread.take_from_first([weight, mask, turned])
torch.save([weight.detach(), mask, turned], Path(sys.argv[1]) / f"{spread.rank}.pt")
leave()
assert not torch.distributed.is_initialized() or torch.distributed.get_backend() != "gloo"
"""


def launch(folder: Path, processes: int, *arguments: str, source: str = SCRIPT) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    script = folder / "script.py"
    script.write_text(source)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    return subprocess.run(
        [sys.executable, "-W", "ignore", *launcher, str(script), str(folder), *arguments],
        env=environment, capture_output=True, text=True, timeout=240, start_new_session=True,
    )  # fmt: skip


def results(folder: Path, processes: int, *arguments: str) -> list[dict[str, object]]:
    done = launch(folder, processes, *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(processes)]


@pytest.fixture(scope="module")
def alone_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], dict[str, object]]:
    """What one process makes of a model by a method."""
    return cache(lambda build, method: results(tmp_path_factory.mktemp("one"), 1, build, method, "auto", "60")[0])


@pytest.mark.parametrize(
    ("build", "method", "strategy"),
    [
        ("llama", "ast", "ddp"),
        ("llama", "ast", "fsdp"),
        pytest.param("gpt2", "ast", "fsdp", marks=pytest.mark.full),
        pytest.param("gpt2", "cast", "fsdp", marks=pytest.mark.full),
        pytest.param("llama", "cast", "ddp", marks=pytest.mark.full),
    ],
)
def test_two_processes_do_what_one_does(tmp_path: Path, alone_of: Any, build: str, method: str, strategy: str) -> None:
    alone = alone_of(build, method)
    first, second = results(tmp_path / "two", 2, build, method, strategy, "60")
    assert alone["losses"] == pytest.approx(first["losses"], rel=1e-4)
    assert second["losses"] == []
    model = {"llama": llama, "gpt2": gpt2}[build]()
    for name, module in linears_of(model).items():
        key = f"{name}.weight"
        one, two, other = (result["model"][key] for result in (alone, first, second))  # type: ignore[index]
        assert torch.equal(two, other)
        assert torch.equal(one != 0, two != 0), name
        assert torch.allclose(one, two, atol=2e-4)
        assert not torch.equal(one, weight_of(module))


@pytest.mark.parametrize("strategy", ["fsdp", pytest.param("ddp", marks=pytest.mark.full)])
def test_two_killed_processes_go_on_to_the_same_end(tmp_path: Path, strategy: str) -> None:
    whole = results(tmp_path / "whole", 2, "llama", "ast", strategy, "0")
    assert launch(tmp_path / "killed", 2, "llama", "ast", strategy, "0", "7").returncode != 0
    again = results(tmp_path / "killed", 2, "llama", "ast", strategy, "0")
    assert len(again[0]["losses"]) < 12  # type: ignore[arg-type]
    for before, after in zip(whole, again, strict=True):
        for name, tensor in before["model"].items():  # type: ignore[attr-defined]
            assert torch.equal(tensor, after["model"][name]), name  # type: ignore[index]


def test_all_start_from_what_the_first_has(tmp_path: Path) -> None:
    done = launch(tmp_path, 2, source=SHARED)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    torch.manual_seed(0)
    assert torch.equal(first[0], torch.randn(4, 6, dtype=torch.bfloat16))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_batches_that_cannot_be_shared_are_refused() -> None:
    with pytest.raises(ValueError, match="a batch of 6 in micro-batches of 2 cannot be shared by 2 processes"):
        Distribution(0, 2).micro_batch(6, 2)
    with pytest.raises(ValueError, match="a batch of 1 in micro-batches of 1"):
        Distribution(0, 2).micro_batch(1, None)
    assert Distribution(0, 2).micro_batch(8, 2) == 2 and Distribution(0, 2).micro_batch(8, None) == 4
    assert [len(part) for part in Distribution(1, 2).own(list(torch.arange(8).split(2)))] == [2, 2]


@pytest.mark.parametrize(
    ("recipe", "settings", "why"),
    [
        ("ast-2of4-int4", ["retraining.loop.batch=3"], "a batch of 3 in micro-batches of 1"),
        ("ast-2of4-int4", ["retraining.loop.quantize_share=0.1"], "quantize_share needs all rows"),
        ("ast-2of4-int4", ["sparsity.pattern=50%"], "a 50% mask compares weights of the whole layer"),
    ],
)
def test_what_processes_cannot_share_is_refused_before_any_work(
    recipe: str, settings: list[str], why: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "distribution", lambda _strategy: Distribution(0, 2, sharded=True))
    with pytest.raises(ValueError, match=why):
        preflight.check(tiny_llama, load_recipe(recipe, ["retraining.loop.batch=4", *settings]), tmp_path / "out")


def test_a_mask_that_lost_its_weight_raises() -> None:
    from compressor.retraining.optimizers import AdamSettings, train_linear

    linear = torch.nn.Linear(8, 4)
    entry = train_linear("a", linear, torch.ones(4, 8, dtype=torch.bool), AdamSettings())
    entry.mask = torch.ones(2, 8, dtype=torch.bool)
    with pytest.raises(RuntimeError, match=re.escape("mask of (2, 8) beside a weight of (4, 8)")):
        Distribution().check_masks([entry])


def test_activation_checkpoints_change_nothing() -> None:
    def weights(wanted: bool) -> list[torch.Tensor]:
        model = llama()
        run(model, loop=LoopSettings(batch=4, precision="fp32", checkpoint_activations=wanted))
        assert not any("forward" in vars(module) for module in model.modules())
        return [parameter.detach() for parameter in model.parameters()]

    torch.set_num_threads(1)
    for plain, again in zip(weights(False), weights(True), strict=True):
        assert torch.equal(plain, again)


def test_unknown_strategies_are_refused() -> None:
    with pytest.raises(ValueError, match="accepted are auto, ddp, fsdp"):
        LoopSettings(distribution="zero")


@pytest.mark.full
def test_compress_is_launched_in_two_processes(tiny_llama: Path, prose: Path, tmp_path: Path) -> None:
    flags = [
        str(tiny_llama), "--recipe", "ast-2of4-int4", "--budget", "4ktok", "--set", f"text.source={prose}",
        "--set", "text.length=32", "--set", "retraining.validation_blocks=2", "--set", "sparsity.samples=8",
        "--set", "quantization.samples=8", "--set", "retraining.loop.batch=4",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launchers = {"one": [], "two": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]}
    for name, launcher in launchers.items():
        done = subprocess.run(
            [sys.executable, "-W", "ignore", *launcher, "-m", "compressor", *flags, "--out", str(tmp_path / name)],
            env=environment, capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    sizes = {name: (tmp_path / name / "model.safetensors").stat().st_size for name in launchers}
    assert sizes["one"] == sizes["two"]
    assert {entry.name for entry in tmp_path.iterdir()} >= set(launchers)
