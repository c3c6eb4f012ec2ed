"""`benchmarks serving --runtime vllm` without vLLM: what is measured, what is not measured again, the headline."""

from __future__ import annotations

import json
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
from benchmarks.vllm_serving import DENSE, FLOAT32, INT4, LARGE, PACKED, SMALL, summarise


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


def test_dense_is_the_faster_of_its_dtypes() -> None:
    rows = [
        streams(PACKED, 1, 10, 90), streams(DENSE, 1, 45, 13), streams(FLOAT32, 1, 30, 30),
        streams(PACKED, 8, 20, 300), streams(DENSE, 8, 60, 40), streams(FLOAT32, 8, 40, 150),
        streams(PACKED, 32, 20, 300), streams(DENSE, 32, 60, 100), streams(FLOAT32, 32, 40, 75),
        linears(PACKED, 1, 10), linears(DENSE, 4, 50),
    ]  # fmt: skip
    assert summarise(rows) == pytest.approx(
        {
            "vllm_decode_vs_dense_b1": 3.0, "vllm_streams8_vs_dense": 2.0, "vllm_streams32_vs_dense": 3.0,
            "linear_bytes_vs_dense": 0.2, "linear_seconds_vs_dense": 0.25,
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
        [("linears", PACKED, None), ("linears", DENSE, None)],
        [("streams", PACKED, 1), ("streams", DENSE, 1)],
        [("streams", PACKED, 8), ("streams", DENSE, 8)],
    ]
    assert list(vllm_serving.missing([*rows, *chain(*groups)], SMALL, arms, (1, 8), "python", 1)) == []


@pytest.fixture
def untrapped() -> Iterator[None]:
    """The command's handler of SIGTERM is gone afterwards."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


COMMAND = ["packed", "--runtime", "vllm", "--dense", "dense", "--vllm-python", "python"]


@pytest.mark.usefixtures("untrapped")
def test_a_group_measured_again_takes_the_place_of_its_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of two sessions, one on a machine that was twice as fast, no ratio takes rows of both."""
    record = tmp_path / "vllm.json"
    kept = [
        {"model": SMALL, "kind": "quality", "server": PACKED, "perplexity": 11.0, "perplexity_embedded_runtime": 10.0}
    ]
    kept += [streams(PACKED, 1, 30, 30, LARGE), streams(DENSE, 1, 120, 8, LARGE)]
    old = [linears(PACKED, 1, 10), linears(DENSE, 4, 50)]
    old += [streams(name, count, gap, 1) for count in serving.STREAMS for name, gap in ((PACKED, 5), (DENSE, 12))]
    record.write_text(json.dumps({"name": "serving", "rows": [*old, *kept]}))
    monkeypatch.setattr(vllm_serving, "wants_float32", lambda _: False)
    monkeypatch.setattr(
        vllm_serving, "linears", lambda model, name, *_: linears(name, {PACKED: 2, DENSE: 8}.get(name, 4), 1)
    )
    monkeypatch.setattr(vllm_serving.Server, "start", lambda self: 0.0)
    gaps = {PACKED: 10, DENSE: 25, INT4: 15}
    monkeypatch.setattr(
        vllm_serving,
        "measure",
        lambda servers, rounds, counts: [streams(each.name, counts[0], gaps[each.name], 2) for each in servers],
    )
    assert serving.main([*COMMAND, "--int4", "int4", "--json", str(record)]) == 0
    found = read_record(record, "serving")
    assert found["rows"][: len(kept)] == kept
    rows = [(row["kind"], row["server"], row.get("streams")) for row in found["rows"][len(kept) :]]
    assert rows == [
        *[("linears", name, None) for name in gaps],
        *[("streams", name, count) for count in serving.STREAMS for name in gaps],
    ]
    ratios = {"vllm_decode_vs_dense_b1": 2.5, "vllm_vs_stock_int4_b1": 1.5, "linear_seconds_vs_dense": 0.25}
    assert {key: found["headline"][key] for key in ratios} == ratios


@pytest.mark.usefixtures("untrapped")
@pytest.mark.parametrize(
    ("flags", "gpu", "float32"),
    [("avx2", False, True), ("avx2 avx512_bf16", False, False), ("amx_bf16", False, False), ("avx2", True, False)],
)
def test_dense_is_float32_too_where_nothing_multiplies_bf16(
    flags: str, gpu: bool, float32: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, dict[str, Path]] = {}
    monkeypatch.setattr(serving, "cpu_fields", lambda: {"flags": flags})
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    monkeypatch.setattr(vllm_serving, "missing", lambda rows, model, arms, *_: asked.update({model: dict(arms)}) or [])
    assert serving.main([*COMMAND, "--one-b", "large", "--one-b-dense", "large-dense"]) == 0
    dense = [DENSE, *[FLOAT32] * float32]
    assert asked == {
        SMALL: {PACKED: Path("packed")} | dict.fromkeys(dense, Path("dense")),
        LARGE: {PACKED: Path("large")} | dict.fromkeys(dense, Path("large-dense")),
    }


def test_float32_is_the_same_server_with_another_dtype(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    command = vllm_serving.server(DENSE, tmp_path, "python", 3).command
    assert vllm_serving.server(FLOAT32, tmp_path, "python", 3).command == [*command, "--dtype", "float32"]
    monkeypatch.setattr(vllm_serving, "linears", lambda model, name, *_: linears(name, 1, 1))
    arms = {name: tmp_path for name in (PACKED, DENSE, FLOAT32)}
    [group] = vllm_serving.missing([], LARGE, arms, (), "python", 1)
    assert [row["server"] for row in group] == [PACKED, DENSE]


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


@pytest.mark.usefixtures("untrapped")
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
    record = tmp_path / "vllm.json"
    with pytest.raises(SystemExit) as left:
        serving.main([*COMMAND, "--json", str(record)])
    assert left.value.code == 143
    assert stopped == [True]
    assert [row["server"] for row in read_record(record, "serving")["rows"]] == [PACKED]


def test_a_script_that_fails_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad.py").write_text("raise SystemExit('no such model')")
    monkeypatch.setattr(vllm_serving, "_CONSUMERS", tmp_path)
    with pytest.raises(ValueError, match=r"bad.py failed on model: no such model"):
        vllm_serving.consume(sys.executable, "bad.py", tmp_path / "model")
