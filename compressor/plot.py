"""`compress plot`: the retraining of a checkpoint, or of a run in progress, as one SVG page of charts over tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

from compressor.svg import CURVE_HEIGHT, CURVE_WIDTH, Line, chart, drawing

POINTS = 200
METRICS = "metrics.jsonl"
_TITLE, _GAP, _MARGIN, _COLUMNS = 46, 28, 24, 2
_STYLE = """
  svg { --page: #ffffff; --ink: #18202c; --soft: #5c6675; --line: #e1e5eb; --s1: #c77f0a; --s2: #1f6fd6;
        font: 13px system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
  @media (prefers-color-scheme: dark) {
    svg { --page: #11151b; --ink: #e8ecf2; --soft: #9aa5b5; --line: #2c3542; --s1: #dba544; --s2: #5b9df5; } }
  .page { fill: var(--page); } text { fill: var(--ink); } .title { font-weight: 600; font-size: 15px; }
  .label, .tick { fill: var(--soft); } tspan.s1 { fill: var(--s1); } tspan.s2 { fill: var(--s2); }
  .grid { stroke: var(--line); } .line { fill: none; stroke-width: 2; stroke-linejoin: round; }
  .line.s1 { stroke: var(--s1); } .line.s2 { stroke: var(--s2); }
"""
_CHARTS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("Loss", "nats a token", {"total": "trained on", "ce": "cross-entropy"}),
    ("Distance from the dense model", "KL, nats a token", {"kl": ""}),
    ("Mask entries that changed", "share at a refresh", {"flip_rate": ""}),
    ("Mean |w|", "size of a weight", {"mean_kept": "kept", "mean_masked": "masked"}),
    ("Learning rate", "rate", {"learning_rate": ""}),
    ("Speed", "tokens a second", {"tokens_per_second": ""}),
)
"""Title, axis, and {metric: name of its line}."""
_OF_TASKS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("Loss", "{loss}", {"total": "trained on", "ce": "cross-entropy"}),
    ("Accuracy", "share of a batch", {"accuracy": ""}),
    ("Distance from the teacher", "KL, {loss}", {"kl": ""}),
    ("Sparsity", "share of weights", {"sparsity": ""}),
    _CHARTS[2],
    _CHARTS[4],
    ("Speed", "tokens a second, padding too", {"tokens_per_second": ""}),
)
"""The same for fine-tuning, where written answers are measured by token, labels by example."""


def metrics_file(folder: Path) -> Path:
    """Where the metrics of a checkpoint lie: in the folder itself, or in the work folder of a run in progress; of both,
    the newer.

    Raises:
        ValueError: in neither.
    """
    work = folder.with_name(f".{folder.name}.work")
    files = [place / METRICS for place in (folder, work) if (place / METRICS).is_file()]
    if files:
        return max(files, key=lambda file: file.stat().st_mtime_ns)
    raise ValueError(
        f"neither {folder} nor {work} holds {METRICS}: give a checkpoint that `compress` made with retraining, or the "
        "--out of a run in progress that has made its first steps"
    )


def read_curve(file: Path, keys: Sequence[str], points: int = POINTS) -> list[dict[str, float]]:
    """At most `points` points over tokens, each the mean of the steps that it stands for; empty without a file."""
    if not file.is_file():
        return []
    lines = [line for line in file.read_text().splitlines() if line.endswith("}")]  # the last may be half written
    steps = [step for step in map(json.loads, lines) if isinstance(step.get("tokens"), int | float)]
    size = -(-len(steps) // points) if steps else 1
    return [_point(steps[start : start + size], keys) for start in range(0, len(steps), size)]


def _point(steps: list[dict[str, Any]], keys: Sequence[str]) -> dict[str, float]:
    point = {"tokens": float(steps[-1]["tokens"]), "step": float(steps[-1].get("step", 0))}
    for key in keys:
        values = [step[key] for step in steps if key in step]
        if values:
            point[key] = fmean(values)
    return point


def training_page(file: Path, name: str) -> str:
    """The SVG page of a metrics file; raises ValueError where there is too little to draw."""
    points = read_curve(file, [key for _, _, names in (*_CHARTS, *_OF_TASKS) for key in names])
    measured = set().union(*points)
    of_task = "sparsity" in measured or "ce" not in measured
    charts, x_axis = (_OF_TASKS, "tokens, padding too") if of_task else (_CHARTS, "tokens")
    loss = "nats a token" if "ce" in measured else "mean of examples"
    panels = [_panel(points, x_axis, title, axis.format(loss=loss), names) for title, axis, names in charts]
    panels = [panel for panel in panels if panel]
    if not panels:
        raise ValueError(f"{file} holds fewer than two steps: wait for the run to go on")
    rows = -(-len(panels) // _COLUMNS)
    width = 2 * _MARGIN + _COLUMNS * CURVE_WIDTH + (_COLUMNS - 1) * _GAP
    height = 2 * _MARGIN + 36 + rows * (CURVE_HEIGHT + _TITLE) + (rows - 1) * _GAP
    tokens, steps = points[-1]["tokens"], points[-1]["step"]
    heading = f"{name}: {tokens:,.0f} tokens, {steps:,.0f} steps"
    elements = [
        f"<style>{_STYLE}</style>",
        f'<rect class="page" width="{width}" height="{height}"/>',
        f'<text class="title" x="{_MARGIN}" y="{_MARGIN + 14}">{escape(heading)}</text>',
    ]
    for number, panel in enumerate(panels):
        x = _MARGIN + number % _COLUMNS * (CURVE_WIDTH + _GAP)
        y = _MARGIN + 36 + number // _COLUMNS * (CURVE_HEIGHT + _TITLE + _GAP)
        elements += [f'<g transform="translate({x} {y})">', *panel, "</g>"]
    return drawing(width, height, heading, elements, ' xmlns="http://www.w3.org/2000/svg"') + "\n"


def _panel(points: Sequence[dict[str, float]], x_axis: str, title: str, axis: str, names: dict[str, str]) -> list[str]:
    """A titled chart of those metrics that have at least two points; a line that repeats another is left out."""
    lines: dict[str, Line] = {}
    for number, key in enumerate(names):
        having = [point for point in points if key in point]
        y = [point[key] for point in having]
        if len(having) > 1 and all(y != known for _, known, _ in lines.values()):
            lines[key] = [point["tokens"] for point in having], y, f"s{2 - number}"
    if not lines:
        return []
    elements = [f'<text class="title" x="0" y="14">{escape(title)}</text>']
    if any(names[key] for key in lines):
        parts = [f'<tspan dx="12" class="{style}">{escape(names[key])}</tspan>' for key, (_, _, style) in lines.items()]
        elements.append(f'<text x="-12" y="34">{"".join(parts)}</text>')
    return [*elements, f'<g transform="translate(0 {_TITLE})">', *chart(list(lines.values()), x_axis, axis), "</g>"]
