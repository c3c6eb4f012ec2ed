"""A run that was killed is kept from runs with other settings into the same folder, which would delete what it has."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor import pipeline
from compressor.cli import main
from compressor.inspection import verify
from compressor.interrupted import check_work_folder, claim_work_folder
from compressor.preflight import check
from compressor.recipe import load_recipe
from tests.tiny import make_tiny_model

SETTINGS = ["text.length=64", "sparsity.samples=8", "retraining.validation_blocks=4", "retraining.loop.batch=8"]
SETTINGS += ["reconstruction.samples=8", "quantization.reconstruction.samples=8", "quantization.scales.samples=8"]


@pytest.fixture
def command(tiny_llama: Path, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A command whose run was killed after its retraining."""
    settings = [part for setting in [f"text.source={prose}", *SETTINGS] for part in ("--set", setting)]
    command = [str(tiny_llama), "--recipe", "ast-2of4-int4", "--budget", "4ktok", "--out", str(tmp_path / "out")]

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "save", killed)
        assert main([*command, *settings]) == 130
    return [*command, *settings]


def snapshots(folder: Path) -> list[Path]:
    return sorted((folder / ".out.work" / "snapshots").iterdir())


@pytest.mark.parametrize(
    ("change", "differing"),
    [
        (["--one-shot"], "retraining"),
        (["--budget", "8ktok"], "retraining.budget.tokens"),
        (["--set", "retraining.loop.learning_rate=1e-3"], "retraining.loop.learning_rate"),
        (["--set", "text.length=32"], "text.length"),
        (["--keep-dense", "model.layers.0.mlp.up_proj"], "sparsity.keep_dense"),
    ],
)
def test_a_run_with_other_settings_is_refused_before_any_work(
    command: list[str], change: list[str], differing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = snapshots(tmp_path)
    capsys.readouterr()
    for more in ([], ["--dry-run"]):
        assert main([*command, *change, *more]) == 1
        told = capsys.readouterr().err
        assert re.search(rf"interrupted run with another (\S+, )*{re.escape(differing)}\. Give", told)
        assert f"--out, or delete {tmp_path / '.out.work'}" in told
        assert '"stage": "prune"' not in told
    assert snapshots(tmp_path) == kept


def test_another_model_is_refused(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = make_tiny_model("llama", tmp_path / "other", intermediate_size=192)
    assert main([str(other), *command[1:]]) == 1
    assert "another model" in capsys.readouterr().err


def test_other_threads_are_refused(
    command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For they give other masks in the last bits, whose kept blocks would be trained again first."""
    threads = torch.get_num_threads()
    monkeypatch.setattr("compressor.machine.available_processors", lambda: threads + 1)
    try:
        torch.set_num_threads(threads + 1)
        assert main(command) == 1
    finally:
        torch.set_num_threads(threads)
    assert "another OMP_NUM_THREADS" in capsys.readouterr().err


def test_what_comes_after_the_retraining_may_change(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    budget = ["--budget", "4000tok", "--set", "quantization.values=int8", "--set", "quantization.embeddings=dense"]
    assert main([*command, *budget]) == 0
    assert '"stage": "retrain"' not in capsys.readouterr().err
    verify(tmp_path / "out")


def test_a_run_of_an_older_version_is_kept_from_one_shot_and_goes_on(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / ".out.work" / "run.json").unlink()
    capsys.readouterr()
    assert main([*command, "--one-shot"]) == 1
    assert "interrupted run with another retraining" in capsys.readouterr().err
    assert main(command) == 0
    assert '"stage": "retrain"' not in capsys.readouterr().err


def test_rebuilt_blocks_are_kept_from_other_settings_of_theirs_alone(tiny_llama: Path, tmp_path: Path) -> None:
    def started(*changes: str) -> None:
        recipe = load_recipe("ast-2of4-int4", changes)
        check_work_folder(tmp_path, recipe, check(tiny_llama, recipe, tmp_path / "out"))

    recipe = load_recipe("ast-2of4-int4")
    claim_work_folder(tmp_path, recipe, check(tiny_llama, recipe, tmp_path / "out"))
    started("seed=1")  # nothing is kept yet
    (tmp_path / "reconstruct").mkdir()
    started(
        "retraining.budget=2h",
        "retraining.loop.quantize_share=0.1",
        "quantization.reconstruction=null",
        "quantization.scales=null",
    )
    with pytest.raises(ValueError, match=r"another reconstruction\.passes"):
        started("reconstruction.passes=3")


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_a_grid_that_is_trained_on_stays(share: float, tiny_llama: Path, tmp_path: Path) -> None:
    given = ["quantization.reconstruction=null", "quantization.scales=null", f"retraining.loop.quantize_share={share}"]
    recipe, other = (load_recipe("ast-2of4-int4", [*given, *more]) for more in ([], ["quantization.values=int8"]))
    claim_work_folder(tmp_path, recipe, check(tiny_llama, recipe, tmp_path / "out"))
    (tmp_path / "snapshots").mkdir()
    if not share:
        check_work_folder(tmp_path, other, check(tiny_llama, other, tmp_path / "out"))
        return
    with pytest.raises(ValueError, match=r"another grid\.model\.layers\.0"):
        check_work_folder(tmp_path, other, check(tiny_llama, other, tmp_path / "out"))


def test_a_measured_length_of_text_stays_that_of_the_first_start(tiny_llama: Path, tmp_path: Path) -> None:
    """Blocks are shuffled over all that was read: with another length a resumed run would see others."""
    recipe = load_recipe("ast-2of4-int4")
    plan = check(tiny_llama, recipe, tmp_path / "out")
    claim_work_folder(tmp_path, recipe, plan, 1000)
    assert check_work_folder(tmp_path, recipe, plan, 1200) == 1000
    assert check_work_folder(tmp_path, load_recipe("ast-2of4-int4", ["retraining.budget=2h"]), plan, 1200) == 1200
