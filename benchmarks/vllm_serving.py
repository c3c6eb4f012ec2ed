"""`python -m benchmarks serving OUT --runtime vllm`: compressed against dense bf16 and stock int4, all in vLLM itself.

The arms are vLLM's own servers with the same flags, started by our launcher; only the folder differs. They run side by
side and are asked in turn, the idle ones waiting. A row is written as soon as it is measured and not measured again, so
the command may be interrupted and repeated. `linears` rows come from a process that times every linear of a decode
step, for where vLLM's own time per step hides them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.record import make_record, read_record, write_record
from benchmarks.serving import STREAMS, Server, measure

PACKED, DENSE, INT4 = "vLLM + halfweight", "vLLM dense bf16", "vLLM stock int4"
SMALL, LARGE = "SmolLM2-135M", "TinyLlama-1.1B"
_PROFILE = Path(__file__).parent / "consumers" / "vllm_linears.py"
_DECODED = 32
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
    rounds = 1 if options.quick else options.rounds
    rows: Rows = read_record(options.json, "serving")["rows"] if options.json and options.json.is_file() else []
    models: dict[str, tuple[dict[str, Path | None], tuple[int, ...]]] = {
        SMALL: ({PACKED: options.packed, DENSE: options.dense, INT4: options.int4}, STREAMS)
    }
    if options.one_b:
        models[LARGE] = ({PACKED: options.one_b, DENSE: options.one_b_dense, INT4: options.one_b_int4}, (1,))
    for model, (given, streams) in models.items():
        arms = {name: folder for name, folder in given.items() if folder is not None}
        for group in missing(rows, model, arms, streams, options.vllm_python, rounds):
            rows += group
            _write(options.json, argv, rows)
    headline = summarise(rows)
    for key, value in headline.items():
        print(f"{key:34} {value:.3f}")
    return 0


def _write(file: Path | None, argv: Sequence[str], rows: Rows) -> None:
    if file:
        write_record(file, make_record("serving", argv, rows, summarise(rows)))


def missing(rows: Rows, model: str, arms: Mapping[str, Path], streams: Sequence[int], python: str, rounds: int) -> Any:
    """Yields the groups of rows that the record lacks; the servers of a model start only where one does."""

    def has(name: str, **wanted: Any) -> bool:
        return any((wanted | {"model": model, "server": name}).items() <= row.items() for row in rows)

    for name, folder in arms.items():
        if not has(name, kind="linears"):
            yield [linears(model, name, folder, python)]
    wanted = [count for count in streams if not all(has(name, kind="streams", streams=count) for name in arms)]
    if not wanted:
        return
    with ExitStack() as stack:
        servers = [server(name, folder, python) for name, folder in arms.items()]
        for each in servers:
            stack.callback(each.stop)
            print(f"{model}, {each.name}: first token after {each.start():.0f} s", flush=True)
        for count in wanted:
            yield [{"model": model, "kind": "streams"} | row for row in measure(servers, rounds, (count,))]


def server(name: str, folder: Path, python: str) -> Server:
    """vLLM's server for a folder, with the flags that all arms share."""
    sizes = ["--max-model-len", "2048", "--max-num-seqs", str(max(STREAMS)), "--no-prefix-caching"]
    command = [python, "-m", "serve", str(folder.resolve()), "--runtime", "vllm", "--port", "{port}", *sizes]
    return Server(name, command, {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"})


def linears(model: str, name: str, folder: Path, python: str) -> dict[str, Any]:
    """The row of one arm's linears: seconds of all of them in a decode step of one stream, and their bytes."""
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "linears.json"
        settings = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
        command = [python, str(_PROFILE), str(folder.resolve()), str(out), str(_DECODED)]
        done = subprocess.run(command, env=settings, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ValueError(f"{_PROFILE.name} failed on {folder.name}: {(done.stderr or done.stdout)[-1500:]}")
        found = json.loads(out.read_text())
    share = found["linears_seconds"] / found["step_seconds"]
    print(
        f"{model}, {name}: {1e3 * found['linears_seconds']:.1f} of {1e3 * found['step_seconds']:.1f} ms a step are "
        f"linears ({share:.0%}), {found['linear_bytes'] / 1e6:.1f} MB",
        flush=True,
    )
    return {"model": model, "kind": "linears", "server": name, **found}


def summarise(rows: Rows) -> dict[str, float]:
    """The headline: ratios of medians; what was not measured is left out."""
    found: dict[str, float] = {}

    def ratio(key: str, field: str, over: str, *, inverse: bool = False, **wanted: Any) -> None:
        ours, theirs = (
            next((row[field] for row in rows if (wanted | {"server": name}).items() <= row.items()), None)
            for name in (PACKED, over)
        )
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
    return found
