"""Checkpoints that others quantised, as dense folders to start from: GPTQ, AWQ and compressed-tensors.

Each weight is `(q - zero point) * scale`, computed in float32 and rounded once to bf16. Stored layouts, with F
fields of `bits` bits in a 32-bit word, lower bits first:

    gptq                qweight [I / F, O], qzeros [G, O / F] (version 1 stores them less one), scales [G, O], g_idx [I]
    awq (gemm)          qweight [I, O / 8], qzeros [G, O / 8], scales [G, O]; columns of a word: 0 2 4 6 1 3 5 7
    compressed-tensors  weight_packed [O, I / F], weight_scale [O, G], weight_zero_point [O / F, G], weight_g_idx [I],
                        (or int8 [O, G]); or weight [O, I] int8 or fp8, weight_scale; or a dense weight beside a scale

Shapes: O out_features, I in_features, G groups a row.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.calibration import is_conv1d
from compressor.checkpoint import Checkpoint, CheckpointError, ShardWriter, copy_companions
from compressor.packages import check_cache_space

VERSION = 2
"""Of what is read here: dense folders in the cache that an earlier one made are made anew."""
_RECORDS = ("quantization_config", "compression_config")
_AWQ_FIELDS = (0, 2, 4, 6, 1, 3, 5, 7)
_KEYS = {
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "awq": ("qweight", "qzeros", "scales"),
    "compressed-tensors": (
        "weight_packed", "weight", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape",
        "input_scale", "output_scale", "input_zero_point", "output_zero_point",
    ),
}  # fmt: skip


def method_of(config: Mapping[str, Any]) -> str | None:
    """The quantisation method of a configuration where it is one that can be read here."""
    record = _record(config)
    method = record.get("quant_method") if isinstance(record, Mapping) else None
    return method if isinstance(method, str) and method in READERS else None


def _record(config: Mapping[str, Any]) -> Any:
    """What a configuration says of its quantisation; under the second name in compressed-tensors' first year."""
    return config.get(_RECORDS[0], config.get(_RECORDS[1]))


