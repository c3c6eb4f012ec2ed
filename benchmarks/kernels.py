"""Every kernel against torch's bf16 linear: time, bytes and multiplications a second, per model, batch and format.

A measurement is one pass through the linears of a transformer's layers (q/k/v and gate/up fused, as they are served).
At small batches the layers make 1 GB of distinct weights, more than any cache holds; SmolLM2's 30 layers fit the cache
and are measured there. Arms take turns, round after round, and a figure is the median of its rounds; the machine's read
bandwidth and multiply rates are measured first and again with every batch, so that a noisy machine shows.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

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
TORCH, LLAMA = "torch bf16", "llama.cpp Q4_0"

# Runs in the peer's Python: loads the model, then answers every line (a number of tokens) with the seconds of a step.
PEER = """
import sys, time
import llama_cpp as lib
lib.llama_backend_init()
model = lib.llama_model_load_from_file(sys.argv[1].encode(), lib.llama_model_default_params())
wanted = lib.llama_context_default_params()
wanted.n_ctx, wanted.n_batch, wanted.n_ubatch = 1024, 512, 512
wanted.n_threads = wanted.n_threads_batch = int(sys.argv[2])
context = lib.llama_init_from_model(model, wanted)
print("ready", flush=True)
for line in sys.stdin:
    ids = (lib.llama_token * int(line))(*[7] * int(line))
    lib.llama_memory_clear(lib.llama_get_memory(context), True)
    start = time.perf_counter()
    assert lib.llama_decode(context, lib.llama_batch_get_one(ids, int(line))) == 0
    lib.llama_synchronize(context)
    print(time.perf_counter() - start, flush=True)
"""


@dataclass(frozen=True)
class Model:
    """The linears of one layer as (out_features, in_features)."""

    name: str
    layers: int
    group: int
    shapes: tuple[tuple[int, int], ...]

    @property
    def weights(self) -> int:
        """Weights of a layer."""
        return sum(rows * columns for rows, columns in self.shapes)


LLAMA_2 = Model("Llama-2-7B", 32, 128, ((12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)))
TINYLLAMA = Model("TinyLlama-1.1B", 22, 128, ((2560, 2048), (2048, 2048), (11264, 2048), (2048, 5632)))
SMOLLM2 = Model("SmolLM2-135M", 30, 64, ((960, 576), (576, 576), (3072, 576), (576, 1536)))


class Arm:
    """One way to run a model's layers; every layer has memory of its own."""

    def __init__(self, name: str, model: Model, distinct_bytes: int) -> None:
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


