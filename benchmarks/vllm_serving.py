"""`python -m benchmarks serving OUT --runtime vllm`: compressed against dense and stock int4, all in vLLM itself.

The arms are vLLM's own servers with the same flags, started by our launcher; only the folder differs. They run side by
side, sharing a GPU where there is one, and are asked in turn, the idle ones waiting. Dense is bf16, and float32 too (by
`--dtype`) where the processor does not multiply bf16, for it is faster there.

The rows of a ratio are a group, which is written as soon as it is measured and not measured again, so the command may
be interrupted and repeated; a group that lacks an arm is measured again as a whole, in place of its old rows. `linears`
rows come from a process that times every linear of a decode step, for where vLLM's own time per step hides them; dense
is bf16 alone there. The `quality` row holds the losses of the same windows of held-out text in vLLM and in the embedded
runtime.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from benchmarks.measure import QualitySettings, in_own_process
from benchmarks.record import make_record, read_record, write_record
from benchmarks.serving import STREAMS, VLLM_FLOAT32, Server, measure, peers

PACKED, DENSE, INT4 = "vLLM + halfweight", "vLLM dense bf16", "vLLM stock int4"
FLOAT32 = "vLLM dense float32"
SMALL, LARGE = "SmolLM2-135M", "TinyLlama-1.1B"
_CONSUMERS = Path(__file__).parent / "consumers"
_SETTINGS = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
_MEMORY = 0.9
"""Of a GPU, for all servers that lie on it together; by itself each would take nearly all."""
_DECODED = 32
_TEXT = QualitySettings(max_tokens=16 * 512)
Rows = list[dict[str, Any]]


def add_flags(add: Callable[..., Any]) -> None:
    """The flags that only `--runtime vllm` takes."""
    add("--int4", type=Path, metavar="DIR", help="vllm: the same model by `compress export`, for stock vLLM")
    add("--one-b", type=Path, metavar="OUT", help="vllm: a packed model of TinyLlama-1.1B's shapes")
    add("--one-b-dense", type=Path, metavar="DIR", help="vllm: dense weights of the same shapes")
    add("--one-b-int4", type=Path, metavar="DIR", help="vllm: the same in int4, for stock vLLM")


def main(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """Measures what the record lacks, and writes it after every group of rows."""
    if not options.vllm_python or not options.dense:
        raise ValueError("--runtime vllm needs --vllm-python (a Python that has vLLM and halfweight) and --dense")
    signal.signal(signal.SIGTERM, _leave)
    rounds = 1 if options.quick else options.rounds
    rows: Rows = read_record(options.json, "serving")["rows"] if options.json and options.json.is_file() else []
    models: dict[str, tuple[dict[str, Path | None], tuple[int, ...]]] = {
        SMALL: ({PACKED: options.packed, DENSE: options.dense, INT4: options.int4}, STREAMS)
    }
    if options.one_b:
        models[LARGE] = ({PACKED: options.one_b, DENSE: options.one_b_dense, INT4: options.one_b_int4}, (1,))
    float32 = wants_float32(options)
    for model, (given, streams) in models.items():
        if float32:
            given[FLOAT32] = given[DENSE]
        arms = {name: folder for name, folder in given.items() if folder is not None}
        for group in missing(rows, model, arms, streams, options.vllm_python, rounds):
            replace_group(rows, group)
            _write(options.json, argv, rows)
    headline = summarise(rows)
    for key, value in headline.items():
        print(f"{key:34} {value:.3f}")
    return 0


def wants_float32(options: argparse.Namespace) -> bool:
    """Whether dense float32 is an arm: where `peers` asks vLLM for it, unless a GPU computes."""
    return not torch.cuda.is_available() and VLLM_FLOAT32 in {peer.name for peer in peers(options)}


def replace_group(rows: Rows, group: Rows) -> None:
    """Puts a group in place of its rows of earlier sessions, those of arms that are not given now too."""

    def place(row: Mapping[str, Any]) -> tuple[Any, ...]:
        return row["model"], row["kind"], row.get("streams")

    new = {place(row) for row in group}
    rows[:] = [row for row in rows if place(row) not in new] + group


def _leave(*_: object) -> None:
    raise SystemExit(143)  # on the way out the servers are stopped


def _write(file: Path | None, argv: Sequence[str], rows: Rows) -> None:
    if file:
        write_record(file, make_record("serving", argv, rows, summarise(rows)))


def missing(rows: Rows, model: str, arms: Mapping[str, Path], streams: Sequence[int], python: str, rounds: int) -> Any:
    """Yields the groups that the record lacks a row of, whole; the servers of a model start only where it does."""

    def has(name: str, **wanted: Any) -> bool:
        return any((wanted | {"model": model, "server": name}).items() <= row.items() for row in rows)

    timed = {name: folder for name, folder in arms.items() if name != FLOAT32}  # the script takes the folder's dtype
    if not all(has(name, kind="linears") for name in timed):
        yield [linears(model, name, folder, python) for name, folder in timed.items()]
    if model == SMALL and not has(PACKED, kind="quality"):
        yield [quality(model, arms[PACKED], python)]
    wanted = [count for count in streams if not all(has(name, kind="streams", streams=count) for name in arms)]
    if not wanted:
        return
    with ExitStack() as stack:
        servers = [server(name, folder, python, len(arms)) for name, folder in arms.items()]
        for each in servers:
            stack.callback(each.stop)
            print(f"{model}, {each.name}: first token after {each.start():.0f} s", flush=True)
        for count in wanted:
            yield [{"model": model, "kind": "streams"} | row for row in measure(servers, rounds, (count,))]


def server(name: str, folder: Path, python: str, arms: int) -> Server:
    """vLLM's server for a folder, with the flags that all arms share, and its part of the memory of a GPU."""
    sizes = ["--max-model-len", "2048", "--max-num-seqs", str(max(STREAMS)), "--no-prefix-caching"]
    command = [python, "-m", "serve", str(folder.resolve()), "--runtime", "vllm", "--port", "{port}", *sizes]
    if name == FLOAT32:
        command += ["--dtype", "float32"]
    if torch.cuda.is_available():
        command += ["--", "--gpu-memory-utilization", f"{_MEMORY / arms:.2f}"]
    return Server(name, command, _SETTINGS)