def dequantise(folder: Path, stage: Path) -> None:
    """Writes the dense bf16 folder of a quantised one.

    Raises:
        CheckpointError: tensors that are not those of the method, or a variant of it that is not known.
    """
    from compressor.models import skeleton

    source = Checkpoint.open(folder, verify=False, foreign=True)
    method, record = str(method_of(source.config)), _record(source.config)
    _check_variant(source, record)
    model = skeleton(folder)
    check_cache_space(2 * sum(parameter.numel() for parameter in model.parameters()), folder)
    transposed = {name for name, module in model.named_modules() if is_conv1d(module)}
    writer = ShardWriter(stage)
    for name, tensor in _dense_tensors(source, method, record, transposed):
        writer.add(name, tensor)
    writer.close()
    copy_companions(folder, stage)
    config = {key: value for key, value in source.config.items() if key not in _RECORDS}
    config |= {"dtype": "bfloat16", "halfweight_source": f"{folder.name}, quantised by {method}, dequantised to bf16"}
    config.pop("torch_dtype", None)
    (stage / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _check_variant(source: Checkpoint, record: Mapping[str, Any]) -> None:
    """Raises CheckpointError for what changes a model's activations too, of which a dense folder would know nothing."""
    scaled = [name for name in source.names() if name.endswith(".act.scales")]
    if scaled:
        raise CheckpointError(
            f"{source.folder} divides activations by {scaled[0]}, which is not read here. "
            "Give the dense model that it was made from."
        )
    if record.get("transform_config"):
        raise CheckpointError(
            f"{source.folder} rotates activations (transform_config), which is not read here. "
            "Give the dense model that it was made from."
        )


def _dense_tensors(
    source: Checkpoint, method: str, record: Mapping[str, Any], transposed: set[str]
) -> Iterator[tuple[str, Tensor]]:
    marks = ("weight_packed", "weight_scale") if method == "compressed-tensors" else ("qweight",)
    modules = {name.rpartition(".")[0] for name in source.names() if name.rpartition(".")[2] in marks}
    if not modules:
        raise CheckpointError(
            f"{source.folder} is quantised by {method} in a layout that is not read here: it has no tensor named "
            f"{' or '.join(f'*.{mark}' for mark in marks)}. Give the dense model that it was made from."
        )
    for module in sorted(modules):
        parts = {key: source.tensor(f"{module}.{key}") for key in _KEYS[method] if f"{module}.{key}" in source.shards}
        try:
            weight = READERS[method](parts, record).to(torch.bfloat16)
        except CheckpointError as error:
            raise CheckpointError(f"{source.folder}, {module}: {error}") from None
        except (KeyError, RuntimeError, IndexError, ZeroDivisionError, ValueError, TypeError) as error:
            raise CheckpointError(f"{source.folder}, {module}: not the tensors of {method}: {error}") from None
        if not bool(torch.isfinite(weight).all()):
            raise CheckpointError(f"{source.folder}, {module}: the dequantised weight holds NaN or infinity")
        yield f"{module}.weight", weight.t().contiguous() if module in transposed else weight
    for name in source.names():
        module, _, key = name.rpartition(".")
        if module not in modules or key not in _KEYS[method]:
            tensor = source.tensor(name)
            yield name, tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor


def _fields(words: Tensor, bits: int, dim: int) -> Tensor:
    """The unsigned fields of 32-bit words, spread out along `dim`."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32).view(-1, *[1] * (words.dim() - 1 - dim))
    spread = words.to(torch.int32).unsqueeze(dim + 1) >> shifts
    return (spread & (2**bits - 1)).flatten(dim, dim + 1)


def _bits(record: Mapping[str, Any], key: str, accepted: tuple[int, ...]) -> int:
    bits = record.get(key)
    if bits not in accepted:
        raise CheckpointError(f"{key} is {bits!r}; accepted here: {', '.join(map(str, accepted))}")
    return int(bits)


def _gptq(parts: Mapping[str, Tensor], record: Mapping[str, Any]) -> Tensor:
    bits = _bits(record, "bits", (2, 4, 8))
    values, zeros = _fields(parts["qweight"], bits, 0), parts["qzeros"]
    if record.get("checkpoint_format") != "gptq_v2":  # less one in each field, with a borrow from the next below zero
        zeros = zeros.to(torch.int32) + sum(1 << shift for shift in range(0, 32, bits))
    zeros = _fields(zeros, bits, 1)
    scales = parts["scales"].float()
    group = parts["g_idx"].long() if "g_idx" in parts else torch.arange(len(values)) // (len(values) // len(scales))
    return ((values - zeros[group]).float() * scales[group]).t().contiguous()


def _awq(parts: Mapping[str, Tensor], record: Mapping[str, Any]) -> Tensor:
    bits = _bits(record, "bits", (4,))
    if str(record.get("version", "gemm")).lower() != "gemm":
        raise CheckpointError(f"awq of version {record.get('version')!r}; accepted here: gemm")
    values, zeros = (_awq_order(_fields(parts[key], bits, 1)) for key in ("qweight", "qzeros"))
    repeats = len(values) // len(zeros)
    scales = parts["scales"].float().repeat_interleave(repeats, dim=0)
    return ((values - zeros.repeat_interleave(repeats, dim=0)).float() * scales).t().contiguous()


def _awq_order(fields: Tensor) -> Tensor:
    """Columns in their own order, from the order of AWQ's words."""
    places = torch.tensor(_AWQ_FIELDS).argsort()
    return fields.unflatten(1, (-1, 8))[:, :, places].flatten(1)


def _compressed_tensors(parts: Mapping[str, Tensor], record: Mapping[str, Any]) -> Tensor:
    scale = parts["weight_scale"].float()
    if "weight_packed" not in parts:
        values = parts["weight"]
        if values.dtype in (torch.bfloat16, torch.float16, torch.float32):
            return values.float()  # saved with `save_compressed=False`: the scales are multiplied in
        values = values.float()
        # One scale for the tensor, for each row, or for groups of a row.
        if scale.numel() != 1 and not (scale.dim() <= 2 and len(scale) == len(values)):
            raise CheckpointError(
                f"weight_scale is {list(scale.shape)} for a weight of {list(values.shape)}; accepted here: one, one a "
                "row, or one for each group of a row"
            )
        if "weight_zero_point" in parts:
            zero = parts["weight_zero_point"].float().view(scale.shape)
            values = values - (
                zero if zero.numel() == 1 else _by_input(zero.view(len(values), -1), values.shape[1], None)
            )
        return values * (scale if scale.numel() == 1 else _by_input(scale.view(len(values), -1), values.shape[1], None))
    rows, columns = (int(size) for size in parts["weight_shape"])
    bits = 32 // max(1, -(-columns // parts["weight_packed"].shape[1]))
    if bits not in (4, 8):
        raise CheckpointError(f"weight_packed holds values of {bits} bits; accepted here: 4, 8")
    half = 2 ** (bits - 1)
    values = (_fields(parts["weight_packed"], bits, 1)[:, :columns] - half).float()
    if "weight_zero_point" in parts:
        zero = parts["weight_zero_point"]
        if zero.dtype == torch.int32:
            zero = _fields(zero, bits, 0)[:rows] - half
        if zero.shape != scale.shape:  # before they were packed, they were stored as they are
            raise CheckpointError(f"weight_zero_point is {list(zero.shape)} for scales of {list(scale.shape)}")
        zero = zero.float()
        values = values - _by_input(zero, columns, parts.get("weight_g_idx"))
    return values * _by_input(scale, columns, parts.get("weight_g_idx"))


def _by_input(per_group: Tensor, columns: int, groups: Tensor | None) -> Tensor:
    """[O, G] as [O, I]: each input's own group, or groups of equal size in order."""
    if groups is not None and bool((groups >= 0).all()):
        return per_group[:, groups.long()]
    return per_group.repeat_interleave(columns // per_group.shape[1], dim=1)


READERS: dict[str, Callable[[Mapping[str, Tensor], Mapping[str, Any]], Tensor]] = {
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed_tensors,
}
