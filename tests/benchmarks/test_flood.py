"""The flood: what it counts, and a short one of many clients on a small queue."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks import flood

RECORDS = Path(flood.__file__).parent / "results"
CACHE_MB = 0.2 * 2**30 / 1e6  # of the records


def recorded(name: str) -> dict[str, float]:
    figures: dict[str, float] = json.loads((RECORDS / name).read_text())["headline"]
    return figures


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
    assert flood.faults(0, state.different, figures, 4, 0.02 * 2**30 / 1e6) == []


def test_an_answer_that_changes_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    async def answered(port: int, body: dict[str, object]) -> tuple[str, str]:
        return ("200", "b") if body["stream"] else ("429", "")

    monkeypatch.setattr(flood, "answer_of", answered)
    state = flood.Flood(0, [{}], ["a"])
    assert asyncio.run(state.ask(0, True, 1)) == "200"
    assert asyncio.run(state.ask(0, False, 1)) == "429"
    assert state.different == 1


@pytest.mark.parametrize("name", ["flood.json", "flood-avx2.json"])
def test_the_records_are_without_fault(name: str) -> None:
    assert flood.faults(0, 0, recorded(name), 600, CACHE_MB) == []


@pytest.mark.parametrize(
    ("name", "more", "fault"),
    [
        ("rss_peak_mb", 60, "memory grew by 257 MB, of which the cache is 215"),
        ("rss_slope_mb_per_minute", 2, "memory went on growing, by 3.4 MB a minute"),
        ("requests_left", 1, "1 requests left"),
        ("blocks_left", 3, "3 cache blocks left"),
    ],
)
def test_what_is_left_or_grows_is_a_fault(name: str, more: float, fault: str) -> None:
    figures = recorded("flood.json")
    assert flood.faults(0, 0, figures | {name: figures[name] + more}, 600, CACHE_MB) == [fault]


def test_wrong_answers_are_faults() -> None:
    assert flood.faults(1, 2, recorded("flood.json"), 600, CACHE_MB) == ["1 wrong statuses", "2 different answers"]


def test_memory_may_grow_while_the_cache_fills() -> None:
    figures = recorded("flood.json") | {"rss_slope_mb_per_minute": 100.0}
    assert flood.faults(0, 0, figures, 30, CACHE_MB) == []
    assert flood.faults(0, 0, figures, 30, CACHE_MB / 2) == ["memory grew by 197 MB, of which the cache is 107"]


@pytest.mark.parametrize(("grown", "status"), [(0, 0), (60, 1)])
def test_the_exit_status_tells_of_memory(
    grown: float, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @contextmanager
    def served(model: Path, flags: Sequence[str]) -> Iterator[tuple[int, int]]:
        yield 0, 0

    async def flooded(*_arguments: object) -> tuple[flood.Flood, dict[str, float]]:
        figures = recorded("flood.json")
        return flood.Flood(0, []), figures | {"rss_peak_mb": figures["rss_peak_mb"] + grown}

    monkeypatch.setattr(flood, "served", served)
    monkeypatch.setattr(flood, "flood", flooded)
    assert flood.main(["model"]) == status
    assert ("error: memory grew" in capsys.readouterr().err) == bool(status)


def test_slope_is_of_the_line_that_fits_best() -> None:
    assert flood.slope_per_minute([(0, 5.0), (30, 6.0), (60, 7.0)]) == pytest.approx(2)
    assert flood.slope_per_minute([(0, 5.0), (30, 8.0), (60, 5.0)]) == pytest.approx(0)