class Peer:
    """llama.cpp in a process of its own, on a model of Llama-2-7B's shapes with random Q4_0 weights."""

    name = LLAMA

    def __init__(self, python: str, folder: Path, layers: int) -> None:
        self.layers = layers
        path = folder / "peer.gguf"
        self.layer_bytes = write_gguf(path, LLAMA_2, layers)
        self.process = subprocess.Popen(
            [python, "-c", PEER, str(path), str(torch.get_num_threads())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        if self._line() != "ready":
            raise ValueError(f"{python} could not load the model of {LLAMA}")

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def seconds(self, batch: int, layers: int) -> float:
        """Time of one layer, attention and norms included."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{batch}\n")
        self.process.stdin.flush()
        return float(self._line()) / self.layers

    def close(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.wait()


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


def write_gguf(path: Path, model: Model, layers: int) -> int:
    """A llama model with random Q4_0 linears and a vocabulary too small to matter; returns a layer's bytes."""
    import gguf

    hidden, inner = model.shapes[1][0], model.shapes[3][1]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(1024)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(32)
    writer.add_head_count_kv(32)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(hidden // 32)
    writer.add_vocab_size(256)
    writer.add_tokenizer_model("no_vocab")
    ones = np.ones(hidden, dtype=np.float32)
    table = np.random.default_rng(0).standard_normal((256, hidden)).astype(np.float16)
    for name in ("token_embd", "output"):
        writer.add_tensor(f"{name}.weight", table)
    writer.add_tensor("output_norm.weight", ones)
    square, up, down = (random_q4_0(*shape) for shape in ((hidden, hidden), (inner, hidden), (hidden, inner)))
    linears = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), square)
    linears |= {"ffn_gate": up, "ffn_up": up, "ffn_down": down}
    for layer in range(layers):
        writer.add_tensor(f"blk.{layer}.attn_norm.weight", ones)
        writer.add_tensor(f"blk.{layer}.ffn_norm.weight", ones)
        for name, data in linears.items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", data, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sum(data.nbytes for data in linears.values())


def random_q4_0(rows: int, columns: int) -> np.ndarray[Any, Any]:
    """[rows, columns / 32 * 18] bytes: blocks of an fp16 scale and 32 nibbles."""
    data = np.random.default_rng(1).integers(0, 256, (rows, columns // 32, 18), dtype=np.uint8)
    data[:, :, :2] = np.frombuffer(np.float16(0.01).tobytes(), dtype=np.uint8)
    return data.reshape(rows, -1)


def best_seconds(run: Callable[[], object], rounds: int = 5) -> float:
    """The fastest of some calls: what the machine can do."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def machine_rates(bytes_read: int) -> dict[str, float]:
    """Read bandwidth in bytes/s, and multiply-accumulates/s of torch's own bf16 and int8 products."""
    memory = torch.ones(bytes_read, dtype=torch.uint8)
    rates = {"read_bytes_per_s": memory.nbytes / best_seconds(lambda: torch.ops.halfweight.read_bytes(memory))}
    left, right = torch.randn(512, 2048).to(torch.bfloat16), torch.randn(2048, 2048).to(torch.bfloat16)
    products = 512 * 2048 * 2048
    rates["bf16_macs_per_s"] = products / best_seconds(lambda: left @ right)
    a, b = left.char(), right.char()
    rates["int8_macs_per_s"] = products / best_seconds(lambda: torch._int_mm(a, b))
    return rates


def measure(
    model: Model, arms: Sequence[Arm | Peer], batch: int, layers: int, rounds: int, rates: Mapping[str, float]
) -> list[dict[str, Any]]:
    """One row an arm: the arms in turn, `rounds` times after one that does not count; medians."""
    times: dict[str, list[float]] = {arm.name: [] for arm in arms}
    for turn in range(rounds + 1):
        for arm in arms:
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
                "group": {TORCH: None, LLAMA: 32, "sparse24": None}.get(arm.name, model.group),
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
    "model          batch arm             kernel       bits  ms/layer    GB/s  of read  Gweights/s  GMAC/s  vs bf16"
)


def row_text(row: Mapping[str, Any]) -> str:
    """A row as a line of the table."""
    return (
        f"{row['model']:14} {row['batch']:5} {row['arm']:15} {row['kernel']:11} {row['bits_per_weight']:5.2f} "
        f"{1e3 * row['layer_seconds']:9.3f} {row['bytes_per_s'] / 1e9:7.1f} {row['bandwidth_share']:7.0%} "
        f"{row['weights_per_s'] / 1e9:11.1f} {row['macs_per_s'] / 1e9:7.0f} {row['vs_torch_bf16']:7.2f}x"
    )


def call_overhead() -> float:
    """Seconds of an operator call on a weight so small that nothing else counts, less torch's own smallest linear."""
    weight = random_weight("sparse24_int4", 16, 32, 32)
    x = torch.ones(1, 32)
    operator = torch.ops.halfweight.linear.default

    def calls() -> None:
        for _ in range(1000):
            operator(x, weight, None, None, False)

    return best_seconds(calls, 20) / 1000


def headline(rows: Sequence[Mapping[str, Any]], overhead: float) -> dict[str, float]:
    """The issue's numbers; what was not measured is left out."""
    by_key = {(row["model"], row["batch"], row["arm"]): row for row in rows}

    def value(field: str, batch: int, arm: str = "sparse24_int4", model: Model = LLAMA_2) -> float | None:
        row = by_key.get((model.name, batch, arm))
        return None if row is None else float(row[field])

    def against(arm: str) -> float | None:
        other, own = value("layer_seconds", 1, arm), value("layer_seconds", 1)
        return None if other is None or own is None else other / own

    weights = value("weights_per_s", 1, model=SMOLLM2)
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
        "cached_gweights_per_s": None if weights is None else weights / 1e9,
        "call_microseconds": 1e6 * overhead,
    }
    return {key: round(number, 4) for key, number in found.items() if number is not None}


def llama_arm(python: str | None, folder: Path, layers: int) -> Peer | None:
    """The peer, or None with a line that says why."""
    python = python or sys.executable
    probe = subprocess.run(
        [python, "-c", "import importlib.util as u; assert u.find_spec('llama_cpp')"], capture_output=True
    )
    if probe.returncode:
        print(f"{LLAMA}: skipped, {python} has no llama_cpp; pip install llama-cpp-python, or give --llama-python")
        return None
    return Peer(python, folder, layers)


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
            arms: list[Arm | Peer] = [Arm(name, model, distinct) for name in names]
            if model is LLAMA_2:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR"))))
                peer = llama_arm(arguments.llama_python, folder, 3 if quick else 9)
                if peer is not None:
                    stack.callback(peer.close)
                    arms.append(peer)
            for batch in [1, 8, 128] if quick else BATCHES:
                large = batch >= LARGE
                chosen = [arm for arm in arms if not large or arm.name in (TORCH, *BATCHED)]
                layers = max(1, round(1e8 / model.weights)) if large else 10**6
                rows += measure(model, chosen, batch, layers, min(rounds, 5) if large else rounds, rates)
            del arms
    with torch.inference_mode():
        cached = [Arm(name, SMOLLM2, 0) for name in (TORCH, "sparse24_int4", "int4")]
        for batch in [1] if quick else BATCHES:
            rows += measure(SMOLLM2, cached, batch, SMOLLM2.layers, 2 * rounds, rates)
    return rows, rates, headline(rows, call_overhead())


def main(argv: list[str]) -> int:
    """`python -m benchmarks kernels`."""
    own = parser("kernels", "Each kernel's speed against torch's bf16 linear, with the machine's limits beside it.")
    own.add_argument(
        "--llama-python",
        metavar="PYTHON",
        help="a Python that has llama-cpp-python (default: this one)",
    )
    arguments = own.parse_args(argv)
    if not kernels.available():
        raise ValueError("the compiled kernels are not installed; install the package with a C++ compiler present")
    print(kernels.describe())
    rows, rates, numbers = run(arguments)
    print(json.dumps(numbers, indent=1))
    if arguments.json:
        record = make_record("kernels", argv, rows, numbers, rates=rates, threads=torch.get_num_threads())
        write_record(arguments.json, record)
    return 0
