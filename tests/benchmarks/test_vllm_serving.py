"""`benchmarks serving --runtime vllm` without vLLM: what is measured, what is not measured again, the headline."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import serving, vllm_serving
from benchmarks.consumers import vllm_linears
from benchmarks.record import read_record
from benchmarks.vllm_serving import DENSE, INT4, LARGE, PACKED, SMALL, summarise


def streams(server: str, count: int, gap: float, rate: float, model: str = SMALL) -> dict[str, Any]:
    times = {"inter_token_ms_median": gap, "tokens_per_s": rate}
    return {"model": model, "kind": "streams", "server": server, "streams": count, **times}


def linears(server: str, seconds: float, size: int) -> dict[str, Any]:
    return {"model": SMALL, "kind": "linears", "server": server, "linears_seconds": seconds, "linear_bytes": size}


def test_the_headline_is_ratios_and_leaves_out_what_is_missing() -> None:
    rows = [
        streams(PACKED, 1, 10, 90), streams(DENSE, 1, 25, 40), streams(INT4, 1, 15, 60),
        streams(PACKED, 8, 20, 300), streams(DENSE, 8, 40, 200),
        streams(PACKED, 1, 30, 30, LARGE), streams(DENSE, 1, 120, 8, LARGE),
        linears(PACKED, 1, 10), linears(DENSE, 4, 50), linears(INT4, 2, 16),
        {"model": SMALL, "kind": "quality", "server": PACKED, "perplexity": 11.0, "perplexity_embedded_runtime": 10.0},
    ]  # fmt: skip
    assert summarise(rows) == pytest.approx(
        {
            "vllm_decode_vs_dense_b1": 2.5, "vllm_decode_vs_dense_b1_1b": 4.0, "vllm_vs_stock_int4_b1": 1.5,
            "vllm_streams8_vs_dense": 1.5, "linear_bytes_vs_dense": 0.2, "linear_seconds_vs_dense": 0.25,
            "linear_bytes_vs_stock_int4": 0.625, "vllm_perplexity_vs_embedded": 1.1,
        }
    )  # fmt: skip


def test_only_what_the_record_lacks_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    arms = {PACKED: Path("packed"), DENSE: Path("dense")}
    monkeypatch.setattr(vllm_serving, "linears", lambda model, name, *_: linears(name, 1, 1))
    monkeypatch.setattr(vllm_serving, "quality", lambda *_: pytest.fail("it is there"))
    monkeypatch.setattr(vllm_serving.Server, "start", lambda self: 0.0)
    monkeypatch.setattr(
        vllm_serving,
        "measure",
        lambda servers, rounds, counts: [streams(server.name, counts[0], 1, 1) for server in servers],
    )
    rows = [linears(PACKED, 1, 1), {"model": SMALL, "kind": "quality", "server": PACKED}, streams(PACKED, 1, 1, 1)]
    groups = list(vllm_serving.missing(rows, SMALL, arms, (1, 8), "python", 1))
    found = [[(row["kind"], row["server"], row.get("streams")) for row in group] for group in groups]
    assert found == [
        [("linears", DENSE, None)],
        [("streams", PACKED, 1), ("streams", DENSE, 1)],
        [("streams", PACKED, 8), ("streams", DENSE, 8)],
    ]
    assert list(vllm_serving.missing([*rows, *chain(*groups)], SMALL, arms, (1, 8), "python", 1)) == []


@pytest.mark.parametrize("gpu", [False, True])
def test_servers_share_a_gpu(gpu: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a CPU the flag would stand for the machine's memory."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    command = vllm_serving.server(DENSE, tmp_path, "python", 3).command
    assert command[-3:] == ["--", "--gpu-memory-utilization", "0.30"] if gpu else "--" not in command


def test_a_linears_time_is_until_the_device_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    layer = SimpleNamespace(quant_method=SimpleNamespace(apply=lambda x: done.append(x)))
    vllm_linears._time(layer, [0.0])
    layer.quant_method.apply("cpu")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.synchronize", lambda: done.append("synchronised"))
    layer.quant_method.apply("gpu")
    assert done == ["cpu", "synchronised", "gpu", "synchronised"]


def test_servers_are_stopped_when_the_command_is_told_to_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stopped = []

    def missing(*_: object) -> Iterator[list[dict[str, Any]]]:
        yield [linears(PACKED, 1, 1)]
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            yield [linears(DENSE, 1, 1)]
        finally:
            stopped.append(True)

    monkeypatch.setattr(vllm_serving, "missing", missing)
    before = signal.getsignal(signal.SIGTERM)
    record = tmp_path / "vllm.json"
    command = ["packed", "--runtime", "vllm", "--dense", "dense", "--vllm-python", "python", "--json", str(record)]
    try:
        with pytest.raises(SystemExit) as left:
            serving.main(command)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert left.value.code == 143
    assert stopped == [True]
    assert [row["server"] for row in read_record(record, "serving")["rows"]] == [PACKED]


def test_a_script_that_fails_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad.py").write_text("raise SystemExit('no such model')")
    monkeypatch.setattr(vllm_serving, "_CONSUMERS", tmp_path)
    with pytest.raises(ValueError, match=r"bad.py failed on model: no such model"):
        vllm_serving.consume(sys.executable, "bad.py", tmp_path / "model")
