"""Prometheus metrics, under vLLM's names where the meaning is the same, so that its dashboards work."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field

from serve.engine.async_encoder import AsyncEncoder, Job
from serve.engine.async_engine import AsyncEngine, Request
from serve.engine.llm_engine import StepOutput

SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Value = tuple[str, str, str, float]
"""Name, kind, what it is, and the value."""


@dataclass
class Histogram:
    buckets: tuple[float, ...] = SECONDS
    counts: list[int] = field(init=False)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.buckets) + 1)

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.buckets, value)] += 1
        self.total += value

    def lines(self, name: str, labels: str) -> list[str]:
        out, seen = [], 0
        for bound, count in zip((*map(str, self.buckets), "+Inf"), self.counts, strict=True):
            seen += count
            out.append(f'{name}_bucket{{{labels},le="{bound}"}} {seen}')
        return [*out, f"{name}_count{{{labels}}} {seen}", f"{name}_sum{{{labels}}} {self.total}"]


class Metrics:
    def __init__(self, engine: AsyncEngine, model_name: str) -> None:
        self._engine = engine
        self._labels = _labels(model_name)
        self._finished: Counter[str] = Counter()
        self._latest: dict[int, float] = {}
        self.time_to_first_token = Histogram()
        self.inter_token_latency = Histogram()
        self.request_latency = Histogram()
        engine.on_output = self.observe

    def observe(self, request: Request, output: StepOutput) -> None:
        now = time.perf_counter()
        if output.tokens:
            before = self._latest.get(output.seq_id)
            if before is None:
                self.time_to_first_token.observe(now - request.arrival)
            else:
                self.inter_token_latency.observe(now - before)
            self._latest[output.seq_id] = now
        if output.finish_reason is not None:
            self._finished[output.finish_reason] += 1
            self.request_latency.observe(now - request.arrival)
            self._latest.pop(output.seq_id, None)

    def forget(self, request: Request) -> None:
        """The request ended before its answers did."""
        self._finished["abort"] += request.unfinished
        request.unfinished = 0
        for seq_id in request.seq_ids:
            self._latest.pop(seq_id, None)

    def render(self) -> str:
        engine, stats = self._engine.engine, self._engine.engine.stats
        blocks = engine.blocks
        values: list[Value] = [
            ("vllm:num_requests_running", "gauge", "Sequences being computed.", self._engine.num_running),
            ("vllm:num_requests_waiting", "gauge", "Sequences waiting.", self._engine.num_waiting),
            ("vllm:kv_cache_usage_perc", "gauge", "Share of KV blocks in use.", blocks.num_used / blocks.num_blocks),
            ("vllm:prompt_tokens_total", "counter", "Prompt tokens computed.", stats.prompt_tokens),
            ("vllm:generation_tokens_total", "counter", "Tokens generated.", stats.generated_tokens),
            ("vllm:num_preemptions_total", "counter", "Preemptions.", engine.scheduler.num_preemptions),
            ("vllm:prefix_cache_queries_total", "counter", "Tokens looked up.", blocks.prefix_queries),
            ("vllm:prefix_cache_hits_total", "counter", "Tokens found.", blocks.prefix_hits),
            ("vllm:spec_decode_num_draft_tokens_total", "counter", "Tokens guessed ahead.", stats.drafted_tokens),
            ("vllm:spec_decode_num_accepted_tokens_total", "counter", "Right guesses.", stats.accepted_tokens),
            ("halfweight:engine_steps_total", "counter", "Engine steps.", stats.steps),
            ("halfweight:kv_blocks_used", "gauge", "KV blocks in use.", blocks.num_used),
            ("halfweight:weight_bytes", "gauge", "Bytes of weights in memory.", engine.weight_bytes),
        ]
        histograms = {
            "vllm:time_to_first_token_seconds": self.time_to_first_token,
            "vllm:inter_token_latency_seconds": self.inter_token_latency,
            "vllm:e2e_request_latency_seconds": self.request_latency,
        }
        return _text(self._labels, values, self._finished, ("stop", "length", "abort", "error"), histograms)


class EncoderMetrics:
    """Of a server whose model answers whole: a class, or a vector."""

    def __init__(self, engine: AsyncEncoder, model_name: str) -> None:
        self._engine = engine
        self._labels = _labels(model_name)
        self._finished: Counter[str] = Counter()
        self.request_latency = Histogram()

    def observe(self, job: Job, finish_reason: str) -> None:
        self._finished[finish_reason] += 1
        if finish_reason == "stop":
            self.request_latency.observe(time.perf_counter() - job.arrival)

    def render(self) -> str:
        engine, stats = self._engine.engine, self._engine.stats
        values: list[Value] = [
            ("vllm:num_requests_running", "gauge", "Sequences being computed.", self._engine.num_running),
            ("vllm:num_requests_waiting", "gauge", "Sequences waiting.", self._engine.num_waiting),
            ("vllm:prompt_tokens_total", "counter", "Prompt tokens computed.", stats.prompt_tokens),
            ("halfweight:computed_tokens_total", "counter", "Tokens computed with padding.", stats.computed_tokens),
            ("halfweight:engine_steps_total", "counter", "Batches computed.", stats.steps),
            ("halfweight:weight_bytes", "gauge", "Bytes of weights in memory.", engine.weight_bytes),
        ]
        histograms = {"vllm:e2e_request_latency_seconds": self.request_latency}
        return _text(self._labels, values, self._finished, ("stop", "abort"), histograms)


def _text(
    labels: str,
    values: list[Value],
    finished: Counter[str],
    reasons: tuple[str, ...],
    histograms: dict[str, Histogram],
) -> str:
    lines: list[str] = []
    for name, kind, text, value in values:
        lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}", f"{name}{{{labels}}} {value}"]
    name = "vllm:request_success_total"
    lines += [f"# HELP {name} Answers by how they ended.", f"# TYPE {name} counter"]
    lines += [f'{name}{{{labels},finished_reason="{reason}"}} {finished[reason]}' for reason in reasons]
    for name, histogram in histograms.items():
        lines += [f"# TYPE {name} histogram", *histogram.lines(name, labels)]
    return "\n".join(lines) + "\n"


def _labels(model_name: str) -> str:
    return f'model_name="{_escaped(model_name)}"'


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
