"""What a checkpoint holds (`inspect`), whether it is intact (`verify`), and what this machine can do (`doctor`)."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from compressor import kernels
from compressor.checkpoint import MANIFEST, Checkpoint, CheckpointError, check_manifest, read_json
from compressor.formats import FORMATS, make_format
from compressor.kernels import dense
from compressor.masks import check_n_m
from compressor.scheme import Scheme


@dataclass(frozen=True)
class Row:
    """Layers that differ only in their number. Shape is [out_features, in_features]."""

    layers: str
    format: str
    group: str
    shape: tuple[int, ...]
    bits_per_weight: float
    stored_bytes: int


@dataclass(frozen=True)
class Inspection:
    """All rows, and totals over the checkpoint."""

    rows: list[Row]
    parameters: int
    stored_bytes: int


def packed_modules(checkpoint: Checkpoint) -> dict[str, Scheme]:
    """{module: scheme} of every packed module that is stored."""
    modules = sorted({name.rpartition(".")[0] for name in checkpoint.shards}, key=_natural)
    schemes = {module: checkpoint.scheme_of(module) for module in modules}
    return {module: scheme for module, scheme in schemes.items() if scheme is not None}


def inspect(folder: Path) -> Inspection:
    """Sums up a checkpoint; raises CheckpointError where it is not valid."""
    checkpoint = Checkpoint.open(folder, verify=False)
    schemes = packed_modules(checkpoint)
    rows: dict[tuple[object, ...], list[tuple[str, int, int]]] = {}
    for module, scheme in schemes.items():
        tensors = checkpoint.module(module)
        fmt = make_format(scheme)
        shape = fmt.shape_of(tensors)
        size = sum(t.numel() * t.element_size() for key, t in tensors.items() if key != "bias")
        rows.setdefault((_family(module), scheme, shape), []).append((module, size, shape[0] * shape[1]))
    for name in checkpoint.names():
        if name.rpartition(".")[0] not in schemes or name.endswith(".bias"):
            size, plain = checkpoint.size_of(name), checkpoint.tensor(name).shape
            rows.setdefault((_family(name), None, tuple(plain)), []).append((name, size, plain.numel()))
    result = [_row(key, members) for key, members in rows.items()]
    parameters = sum(weights for members in rows.values() for _, _, weights in members)
    return Inspection(result, parameters, sum(row.stored_bytes for row in result))


def _row(key: tuple[object, ...], members: list[tuple[str, int, int]]) -> Row:
    family, scheme, shape = key
    assert isinstance(shape, tuple)
    size, weights = sum(m[1] for m in members), sum(m[2] for m in members)
    name = f"{family} ({len(members)})" if len(members) > 1 else members[0][0]
    if not isinstance(scheme, Scheme):
        return Row(name, "plain", "", shape, 8 * size / weights, size)
    branch = "" if scheme.low_rank is None else f" + low rank {scheme.low_rank.dtype}"
    group = "" if not FORMATS[scheme.format].scaled else "row" if scheme.group_size == -1 else str(scheme.group_size)
    return Row(name, scheme.format + branch, group, shape, 8 * size / weights, size)


def _family(name: str) -> str:
    return re.sub(r"\b\d+\b", "*", name)


def _natural(name: str) -> list[object]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


@dataclass(frozen=True)
class Verification:
    """Counts of what was checked and found right."""

    files: int
    packed: int
    sparse: int
    groups: int
    tensors: int


def verify(folder: Path) -> Verification:
    """Checks every file, position, shape and value; raises CheckpointError naming the first fault."""
    checkpoint = Checkpoint.open(folder, verify=False)
    if not checkpoint.packed:
        raise CheckpointError(f"{folder} is not a halfweight checkpoint; give a folder made by `compress`")
    check_manifest(folder)
    schemes = packed_modules(checkpoint)
    sparse = groups = 0
    for module, scheme in schemes.items():
        fmt = make_format(scheme)
        tensors = checkpoint.module(module)
        if fmt.sparse:
            stored = {name: t for name, t in tensors.items() if name.startswith("weight")}
            values = fmt.unpack_quantized(stored).values
            try:
                check_n_m(values)
            except ValueError as error:
                raise CheckpointError(f"{folder}, {module}: {error}") from None
            sparse, groups = sparse + 1, groups + values.numel() // 4
    for name in checkpoint.names():
        tensor = checkpoint.tensor(name)
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
            raise CheckpointError(f"{folder}, {name} holds NaN or infinity. Compress the model again.")
    files = len(read_json(folder / MANIFEST)["files"])
    return Verification(files, len(schemes), sparse, groups, len(checkpoint.names()))


def doctor() -> dict[str, str]:
    """{what: finding} for this machine."""
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    found = {
        "processor": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": f"{torch.__version__}, {torch.backends.cpu.get_cpu_capability()}",
        "CUDA": cuda,
        "kernels": kernels.describe(),
    }
    for name, fmt in FORMATS.items():
        served = kernels.available() and fmt.has_kernel()
        found[name] = f"C++ kernel, {kernels.isa()}" if served else "portable torch path (slow)"
        if name == "dense" and kernels.isa() not in dense.FASTER_ON:
            found[name] = "torch, which reads the weights as they are stored"
    return found
