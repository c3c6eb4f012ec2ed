"""`gptq`: AutoGPTQ's layout (version 1), which GPTQModel, vLLM and transformers read; int4 and int8, symmetric.

Grid values are kept exactly. Scales are fp16 there: those of an ordinary checkpoint are bf16 numbers that fp16 holds
exactly, and where one is not it is said first.

Stored: `qweight` [I * bits / 32, O] int32, `scales` [G, O] fp16, `qzeros` [G, O * bits / 32] int32 (the zero point less
one, as version 1 wants it), `g_idx` [I] int32.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.checkpoint import ShardWriter
from compressor.exports import source as exported
from compressor.exports.compressed_tensors import check_words
from compressor.exports.dense import write_config
from compressor.exports.source import Layer, Source, architecture_of, bits_of
from compressor.exports.words import from_words, to_words
from compressor.formats import QuantizedWeight
from compressor.models import is_classifier
from compressor.scheme import Scheme


def losses(source: Source) -> list[str]:
    """Scales that fp16 does not hold, and layers that vLLM makes one of and that are stored unlike.

    Raises:
        ValueError: a model with a head for classes, layers that differ in bits or group size, or that the layout cannot
            store.
    """
    if is_classifier(source.config.get("architectures")):
        raise ValueError(
            f"what reads gptq knows language models, this is {architecture_of(source.config)}: "
            "export to compressed-tensors, onnx or dense instead"
        )
    packed = {name: scheme for name, scheme in source.linears().items() if bits_of(scheme) is not None}
    alike = {(bits_of(scheme), scheme.group_size) for scheme in packed.values()}
    if len(alike) != 1:
        raise ValueError(
            f"gptq keeps one kind of integer layer, found {len(alike)} (bits, group size): {sorted(map(str, alike))}. "
            "Export to compressed-tensors or dense instead."
        )
    for name, scheme in packed.items():
        rows, columns = source.shape_of(name)
        bits = bits_of(scheme)
        check_words(name, columns, bits)
        if bits and rows % (32 // bits):
            raise ValueError(f"{name} has {rows} rows; gptq needs a multiple of {32 // bits}: export to dense instead")
    count = sum(inexact_in_fp16(source.scale(name)) for name in packed)
    return [*([f"{count} scales are rounded to fp16"] if count else []), *source.unlike_parts()]


def inexact_in_fp16(scale: Tensor) -> int:
    """How many scales are other numbers in fp16."""
    return int((scale.float() != scale.to(torch.float16).float()).sum())


def write(source: Source, stage: Path) -> None:
    """Writes shards, config.json and quantize_config.json."""
    schemes = source.linears()
    writer = ShardWriter(stage)
    for name in source.schemes:
        layer = source.layer(name)
        bits = bits_of(schemes.get(name))
        for key, tensor in _stored(layer, bits).items():
            writer.add(source.hub_name(f"{name}.{key}"), tensor)
    for name, tensor in source.plain():
        writer.add(source.hub_name(name), tensor)
    writer.close()
    record = _config(source, schemes)
    write_config(stage, source.config | {"quantization_config": record})
    (stage / "quantize_config.json").write_text(json.dumps(record, indent=2) + "\n")


def _stored(layer: Layer, bits: int | None) -> dict[str, Tensor]:
    scale = layer.weight.scale
    if bits is None or scale is None:
        return {"weight": layer.dense()}
    out_features, in_features = layer.weight.values.shape
    # The zero point less one in every field: 7 or 127.
    zero = 0x77777777 if bits == 4 else 0x7F7F7F7F
    return {
        "qweight": to_words(layer.weight.values, bits).t().contiguous(),
        "qzeros": torch.full((scale.shape[1], out_features * bits // 32), zero, dtype=torch.int32),
        "scales": scale.to(torch.float16).t().contiguous(),
        "g_idx": torch.arange(in_features, dtype=torch.int32) // (in_features // scale.shape[1]),
    }


def _config(source: Source, schemes: dict[str, Scheme]) -> dict[str, Any]:
    packed = {name: scheme for name, scheme in schemes.items() if bits_of(scheme) is not None}
    scheme = next(iter(packed.values()))
    dense = [name for name in source.dense_linears() if name not in packed]
    dense += sorted(name for name, kinds in source.fused().items() if kinds == {None})  # by the names that vLLM has
    return {
        "quant_method": "gptq",
        "bits": bits_of(scheme),
        "group_size": scheme.group_size,
        "sym": True,
        "desc_act": False,
        "true_sequential": True,
        "damp_percent": 0.01,
        "lm_head": False,
        "checkpoint_format": "gptq",
        **({"dynamic": {f"-:^{re.escape(name)}$": {} for name in dense}} if dense else {}),
    }


class Exported(exported.Exported):
    """Grid values as they were, scales in fp16."""

    def weight(self, name: str, scheme: Scheme) -> QuantizedWeight | None:
        bits = bits_of(scheme)
        if bits is None or f"{name}.qweight" not in self.checkpoint.shards:
            return super().weight(name, scheme)
        values, scale = (self.checkpoint.tensor(f"{name}.{key}").t().contiguous() for key in ("qweight", "scales"))
        return QuantizedWeight(from_words(values, bits), scale.to(getattr(torch, scheme.dtype)))
