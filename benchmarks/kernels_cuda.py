"""`python -m benchmarks kernels --device cuda`: the GPU paths against torch's bf16 linear, per shape and batch.

Each product is first compared with the unpacked weight's, so a wrong kernel gives an error and not a figure.
`expected` is what the bytes allow while memory is the limit: those of a bf16 weight over those that are stored. Weights
of a shape are repeated until they exceed the device's cache, and calls take turns among them.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.geometries import LLAMA_2, TINYLLAMA, Geometry
from benchmarks.record import make_record, write_record
from compressor.formats import make_format
from compressor.kernels.cuda import choose
from compressor.kernels.cuda.semi_structured import COMPRESSED, PACKED
from compressor.masks import n_m_mask
from compressor.quantizers import rtn
from compressor.scheme import Scheme

BATCHES = (1, 4, 16, 32, 64, 128, 512)
FORMATS = ("sparse24_int4", "sparse24", "sparse24_int8", "sparse24_fp8")
TORCH = "torch bf16"
_TOLERANCE = {"sparse24_fp8": 0.06}
"""Where it is not 0.02: activations of fp8 have 3 bits after the leading one."""
_CALLS = 20


def main(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """Compares, times, prints and writes."""
    if not torch.cuda.is_available():
        raise ValueError("--device cuda needs a GPU that torch can use; without one leave --device out")
    rows: list[dict[str, Any]] = []
    for model in [TINYLLAMA] if options.quick else [TINYLLAMA, LLAMA_2]:
        for shape in model.shapes:
            for name in FORMATS:
                rows += measure(model, shape, name, BATCHES[:2] if options.quick else BATCHES, options.quick)
        if options.json:
            write_record(options.json, make_record("kernels", argv, rows, headline(rows), **_device()))
    print(json.dumps(headline(rows), indent=1))
    return 0


def _device() -> dict[str, Any]:
    device = torch.cuda.get_device_properties(0)
    return {"device": device.name, "capability": [device.major, device.minor], "cuda": torch.version.cuda}


def measure(
    model: Geometry, shape: tuple[int, int], name: str, batches: Sequence[int], quick: bool
) -> list[dict[str, Any]]:
    """One row a batch: milliseconds of the packed product and of torch's."""
    # Sparse products of 8 bits take one scale a row.
    group = -1 if name in ("sparse24_int8", "sparse24_fp8") else model.group
    scheme = Scheme(name, group)
    fmt = make_format(scheme)
    weight = torch.randn(shape, device="cuda") * 0.02
    stored = fmt.pack(rtn(weight * n_m_mask(weight.abs()), None, scheme))
    dense = fmt.unpack(stored)
    size = sum(tensor.nbytes for tensor in stored.values())
    copies = 2 if quick else max(2, -(-256_000_000 // size))
    packed = [fmt.prepare({part: tensor.clone() for part, tensor in stored.items()}) for _ in range(copies)]
    plain = [dense.clone() for _ in range(copies)]
    path = choose(name, torch.cuda.get_device_capability(), *shape, group, dense.dtype)
    if path == "semi_structured" and not {PACKED, COMPRESSED} & packed[0].keys():
        path = "unpack"  # the library refused
    rows = []
    for batch in batches:
        x = torch.randn(batch, shape[1], device="cuda", dtype=torch.bfloat16)
        expected = F.linear(x.float(), dense.float())
        error = float((fmt.linear(x, packed[0]).float() - expected).norm() / expected.norm())
        if not error < _TOLERANCE.get(name, 0.02):
            raise ValueError(f"{name} {shape} batch {batch} by {path}: wrong by {error:.3g} of the result")
        own = milliseconds(partial(fmt.linear, x), packed)
        torchs = milliseconds(partial(F.linear, x), plain)
        rows.append(
            {
                "model": model.name, "shape": list(shape), "arm": name, "path": path, "batch": batch,
                "milliseconds": own, "torch_bf16_milliseconds": torchs, "vs_torch_bf16": torchs / own,
                "bytes": size, "bytes_per_s": size / own * 1e3, "expected": dense.nbytes / size, "error": error,
            }
        )  # fmt: skip
        print(
            f"{model.name:14} {shape!s:14} {name:14} {path:16} batch {batch:3}: {own:7.4f} ms, {torchs / own:5.2f}x "
            f"torch bf16 (bytes allow {dense.nbytes / size:.2f}x), {size / own / 1e6:6.0f} GB/s, error {error:.1e}",
            flush=True,
        )
    return rows


def milliseconds(run: Callable[[Any], Tensor], weights: Sequence[Any]) -> float:
    """The median call; all are captured in one CUDA graph, as a server runs them, after calls that tune."""
    for weight in weights[:2]:
        run(weight)
    torch.cuda.synchronize()
    graph, order = torch.cuda.CUDAGraph(), cycle(weights)
    with torch.cuda.graph(graph):
        for _ in range(_CALLS):
            run(next(order))
    times = []
    for _ in range(7):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / _CALLS)
    return statistics.median(times)


def headline(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Sums over the largest model's linears at batch 1 and 64."""
    found = {}
    largest = rows[-1]["model"]
    for name in FORMATS:
        for batch in (1, 64):
            chosen = [r for r in rows if r["model"] == largest and r["arm"] == name and r["batch"] == batch]
            if chosen:
                ours, theirs = (sum(r[key] for r in chosen) for key in ("milliseconds", "torch_bf16_milliseconds"))
                found[f"cuda_{name}_vs_torch_bf16_b{batch}"] = theirs / ours
    return found
