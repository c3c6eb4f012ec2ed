"""`dense`: a plain bf16 Hugging Face folder with the zeros in place, for every runtime that knows the model.

A quantised weight is `q * scale` rounded once to the scheme's dtype, which is what `Format.unpack` gives.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compressor.checkpoint import ShardWriter
from compressor.exports.source import Exported, Source

__all__ = ["Exported", "losses", "write", "write_config"]


def losses(source: Source) -> list[str]:
    """Nothing beyond what no target holds."""
    return []


def write(source: Source, stage: Path) -> None:
    """Writes shards and config.json."""
    writer = ShardWriter(stage)
    for name in source.schemes:
        writer.add(source.hub_name(f"{name}.weight"), source.layer(name).dense())
    for name, tensor in source.plain():
        writer.add(source.hub_name(name), tensor)
    writer.close()
    write_config(stage, source.config)


def write_config(stage: Path, config: Mapping[str, Any]) -> None:
    """Writes config.json, with the keys beside that readers of transformers 4 know."""
    (stage / "config.json").write_text(json.dumps({**config, **_older_keys(config)}, indent=2) + "\n")


def _older_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_theta`, `rope_scaling` and `torch_dtype`; without them such a reader computes something else, silently."""
    older = {"torch_dtype": config["dtype"]} if "dtype" in config else {}
    rope = config.get("rope_parameters")
    if not isinstance(rope, Mapping) or any(isinstance(part, Mapping) for part in rope.values()):
        return older
    for key in ("rope_theta", "partial_rotary_factor"):
        older |= {key: rope[key]} if key in rope else {}
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    return older | ({"rope_scaling": scaling} if scaling.get("rope_type", "default") != "default" else {})
