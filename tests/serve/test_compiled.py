"""The compiled step gives what the eager one gives, at sizes it was not made with, and is found again on disk."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest

from compressor.kernels import available
from serve.engine import compiled, llm_engine
from serve.engine.compiled import can_compile, program_path
from serve.engine.llm_engine import LLMEngine
from serve.engine.models.decoder import Decoder
from serve.engine.sampling_params import SamplingParams

Folder = Callable[[str], Path]
needs_kernels = pytest.mark.skipif(not available(), reason="the CPU kernels are not installed")
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)


def load(folder: Path, **settings: object) -> LLMEngine:
    return LLMEngine.from_folder(folder, kv_cache_gb=0.01, prefix_caching=False, **settings)


@needs_kernels
@pytest.mark.parametrize("family", ["gpt2", pytest.param("llama", marks=pytest.mark.full)])
def test_compiled_steps_equal_eager_ones(
    tiny_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    monkeypatch.setenv("HALFWEIGHT_CACHE", str(tmp_path))
    folder = tiny_folder(family)
    eager = load(folder, compile=False)
    if isinstance(eager.loaded.decoder, Decoder) and eager.loaded.decoder.fused is not None:
        pytest.skip("the kernels run its dense layers as one operator on this processor: nothing is compiled")
    prompts = [[5, 77, 130, 9], [260], [42, 18, 300, 7, 7, 91, 200, 33, 12, 64] * 4]
    expected = [output.token_ids for output in eager.generate(prompts, GREEDY)]
    assert not eager.compiled
    made = load(folder)
    assert made.compiled
    assert [output.token_ids for output in made.generate(prompts, GREEDY)] == expected
    assert [made.generate([prompt], GREEDY)[0].token_ids for prompt in prompts] == [
        eager.generate([prompt], GREEDY)[0].token_ids for prompt in prompts
    ]
    assert program_path(eager.loaded.decoder, 16, "bfloat16").is_file()
    script = (
        "import sys; from serve.engine.llm_engine import LLMEngine; "
        f"engine = LLMEngine.from_folder({str(folder)!r}, kv_cache_gb=0.02); assert engine.compiled; "
        "slow = [m for m in sys.modules if m.startswith(('transformers', 'torch._inductor'))]; assert not slow, slow"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


@needs_kernels
def test_a_damaged_program_is_made_again(
    tiny_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HALFWEIGHT_CACHE", str(tmp_path))
    compiler = Mock()
    monkeypatch.setattr(llm_engine, "BackgroundCompiler", compiler)
    path = program_path(load(tiny_folder("gpt2"), compile=False).loaded.decoder, 16, "bfloat16")
    path.parent.mkdir()
    path.write_bytes(b"PK\x03\x04 cut off")
    load(tiny_folder("gpt2"))
    compiler.assert_called_once()
    assert not path.exists() and "damaged" in caplog.text


@needs_kernels
def test_programs_are_of_one_processor(tiny_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = load(tiny_folder("llama"), compile=False).loaded.decoder
    here = program_path(decoder, 16, "bfloat16")
    monkeypatch.setattr(compiled, "_processor", lambda: "another")
    assert program_path(decoder, 16, "bfloat16") != here


@needs_kernels
def test_programs_serve_any_length(tiny_folder: Folder) -> None:
    short, long = (load(tiny_folder("llama"), compile=False, max_model_len=length) for length in (64, 512))
    assert len({program_path(engine.loaded.decoder, 16, "bfloat16") for engine in (short, long)}) == 1


def test_what_cannot_be_compiled_stays_eager(tiny_folder: Folder) -> None:
    engine = load(tiny_folder("llama"), dtype="float32")
    assert not can_compile(engine.loaded.decoder)
    assert not engine.compiled
