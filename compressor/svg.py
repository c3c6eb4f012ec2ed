"""Line charts as SVG, drawn by hand: one file, no library, light and dark mode.

Colours are CSS classes of whatever holds the drawing: `s0`, `s1`, ... for series, `grid`, `tick`, `label`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

CURVE_WIDTH, CURVE_HEIGHT = 340, 220
LEFT, RIGHT, TOP, BOTTOM = 66, 14, 10, 44

Line = tuple[Sequence[float], Sequence[float], str]
"""x, y and the class of a series."""


def chart(lines: Sequence[Line], x_title: str, y_title: str) -> list[str]:
    """Elements of a chart of CURVE_WIDTH by CURVE_HEIGHT; axes run from zero along x, and around all values along y."""
    x_ticks = ticks(0.0, max(max(x) for x, _, _ in lines))
    y_ticks = ticks(min(min(y) for _, y, _ in lines), max(max(y) for _, y, _ in lines))
    drawn = []
    for tick in y_ticks:
        at = _place(tick, y_ticks, CURVE_HEIGHT - BOTTOM, TOP)
        drawn.append(f'<line class="grid" x1="{LEFT}" x2="{CURVE_WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        drawn.append(f'<text class="tick" x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{_short(tick)}</text>')
    for tick in x_ticks:
        at = _place(tick, x_ticks, LEFT, CURVE_WIDTH - RIGHT)
        low = CURVE_HEIGHT - BOTTOM + 18
        drawn.append(f'<text class="tick" x="{at:.1f}" y="{low}" text-anchor="middle">{_short(tick)}</text>')
    for x, y, style in lines:
        points = " ".join(
            f"{_place(a, x_ticks, LEFT, CURVE_WIDTH - RIGHT):.1f},{_place(b, y_ticks, CURVE_HEIGHT - BOTTOM, TOP):.1f}"
            for a, b in zip(x, y, strict=True)
        )
        drawn.append(f'<polyline class="line {style}" points="{points}"/>')
    middle, half = (CURVE_WIDTH + LEFT - RIGHT) / 2, (CURVE_HEIGHT - BOTTOM + TOP) / 2
    place = f'x="{middle}" y="{CURVE_HEIGHT - 6}" text-anchor="middle"'
    turned = f'transform="translate(10 {half}) rotate(-90)" text-anchor="middle"'
    return [
        *drawn,
        f'<text class="label" {place}>{escape(x_title)}</text>',
        f'<text class="label" {turned}>{escape(y_title)}</text>',
    ]


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


def drawing(width: float, height: float, summary: str, elements: Sequence[str], attributes: str = "") -> str:
    """An `<svg>` element; `summary` is read out by screen readers."""
    body = "\n".join(elements)
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(summary, quote=True)}" '
        f'style="max-width: {width}px"{attributes}>\n{body}\n</svg>'
    )
