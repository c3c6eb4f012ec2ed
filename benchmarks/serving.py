"""`python -m benchmarks serving`: many streams over HTTP, ours against llama.cpp's server and vLLM's, and our start.

All servers run at the same time and are asked in turn, the idle ones waiting, each round in another order; every
request has a prompt of its own, so that no cache of earlier prompts helps. All streams begin at once with a prompt of
about 100 words and get 64 tokens; a rate counts those, over the time of the slowest stream, prompts included. A stream
is fair if it does not take much longer than the others.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from benchmarks import http_client
from benchmarks.record import cpu_fields, finish, parser

PACKED, LLAMA, VLLM, VLLM_FLOAT32 = "halfweight", "llama.cpp Q4_0", "vLLM bf16", "vLLM float32"
_PEERS = {"llama_cpp": LLAMA, "vllm_bf16": VLLM, "vllm_float32": VLLM_FLOAT32}
STREAMS = (1, 8, 32)
PROMPT_WORDS, OUTPUT, CONTEXT = 100, 64, 768
LONG_PROMPT, FEW = 512, 8
"""Tokens of the prompt whose first token is timed, and of its answer."""
_START = 900
"""Seconds that a server gets to start; vLLM compiles first."""
_PAUSE = 1.5
"""Seconds before a turn: vLLM's processes spin for one after their last."""
WORDS = ("river", "stone", "window", "paper", "garden", "winter", "letter", "market", "engine", "silver", "bridge")


@dataclass
class Server:
    """One server process and where it listens."""

    name: str
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    words: int = PROMPT_WORDS
    port: int = 0
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> float:
        """Seconds until the first token of the first answer."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [part.replace("{port}", str(self.port)) for part in self.command]
        began = time.monotonic()
        self.process = subprocess.Popen(
            command, env=os.environ | self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while time.monotonic() - began < _START:
            if self.process.poll() is not None:
                raise ValueError(f"{self.name} ended with status {self.process.returncode}: {' '.join(command)}")
            try:
                asyncio.run(self.ask(1, 1, salt=0))
                return time.monotonic() - began
            except ConnectionError:  # not up yet
                time.sleep(0.02)
        raise ValueError(f"{self.name} did not answer within {_START} s: {' '.join(command)}")

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    async def ask(self, streams: int, tokens: int, salt: int, *, prompt: int | None = None) -> list[list[float]]:
        """The times of every token of every stream, in seconds since they were all asked for.

        Args:
            prompt: tokens of a prompt of random ids, in place of words.
        """
        models = await http_client.ask(self.port, "/v1/models")
        if models.status != 200:
            raise ConnectionError(f"{self.name} is not ready: {models.status}")
        model, start = json.loads(models.body)["data"][0]["id"], time.perf_counter()
        bodies = [self._body(model, tokens, salt * 1000 + i, prompt) for i in range(streams)]
        answers = await asyncio.gather(*(http_client.ask(self.port, "/v1/completions", body) for body in bodies))
        return [self._times(answer, start) for answer in answers]

    def _body(self, model: str, tokens: int, seed: int, prompt: int | None) -> dict[str, Any]:
        words = [WORDS[(seed * 7 + i * (1 + seed % 5)) % len(WORDS)] for i in range(self.words)]
        ids = random.Random(seed)
        return {
            "model": model,
            "prompt": [ids.randrange(1000, 20_000) for _ in range(prompt)] if prompt else f"{seed} " + " ".join(words),
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }

    def _times(self, answer: http_client.Answer, start: float) -> list[float]:
        if answer.status == 0 or answer.status >= 500:
            raise ConnectionError(f"{self.name} answered {answer.status}")
        if answer.status != 200:
            raise ValueError(f"{self.name} answered {answer.status}: {answer.body[:200]!r}")
        times = [when - start for when, event in answer.events() if event.get("choices")]
        if not times:
            raise ValueError(f"{self.name} sent no token")
        return times

    def resident_bytes(self) -> int:
        """Resident memory of the process now."""
        assert self.process is not None
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("VmRSS"))


def main(argv: Sequence[str]) -> int:
    """Starts the servers, measures in turn, prints the table, writes the record."""
    options = flags().parse_args(list(argv))
    if options.runtime == "vllm":
        from benchmarks import vllm_serving

        return vllm_serving.main(options, argv)
    rounds = 1 if options.quick else options.rounds
    with ExitStack() as stack:
        headline = measure_start(options.packed)
        servers = [
            Server(
                PACKED, [sys.executable, "-m", "serve", str(options.packed), "--port", "{port}", "--max-num-seqs", "32"]
            )
        ]
        servers += peers(options)
        for server in servers:
            stack.callback(server.stop)
            print(f"{server.name}: first token after {server.start():.1f} s", flush=True)
        rows = measure(servers, rounds)
        rows += measure_first(servers, rounds)
    headline |= summarise(rows)
    finish("serving", argv, rows, headline, options.json)
    return 0


def flags() -> argparse.ArgumentParser:
    """The command's flags."""
    from benchmarks import vllm_serving

    result = parser("serving", __doc__.splitlines()[0])
    result.add_argument("packed", type=Path, metavar="OUT", help="a folder that `compress` made")
    result.add_argument("--gguf", type=Path, metavar="FILE", help="the same model in Q4_0, for llama.cpp")
    result.add_argument("--llama-server", metavar="FILE", help="llama.cpp's server")
    result.add_argument("--dense", type=Path, metavar="DIR", help="the same model, dense, for vLLM")
    result.add_argument("--vllm-python", metavar="PYTHON", help="a Python that has vLLM")
    result.add_argument("--runtime", choices=("torch", "vllm"), default="torch", help="whose server is ours (torch)")
    vllm_serving.add_flags(result.add_argument)
    result.add_argument("--rounds", type=int, default=3, help="rounds (default: %(default)s)")
    return result


