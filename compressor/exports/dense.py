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
        writer.add(f"{name}.weight", source.layer(name).dense())
    for name, tensor in source.plain():
        writer.add(name, tensor)
    writer.close()
    write_config(stage, source.config)


def write_config(stage: Path, config: Mapping[str, Any]) -> None:
    """Writes config.json."""
    (stage / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n")
