"""`serve OUT --runtime vllm` as a user starts it: vLLM's server behind our gate, its flags, its own load generator."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from compressor.scheme import Scheme
from serve.engine.llm_engine import LLMEngine
from serve.engine.sampling_params import SamplingParams
from tests.serve.test_clients import LM_EVAL, TASK, accuracies, questions
from tests.serve.test_clients import environment as clients
from tests.vllm.conftest import ROOT
from tests.vllm.models import pack, write_model

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]
KEY = "secret"
INT4 = Scheme("sparse24_int4", 32)
PROMPT = [40, 41, 42, 43, 44]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("served")
    return pack(write_model("llama", place / "dense"), place / "packed", INT4)


@contextmanager
def server(python: str, folder: Path, *flags: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The URL and process of `serve FOLDER --runtime vllm ...`, once it is healthy."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python, "-m", "serve", str(folder), "--runtime", "vllm", "--port", str(port), *flags]
    log = folder.parent / "server.log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, cwd=ROOT, env=environment())
    try:
        end = time.monotonic() + 240
        while not healthy(f"http://127.0.0.1:{port}"):
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def environment() -> dict[str, str]:
    return os.environ | {"HALFWEIGHT_API_KEY": KEY, "VLLM_NO_USAGE_STATS": "1"}


def healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.HTTPError:
        return False


def own_tokens(folder: Path, count: int) -> list[int]:
    """What the embedded runtime answers to PROMPT."""
    engine = LLMEngine.from_folder(folder, dtype="float32", kv_cache_gb=0.02, compile=False)
    settings = SamplingParams(max_tokens=count, temperature=0, ignore_eos=True)
    [answer] = engine.generate([PROMPT], settings)
    return list(answer.token_ids)


def test_the_server_that_a_user_gets(vllm_python: str, folder: Path, tmp_path: Path) -> None:
    flags = ["--dtype", "float32", "--max-model-len", "128", "--eager"]
    flags += ["--served-model-name", "tiny", "--max-body-mb", "1"]
    with server(vllm_python, folder, *flags, "--", "--max-num-batched-tokens", "128", "--seed", "7") as (url, process):
        with httpx.Client(base_url=url, timeout=60) as anyone:
            for route in ("/v1/models", "/tokenize", "/invocations", "/metrics", "/version"):
                assert anyone.post(route, json={}).status_code == 401, route
        with httpx.Client(base_url=url, timeout=60, headers={"Authorization": f"Bearer {KEY}"}) as user:
            assert user.get("/v1/models").json()["data"][0]["id"] == "tiny"
            asked: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
            answer = user.post("/v1/completions", json=asked | {"ignore_eos": True, "return_token_ids": True}).json()
            # The first token rests on no other: later ones may differ where two are about as likely.
            assert answer["choices"][0]["token_ids"][0] == own_tokens(folder, 1)[0]
            assert answer["usage"] == answer["usage"] | {"prompt_tokens": 5, "completion_tokens": 8}
            assert user.post("/v1/completions", json=asked | {"prompt": "x" * 2_000_000}).status_code == 413
            assert "vllm:num_requests_running" in user.get("/metrics").text
        bench(vllm_python, folder, url)
        evaluate(folder, url, tmp_path)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    shown = json.dumps(Path(folder.parent / "server.log").read_text())
    assert "'max_num_batched_tokens': 128" in shown
    assert KEY not in shown


def bench(python: str, folder: Path, url: str) -> None:
    """`vllm bench serve` by our launcher, which gives the CPU wheel the metadata that the command asks for."""
    command = [python, "-m", "serve.vllm_plugin", "bench", "serve", "--backend", "openai", "--base-url", url]
    command += ["--model", "tiny", "--tokenizer", str(folder), "--dataset-name", "random", "--num-prompts", "4"]
    command += ["--random-input-len", "16", "--random-output-len", "8", "--ignore-eos"]
    settings = environment() | {"OPENAI_API_KEY": KEY}
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    lines = dict(line.split(":", 1) for line in done.stdout.splitlines() if line.count(":") == 1)
    assert int(lines["Successful requests"]) == 4
    assert int(lines["Total generated tokens"]) == 32


def evaluate(folder: Path, url: str, work: Path) -> None:
    """lm_eval through HTTP finds the accuracies of the embedded engine; two near choices may change places."""
    docs = questions()
    (work / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (work / "choices.yaml").write_text(TASK.format(file=work / "docs.jsonl"))
    where = f"model=tiny,base_url={url}/v1/completions,tokenizer={folder},num_concurrent=4,max_length=128"
    command: list[str | Path] = [clients("HALFWEIGHT_LM_EVAL", LM_EVAL) / "lm_eval", "--model", "local-completions"]
    command += ["--model_args", where, "--tasks", "choices", "--include_path", work, "--output_path", work]
    settings = environment() | {"OPENAI_API_KEY": KEY, "HF_HOME": str(work / "hf")}
    done = subprocess.run(command, cwd=work, env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    [report] = work.rglob("results_*.json")
    found = json.loads(report.read_text())["results"]["choices"]
    engine = LLMEngine.from_folder(folder, dtype="float32", kv_cache_gb=0.02, compile=False)
    assert (found["acc,none"], found["acc_norm,none"]) == pytest.approx(accuracies(engine, docs), abs=1.5 / len(docs))


def test_the_plugin_registers_once_and_lazily(vllm_python: str) -> None:
    script = str(Path(__file__).with_name("registration.py"))
    done = subprocess.run([vllm_python, script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["registered"] == 1
    assert found["same"]
    assert found["loaded"] == []
    assert "tested with vLLM 0.32.*, this is vLLM 0.33.1" in found["refusal"]


@pytest.mark.parametrize(
    "flags", [("--eager",), ("--eager", "--tensor-parallel-size", "2"), ("--pipeline-parallel-size", "2")]
)
def test_check_loads_and_answers(vllm_python: str, folder: Path, flags: tuple[str, ...]) -> None:
    check(vllm_python, folder, *flags)


def test_a_cache_of_the_longest_sequence_is_what_vllm_wants(vllm_python: str, tmp_path: Path) -> None:
    """1.25 GiB, of 64 KiB a token: more than a model gets that needs less."""
    sizes = {"num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 20481}
    check(vllm_python, pack(write_model("llama", tmp_path / "dense", **sizes), tmp_path / "packed", INT4), "--eager")


def check(python: str, folder: Path, *flags: str) -> None:
    """`serve FOLDER --runtime vllm --check` succeeds."""
    command = [python, "-m", "serve", str(folder), "--runtime", "vllm", "--check", "--dtype", "float32", *flags]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "packed: loaded by vLLM, generated [" in done.stdout
