"""`python -m benchmarks flood MODEL`: many clients at once, a third of which hang up, for as long as you like.

The server runs under --deterministic, so each answer that arrives whole must be the one that a client alone got before.
Afterwards nothing may be left: no running request, no cache block; and memory must not have grown beyond what the
cache and full batches take, nor have gone on growing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.record import make_record, parser, write_record

PROMPTS, LONGEST_PROMPT, LONGEST_ANSWER = 24, 120, 32  # the longest ones in words and in tokens
WORDS = ("river", "stone", "window", "paper", "garden", "winter", "letter", "market", "engine", "silver", "bridge")
HANG_UP, STREAMED = 1 / 3, 0.6
RETRY_SECONDS = 0.5  # after a 429
SPARE_MB = 40
"""What memory may grow by beside the cache, for connections and full batches. It was 35 in both records, of ten minutes
with SmolLM2 (`flood.json`, `flood-avx2.json`): of 197 and 196, as of the cache's 215 up to 53 were in use before."""
SETTLED_SECONDS, MB_PER_MINUTE = 600, 3
"""From the records' length on the cache is full in the second half. The most that memory may then grow by is twice what
it did in one record; in the other, with as many requests, it grew by nothing."""


@dataclass
class Flood:
    """What the clients saw."""

    port: int
    bodies: list[dict[str, Any]]
    expected: list[str] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)
    different: int = 0

    async def client(self, number: int, end: float) -> None:
        rng = random.Random(number)
        while time.monotonic() < end:
            index = rng.randrange(len(self.bodies))
            left = end - time.monotonic()  # at the end everybody hangs up
            patience = min(rng.random() * 2, left) if rng.random() < HANG_UP else left
            outcome = await self.ask(index, rng.random() < STREAMED, patience)
            self.seen[outcome] += 1
            if outcome == "429":
                await asyncio.sleep(RETRY_SECONDS * (0.5 + rng.random()))

    async def ask(self, index: int, stream: bool, patience: float) -> str:
        """The status of one request, "hung up" when `patience` was over before its end."""
        try:
            async with asyncio.timeout(patience):
                status, text = await answer_of(self.port, self.bodies[index] | {"stream": stream})
        except TimeoutError:
            return "hung up"
        except OSError as error:
            return type(error).__name__
        if status == "200" and text != self.expected[index]:
            self.different += 1
        return status


