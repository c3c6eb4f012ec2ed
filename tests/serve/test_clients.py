"""The clients that people use, each in its own words, against a running server.

They live in environments of their own, `HALFWEIGHT_CLIENTS` and `HALFWEIGHT_LM_EVAL` or others in the user's cache
folder that the first run makes. `HALFWEIGHT_ZERO_SHOT` may be a folder with a `copa.jsonl` to evaluate on.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from compressor.machine import cache_folder
from serve.engine.llm_engine import LLMEngine
from serve.engine.sampling_params import SamplingParams
from tests.serve.encoders import save_encoder
from tests.serve.test_server import server

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]
PACKAGES = ("openai>=2.20,<3", "langchain-openai>=1.0", "litellm>=1.70", "llm>=0.26", "schemathesis>=4.0")
CACHE = cache_folder()  # the user's: at import the tests have none of their own yet
LM_EVAL = ("lm-eval[api]>=0.4.9,<0.5", "transformers>=5.0")
TASK = """
task: choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{query}}}}"
doc_to_target: gold
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""

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


def environment(variable: str, packages: tuple[str, ...]) -> Path:
    """The folder of the commands of an environment, made if need be."""
    folder = Path(os.environ.get(variable) or CACHE / variable.removeprefix("HALFWEIGHT_").lower())
    if not (folder / ".ready").is_file():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([folder / "bin/python", "-m", "pip", "install", "-q", *packages], check=True)
        (folder / ".ready").touch()
    return folder / "bin"


@pytest.fixture(scope="module")
def binaries() -> Path:
    return environment("HALFWEIGHT_CLIENTS", PACKAGES)


@pytest.fixture(scope="module")
def address(tiny_folder: Callable[[str], Path]) -> Iterator[str]:
    with server(tiny_folder("llama"), "--served-model-name", "tiny") as (url, _):
        yield url


def run(*command: str | Path, cwd: Path | None = None, **environment: str) -> str:
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=800, check=False, cwd=cwd, env=os.environ | environment
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


def test_schemathesis_finds_nothing(binaries: Path, address: str, tmp_path: Path) -> None:
    fuzz(binaries, address, tmp_path)


@pytest.mark.parametrize("head", [True, False], ids=["classifier", "encoder"])
def test_schemathesis_finds_nothing_in_encoders(binaries: Path, tmp_path: Path, head: bool) -> None:
    with server(save_encoder(tmp_path / "model", "bert", head=head)) as (url, _):
        fuzz(binaries, url, tmp_path)


def fuzz(binaries: Path, address: str, tmp_path: Path) -> None:
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    report = run(
        *(binaries / "schemathesis", "run", f"{address}/openapi.json", "--checks", checks),
        *("--max-examples", "60", "--seed", "1", "--no-color"),
        cwd=tmp_path,
    )
    assert re.search(r"(\d+) passed", report) or "No issues found" in report, report[-2000:]


def test_lm_eval_finds_the_accuracies_of_the_engine(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """lm_eval through HTTP, against sums of log-probabilities by the engine in this process."""
    docs = questions()
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (tmp_path / "choices.yaml").write_text(TASK.format(file=tmp_path / "docs.jsonl"))
    folder = tiny_folder("llama")
    with server(folder, "--served-model-name", "tiny", "--dtype", "float32") as (url, _):
        where = f"model=tiny,base_url={url}/v1/completions,tokenizer={folder},num_concurrent=4,max_length=512"
        run(
            *(environment("HALFWEIGHT_LM_EVAL", LM_EVAL) / "lm_eval", "--model", "local-completions"),
            *("--model_args", where, "--tasks", "choices", "--include_path", tmp_path, "--output_path", tmp_path),
            cwd=tmp_path,
            HF_HOME=str(tmp_path / "hf"),
        )
    [report] = tmp_path.rglob("results_*.json")
    found = json.loads(report.read_text())["results"]["choices"]
    engine = LLMEngine.from_folder(folder, dtype="float32", kv_cache_gb=0.05, compile=False)
    assert (found["acc,none"], found["acc_norm,none"]) == pytest.approx(accuracies(engine, docs), abs=1e-9)


def questions() -> list[dict[str, Any]]:
    given = os.environ.get("HALFWEIGHT_ZERO_SHOT")
    if given:
        return [json.loads(line) for line in (Path(given) / "copa.jsonl").read_text().splitlines()]
    ends = ("the dog ran home.", "a fox jumped.", "nothing happened for a long time.", "it was the end.")
    return [
        {"query": f"Question {i}: the sky was {word}, so", "gold": i % 3, "choices": [*ends[i % 2 :][:3]]}
        for i, word in enumerate(("blue", "grey", "black", "red", "white", "high", "low", "far", "cold", "near") * 4)
    ]


def accuracies(engine: LLMEngine, docs: list[dict[str, Any]]) -> tuple[float, float]:
    """acc and acc_norm (by the length of the choice in characters), as lm_eval defines them."""
    right = [0, 0]
    for doc in docs:
        start = len(engine.tokenizer.encode(doc["query"]))
        prompts = [engine.tokenizer.encode(f"{doc['query']} {choice}") for choice in doc["choices"]]
        outputs = engine.generate(prompts, SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0))
        scores = [sum(one.logprob for one in output.prompt_logprobs[start:] if one) for output in outputs]
        normed = [score / len(choice) for score, choice in zip(scores, doc["choices"], strict=True)]
        for i, each in enumerate((scores, normed)):
            right[i] += each.index(max(each)) == doc["gold"]
    return right[0] / len(docs), right[1] / len(docs)
