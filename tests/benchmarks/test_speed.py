"""Throughput and serving: engines answer with times, servers are asked over HTTP, headlines are ratios."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from benchmarks import http_client, serving, throughput
from benchmarks.step_process import StepProcess, engine_process


def test_an_engine_in_its_own_process_answers_with_times(tiny_compressed: Path) -> None:
    engine = engine_process(tiny_compressed)
    try:
        assert len(engine.answer(12, 0)) == 1
        times = engine.answer(12, 4)
        assert len(times) == 5 and all(time > 0 for time in times)
        assert 0 < engine.ask("native 12 8")[0] < 1
    finally:
        engine.close()


def test_a_process_that_does_not_load_is_named() -> None:
    with pytest.raises(ValueError, match="the peer could not be loaded: it said nothing"):
        StepProcess([sys.executable, "-c", "print('no')"], "the peer")
    with pytest.raises(ValueError, match="the peer could not be loaded: no such model"):
        StepProcess([sys.executable, "-c", "raise SystemExit('no such model')"], "the peer")


def test_a_server_is_started_and_asked(tiny_compressed: Path) -> None:
    command = [sys.executable, "-m", "serve", str(tiny_compressed), "--port", "{port}", "--kv-cache-gb", "0.01"]
    server = serving.Server("tiny", command, words=4)
    try:
        assert server.start() > 0
        streams = asyncio.run(server.ask(3, 5, salt=1))
        assert len(streams) == 3 and all(1 <= len(times) <= 5 and times == sorted(times) for times in streams)
        assert server.resident_bytes() > 1e7
    finally:
        server.stop()
    with pytest.raises(ValueError, match="gone ended with status 3"):
        serving.Server("gone", [sys.executable, "-c", "raise SystemExit(3)"]).start()


def test_headlines_are_ratios_of_what_was_measured() -> None:
    rows = [
        {
            "model": "SmolLM2-135M",
            "arm": throughput.PACKED,
            "decode_tokens_per_s": 180.0,
            "prefill_tokens_per_s": 1200.0,
        },
        {"model": "SmolLM2-135M", "arm": throughput.LLAMA, "decode_tokens_per_s": 90.0, "prefill_tokens_per_s": 300.0},
    ]
    found = throughput.summarise(rows)
    assert found == {"decode_vs_llama_cpp_q4_0": 2.0, "prefill_vs_llama_cpp_q4_0": 4.0}
    served = [{"server": serving.PACKED, "streams": 8, "tokens_per_s": 300.0}]
    served += [{"server": serving.LLAMA, "streams": 8, "tokens_per_s": 100.0}]
    served += [{"server": serving.PACKED, "prompt_tokens": 512, "ttft_ms_median": 50.0}]
    served += [{"server": serving.VLLM, "prompt_tokens": 512, "ttft_ms_median": 200.0}]
    assert serving.summarise(served) == {"streams8_vs_llama_cpp": 3.0, "ttft512_vs_vllm_bf16": 0.25}


def test_events_and_their_times_out_of_raw_bytes() -> None:
    """Framing cut anywhere: an event counts when its last byte has come."""
    events = [b'data: {"n": 1}\n\n', b": comment\n\n", b'data: {"n": 2}\n\ndata: {"n": 3}\n\n', b"data: [DONE]\n\n"]
    framed = b"".join(b"%x\r\n%s\r\n" % (len(event), event) for event in events) + b"0\r\n\r\n"
    raw = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + framed
    for size in (1, 7, 50, len(raw)):
        parts = [(float(at + size), raw[at : at + size]) for at in range(0, len(raw), size)]
        answer = http_client.Answer(parts)
        assert (answer.status, answer.body) == (200, b"".join(events))
        found = answer.events()
        assert [event["n"] for _, event in found] == [1, 2, 3]
        place = raw.index(b'{"n": 1}') + 8
        assert place <= found[0][0] <= place + 20 + size
    plain = http_client.Answer([(0.0, b"HTTP/1.1 503 Busy\r\nContent-Length: 2\r\n\r\nno")])
    assert (plain.status, plain.body, plain.events()) == (503, b"no", [])
    assert http_client.Answer().status == 0