async def answer_of(port: int, body: dict[str, Any]) -> tuple[str, str]:
    """Status and text of one answer, whole or streamed; the connection is cut if this is cancelled."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        data = json.dumps(body).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: flood\r\nConnection: close\r\nContent-Length: "
        writer.write(f"{head}{len(data)}\r\n\r\n".encode() + data)
        await writer.drain()
        raw = (await reader.read()).decode()
    finally:
        writer.close()
    status = raw.split(" ", 2)[1] if raw else "nothing"
    if status != "200":
        return status, ""
    if not body["stream"]:
        return status, json.loads(raw[raw.index("{") : raw.rindex("}") + 1])["choices"][0]["text"]
    events = re.findall(r"^data: (\{.*\})\r?$", raw, re.MULTILINE)
    if "data: [DONE]" not in raw:
        return "cut short", ""
    return status, "".join(json.loads(event)["choices"][0]["text"] for event in events)


async def gauges(port: int) -> dict[str, float]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: flood\r\nConnection: close\r\n\r\n")
    text = (await reader.read()).decode()
    writer.close()
    return {name: float(value) for name, value in re.findall(r"^([a-z:_]+)\{[^,}]*\} (\S+)$", text, re.MULTILINE)}


async def sample(process: psutil.Process, end: float) -> list[tuple[float, float]]:
    """(seconds, MB of resident memory), twice a second."""
    began, found = time.monotonic(), []
    while time.monotonic() < end:
        found.append((time.monotonic() - began, process.memory_info().rss / 1e6))
        await asyncio.sleep(0.5)
    return found


def slope_per_minute(points: Sequence[tuple[float, float]]) -> float:
    """Least squares, in MB a minute."""
    mean_x, mean_y = (sum(column) / len(points) for column in zip(*points, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return 60 * sum((x - mean_x) * (y - mean_y) for x, y in points) / spread


async def flood(
    port: int, pid: int, clients: int, seconds: float, words: int = LONGEST_PROMPT
) -> tuple[Flood, dict[str, float]]:
    """First every prompt alone, then all clients at once; figures are of the server. `words`: of the longest prompt."""
    process = psutil.Process(pid)
    rng = random.Random(0)
    state = Flood(port, [_body(rng, words) for _ in range(PROMPTS)])
    state.expected = [(await answer_of(port, body | {"stream": False}))[1] for body in state.bodies]
    before = process.memory_info().rss / 1e6
    end = time.monotonic() + seconds
    async with asyncio.TaskGroup() as group:
        sampling = group.create_task(sample(process, end))
        for number in range(clients):
            group.create_task(state.client(number, end))
    memory = sampling.result()
    await asyncio.sleep(2)
    left = await gauges(port)
    late = [point for point in memory if point[0] > seconds / 2]
    return state, {
        "rss_before_mb": before,
        "rss_peak_mb": max(rss for _, rss in memory),
        "rss_after_mb": process.memory_info().rss / 1e6,
        "rss_slope_mb_per_minute": slope_per_minute(late),
        "descriptors_left": process.num_fds(),
        "threads_left": process.num_threads(),
        "requests_left": left["vllm:num_requests_running"] + left["vllm:num_requests_waiting"],
        "blocks_left": left["halfweight:kv_blocks_used"],
        "generated_tokens": left["vllm:generation_tokens_total"],
    }


def _body(rng: random.Random, longest: int) -> dict[str, Any]:
    prompt = " ".join(rng.choice(WORDS) for _ in range(rng.randint(5, longest)))
    return {"prompt": prompt, "max_tokens": rng.randint(1, LONGEST_ANSWER), "temperature": 0, "ignore_eos": True}


@contextmanager
def served(model: Path, flags: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Port and process id of a server."""
    command = [sys.executable, "-m", "serve", str(model), "--port", "0", "--deterministic", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if found := re.search(r"url\s+http://[^:]+:(\d+)", line):
                yield int(found[1]), process.pid
                break
        else:
            raise ValueError(f"the server did not start: {' '.join(command)}")
    finally:
        process.terminate()
        process.wait(60)
        process.stdout.close()


def faults(wrong: int, different: int, figures: Mapping[str, float], seconds: float, cache_mb: float) -> list[str]:
    """What must not be, after a flood of `seconds` on a cache of `cache_mb`; nothing where all is well."""
    grown, slope = figures["rss_peak_mb"] - figures["rss_before_mb"], figures["rss_slope_mb_per_minute"]
    found = {
        f"{wrong} wrong statuses": wrong > 0,
        f"{different} different answers": different > 0,
        f"{figures['requests_left']:.0f} requests left": figures["requests_left"] > 0,
        f"{figures['blocks_left']:.0f} cache blocks left": figures["blocks_left"] > 0,
        f"memory grew by {grown:.0f} MB, of which the cache is {cache_mb:.0f}": grown > cache_mb + SPARE_MB,
        f"memory went on growing, by {slope:.1f} MB a minute": seconds >= SETTLED_SECONDS and slope > MB_PER_MINUTE,
    }
    return [text for text, holds in found.items() if holds]


def main(argv: list[str]) -> int:
    flags = parser("flood", "Many clients at once, a third hanging up: errors, leaks, memory, wrong answers.")
    flags.add_argument("model", type=Path, help="folder to serve")
    flags.add_argument("--minutes", type=float, default=10, metavar="M")
    flags.add_argument("--clients", type=int, default=500, metavar="N")
    flags.add_argument(
        "--max-queue", type=int, default=256, metavar="N", help="of the server; beyond it there are 429s"
    )
    flags.add_argument(
        "--kv-cache-gb",
        type=float,
        default=0.2,
        metavar="GB",
        help="of the server: so small that all of it is soon in use, for its pages count once they are (0.2)",
    )
    options: argparse.Namespace = flags.parse_args(argv)
    seconds = 30.0 if options.quick else 60 * options.minutes
    given = ["--max-queue", str(options.max_queue), "--kv-cache-gb", str(options.kv_cache_gb), "--max-model-len", "512"]
    with served(options.model, given) as (port, pid):
        state, figures = asyncio.run(flood(port, pid, options.clients, seconds))
    wrong = sum(count for outcome, count in state.seen.items() if outcome not in ("200", "429", "hung up"))
    headline = {"wrong_statuses": wrong, "different_answers": state.different, **figures}
    rows = [{"outcome": outcome, "count": count} for outcome, count in state.seen.most_common()]
    for name, value in [*((row["outcome"], row["count"]) for row in rows), *headline.items()]:
        print(f"{name:24} {value:10.1f}" if isinstance(value, float) else f"{name:24} {value:10}")
    if options.json:
        write_record(options.json, make_record("flood", argv, rows, headline, clients=options.clients, seconds=seconds))
    found = faults(wrong, state.different, figures, seconds, options.kv_cache_gb * 2**30 / 1e6)
    for text in found:
        print(f"error: {text}", file=sys.stderr)
    return 1 if found else 0
