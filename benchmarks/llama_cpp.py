"""llama.cpp as a peer: a model of known shapes with random Q4_0 weights, run in a process of its own.

It is reached through llama-cpp-python's low-level functions; `LLAMA_CPP_LIB_PATH` points that package at another build.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.geometries import Geometry
from benchmarks.step_process import StepProcess

LLAMA = "llama.cpp Q4_0"

# Runs in the peer's Python: loads the model, then answers every line (a prompt's length, and how many tokens to decode
# after it) with the seconds of the prompt and those of each further token, without sampling.
PEER = """
import sys, time
import llama_cpp as lib
lib.llama_backend_init()
model = lib.llama_model_load_from_file(sys.argv[1].encode(), lib.llama_model_default_params())
wanted = lib.llama_context_default_params()
wanted.n_ctx, wanted.n_batch, wanted.n_ubatch = 2048, 512, 512
wanted.n_threads = wanted.n_threads_batch = int(sys.argv[2])
context = lib.llama_init_from_model(model, wanted)
print("ready", flush=True)

def seconds(count):
    ids = (lib.llama_token * count)(*[7] * count)
    start = time.perf_counter()
    assert lib.llama_decode(context, lib.llama_batch_get_one(ids, count)) == 0
    lib.llama_synchronize(context)
    return time.perf_counter() - start

for line in sys.stdin:
    prompt, tokens = map(int, line.split())
    lib.llama_memory_clear(lib.llama_get_memory(context), True)
    print(seconds(prompt), *[seconds(1) for _ in range(tokens)], flush=True)
"""


def llama_process(python: str, model: Path) -> StepProcess:
    """llama.cpp in a process of its own, with as many threads as torch uses here; times are without sampling."""
    return StepProcess([python, "-c", PEER, str(model), str(torch.get_num_threads())], f"{LLAMA} in {python}")


class Peer:
    """The kernels' arm: a model of random Q4_0 weights and a vocabulary too small to matter."""

    name = LLAMA

    def __init__(self, python: str, model: Geometry, layers: int, folder: Path) -> None:
        self.layers = layers
        path = folder / "peer.gguf"
        self.layer_bytes = write_gguf(path, model, layers)
        self._process = llama_process(python, path)
        self.close = self._process.close

    def seconds(self, batch: int, layers: int) -> float:
        """Time of one layer, attention and norms included."""
        return self._process.answer(batch, 0)[0] / self.layers


def write_gguf(path: Path, model: Geometry, layers: int, vocabulary: int = 256) -> int:
    """A llama model with random Q4_0 linears, its embedding and head in Q8_0; returns a layer's bytes."""
    import gguf

    hidden, inner, keys = model.hidden, model.inner, model.kv_heads * model.head_dim
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(2048)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(model.head_dim)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("no_vocab")
    ones = np.ones(hidden, dtype=np.float32)
    table = np.random.default_rng(0).standard_normal((vocabulary, hidden)).astype(np.float32)
    quantised = gguf.quants.quantize(table, gguf.GGMLQuantizationType.Q8_0)
    for name in ("token_embd", "output"):
        writer.add_tensor(f"{name}.weight", quantised, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("output_norm.weight", ones)
    shapes = {"attn_q": (hidden, hidden), "attn_k": (keys, hidden), "attn_v": (keys, hidden)}
    shapes |= {"attn_output": (hidden, hidden), "ffn_gate": (inner, hidden), "ffn_up": (inner, hidden)}
    shapes |= {"ffn_down": (hidden, inner)}
    linears = {name: random_q4_0(*shape) for name, shape in shapes.items()}
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


def find_python(python: str | None) -> str | None:
    """A Python that has llama_cpp, or None with a line that says why."""
    if python and shutil.which(python) is None:
        raise ValueError(f"--llama-python {python}: no such program; give a Python that has llama-cpp-python")
    python = python or sys.executable
    probe = subprocess.run(
        [python, "-c", "import importlib.util as u; assert u.find_spec('llama_cpp')"], capture_output=True
    )
    if probe.returncode:
        print(f"{LLAMA}: skipped, {python} has no llama_cpp; pip install llama-cpp-python, or give --llama-python")
        return None
    return python