def peers(options: argparse.Namespace) -> list[Server]:
    """The servers to compare with; llama.cpp's has as many threads as this machine has cores, vLLM's what it takes.

    Where the processor does not multiply bf16, vLLM is asked in float32 too, which is faster there.
    """
    cores, most = len(os.sched_getaffinity(0)), max(STREAMS)
    found = []
    if options.llama_server and options.gguf:
        sizes = ["-np", str(most), "-c", str(most * CONTEXT), "-t", str(cores), "-tb", str(cores)]
        command = [options.llama_server, "-m", str(options.gguf), "--port", "{port}", *sizes]
        found.append(Server(LLAMA, command))
    if options.vllm_python and options.dense:
        module = [options.vllm_python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(options.dense)]
        sizes = ["--port", "{port}", "--max-model-len", "2048", "--max-num-seqs", str(most)]
        dtypes = {VLLM: "bfloat16"}
        if not {"avx512_bf16", "amx_bf16"} & set(cpu_fields().get("flags", "").split()):
            dtypes[VLLM_FLOAT32] = "float32"
        for name, dtype in dtypes.items():
            found.append(Server(name, [*module, *sizes, "--dtype", dtype], {"VLLM_CPU_KVCACHE_SPACE": "1"}))
    return found


def _in_turn(servers: Sequence[Server], turn: int) -> Iterator[Server]:
    """The servers, in another order each turn, each once those before it have come to rest."""
    for server in servers if turn % 2 else servers[::-1]:
        time.sleep(_PAUSE)
        yield server


def measure_start(packed: Path) -> dict[str, float]:
    """Seconds to the first token with an empty cache and with a warm one; memory beside the weights, before load."""
    found = {}
    with tempfile.TemporaryDirectory() as cache:
        for name in ("cold", "warm"):
            command = [sys.executable, "-m", "serve", str(packed), "--port", "{port}"]
            server = Server(PACKED, command, {"HALFWEIGHT_CACHE": cache})
            found[f"{name}_first_token_s"] = server.start()
            weights = sum(file.stat().st_size for file in packed.glob("*.safetensors"))
            found["rss_over_weights_and_kv_mb"] = (server.resident_bytes() - weights) / 1e6
            server.stop()
        shutil.rmtree(cache, ignore_errors=True)
        Path(cache).mkdir()
    return found


