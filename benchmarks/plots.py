"""Plots of the report as inline SVG: the page stays one file, follows light and dark mode, and needs no library.

Colours are CSS classes of the page (templates/report.html): `s0`, `s1`, ... for series, `axis`, `label`.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from compressor.svg import CURVE_HEIGHT, CURVE_WIDTH, chart, drawing

BAR, GAP, WIDTH = 22, 12, 340


def bars(labels: Sequence[str], values: Sequence[float], texts: Sequence[str], summary: str) -> str:
    """Horizontal bars from zero, one a model, each with its figure; `summary` is read out by screen readers."""
    top = max(values) or 1.0
    lines = []
    for number, (label, value, text) in enumerate(zip(labels, values, texts, strict=True)):
        y = number * (BAR + GAP + 14)
        width = max(value / top * (WIDTH - 112), 2)
        lines.append(f'<text class="label" x="0" y="{y + 11}">{escape(label)}</text>')
        lines.append(f'<rect class="s{number}" x="0" y="{y + 17}" width="{width:.1f}" height="{BAR}" rx="3"/>')
        lines.append(f'<text class="figure" x="{width + 8:.1f}" y="{y + 33}">{escape(text)}</text>')
    height = len(labels) * (BAR + GAP + 14)
    return drawing(WIDTH, height, summary, lines)


def curve(x: Sequence[float], y: Sequence[float], x_title: str, y_title: str, summary: str, style: str = "s2") -> str:
    """A line over x with axes from the least to the greatest value, rounded outwards to whole ticks."""
    return drawing(CURVE_WIDTH, CURVE_HEIGHT, summary, chart([(x, y, style)], x_title, y_title))
