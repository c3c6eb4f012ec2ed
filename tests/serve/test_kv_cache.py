"""Keys and values in 8 bits: about twice the tokens, close answers, and the same care for prefixes and preemption."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from compressor.checkpoint import write_manifest
from compressor.cli import main as compress
from compressor.kernels import loading
from compressor.scheme import QuantizationConfig
from serve.engine.config import EngineConfig
from serve.engine.llm_engine import LLMEngine
from serve.engine.sampling_params import SamplingParams
from tests.serve.test_engine import prompts
from tests.serve.test_models import PROMPT, engine_logits

Folder = Callable[[str], Path]
KINDS = pytest.mark.parametrize("kind", ["int8", "fp8"])
GREEDY = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)


def load(folder: Path, **settings: object) -> LLMEngine:
    return LLMEngine.from_folder(folder, **({"compile": False, "kv_cache_gb": 0.01} | settings))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@KINDS
def test_close_to_whole_keys_and_values(tiny_folder: Folder, family: str, dtype: str, kind: str) -> None:
    whole, small = (load(tiny_folder(family), dtype=dtype, kv_cache_dtype=each) for each in ("auto", kind))
    expected, found = engine_logits(whole, PROMPT), engine_logits(small, PROMPT)
    # A step of e4m3 is an eighth of its value at most, one of int8 a 127th of the largest.
    assert 0 < (found - expected).norm() < {"int8": 0.03, "fp8": 0.1}[kind] * expected.norm()


@pytest.mark.parametrize(("kind", "row"), [("int8", 16 + 4), ("fp8", 16)])
def test_more_tokens_fit(tiny_folder: Folder, kind: str, row: int) -> None:
    """Heads of 16 values: 20 or 16 bytes instead of 32; of 64 they would be 68 or 64 instead of 128."""
    whole, small = (load(tiny_folder("llama"), kv_cache_dtype=each) for each in ("bfloat16", kind))
    assert small.plan.num_blocks == pytest.approx(whole.plan.num_blocks * 32 / row, rel=0.01)
    caches = [*small.runner.k_caches, *small.runner.v_caches]  # type: ignore[union-attr]
    assert sum(cache.nbytes for cache in caches) == small.kv_cache_bytes <= 0.01 * 2**30


@KINDS
def test_shared_prefixes_do_not_change_answers(tiny_folder: Folder, kind: str) -> None:
    engine = load(tiny_folder("llama"), kv_cache_dtype=kind, deterministic=True, max_prefill_beside_decode=32)
    prompt = prompts(1, 100)[0]
    first, second = (engine.generate([prompt], GREEDY)[0].token_ids for _ in range(2))
    assert first == second
    assert engine.blocks.prefix_hits == 96


@KINDS
def test_preemption_does_not_change_answers(tiny_folder: Folder, kind: str) -> None:
    settings = {"kv_cache_dtype": kind, "deterministic": True, "max_prefill_beside_decode": 32, "max_model_len": 256}
    roomy = load(tiny_folder("llama"), **settings)
    cramped = load(tiny_folder("llama"), **settings, kv_cache_gb=16 * roomy.plan.bytes_per_block / 2**30)
    alone = [roomy.generate([prompt], GREEDY)[0].token_ids for prompt in prompts(4)]
    together = [output.token_ids for output in cramped.generate(prompts(4), GREEDY)]
    assert together == alone
    assert cramped.scheduler.num_preemptions > 0 and cramped.blocks.num_used == 0


@pytest.mark.skipif(loading.LIBRARY is None, reason="the CPU kernels are not installed")
@KINDS
def test_portable_path_agrees(tiny_folder: Folder, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    engine = load(tiny_folder("llama"), kv_cache_dtype=kind)
    found = engine_logits(engine, PROMPT)
    monkeypatch.setattr(loading, "LIBRARY", None)
    expected = engine_logits(engine, PROMPT)
    assert (found - expected).norm() < 0.02 * expected.norm()


@KINDS
def test_the_checkpoint_says_which(tiny_folder: Folder, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "recorded"
    shutil.copytree(tiny_folder("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = QuantizationConfig({}, kv_cache_dtype=kind).to_dict()
    (folder / "config.json").write_text(json.dumps(config))
    write_manifest(folder)
    assert load(folder).plan.dtype == kind
    assert load(folder, kv_cache_dtype="bfloat16").plan.dtype == "bfloat16"
    assert load(tiny_folder("llama")).plan.dtype == "bfloat16"


@KINDS
def test_a_recipe_records_it(tiny_folder: Folder, tmp_path: Path, kind: str) -> None:
    one_shot = ["--one-shot", "--low-memory"]
    for entry in ("sparsity.criterion=magnitude", "quantization.quantizer=rtn", f"quantization.kv_cache_dtype={kind}"):
        one_shot += ["--set", entry]
    assert compress([str(tiny_folder("llama")), *one_shot, "--out", str(tmp_path / "out")]) == 0
    assert load(tmp_path / "out").plan.dtype == kind


def test_unknown_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match="kv_cache_dtype must be one of auto, bfloat16, int8, fp8, got 'int4'"):
        EngineConfig(kv_cache_dtype="int4")
    record = QuantizationConfig({}).to_dict() | {"kv_cache_dtype": "int4"}
    with pytest.raises(ValueError, match="kv_cache_dtype must be one of"):
        QuantizationConfig.from_dict(record)
    assert "kv_cache_dtype" not in QuantizationConfig({}).to_dict()