def measure(servers: Sequence[Server], rounds: int, counts: Sequence[int] = STREAMS) -> list[dict[str, Any]]:
    """One row a server and number of streams: medians over rounds, after one that does not count."""
    rows = []
    for streams in counts:
        rates: dict[str, list[float]] = {server.name: [] for server in servers}
        gaps: dict[str, list[float]] = {server.name: [] for server in servers}
        first: dict[str, list[float]] = {server.name: [] for server in servers}
        spread: dict[str, list[float]] = {server.name: [] for server in servers}
        for turn in range(rounds + 1):
            for server in _in_turn(servers, turn):
                times = asyncio.run(server.ask(streams, OUTPUT, salt=100 * streams + turn))
                if turn:
                    rates[server.name].append(streams * OUTPUT / max(stream[-1] for stream in times))
                    gaps[server.name] += [b - a for stream in times for a, b in pairwise(stream)]
                    first[server.name] += [stream[0] for stream in times]
                    ends = [stream[-1] for stream in times]
                    spread[server.name].append(max(ends) / min(ends))
        for server in servers:
            rates_here, gaps_here = rates[server.name], gaps[server.name]
            row = {
                "server": server.name,
                "streams": streams,
                "tokens_per_s": median(rates_here),
                "tokens_per_s_range": [min(rates_here), max(rates_here)],
                "inter_token_ms_median": 1e3 * median(gaps_here),
                "inter_token_ms_p99": 1e3 * quantiles(gaps_here, n=100)[98],
                "ttft_ms_median": 1e3 * median(first[server.name]),
                "slowest_over_fastest_stream": median(spread[server.name]),
                "rounds": rounds,
            }
            rows.append(row)
            print(
                f"{server.name:16} {streams:3} streams {row['tokens_per_s']:8.1f} tokens/s "
                f"({min(rates_here):.0f} to {max(rates_here):.0f})  first {row['ttft_ms_median']:7.0f} ms  "
                f"between {row['inter_token_ms_median']:6.1f} ms, p99 {row['inter_token_ms_p99']:7.1f} ms  "
                f"slowest/fastest {row['slowest_over_fastest_stream']:.2f}",
                flush=True,
            )
    return rows


def measure_first(servers: Sequence[Server], rounds: int) -> list[dict[str, Any]]:
    """One row a server: milliseconds from asking to the first token of a prompt of LONG_PROMPT tokens, alone."""
    times: dict[str, list[float]] = {server.name: [] for server in servers}
    for turn in range(2 * rounds + 1):
        for server in _in_turn(servers, turn):
            found = asyncio.run(server.ask(1, FEW, salt=10_000 + turn, prompt=LONG_PROMPT))
            if turn:
                times[server.name].append(1e3 * found[0][0])
    rows = []
    for name, taken in times.items():
        middle, low, high = median(taken), min(taken), max(taken)
        row = {"server": name, "prompt_tokens": LONG_PROMPT, "ttft_ms_median": middle, "ttft_ms_range": [low, high]}
        rows.append(row)
        print(f"{name:16} first token of {LONG_PROMPT}: {middle:7.0f} ms ({low:.0f} to {high:.0f})", flush=True)
    return rows


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The headline: ratios of medians; what was not measured is left out."""
    rates = {(row["server"], row["streams"]): float(row["tokens_per_s"]) for row in rows if "streams" in row}
    first = {row["server"]: float(row["ttft_ms_median"]) for row in rows if "prompt_tokens" in row}
    found = {
        f"ttft{LONG_PROMPT}_vs_{name}": first[PACKED] / first[peer] for name, peer in _PEERS.items() if peer in first
    }
    for streams in STREAMS:
        for name, peer in _PEERS.items():
            if (peer, streams) in rates:
                found[f"streams{streams}_vs_{name}"] = rates[PACKED, streams] / rates[peer, streams]
    return found
