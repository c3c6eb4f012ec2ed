import os
import subprocess
import sys
from pathlib import Path

import pytest

from compressor.output import OutputFolder, check_replaceable


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def test_a_commit_makes_the_folder_and_leaves_nothing_else(tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "deep" / "out") as output:
        (output.open_stage() / "file").write_text("new")
        output.commit()
    assert (tmp_path / "deep" / "out" / "file").read_text() == "new"
    assert names(tmp_path / "deep") == {"out"}


def test_a_failure_leaves_the_old_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "file").write_text("old")
    with pytest.raises(RuntimeError), OutputFolder(out, force=True) as output:
        (output.open_stage() / "file").write_text("new")
        raise RuntimeError
    assert (out / "file").read_text() == "old"
    assert names(tmp_path) == {"out"}


def test_force_replaces_and_its_absence_refuses(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "stale").write_text("old")
    with pytest.raises(FileExistsError, match="--force"), OutputFolder(out):
        pass
    with OutputFolder(out, force=True) as output:
        (output.open_stage() / "file").write_text("new")
        output.commit()
    assert names(out) == {"file"}
    assert names(tmp_path) == {"out"}


def test_a_second_run_is_refused_by_name_of_the_first(tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "out"), pytest.raises(BlockingIOError, match=str(os.getpid())):
        OutputFolder(tmp_path / "out").__enter__()


def test_killed_while_writing_leaves_the_old_folder_and_is_swept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "file").write_text("old")
    script = f"""
import os, signal
from compressor.output import OutputFolder, check_replaceable
with OutputFolder({str(out)!r}, force=True) as output:
    (output.open_stage() / "file").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    assert (out / "file").read_text() == "old"
    with OutputFolder(out, force=True) as output:
        (output.open_stage() / "file").write_text("new")
        output.commit()
    assert (out / "file").read_text() == "new"
    assert names(tmp_path) == {"out"}


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(FileExistsError, match="is a file"), OutputFolder(tmp_path / "out", force=True):
        pass


@pytest.mark.parametrize("path", ["", ".", ".."])
def test_the_current_folder_and_those_above_are_not_replaced(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(FileExistsError, match="holds the current folder"):
        OutputFolder(path, force=True).check()


def test_home_is_meant_by_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert OutputFolder("~/out").path == tmp_path / "out"


@pytest.mark.parametrize(
    ("files", "ours"),
    [
        ([], True),
        (["manifest.json", "config.json", "model.safetensors"], True),
        (["halfweight.json", "model.gguf"], True),
        (["model.onnx", "model.onnx_data"], True),
        (["manifest.json", "index.html"], False),
        (["config.json", "model.safetensors"], False),
        (["thesis.tex"], False),
    ],
)
def test_only_what_halfweight_made_is_replaced(files: list[str], ours: bool, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).write_text("")
    if ours:
        check_replaceable(tmp_path)
        (tmp_path / "more").mkdir()
    if files:
        with pytest.raises(FileExistsError, match="holds other things"):
            check_replaceable(tmp_path)


def test_what_is_read_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "a.gguf").write_text("")
    for source in (tmp_path, tmp_path / "models", tmp_path / "models" / "a.gguf"):
        with pytest.raises(FileExistsError, match="which is read"):
            check_replaceable(tmp_path, source)
    check_replaceable(tmp_path / "new", "someone/some-model")
