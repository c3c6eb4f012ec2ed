"""Tiny models with random weights, built on the spot, and a cache folder of the tests' own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from compressor import kernels
from compressor.machine import cache_folder
from tests.tiny import make_tiny_model


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """For child processes too. Downloads are the user's, and stay."""
    own, users = tmp_path_factory.mktemp("cache"), cache_folder().absolute()
    for name in ("packages", "archives"):
        (users / name).mkdir(parents=True, exist_ok=True)
        (own / name).symlink_to(users / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HALFWEIGHT_CACHE", str(own))
        yield


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """Those that a test sets are its own."""
    threads = torch.get_num_threads()
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def same_numbers_every_time() -> None:
    """Random tensors of a test are the same whichever tests run before it."""
    torch.manual_seed(0)


@pytest.fixture(params=["kernels", "torch"])
def either_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the compiled kernels, and with torch's operators in their place."""
    path: str = request.param
    if path == "torch":
        monkeypatch.setattr(kernels, "available", lambda: False)
    elif not kernels.available():
        pytest.skip("the kernels are not compiled here")
    return path


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama folder with tied embeddings and grouped-query attention; hidden 64, intermediate 128, 2 blocks."""
    return make_tiny_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 folder (Conv1D, biases, learned positions)."""
    return make_tiny_model("gpt2", tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="session")
def tiny_opt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An OPT folder (biases, learned positions, ReLU)."""
    return make_tiny_model("opt", tmp_path_factory.mktemp("opt"))


@pytest.fixture(scope="session")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file to calibrate and train on."""
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    words = [
        "the",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "a",
        "lazy",
        "dog",
        "while",
        "rain",
        "falls",
        "on",
        "old",
        "hills",
        "and",
        "rivers",
        "run",
        "to",
        "the",
        "sea",
    ]
    documents = [" ".join(words[(7 * i + 3 * j) % len(words)] for j in range(200)) + "." for i in range(60)]
    path.write_text("\n\n".join(documents))
    return path
