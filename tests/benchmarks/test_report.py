from __future__ import annotations

import itertools
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from benchmarks.plots import bars, curve
from benchmarks.report import main, page
from compressor.svg import ticks


def test_page_needs_no_other_file(record: dict[str, Any]) -> None:
    text = page(record)
    assert not re.search(r"<script|<link|<img|src=|@import|url\(|https?://", text)
    assert "prefers-color-scheme: dark" in text


def test_page_shows_every_figure_and_what_became_worse(record: dict[str, Any]) -> None:
    text = page(record)
    for shown in ("3.60x smaller", "2.00x later", "20x higher", "80.0 tokens/s", record["command"], "budget: 5m"):
        assert shown in text
    assert "Worse than dense: time to first token, perplexity." in text
    assert "&lt;model&gt;.gguf, dequantised to bf16" in text
    assert text.count("<svg") == 10


def test_page_without_retraining_has_no_curve(record: dict[str, Any]) -> None:
    record["training"] = []
    record["models"][-1]["recipe"] = None
    text = page(record)
    assert text.count("<svg") == 8
    assert "Recipe of" not in text


def test_plots_are_xml_and_bars_are_to_scale() -> None:
    svg = ElementTree.fromstring(bars(["a & b", "c"], [10.0, 5.0], ["10 <x>", "5"], 'a "quoted" summary'))
    first, second = (float(rect.attrib["width"]) for rect in svg.iter("rect"))
    assert second == pytest.approx(first / 2)
    line = ElementTree.fromstring(curve([1.0, 2.0, 3.0], [5.0, 4.0, 4.5], "x", "y", "s")).find("polyline")
    assert line is not None
    heights = [float(point.split(",")[1]) for point in line.attrib["points"].split()]
    assert heights[0] < heights[2] < heights[1]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.5, 0.52), (3, 3), (-2, 7.3), (0, 123456)])
def test_ticks_enclose_the_values_at_equal_steps(low: float, high: float) -> None:
    marks = ticks(low, high)
    assert marks[0] <= low <= high <= marks[-1]
    assert 2 <= len(marks) <= 8
    steps = [b - a for a, b in itertools.pairwise(marks)]
    assert max(steps) == pytest.approx(min(steps))


def test_report_shows_a_saved_record_again(
    record: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "r.json"
    saved.write_text(json.dumps(record))
    assert main([str(saved), "--markdown", "--html", str(tmp_path / "r.html")]) == 0
    assert "3.60x smaller" in capsys.readouterr().out
    assert (tmp_path / "r.html").read_text() == page(record)
    record["rows"] = [row for row in record["rows"] if row["key"] != "rss_loaded_bytes"]  # of an earlier version
    assert page(record).count("<svg") == 9
    with pytest.raises(ValueError, match="is not a file"):
        main([str(tmp_path / "none.json")])
