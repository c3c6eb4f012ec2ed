"""The flood: what it counts, and a short one of many clients on a small queue."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from benchmarks import flood


def test_many_clients_leave_nothing_behind(tiny_compressed: Path) -> None:
    """Whole answers equal those of a client alone, refusals are 429s, and those who hang up hold no block."""
    flags = ["--max-queue", "4", "--max-num-seqs", "4", "--kv-cache-gb", "0.02", "--max-model-len", "512"]
    with flood.served(tiny_compressed, flags) as (port, pid):
        state, figures = asyncio.run(flood.flood(port, pid, clients=40, seconds=4, words=30))
    assert set(state.seen) == {"200", "429", "hung up"}
    assert state.different == 0 and all(state.expected)
    assert figures["requests_left"] == 0 == figures["blocks_left"]
    assert figures["generated_tokens"] > state.seen["200"]
    assert figures["rss_peak_mb"] >= figures["rss_before_mb"] > 10


def test_an_answer_that_changes_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    async def answered(port: int, body: dict[str, object]) -> tuple[str, str]:
        return ("200", "b") if body["stream"] else ("429", "")

    monkeypatch.setattr(flood, "answer_of", answered)
    state = flood.Flood(0, [{}], ["a"])
    assert asyncio.run(state.ask(0, True, 1)) == "200"
    assert asyncio.run(state.ask(0, False, 1)) == "429"
    assert state.different == 1


def test_slope_is_of_the_line_that_fits_best() -> None:
    assert flood.slope_per_minute([(0, 5.0), (30, 6.0), (60, 7.0)]) == pytest.approx(2)
    assert flood.slope_per_minute([(0, 5.0), (30, 8.0), (60, 5.0)]) == pytest.approx(0)
