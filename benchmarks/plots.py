"""Plots as inline SVG, drawn by hand: the page stays one file, follows light and dark mode, and needs no library.

Colours are CSS classes of the page (templates/report.html): `s0`, `s1`, ... for series, `axis`, `label`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

BAR, GAP, WIDTH = 22, 12, 340
CURVE_WIDTH, CURVE_HEIGHT = 340, 220
LEFT, RIGHT, TOP, BOTTOM = 66, 14, 10, 44


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
    return _svg(WIDTH, height, summary, lines)


def curve(x: Sequence[float], y: Sequence[float], x_title: str, y_title: str, summary: str, style: str = "s2") -> str:
    """A line over x with axes from the least to the greatest value, rounded outwards to whole ticks."""
    x_ticks, y_ticks = ticks(0.0, max(x)), ticks(min(y), max(y))
    lines = []
    for tick in y_ticks:
        at = _place(tick, y_ticks, CURVE_HEIGHT - BOTTOM, TOP)
        lines.append(f'<line class="grid" x1="{LEFT}" x2="{CURVE_WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        lines.append(f'<text class="tick" x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{_short(tick)}</text>')
    for tick in x_ticks:
        at = _place(tick, x_ticks, LEFT, CURVE_WIDTH - RIGHT)
        low = CURVE_HEIGHT - BOTTOM + 18
        lines.append(f'<text class="tick" x="{at:.1f}" y="{low}" text-anchor="middle">{_short(tick)}</text>')
    points = " ".join(
        f"{_place(a, x_ticks, LEFT, CURVE_WIDTH - RIGHT):.1f},{_place(b, y_ticks, CURVE_HEIGHT - BOTTOM, TOP):.1f}"
        for a, b in zip(x, y, strict=True)
    )
    lines.append(f'<polyline class="line {style}" points="{points}"/>')
    middle = (CURVE_WIDTH + LEFT - RIGHT) / 2
    lines.append(
        f'<text class="label" x="{middle}" y="{CURVE_HEIGHT - 6}" text-anchor="middle">{escape(x_title)}</text>'
    )
    half = (CURVE_HEIGHT - BOTTOM + TOP) / 2
    turned = f'transform="translate(10 {half}) rotate(-90)" text-anchor="middle"'
    lines.append(f'<text class="label" {turned}>{escape(y_title)}</text>')
    return _svg(CURVE_WIDTH, CURVE_HEIGHT, summary, lines)


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers at equal steps that enclose low and high."""
    if not high > low:
        low, high = low - 0.5, low + 0.5
    raw = (high - low) / about
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * unit for factor in (1, 2, 2.5, 5, 10) if factor * unit >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def _place(value: float, marks: Sequence[float], start: float, end: float) -> float:
    return start + (value - marks[0]) / (marks[-1] - marks[0]) * (end - start)


def _short(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def _svg(width: float, height: float, summary: str, lines: Sequence[str]) -> str:
    body = "\n".join(lines)
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(summary, quote=True)}" '
        f'style="max-width: {width}px">\n{body}\n</svg>'
    )
