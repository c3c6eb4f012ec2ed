"""Ways out: a checkpoint in the layout of another runtime, and back.

An export is one module with `losses`, `write` and `Exported`, and one line in `EXPORTS`. What a target cannot hold is
said first and needs the user's leave; everything else is the same number in another layout. Beside the model lies
`halfweight.json`, the record of what every layer was, from which `import_checkpoint` gives the checkpoint back.

Modules are imported when they are asked for: some need packages that others do without.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from compressor.checkpoint import CheckpointError, CheckpointWriter, copy_companions, read_json
from compressor.exports.source import RECORD, Exported, Source
from compressor.formats import make_format
from compressor.output import OutputFolder
from compressor.scheme import QuantizationConfig, Scheme

EXPORTS = {
    "dense": "compressor.exports.dense",
    "compressed-tensors": "compressor.exports.compressed_tensors",
    "gptq": "compressor.exports.gptq",
    "onnx": "compressor.exports.onnx",
    "gguf": "compressor.exports.gguf",
}
"""{target: module}."""


def export_module(target: str) -> ModuleType:
    """The module of a target; raises ValueError for a name that is not in `EXPORTS`."""
    if target not in EXPORTS:
        raise ValueError(f"no export {target!r}; accepted: {', '.join(EXPORTS)}")
    return import_module(EXPORTS[target])


def export_checkpoint(
    folder: Path, target: str, out: Path, *, allow_lossy: bool = False, force: bool = False
) -> list[str]:
    """Writes the checkpoint `folder` for another runtime into `out`; returns what was lost, a sentence each.

    Raises:
        ValueError: something would be lost and `allow_lossy` is not given, or the target cannot take the model.
    """
    module = export_module(target)
    source = Source(folder)
    losses = [*source.losses(), *module.losses(source)]
    if losses and not allow_lossy:
        raise ValueError(f"{target} cannot hold all of {folder}: {'; '.join(losses)}. Give --allow-lossy to go on.")
    with OutputFolder(out, force=force) as output:
        stage = output.open_stage()
        copy_companions(folder, stage)
        if source.checkpoint.packed:
            _write_record(stage / RECORD, target, source)
        module.write(source, stage)
        output.commit()
    return losses


def _write_record(path: Path, target: str, source: Source) -> None:
    config, modules = source.checkpoint.config, list(source.schemes)
    record = {"version": 1, "target": target, "modules": modules, "config": config}
    path.write_text(json.dumps(record, indent=1) + "\n")


def import_checkpoint(folder: Path, out: Path, *, force: bool = False) -> list[str]:
    """Makes the checkpoint again that `folder` was exported from; returns the modules that had to stay dense.

    Raises:
        CheckpointError: the folder was not made by `compress export`, or does not hold what its record says.
    """
    target, modules, config = _read_record(folder)
    quantization = QuantizationConfig.from_dict(config.get("quantization_config"))
    reader = export_module(target).Exported
    with OutputFolder(out, force=force) as output:
        try:
            schemes = _import(reader(folder, config), modules, quantization, CheckpointWriter(output), folder, config)
        except (KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
            raise CheckpointError(f"{folder} does not hold what its {RECORD} says: {error}") from None
    return [name for name in modules if name not in schemes]


def _import(
    exported: Exported,
    modules: Sequence[str],
    quantization: QuantizationConfig,
    writer: CheckpointWriter,
    folder: Path,
    config: dict[str, Any],
) -> dict[str, Scheme]:
    """Packs every module again; returns the schemes of those that lie on their grids still."""
    copy_companions(folder, writer.folder)
    schemes: dict[str, Scheme] = {}
    for name in modules:
        scheme = quantization.scheme_of(name)
        weight = None if scheme is None or scheme.low_rank is not None else exported.weight(name, scheme)
        if scheme is None or weight is None:
            writer.add(f"{name}.weight", exported.dense(name))
            continue
        schemes[name] = scheme
        for key, tensor in make_format(scheme).pack(weight).items():
            writer.add(f"{name}.{key}", tensor)
    for name, tensor in exported.plain(set(modules)):
        writer.add(name, tensor)
    if len(schemes) < len(modules):
        plain = [name for name in modules if name not in schemes]
        packed = QuantizationConfig.from_schemes(schemes, quantization.kv_cache_dtype, plain)
        config["quantization_config"] = packed.to_dict()
    writer.finish(config)
    return schemes


def _read_record(folder: Path) -> tuple[str, list[str], dict[str, Any]]:
    """Target, packed modules and `config.json` of an exported folder."""
    if not (folder / RECORD).is_file():
        raise CheckpointError(f"{folder} holds no {RECORD}; `compress import` takes what `compress export` made")
    record = read_json(folder / RECORD)
    parts = {"target": str, "modules": list, "config": dict}
    if not isinstance(record, dict) or record.get("version") != 1:
        raise CheckpointError(f"{folder / RECORD} is not a record of version 1")
    wrong = [key for key, kind in parts.items() if not isinstance(record.get(key), kind)]
    if wrong or not all(isinstance(name, str) for name in record["modules"]):
        raise CheckpointError(f"{folder / RECORD}: {', '.join(wrong) or 'modules'} is missing or of the wrong kind")
    return record["target"], record["modules"], record["config"]