def linears(model: str, name: str, folder: Path, python: str) -> dict[str, Any]:
    """The row of one arm's linears: seconds of all of them in a decode step of one stream, and their bytes."""
    found = consume(python, "vllm_linears.py", folder, _DECODED)
    share = found["linears_seconds"] / found["step_seconds"]
    print(
        f"{model}, {name}: {1e3 * found['linears_seconds']:.1f} of {1e3 * found['step_seconds']:.1f} ms a step are "
        f"linears ({share:.0%}), {found['linear_bytes'] / 1e6:.1f} MB",
        flush=True,
    )
    return {"model": model, "kind": "linears", "server": name, **found}


def quality(model: str, folder: Path, python: str) -> dict[str, Any]:
    """The row of the packed model's losses in vLLM and in the embedded runtime, and of their difference, in nats."""
    own = in_own_process("perplexity", folder, _TEXT)
    losses = consume(python, "vllm_losses.py", folder, windows=_windows(folder))
    gaps = [theirs - ours for theirs, ours in zip(losses, own["window_nll"], strict=True)]
    row = {
        "model": model, "kind": "quality", "server": PACKED, "tokens": own["tokens"], "windows": len(gaps),
        "perplexity": math.exp(mean(losses)), "perplexity_embedded_runtime": own["perplexity"],
        "nll_above_embedded": mean(gaps), "nll_above_embedded_stderr": stdev(gaps) / math.sqrt(len(gaps)),
    }  # fmt: skip
    print(
        f"{model}: perplexity {row['perplexity']:.2f} in vLLM, {own['perplexity']:.2f} in the embedded runtime; "
        f"{1e3 * row['nll_above_embedded']:+.2f} ± {1e3 * row['nll_above_embedded_stderr']:.2f} thousandths of a nat",
        flush=True,
    )
    return row


def _windows(folder: Path) -> list[list[int]]:
    from benchmarks.texts import read_windows
    from compressor.models import load_tokenizer

    found = read_windows(
        _TEXT.text,
        load_tokenizer(folder),
        window=_TEXT.window,
        max_tokens=_TEXT.max_tokens,
        wikitext=_TEXT.wikitext,
    )
    return found.tokens.tolist()


def consume(python: str, script: str, folder: Path, *extra: object, windows: Any = None) -> Any:
    """What a script of `consumers` writes about a folder."""
    with tempfile.TemporaryDirectory() as place:
        given, out = Path(place) / "windows.json", Path(place) / "out.json"
        given.write_text(json.dumps(windows))
        files = [str(out)] if windows is None else [str(given), str(out)]
        command = [python, str(_CONSUMERS / script), str(folder.resolve()), *files, *map(str, extra)]
        # As many threads as vLLM's server has, which leaves a core to its scheduler.
        threads = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) - 1))}
        settings = os.environ | _SETTINGS | threads
        done = subprocess.run(command, env=settings, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ValueError(f"{script} failed on {folder.name}: {(done.stderr or done.stdout)[-1500:]}")
        return json.loads(out.read_text())


def summarise(rows: Rows) -> dict[str, float]:
    """The headline: ratios of medians; what was not measured is left out.

    The dense of a ratio is the faster one of its group; in `linears` rows, which have no float32, that is bf16.
    """
    found: dict[str, float] = {}

    def ratio(key: str, field: str, over: str, *, inverse: bool = False, **wanted: Any) -> None:
        measured = {row["server"]: row[field] for row in rows if wanted.items() <= row.items()}
        better = max if field == "tokens_per_s" else min
        ours = measured.get(PACKED)
        names = (DENSE, FLOAT32) if over == DENSE else (over,)
        theirs = better((measured[name] for name in names if name in measured), default=None)
        if ours and theirs:
            found[key] = theirs / ours if inverse else ours / theirs

    gap = "inter_token_ms_median"
    ratio("vllm_decode_vs_dense_b1", gap, DENSE, inverse=True, model=SMALL, kind="streams", streams=1)
    ratio("vllm_decode_vs_dense_b1_1b", gap, DENSE, inverse=True, model=LARGE, kind="streams", streams=1)
    ratio("vllm_vs_stock_int4_b1", gap, INT4, inverse=True, model=SMALL, kind="streams", streams=1)
    ratio("vllm_vs_stock_int4_b1_1b", gap, INT4, inverse=True, model=LARGE, kind="streams", streams=1)
    for count in STREAMS[1:]:
        ratio(f"vllm_streams{count}_vs_dense", "tokens_per_s", DENSE, model=SMALL, kind="streams", streams=count)
    for key, model in (("", SMALL), ("_1b", LARGE)):
        ratio(f"linear_bytes_vs_dense{key}", "linear_bytes", DENSE, model=model, kind="linears")
        ratio(f"linear_seconds_vs_dense{key}", "linears_seconds", DENSE, model=model, kind="linears")
        ratio(f"linear_bytes_vs_stock_int4{key}", "linear_bytes", INT4, model=model, kind="linears")
    for row in rows:
        if row["kind"] == "quality":
            found["vllm_perplexity_vs_embedded"] = row["perplexity"] / row["perplexity_embedded_runtime"]
    return found
