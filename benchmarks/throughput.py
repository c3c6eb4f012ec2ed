"""`python -m benchmarks throughput`: one stream, our runtime against llama.cpp and against our own dense bf16.

All arms stay loaded, each in a process of its own, and take turns. Ours are timed with scheduling and sampling,
llama.cpp without sampling. `--one-b` adds a model of TinyLlama-1.1B's shapes with random weights: a packed folder
that `python -m benchmarks packing` leaves in its work folder; llama.cpp gets Q4_0 weights of the same shapes.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.geometries import TINYLLAMA
from benchmarks.llama_cpp import LLAMA, find_python, llama_process, write_gguf
from benchmarks.record import finish, parser
from benchmarks.step_process import StepProcess, engine_process
from compressor.checkpoint import write_manifest

PACKED, DENSE, SLORB = "halfweight sparse24_int4", "halfweight dense bf16", "halfweight sparse24_int4 + SLoRB"
PREFILL, PROMPT, OUTPUT = 512, 128, 128


def main(argv: Sequence[str]) -> int:
    """Loads the arms, measures in turn, prints the table, writes the record."""
    options = flags().parse_args(list(argv))
    rounds = 2 if options.quick else options.rounds
    if options.one_b and not (options.one_b / "config.json").is_file():  # before the small model's rounds, not after
        raise ValueError(f"--one-b {options.one_b} is no folder that `compress` made")
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        python = find_python(options.llama_python)
        arms = {PACKED: engine_process(options.packed)}
        if options.dense:
            arms[DENSE] = engine_process(options.dense)
        if options.slorb:
            arms[SLORB] = engine_process(options.slorb)
        if python and options.gguf:
            arms[LLAMA] = llama_process(python, options.gguf)
        for arm in arms.values():
            stack.callback(arm.close)
        rows += measure("SmolLM2-135M", arms, rounds)
        share = arms[PACKED].ask(f"native {PROMPT} {OUTPUT}")[0]
        print(f"outside of the model's operators: {share:.1%} of a decode step")
        stack.close()
        if options.one_b:
            rows += measure("TinyLlama-1.1B", large_arms(options, python, Path(folder), stack), max(2, rounds // 2))
    headline = summarise(rows) | {"python_share_of_step": share}
    finish("throughput", argv, rows, headline, options.json)
    return 0


def flags() -> argparse.ArgumentParser:
    """The command's flags."""
    result = parser("throughput", __doc__.splitlines()[0])
    result.add_argument("packed", type=Path, metavar="OUT", help="SmolLM2-135M as `compress` made it")
    result.add_argument("--dense", type=Path, metavar="DIR", help="the same model, dense")
    result.add_argument("--slorb", type=Path, metavar="OUT", help="the same model with a low-rank branch")
    result.add_argument("--gguf", type=Path, metavar="FILE", help="the same model in Q4_0, for llama.cpp")
    result.add_argument("--llama-python", metavar="PYTHON", help="a Python that has llama-cpp-python")
    result.add_argument("--one-b", type=Path, metavar="OUT", help="a packed model of TinyLlama-1.1B's shapes")
    result.add_argument("--rounds", type=int, default=7, help="rounds (default: %(default)s)")
    return result


def large_arms(options: argparse.Namespace, python: str | None, folder: Path, stack: ExitStack) -> dict[str, Any]:
    """The arms of the large model; random weights have no tokenizer, so it gets the small model's."""
    model = folder / "packed"
    shutil.copytree(options.one_b, model, symlinks=False)
    for file in options.packed.glob("tokenizer*"):
        shutil.copy(file, model)
    write_manifest(model)
    arms = {PACKED: engine_process(model)}
    if python:
        gguf = folder / "one-b.gguf"
        write_gguf(gguf, TINYLLAMA, TINYLLAMA.layers, TINYLLAMA.vocabulary)
        arms[LLAMA] = llama_process(python, gguf)
    for arm in arms.values():
        stack.callback(arm.close)
    return arms


def measure(model: str, arms: Mapping[str, StepProcess], rounds: int) -> list[dict[str, Any]]:
    """One row an arm: medians over rounds, after a round that does not count.

    Every other round goes backwards, and each turn begins with a prompt that does not count: whoever comes after an arm
    that leaves its threads spinning, or the caches full, would pay for it (up to 40 % of a prompt's speed, measured).
    """
    prefill: dict[str, list[float]] = {name: [] for name in arms}
    decode: dict[str, list[float]] = {name: [] for name in arms}
    first: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds + 1):
        for name, arm in list(arms.items())[:: 1 if turn % 2 else -1]:
            arm.answer(PREFILL, 0)
            long, short = arm.answer(PREFILL, 0), arm.answer(PROMPT, OUTPUT)
            if turn:
                prefill[name].append(PREFILL / long[0])
                first[name].append(long[0])
                decode[name].append(OUTPUT / sum(short[1:]))
    rows = []
    for name in arms:
        rows.append(
            {
                "model": model,
                "arm": name,
                "decode_tokens_per_s": median(decode[name]),
                "decode_range": [min(decode[name]), max(decode[name])],
                "prefill_tokens_per_s": median(prefill[name]),
                "prefill_range": [min(prefill[name]), max(prefill[name])],
                "ttft_512_seconds": median(first[name]),
                "rounds": rounds,
            }
        )
        row = rows[-1]
        print(
            f"{model:15} {name:33} decode {row['decode_tokens_per_s']:7.1f} tokens/s "
            f"({min(decode[name]):.1f} to {max(decode[name]):.1f})  "
            f"prefill {row['prefill_tokens_per_s']:6.0f} tokens/s "
            f"({min(prefill[name]):.0f} to {max(prefill[name]):.0f})",
            flush=True,
        )
    return rows


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The headline: ratios of medians; what was not measured is left out."""
    by_key = {(row["model"], row["arm"]): row for row in rows}

    def ratio(field: str, over: str, model: str = "SmolLM2-135M", of: str = PACKED) -> float | None:
        ours, theirs = by_key.get((model, of)), by_key.get((model, over))
        return None if ours is None or theirs is None else float(ours[field] / theirs[field])

    found = {
        "decode_vs_llama_cpp_q4_0": ratio("decode_tokens_per_s", LLAMA),
        "decode_vs_dense_bf16": ratio("decode_tokens_per_s", DENSE),
        "prefill_vs_llama_cpp_q4_0": ratio("prefill_tokens_per_s", LLAMA),
        "prefill_vs_dense_bf16": ratio("prefill_tokens_per_s", DENSE),
        "decode_slorb_vs_plain": ratio("decode_tokens_per_s", PACKED, of=SLORB),
        "decode_1b_vs_llama_cpp_q4_0": ratio("decode_tokens_per_s", LLAMA, "TinyLlama-1.1B"),
    }
    return {name: value for name, value in found.items() if value is not None}
