"""The retraining curve of a checkpoint: what metrics.jsonl holds, thinned to what a plot can show."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

KEYS = ("total", "kl", "ce", "flip_rate", "learning_rate", "gradient_norm")
POINTS = 200


def read_curve(file: Path) -> list[dict[str, float]]:
    """At most POINTS points over tokens, each the mean of the steps that it stands for; empty without a file."""
    if not file.is_file():
        return []
    steps = [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
    steps = [step for step in steps if isinstance(step.get("tokens"), int | float)]
    size = -(-len(steps) // POINTS) if steps else 1
    return [_point(steps[start : start + size]) for start in range(0, len(steps), size)]


def _point(steps: list[dict[str, Any]]) -> dict[str, float]:
    point = {"tokens": float(steps[-1]["tokens"]), "step": float(steps[-1].get("step", 0))}
    for key in KEYS:
        values = [step[key] for step in steps if key in step]
        if values:
            point[key] = fmean(values)
    return point
