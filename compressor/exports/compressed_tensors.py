"""`compressed-tensors`: the layout that vLLM and transformers serve: int4 as W4A16, int8 with one scale a row as W8A8.

Grid values and scales are kept exactly; a 2:4 weight is stored with its zeros, for servers have dropped the sparse
layouts. int8 in groups becomes W8A16, packed like int4. Floats, embeddings and LM head are plain.

Stored for `pack-quantized`: `weight_packed` [O, I * bits / 32] int32, `weight_scale` [O, G], `weight_shape` [2]; for
`int-quantized`: `weight` [O, I] int8, `weight_scale` [O, 1].
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.checkpoint import ShardWriter
from compressor.exports import source as exported
from compressor.exports.dense import write_config
from compressor.exports.source import Layer, Source, bits_of
from compressor.exports.words import from_words, to_words
from compressor.formats import QuantizedWeight
from compressor.scheme import QuantizationConfig, Scheme


def losses(source: Source) -> list[str]:
    """Layers that vLLM makes one of and that are stored unlike, which it does not load.

    Raises:
        ValueError: a model whose linears compressed-tensors does not know, or none of which has integer values.
    """
    turned = [name for name in source.linears() if source.is_transposed(name)]
    if turned:
        raise ValueError(
            f"{turned[0]} is a Conv1D, which compressed-tensors does not know; export to gptq or dense instead"
        )
    linears = source.linears()
    if all(bits_of(scheme) is None for scheme in linears.values()):
        raise ValueError("no layer of this checkpoint has integer values; export it to dense instead")
    for name, scheme in linears.items():
        if not _per_row(scheme):
            check_words(name, source.shape_of(name)[1], bits_of(scheme))
    return source.unlike_parts()


def check_words(name: str, count: int, bits: int | None) -> None:
    """Raises ValueError where so many values of a row do not fill 32-bit words."""
    if bits is not None and count % (32 // bits):
        raise ValueError(f"{name} has {count} inputs, which are no multiple of {32 // bits}: export to dense instead")


def write(source: Source, stage: Path) -> None:
    """Writes shards and config.json with the `quantization_config` of compressed-tensors."""
    schemes = source.linears()
    writer = ShardWriter(stage)
    for name in source.schemes:
        layer = source.layer(name)
        for key, tensor in _stored(layer, bits_of(schemes.get(name))).items():
            writer.add(source.hub_name(f"{name}.{key}"), tensor)
    for name, tensor in source.plain():
        writer.add(source.hub_name(name), tensor)
    writer.close()
    write_config(stage, source.config | {"quantization_config": _config(source, schemes)})


def _per_row(scheme: Scheme) -> bool:
    return bits_of(scheme) == 8 and scheme.group_size == -1


def _stored(layer: Layer, bits: int | None) -> dict[str, Tensor]:
    if bits is None or layer.weight.scale is None:
        return {"weight": layer.dense()}
    if _per_row(layer.scheme):
        return {"weight": layer.weight.values, "weight_scale": layer.weight.scale}
    return {
        "weight_packed": to_words(layer.weight.values, bits),
        "weight_scale": layer.weight.scale,
        "weight_shape": torch.tensor(layer.weight.values.shape),
    }


def _config(source: Source, schemes: Mapping[str, Scheme]) -> dict[str, Any]:
    packed = {name: scheme for name, scheme in schemes.items() if bits_of(scheme) is not None}
    alike = {Scheme(f"int{bits_of(scheme)}", scheme.group_size, scheme.dtype) for scheme in packed.values()}
    groups: dict[str, Any] = {}
    if len(alike) == 1:
        groups["group_0"] = {"targets": ["Linear"], **_arguments(next(iter(alike)))}
    else:
        for key, group in QuantizationConfig.from_schemes(packed).groups.items():
            groups[key] = {"targets": list(group.targets), **_arguments(group.scheme)}
    formats = sorted({group["format"] for group in groups.values()})
    return {
        "quant_method": "compressed-tensors",
        "format": formats[0] if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": sorted(
            {
                "lm_head",
                source.hub_name("lm_head.weight").rpartition(".")[0],
                *(name for name in source.dense_linears() if name not in packed),
            }
        ),
        "config_groups": groups,
    }


def _arguments(scheme: Scheme) -> dict[str, Any]:
    shared = {"type": "int", "symmetric": True}
    size = scheme.group_size
    grouped = {"strategy": "channel", "group_size": None} if size == -1 else {"strategy": "group", "group_size": size}
    weights = {"num_bits": bits_of(scheme), **shared, "dynamic": False, "actorder": None, **grouped}
    inputs = {"num_bits": 8, **shared, "dynamic": True, "strategy": "token"} if _per_row(scheme) else None
    return {
        "format": "int-quantized" if _per_row(scheme) else "pack-quantized",
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
    }


class Exported(exported.Exported):
    """Grid values and scales are there as they were."""

    def weight(self, name: str, scheme: Scheme) -> QuantizedWeight | None:
        if f"{name}.weight_scale" not in self.checkpoint.shards:
            return super().weight(name, scheme)
        scale = self.checkpoint.tensor(f"{name}.weight_scale")
        if f"{name}.weight_packed" not in self.checkpoint.shards:
            return QuantizedWeight(self.checkpoint.tensor(f"{name}.weight"), scale)
        words = self.checkpoint.tensor(f"{name}.weight_packed")
        return QuantizedWeight(from_words(words, bits_of(scheme) or 4), scale)
