"""Every kernel against torch's bf16 linear: time, bytes and multiplications a second, per model, batch and format.

A measurement is one pass through the linears of a transformer's layers (q/k/v and gate/up fused, as they are served).
At small batches the layers make 1 GB of distinct weights, more than any cache holds; SmolLM2's 30 layers fit the cache
and are measured there. Arms take turns, round after round, and a figure is the median of its rounds; the machine's read
bandwidth and multiply rates are measured first.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.geometries import LLAMA_2, SMOLLM2, TINYLLAMA, Geometry
from benchmarks.llama_cpp import LLAMA, Peer, find_python
from benchmarks.record import make_record, parser, write_record
from compressor import kernels
from compressor.kernels import blob
from compressor.kernels.linear import linear

BATCHES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
FORMATS = ["sparse24_int4", "int4", "sparse24_int8", "int8", "sparse24"]
BATCHED = ["sparse24_int4", "int4", "sparse24_int8"]  # the arms from LARGE on
LARGE = 16  # from here on arithmetic is the limit, and one layer of a large model is enough
CHUNK_BYTES = {"sparse24_int4": 192, "sparse24_int8": 320, "sparse24": 576, "int4": 256, "int8": 512}
POSITIONS = torch.tensor([i | j << 2 for i in range(4) for j in range(i + 1, 4)], dtype=torch.uint8)
TORCH = "torch bf16"
LAYERS = "sparse24_int4 as one"
"""All layers by one operator, as they are served, with norms, rotary positions and attention to a short context."""


class Arm:
    """One way to run a model's layers; every layer has memory of its own."""

    def __init__(self, name: str, model: Geometry, distinct_bytes: int) -> None:
        self.name = name
        self.model = model
        first = [random_weight(name, *shape, model.group) for shape in model.shapes]
        self.layer_bytes = sum(weight.nbytes for weight in first)
        count = max(1, -(-distinct_bytes // self.layer_bytes)) if distinct_bytes else model.layers
        self.layers = [first] + [[weight.clone() for weight in first] for _ in range(count - 1)]

    def seconds(self, batch: int, layers: int) -> float:
        """Time of one layer, from a pass through up to `layers`."""
        inputs = {columns: torch.randn(batch, columns, dtype=torch.bfloat16) for _, columns in self.model.shapes}
        chosen = self.layers[:layers]
        start = time.perf_counter()
        if self.name == TORCH:
            for layer in chosen:
                for weight, (_, columns) in zip(layer, self.model.shapes, strict=True):
                    F.linear(inputs[columns], weight)
        else:
            for layer in chosen:
                for weight, (_, columns) in zip(layer, self.model.shapes, strict=True):
                    linear(inputs[columns], {blob.NAME: weight})
        return (time.perf_counter() - start) / len(chosen)


class Layers:
    """SmolLM2's layers by `decoder_layers`; every token is a sequence of its own, in its first block of the cache."""

    name = LAYERS

    def __init__(self, model: Geometry) -> None:
        self.arm = Arm("sparse24_int4", model, 0)
        self.layer_bytes = self.arm.layer_bytes
        heads, kv_heads, dim = model.heads, model.kv_heads, model.head_dim
        norm = torch.ones(model.hidden, dtype=torch.bfloat16)
        self.weights = [t for qkv, o, up, down in self.arm.layers for t in (norm, qkv, o, norm, up, down)]
        shape = (max(BATCHES), 16, kv_heads, dim)
        self.caches = [[torch.zeros(shape, dtype=torch.bfloat16) for _ in self.arm.layers] for _ in range(2)]
        self.cos_sin = torch.rand(16, dim)
        # Parts of a layer: norm, qkv, -, -, -, -, o, -, -, norm, up, -, -, down, -, -.
        self.present = sum(1 << part for part in (0, 1, 6, 9, 10, 13))
        self.constants = (heads, model.inner, 1e-5, dim**-0.5)

    def seconds(self, batch: int, layers: int) -> float:
        """Time of one layer, from one call for all of them."""
        x = torch.randn(batch, self.weights[0].shape[0], dtype=torch.bfloat16)
        positions = torch.full((batch,), 15)
        tables = torch.arange(batch, dtype=torch.int32)[:, None]
        starts = torch.arange(batch + 1, dtype=torch.int32)
        lengths = torch.full((batch,), 16, dtype=torch.int32)
        step = (self.cos_sin, positions, tables[:, 0].long() * 16 + 15, tables, starts, lengths)
        start = time.perf_counter()
        torch.ops.halfweight.decoder_layers(x, self.weights, self.present, *self.caches, *step, *self.constants)
        return (time.perf_counter() - start) / len(self.arm.layers)


def random_weight(name: str, rows: int, columns: int, group: int) -> Tensor:
    """A weight of an arm, random without a quantiser's work: speed does not depend on the values."""
    if name == TORCH:
        return torch.randn(rows, columns).to(torch.bfloat16)
    header = blob.Header(name, torch.bfloat16, rows, columns, 0 if name == "sparse24" else group)
    blocks, chunks, size = -(-rows // blob.ROWS), header.in_padded // blob.CHUNK, CHUNK_BYTES[name]
    if name == "sparse24":
        values = torch.randn(blocks, chunks, size // 2, dtype=torch.bfloat16).view(torch.uint8)
    else:
        values = torch.randint(0, 256, (blocks, chunks, size), dtype=torch.uint8)
    if name.startswith("sparse24"):
        pairs = POSITIONS[torch.randint(6, (2, blocks, chunks, 64))]
        values[:, :, :64] = pairs[0] | pairs[1] << 4
    scale = None if name == "sparse24" else torch.rand(rows, columns // group).mul(0.01).to(torch.bfloat16)
    return blob.write(header, values, scale)


def best_seconds(run: Callable[[], object], rounds: int = 5) -> float:
    """The fastest of some calls: what the machine can do."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def read_rate(size: int) -> float:
    """Bytes/s of reading `size` bytes over and over: from memory, or from a cache that holds them."""
    memory = torch.ones(size, dtype=torch.uint8)
    return memory.nbytes / best_seconds(lambda: torch.ops.halfweight.read_bytes(memory), 20)


def machine_rates(bytes_read: int) -> dict[str, float]:
    """Read bandwidth in bytes/s, and multiply-accumulates/s of torch's own bf16 and int8 products."""
    rates = {"read_bytes_per_s": read_rate(bytes_read)}
    left, right = torch.randn(512, 2048).to(torch.bfloat16), torch.randn(2048, 2048).to(torch.bfloat16)
    products = 512 * 2048 * 2048
    rates["bf16_macs_per_s"] = products / best_seconds(lambda: left @ right)
    a, b = left.char(), right.char()
    rates["int8_macs_per_s"] = products / best_seconds(lambda: torch._int_mm(a, b))
    return rates


def measure(
    model: Geometry,
    arms: Sequence[Arm | Layers | Peer],
    batch: int,
    layers: int,
    rounds: int,
    rates: Mapping[str, float],
) -> list[dict[str, Any]]:
    """One row an arm: medians of `rounds` turns after a round that does not count.

    Every other round goes backwards, and a turn begins with a pass that does not count (see throughput.measure).
    """
    times: dict[str, list[float]] = {arm.name: [] for arm in arms}
    for turn in range(rounds + 1):
        for arm in arms if turn % 2 else arms[::-1]:
            arm.seconds(batch, layers)
            seconds = arm.seconds(batch, layers)
            if turn:
                times[arm.name].append(seconds)
    rows = []
    baseline = statistics.median(times[TORCH])
    for arm in arms:
        seconds = statistics.median(times[arm.name])
        macs = model.weights * batch / seconds
        limit = rates["bf16_macs_per_s" if arm.name in (TORCH, "sparse24") else "int8_macs_per_s"]
        rows.append(
            {
                "model": model.name,
                "batch": batch,
                "arm": arm.name,
                "kernel": {TORCH: "oneDNN", LLAMA: "ggml"}.get(arm.name, kernels.isa()),
                "group": {TORCH: None, LLAMA: 32, "sparse24": None, LAYERS: model.group}.get(arm.name, model.group),
                "bits_per_weight": 8 * arm.layer_bytes / model.weights,
                "layer_seconds": seconds,
                "fastest_seconds": min(times[arm.name]),
                "bytes_per_s": arm.layer_bytes / seconds,
                "bandwidth_share": arm.layer_bytes / seconds / rates["read_bytes_per_s"],
                "weights_per_s": model.weights / seconds,
                "macs_per_s": macs,
                "multiply_share": macs / limit,
                "vs_torch_bf16": baseline / seconds,
            }
        )
        print(row_text(rows[-1]), flush=True)
    return rows


HEADER = (
    "model          batch arm                  kernel       bits  ms/layer    GB/s  of read  Gweights/s  GMAC/s"
    "  vs bf16"
)


def row_text(row: Mapping[str, Any]) -> str:
    """A row as a line of the table."""
    return (
        f"{row['model']:14} {row['batch']:5} {row['arm']:20} {row['kernel']:11} {row['bits_per_weight']:5.2f} "
        f"{1e3 * row['layer_seconds']:9.3f} {row['bytes_per_s'] / 1e9:7.1f} {row['bandwidth_share']:7.0%} "
        f"{row['weights_per_s'] / 1e9:11.1f} {row['macs_per_s'] / 1e9:7.0f} {row['vs_torch_bf16']:7.2f}x"
    )


def call_overhead() -> tuple[float, float]:
    """Seconds of a call on a weight so small that nothing else counts, and of torch's own linear of that size."""
    weight = random_weight("sparse24_int4", 16, 32, 32)
    x = torch.ones(1, 32)
    operator = torch.ops.halfweight.linear.default

    plain = torch.ones(16, 32)

    def calls() -> None:
        for _ in range(1000):
            operator(x, weight, None, None, False)

    def torch_calls() -> None:
        for _ in range(1000):
            torch.ops.aten.linear.default(x, plain, None)

    return best_seconds(calls, 20) / 1000, best_seconds(torch_calls, 20) / 1000


def headline(rows: Sequence[Mapping[str, Any]], overheads: tuple[float, float], cached: float) -> dict[str, float]:
    """The issue's numbers; what was not measured is left out. `cached`: bytes/s of reading SmolLM2's layers."""
    by_key = {(row["model"], row["batch"], row["arm"]): row for row in rows}

    def value(field: str, batch: int, arm: str = "sparse24_int4", model: Geometry = LLAMA_2) -> float | None:
        row = by_key.get((model.name, batch, arm))
        return None if row is None else float(row[field])

    def against(arm: str) -> float | None:
        other, own = value("layer_seconds", 1, arm), value("layer_seconds", 1)
        return None if other is None or own is None else other / own

    weights, as_one = (value("weights_per_s", 1, arm, SMOLLM2) for arm in ("sparse24_int4", LAYERS))
    cached_bytes = value("bytes_per_s", 1, LAYERS, SMOLLM2)
    found = {
        "bandwidth_share_b1": value("bandwidth_share", 1),
        "int4_bandwidth_share_b1": value("bandwidth_share", 1, "int4"),
        "vs_torch_bf16_b1": value("vs_torch_bf16", 1),
        "vs_int4_b1": against("int4"),
        "vs_llama_cpp_q4_0_b1": against(LLAMA),
        "vs_torch_bf16_b8": value("vs_torch_bf16", 8),
        "vs_torch_bf16_b512": value("vs_torch_bf16", 512),
        "min_vs_torch_bf16_any_batch": min(
            row["vs_torch_bf16"] for row in rows if row["arm"] == "sparse24_int4" and row["model"] == LLAMA_2.name
        ),
        "int8_vs_torch_bf16_b1": value("vs_torch_bf16", 1, "sparse24_int8"),
        "bf16_vs_torch_bf16_b1": value("vs_torch_bf16", 1, "sparse24"),
        "cached_gweights_per_s": None if as_one is None else as_one / 1e9,
        "cached_gweights_per_s_one_by_one": None if weights is None else weights / 1e9,
        "cached_bandwidth_share": None if cached_bytes is None else cached_bytes / cached,
        "cached_read_gbytes_per_s": cached / 1e9,
        "call_microseconds": 1e6 * overheads[0],
        "torch_call_microseconds": 1e6 * overheads[1],
    }
    return {key: round(number, 4) for key, number in found.items() if number is not None}


def run(arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, float], dict[str, float]]:
    """All rows, the machine's rates, and the headline."""
    quick = arguments.quick
    distinct = 250_000_000 if quick else 1_000_000_000
    rounds = 3 if quick else 9
    rates = machine_rates(distinct)
    print(", ".join(f"{name} {rate / 1e9:.1f} G" for name, rate in rates.items()))
    print(HEADER, flush=True)
    rows: list[dict[str, Any]] = []
    for model in [LLAMA_2] if quick else [LLAMA_2, TINYLLAMA]:
        with ExitStack() as stack, torch.inference_mode():
            names = [TORCH, "sparse24_int4", "int4"] if quick else [TORCH, *FORMATS]
            arms: list[Arm | Layers | Peer] = [Arm(name, model, distinct) for name in names]
            if model is LLAMA_2:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR"))))
                python = find_python(arguments.llama_python)
                if python is not None:
                    peer = Peer(python, LLAMA_2, 3 if quick else 9, folder)
                    stack.callback(peer.close)
                    arms.append(peer)
            for batch in [1, 8, 128] if quick else BATCHES:
                large = batch >= LARGE
                chosen = [arm for arm in arms if not large or arm.name in (TORCH, *BATCHED)]
                layers = max(1, round(1e8 / model.weights)) if large else 10**6
                rows += measure(model, chosen, batch, layers, min(rounds, 5) if large else rounds, rates)
            del arms
    with torch.inference_mode():
        layers_as_one = Layers(SMOLLM2)
        cached: list[Arm | Layers] = [Arm(name, SMOLLM2, 0) for name in (TORCH, "sparse24_int4", "int4")]
        rates["cached_read_bytes_per_s"] = read_rate(layers_as_one.layer_bytes * SMOLLM2.layers)
        print(f"reading SmolLM2's layers again and again: {rates['cached_read_bytes_per_s'] / 1e9:.1f} GB/s")
        for batch in [1] if quick else BATCHES:
            rows += measure(SMOLLM2, [*cached, layers_as_one], batch, SMOLLM2.layers, 2 * rounds, rates)
        rates["cached_read_bytes_per_s"] = max(
            rates["cached_read_bytes_per_s"], read_rate(layers_as_one.layer_bytes * SMOLLM2.layers)
        )
    return rows, rates, headline(rows, call_overhead(), rates["cached_read_bytes_per_s"])


def main(argv: list[str]) -> int:
    """`python -m benchmarks kernels`."""
    own = parser("kernels", "Each kernel's speed against torch's bf16 linear, with the machine's limits beside it.")
    own.add_argument(
        "--llama-python",
        metavar="PYTHON",
        help="a Python that has llama-cpp-python (default: this one)",
    )
    own.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="whose kernels (default: %(default)s)")
    arguments = own.parse_args(argv)
    if arguments.device == "cuda":
        from benchmarks import kernels_cuda

        return kernels_cuda.main(arguments, argv)
    if not kernels.available():
        raise ValueError("the compiled kernels are not installed; install the package with a C++ compiler present")
    print(kernels.describe())
    rows, rates, numbers = run(arguments)
    print(json.dumps(numbers, indent=1))
    if arguments.json:
        record = make_record("kernels", argv, rows, numbers, rates=rates, threads=torch.get_num_threads())
        write_record(arguments.json, record)
    return 0
