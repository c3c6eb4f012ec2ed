"""`python -m benchmarks packing`: a model of 1.1 billion random weights packed with `--one-shot --low-memory`.

Memory is the peak resident set of the whole process above that after its imports, as a share of the dense model's
bytes. Time is compared with what nobody can leave out: reading the dense tensors once, rounding them to nearest, and
writing as many bytes as came out.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import make_record, parser, write_record

TINY_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
_SETTINGS = ["sparsity.criterion=magnitude", "quantization.quantizer=rtn"]
_CHILD = """
import json, sys, time
from pathlib import Path
def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
import compressor.streaming, compressor.preflight
from compressor.recipe import load_recipe
from compressor.models import skeleton
from transformers import AutoModelForCausalLM
import transformers.models.llama.modeling_llama
recipe = load_recipe("one-shot-2of4-int4", json.loads(sys.argv[3]))
imports, start = status("VmRSS"), time.monotonic()
result = compressor.streaming.compress_streaming(sys.argv[1], recipe, sys.argv[2], force=True, report=lambda *_: None)
seconds = time.monotonic() - start
print(json.dumps({"import_bytes": imports, "peak_bytes": status("VmHWM"), "seconds": seconds}))
"""


def main(argv: Sequence[str]) -> int:
    """Makes the model, packs it, measures the floor, writes the record."""
    flags = parser("packing", __doc__.splitlines()[0])
    flags.add_argument("--work", type=Path, required=True, metavar="DIR", help="a folder with 5 GB free")
    options = flags.parse_args(list(argv))
    geometry = TINY_LLAMA | ({"num_hidden_layers": 2} if options.quick else {})
    model, out = options.work / "random", options.work / "random-packed"
    make_random_model(model, geometry)
    row = measure(model, out)
    headline = {
        "pack_peak_rss_share": row["peak_above_imports_bytes"] / row["dense_bytes"],
        "pack_time_over_floor": row["seconds"] / row["floor_seconds"],
    }
    print(
        f"{row['dense_bytes'] / 1e9:.2f} GB -> {row['packed_bytes'] / 1e9:.2f} GB in {row['seconds']:.0f} s, "
        f"{headline['pack_time_over_floor']:.2f} x reading, rounding and writing; peak memory above the imports "
        f"{row['peak_above_imports_bytes'] / 1e6:.0f} MB, {headline['pack_peak_rss_share']:.1%} of the dense model"
    )
    if options.json:
        write_record(options.json, make_record("packing", argv, [row], headline, geometry=geometry))
        print(f"wrote {options.json}")
    return 0


def make_random_model(folder: Path, geometry: dict[str, Any]) -> None:
    """Random bf16 weights, written layer by layer, with a tokenizer file that only has to be there."""
    import torch

    from compressor.checkpoint import ShardWriter

    if folder.is_dir():
        return
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    writer = ShardWriter(part)
    for name, shape in shapes(geometry):
        weight = torch.ones(shape) if len(shape) == 1 else torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02)
        writer.add(name, weight.bfloat16())
    writer.close()
    (part / "config.json").write_text(json.dumps(geometry))
    (part / "tokenizer.json").write_text("{}")
    part.rename(folder)


def shapes(geometry: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of a Llama of this geometry."""
    hidden, inner, vocabulary = geometry["hidden_size"], geometry["intermediate_size"], geometry["vocab_size"]
    narrow = hidden * geometry["num_key_value_heads"] // geometry["num_attention_heads"]
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for index in range(geometry["num_hidden_layers"]):
        block = f"model.layers.{index}"
        for name, shape in (
            ("self_attn.q_proj", (hidden, hidden)),
            ("self_attn.k_proj", (narrow, hidden)),
            ("self_attn.v_proj", (narrow, hidden)),
            ("self_attn.o_proj", (hidden, hidden)),
            ("mlp.gate_proj", (inner, hidden)),
            ("mlp.up_proj", (inner, hidden)),
            ("mlp.down_proj", (hidden, inner)),
        ):
            yield f"{block}.{name}.weight", shape
        yield f"{block}.input_layernorm.weight", (hidden,)
        yield f"{block}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)


def measure(model: Path, out: Path) -> dict[str, Any]:
    """Packs in a process of its own, then measures the floor in this one; a run that was cut short goes on there."""
    kept = out.with_suffix(".json")
    if not kept.is_file():
        command = [sys.executable, "-c", _CHILD, str(model), str(out), json.dumps(_SETTINGS)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise OSError(f"packing failed: {done.stderr[-2000:]}")
        kept.write_text(done.stdout.splitlines()[-1])
    found = json.loads(kept.read_text())
    packed = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    row = {
        "dense_bytes": sum(file.stat().st_size for file in model.glob("*.safetensors")),
        "packed_bytes": packed,
        **found,
        "peak_above_imports_bytes": found["peak_bytes"] - found["import_bytes"],
        "floor_seconds": floor(model, packed),
    }
    kept.unlink()
    return row


def floor(model: Path, packed_bytes: int) -> float:
    """Seconds of reading every dense tensor, rounding the matrices to nearest, and writing the packed bytes."""
    from compressor.checkpoint import Checkpoint
    from compressor.output import sync
    from compressor.quantizers import rtn
    from compressor.scheme import Scheme

    start = time.monotonic()
    checkpoint = Checkpoint.open(model)
    for name in checkpoint.names():
        tensor = checkpoint.tensor(name)
        if tensor.dim() == 2:
            linear = "layers" in name
            rtn(tensor, None, Scheme("int4", 128) if linear else Scheme("int8"))
        checkpoint.close()
    file = model.with_suffix(".written")
    block = bytes(1 << 24)
    with file.open("wb") as target:
        for _ in range(packed_bytes // len(block)):
            target.write(block)
    sync(file)
    file.unlink()
    return time.monotonic() - start
