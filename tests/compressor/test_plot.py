"""`compress plot`, progress lines and TensorBoard: what one watches of a retraining."""

import io
import json
import os
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, call

import pytest

from compressor.cli import main
from compressor.plot import POINTS, metrics_file, read_curve, training_page
from compressor.progress import bars, reporter
from compressor.tensorboard import scalars

SVG = "{http://www.w3.org/2000/svg}"


def write_metrics(file: Path, steps: int = 600) -> None:
    lines = []
    for i in range(1, steps + 1):
        line: dict[str, float] = {"step": i, "tokens": 512 * i, "total": 3 / i, "kl": 2 / i, "ce": 3 + 1 / i}
        line |= {"learning_rate": 1e-3 * (1 - i / steps), "tokens_per_second": 100 + i % 7}
        if i % 10 == 1 and i > 1:
            line |= {"flip_rate": 0.1 / i, "mean_kept": 0.02, "mean_masked": 0.01 / i}
        lines.append(json.dumps(line))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n")


def test_a_curve_is_thinned_to_means(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    lines = [{"step": i, "tokens": 10 * i, "kl": float(i % 2)} | ({"a": 0.5} if i == 1 else {}) for i in range(1, 601)]
    file.write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 601, "tok')
    points = read_curve(file, ("kl", "a"))
    assert len(points) == POINTS
    assert points[-1]["tokens"] == 6000
    assert points[0]["kl"] == pytest.approx(2 / 3)
    assert [point.get("a") for point in points[:2]] == [0.5, None]
    assert read_curve(tmp_path / "none.jsonl", ("kl",)) == []


@pytest.mark.parametrize("folder", ["out", ".out.work"])
def test_the_page_of_a_checkpoint_and_of_a_run_in_progress(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_metrics(tmp_path / folder / "metrics.jsonl")
    assert main(["plot", str(tmp_path / "out"), "--out", str(tmp_path / "page.svg")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'page.svg'}\n"
    page = ElementTree.parse(tmp_path / "page.svg").getroot()
    texts = ["".join(text.itertext()) for text in page.iter(f"{SVG}text")]
    assert "out: 307,200 tokens, 600 steps" in texts
    titles = {
        "Loss",
        "Distance from the dense model",
        "Mask entries that changed",
        "Mean |w|",
        "Learning rate",
        "Speed",
    }
    assert titles <= set(texts)
    assert "keptmasked" in texts
    assert len(list(page.iter(f"{SVG}polyline"))) == 8


@pytest.mark.parametrize(
    ("metrics", "titles"),
    [
        ({"total": 2.0, "accuracy": 0.5, "kl": 0.1}, ["mean of examples", "Accuracy", "KL, mean of examples"]),
        ({"total": 2.0, "ce": 1.5, "sparsity": 0.5}, ["nats a token", "Sparsity", "tokens, padding too"]),
    ],
)
def test_the_page_of_a_task_has_its_own_units(metrics: dict[str, float], titles: list[str], tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    lines = [{"step": i, "tokens": i, **{name: value / i for name, value in metrics.items()}} for i in (1, 2, 3)]
    file.write_text("\n".join(map(json.dumps, lines)))
    texts = {"".join(text.itertext()) for text in ElementTree.fromstring(training_page(file, "a")).iter(f"{SVG}text")}
    assert texts.issuperset(titles) and "Distance from the dense model" not in texts
    assert ("nats a token" in texts) is ("ce" in metrics)


def test_a_run_in_progress_comes_before_the_checkpoint_that_it_replaces(tmp_path: Path) -> None:
    for place, (newest, other) in enumerate((("out", ".out.work"), (".out.work", "out"))):
        write_metrics(tmp_path / other / "metrics.jsonl")
        write_metrics(tmp_path / newest / "metrics.jsonl")
        os.utime(tmp_path / newest / "metrics.jsonl", (2e9 + place, 2e9 + place))
        assert metrics_file(tmp_path / "out").parent.name == newest


def test_what_was_not_measured_is_not_drawn(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(
        "".join(json.dumps({"step": i, "tokens": i, "total": 1 / i, "kl": 1 / i}) + "\n" for i in (1, 2, 3))
    )
    page = ElementTree.fromstring(training_page(file, "a<b"))
    assert len(list(page.iter(f"{SVG}polyline"))) == 2
    file.write_text('{"step": 1, "tokens": 1, "total": 1.0}\n')
    with pytest.raises(ValueError, match="fewer than two steps"):
        training_page(file, "a")


def test_a_folder_without_metrics_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"neither .*out nor .*\.out\.work holds metrics\.jsonl"):
        metrics_file(tmp_path / "out")
    assert main(["plot", str(tmp_path / "out")]) == 1
    assert "run in progress" in capsys.readouterr().err


def test_figures_stay_until_their_stage_reports_others(capsys: pytest.CaptureFixture[str]) -> None:
    with reporter() as report:
        report("retrain", 1, 3, {"loss": 2.0, "flips": 0.25})
        report("retrain", 2, 3, {"loss": 1.5})
        report("retrain", 3, 3, {"loss": 1.0})
        report("pack", 1, 1, {})
    *_, last, pack = map(json.loads, capsys.readouterr().err.splitlines())
    assert (last["loss"], last["flips"], last["done"]) == (1.0, 0.25, 3)
    assert "loss" not in pack


def test_bars_show_the_figures_on_a_line_of_their_own() -> None:
    from rich.console import Console

    shown = io.StringIO()
    with bars(Console(file=shown, force_terminal=True, width=80)) as report:
        figures: dict[str, Any] = {"loss": 2.0, "KL": 1.5, "flips": 0.001, "|w| kept": 0.031, "|w| masked": 0.0042}
        report("retrain", 1, 3, figures)
        report("retrain", 2, 3, {"tok/s": 812.5})
    text = " ".join(shown.getvalue().split())
    assert "retrain" in text and "67%" in text
    for part in ("KL 1.5", "flips 0.001", "kept 0.031", "masked 0.0042", "tok/s 812.5"):
        assert part in text


def test_tensorboard_is_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, ...]] = []
    with scalars(None, lambda *progress: seen.append(progress)) as report:
        report("retrain", 1, 2, {"loss": 1.0})
    assert seen == [("retrain", 1, 2, {"loss": 1.0})]
    monkeypatch.setattr("compressor.tensorboard.find_spec", lambda _name: None)
    with pytest.raises(ValueError, match="pip install tensorboard"), scalars(str(tmp_path), lambda *_: None):
        pass


def test_the_numbers_of_every_stage_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, ...]] = []
    writer = MagicMock()
    monkeypatch.setattr("compressor.tensorboard.find_spec", lambda _name: True)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", MagicMock(SummaryWriter=writer))
    with scalars(str(tmp_path), lambda *progress: seen.append(progress)) as report:
        report("prune", 1, 2, {})
        report("retrain", 1, 2, {"loss": 1.0})
        report("fine-tune", 2, 3, {"accuracy": 0.5, "teacher": "none"})
    assert len(seen) == 3
    written = writer.return_value.__enter__.return_value.add_scalar.call_args_list
    assert written == [call("retrain/loss", 1.0, 1), call("fine-tune/accuracy", 0.5, 2)]
