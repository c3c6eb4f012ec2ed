"""The model card of a checkpoint: base model, licence, method, data, figures. Only what is known is said."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from compressor.models import HUB_ID, ORIGINS, is_classifier
from compressor.preflight import Plan
from compressor.recipe import Recipe


def model_card(
    name: str, recipe: Recipe, plan: Plan, figures: Mapping[str, Any], text: Mapping[str, Any] | None
) -> str:
    """Markdown with the hub's YAML header."""
    config = json.loads((plan.folder / "config.json").read_text("utf-8"))
    base, licence = _origin(name, plan.folder)
    shown = Path(name).name if Path(name).exists() else name.removeprefix("pypi:")
    classifies = plan.labels is not None or is_classifier(config.get("architectures"))
    header = {
        **({"base_model": base} if base else {}),
        **licence,
        "library_name": "halfweight",
        "pipeline_tag": "text-classification" if classifies else "text-generation",
        "tags": ["halfweight", *sorted({*map(str, plan.shapes.values())}), *(["sparsity"] if plan.shapes else []),
                 "quantization"],
    }  # fmt: skip
    source = f" ({config['halfweight_source']})" if "halfweight_source" in config else ""
    formats = Counter(scheme.format for scheme in plan.schemes.values())
    patterns = Counter(map(str, plan.shapes.values()))
    endpoint = "offers POST /classify" if classifies else "an OpenAI-compatible endpoint"
    lines = [
        "---",
        yaml.safe_dump(header, sort_keys=False).strip(),
        "---",
        f"# {shown}, compressed",
        "",
        f"Made by halfweight from `{shown}`{source}, recipe `{recipe.name}`. The licence is the base model's.",
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


def _origin(name: str, folder: Path) -> tuple[str | None, dict[str, Any]]:
    """The base model's hub id, where it has one, and what its own card says of its licence."""
    known = ORIGINS.get(name)
    base = known or (name if HUB_ID.fullmatch(name) and not Path(name).exists() else None)
    card = folder / "README.md"
    parts = card.read_text("utf-8", errors="replace").split("---\n", 2) if card.is_file() else []
    try:
        header = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    except yaml.YAMLError:
        header = None
    keys = ("license", "license_name", "license_link")
    licence = {key: header[key] for key in keys if key in header} if isinstance(header, dict) else {}
    return base, licence or ({"license": "apache-2.0"} if known else {})


def _text_section(text: Mapping[str, Any] | None) -> list[str]:
    if text is None:
        return []
    rows = [f"| {key} | {value} |" for key, value in text.items()]
    return ["## Text that was trained or calibrated on", "", "| | |", "|---|---|", *rows, ""]
