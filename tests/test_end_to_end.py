"""The product in small: compress a model, serve the result, and talk to it with OpenAI's own client."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import torch


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, timeout=250, check=False)


@pytest.fixture(scope="module")
def compressed(tiny_llama: Path, prose: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("product") / "model"
    recipe = ["--recipe", "ast-2of4-int4", "--budget", "8ktok", "--set", f"text.source={prose}"]
    small = ["--set", "text.length=64", "--set", "sparsity.samples=8", "--set", "retraining.validation_blocks=4"]
    done = run("compressor", str(tiny_llama), *recipe, *small, "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert f"next: serve {out}" in done.stdout
    assert '"stage": "retrain"' in done.stderr
    return out


@pytest.fixture(scope="module")
def url(compressed: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "serve", str(compressed), "--port", "0", "--kv-cache-gb", "0.02"]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as server:
        assert server.stdout is not None
        shown = ""
        for line in server.stdout:
            shown += line
            if found := re.search(r"url\s+(https?://\S+)", line):
                break
        else:
            raise AssertionError(f"the server did not start:\n{shown}")
        yield found[1]
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=30) == 0


def test_streamed_answer_equals_the_whole_one(url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    name = client.models.list().data[0].id
    request = {"model": name, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 16, "temperature": 0}
    whole = client.chat.completions.create(**request)  # type: ignore[call-overload]
    stream = client.chat.completions.create(**request, stream=True)  # type: ignore[call-overload]
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    assert whole.usage.completion_tokens <= 16
    client.close()


def test_the_server_computes_what_transformers_computes(url: str, compressed: Path) -> None:
    from transformers import AutoModelForCausalLM

    import compressor
    from compressor.models import load_tokenizer, quiet_transformers

    assert compressor.__version__
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    answer = client.completions.create(
        model=client.models.list().data[0].id, prompt="the quick brown", max_tokens=1, temperature=0, logprobs=5
    )
    client.close()
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(compressed)
    ids = load_tokenizer(compressed)("the quick brown", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = model(ids).logits[0, -1].float().log_softmax(-1).max()
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.top_logprobs is not None
    assert max(logprobs.top_logprobs[0].values()) == pytest.approx(float(expected), abs=0.15)


def test_check_loads_generates_and_leaves(compressed: Path) -> None:
    done = run("serve", str(compressed), "--check", "--kv-cache-gb", "0.02")
    assert done.returncode == 0, done.stderr


def test_an_altered_checkpoint_is_not_served(compressed: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(compressed, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    done = run("serve", str(tmp_path / "model"), "--check")
    assert done.returncode != 0
    assert "SHA-256" in done.stderr
    assert "Traceback" not in done.stderr
