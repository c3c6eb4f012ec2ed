"""What a model folder holds, in words for a table: its label, where it came from, how it is stored."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from compressor.scheme import QUANT_METHOD, QuantizationConfig

DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


@dataclass(frozen=True)
class ModelFolder:
    """One column of a comparison."""

    name: str
    folder: Path
    label: str
    compressed: bool
    storage: str
    source: str
    recipe: dict[str, Any] | None
    disk_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """For the record; the folder is left out, for it is a path of one machine."""
        return {key: value for key, value in asdict(self).items() if key != "folder"}


def describe_all(names: Sequence[str]) -> list[ModelFolder]:
    """One entry a model, with labels that differ. Names are what `compress` takes: folders, hub ids, `pypi:NAME`.

    Raises:
        ValueError: no such model, a folder that holds none, or one given twice.
    """
    found = [describe(name) for name in names]
    counts = Counter(model.label for model in found)
    told = [
        replace(model, label=f"{model.label} ({model.folder.name})") if counts[model.label] > 1 else model
        for model in found
    ]
    if len({model.label for model in told}) < len(told):
        raise ValueError(f"{', '.join(names)}: two of these are the same folder, or folders of the same name")
    return told


def describe(name: str) -> ModelFolder:
    """What is written in a folder's config.json and recipe.yaml."""
    folder = locate(name)
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(
            f"{folder} holds no config.json; give the folder of a model (`compress fetch MODEL` prints it)"
        )
    config = json.loads(file.read_text())
    block = config.get("quantization_config")
    packed = isinstance(block, dict) and block.get("quant_method") == QUANT_METHOD
    recipe_file = folder / "recipe.yaml"
    recipe = yaml.safe_load(recipe_file.read_text()) if recipe_file.is_file() else None
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    dense = f"dense {DTYPES.get(dtype, dtype)}"
    return ModelFolder(
        name=name,
        folder=folder,
        label=_short(recipe, folder) if packed else dense,
        compressed=packed,
        storage=storage_sentence(QuantizationConfig.from_dict(block)) if packed else dense,
        source=str(config.get("halfweight_source", "")),
        recipe=recipe,
        disk_bytes=sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
    )


def locate(name: str) -> Path:
    """The folder of a model; imports what downloads and converts only where the name is no folder."""
    if Path(name).is_dir():
        return Path(name)
    from compressor.models import fetch_model

    return fetch_model(name)


def _short(recipe: dict[str, Any] | None, folder: Path) -> str:
    """`one-shot 2:4 int4`, `retrained 2:4 int4`, `int4`: what was done, then what is stored."""
    if recipe is None:
        return folder.name
    values = str((recipe.get("quantization") or {}).get("values", "int4"))
    stored = DTYPES.get(values, values)
    sparsity, retraining = recipe.get("sparsity"), recipe.get("retraining")
    if not sparsity:
        return stored
    return f"{'retrained' if retraining else 'one-shot'} {sparsity.get('pattern', '2:4')} {stored}"


def storage_sentence(config: QuantizationConfig) -> str:
    """For example `linears sparse24_int4, groups of 64; embeddings int8`."""
    parts = []
    for group in config.groups.values():
        scheme = group.scheme
        size = f", groups of {scheme.group_size}" if scheme.group_size > 0 else ""
        branch = "" if scheme.low_rank is None else f" + low rank k={scheme.low_rank.segment} {scheme.low_rank.dtype}"
        names = "embeddings" if any("embed" in target or "head" in target for target in group.targets) else "linears"
        parts.append(f"{names} {scheme.format}{branch}{size}")
    return "; ".join(parts)
