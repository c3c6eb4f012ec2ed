"""The clients that people use, each in its own words, against a running server.

They live in an environment of their own, `HALFWEIGHT_CLIENTS` or one in the cache folder that the first run makes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from serve.engine.config import cache_folder
from tests.serve.test_server import server

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]
PACKAGES = ("openai>=2.20,<3", "langchain-openai>=1.0", "litellm>=1.70", "llm>=0.26")

LANGCHAIN = """
from langchain_openai import ChatOpenAI
model = ChatOpenAI(base_url=URL + "/v1", api_key="none", model=NAME, max_retries=0, max_tokens=8, temperature=0)
whole = model.invoke("Hello").content
assert isinstance(whole, str)
assert "".join(part.content for part in model.stream("Hello")) == whole
"""
LITELLM = """
import litellm
ask = dict(model="hosted_vllm/" + NAME, api_base=URL + "/v1", max_tokens=8, temperature=0)
messages = [{"role": "user", "content": "Hello"}]
answer = litellm.completion(messages=messages, **ask)
assert answer.usage.total_tokens > 8 or answer.choices[0].finish_reason == "stop"
parts = litellm.completion(messages=messages, stream=True, **ask)
assert "".join(part.choices[0].delta.content or "" for part in parts) == (answer.choices[0].message.content or "")
"""


@pytest.fixture(scope="module")
def binaries() -> Path:
    """The folder of the clients' commands."""
    folder = Path(os.environ.get("HALFWEIGHT_CLIENTS") or cache_folder() / "clients")
    if not (folder / ".ready").is_file():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([folder / "bin/python", "-m", "pip", "install", "-q", *PACKAGES], check=True)
        (folder / ".ready").touch()
    return folder / "bin"


@pytest.fixture(scope="module")
def address(tiny_folder: Callable[[str], Path]) -> Iterator[str]:
    with server(tiny_folder("llama"), "--served-model-name", "tiny") as (url, _):
        yield url


def run(*command: str | Path, **environment: str) -> str:
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=600, check=False, env=os.environ | environment
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return result.stdout


@pytest.mark.parametrize("script", [LANGCHAIN, LITELLM], ids=["langchain", "litellm"])
def test_python_client(binaries: Path, address: str, script: str) -> None:
    run(binaries / "python", "-c", f"URL, NAME = {address!r}, 'tiny'\n{script}")


def test_llm(binaries: Path, address: str, tmp_path: Path) -> None:
    entry = f"- model_id: ours\n  model_name: tiny\n  api_base: {address}/v1\n"
    (tmp_path / "extra-openai-models.yaml").write_text(entry)
    environment = {"LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none"}
    for flag in ("--no-stream", "--log"):
        run(binaries / "llm", "-m", "ours", flag, "-o", "max_tokens", "8", "Hello", **environment)
