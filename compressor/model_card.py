"""The model card of a checkpoint: base model, licence, method, data, figures. Only what is known is said."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

import yaml

from compressor.models import is_classifier
from compressor.preflight import Plan
from compressor.recipe import Recipe


def model_card(
    name: str, recipe: Recipe, plan: Plan, figures: Mapping[str, Any], text: Mapping[str, Any] | None
) -> str:
    """Markdown with the hub's YAML header."""
    config = json.loads((plan.folder / "config.json").read_text())
    classifies = plan.labels is not None or is_classifier(config.get("architectures"))
    header = {
        "base_model": name,
        "library_name": "halfweight",
        "pipeline_tag": "text-classification" if classifies else "text-generation",
        "tags": ["halfweight", "2:4", "sparsity", "quantization"],
    }
    source = f" ({config['halfweight_source']})" if "halfweight_source" in config else ""
    formats = Counter(scheme.format for scheme in plan.schemes.values())
    patterns = Counter(map(str, plan.shapes.values()))
    endpoint = "offers POST /classify" if classifies else "an OpenAI-compatible endpoint"
    lines = [
        "---",
        yaml.safe_dump(header, sort_keys=False).strip(),
        "---",
        f"# {name.removeprefix('pypi:')}, compressed",
        "",
        f"Made by halfweight from `{name}`{source}, recipe `{recipe.name}`. The licence is the base model's.",
        "",
        "| | |",
        "|---|---|",
        f"| parameters | {plan.parameters:,} |",
        f"| layers | {', '.join(f'{count} x {fmt}' for fmt, count in formats.items())} |",
        *([f"| pruned | {', '.join(f'{count} x {shape}' for shape, count in patterns.items())} |"] if patterns else []),
        f"| dense weights on disk | {plan.dense_bytes / 1e6:.1f} MB |",
        *(f"| {key.replace('_', ' ')} | {value} |" for key, value in figures.items()),
        "",
        *_text_section(text),
        "## Use",
        "",
        "```",
        f"serve .          # {endpoint}",
        "```",
        "",
        "## Recipe",
        "",
        "```yaml",
        yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True), sort_keys=False).strip(),
        "```",
        "",
    ]
    return "\n".join(lines)


def _text_section(text: Mapping[str, Any] | None) -> list[str]:
    if text is None:
        return []
    rows = [f"| {key} | {value} |" for key, value in text.items()]
    return ["## Text that was trained or calibrated on", "", "| | |", "|---|---|", *rows, ""]
