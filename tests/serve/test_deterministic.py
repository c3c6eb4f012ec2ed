"""--deterministic: an answer's tokens do not depend on what is computed beside it, before it, or in its place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from serve.engine.config import EngineConfig
from serve.engine.llm_engine import GenerationOutput, LLMEngine
from serve.engine.models.linears import FixedRows, PlainLinear
from serve.engine.sampling_params import SamplingParams

GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True, logprobs=1)


def prompts() -> list[list[int]]:
    shared = [(11 * i) % 380 + 3 for i in range(200)]
    return [shared[: 5 + 17 * i] + [(i + 3 * j) % 380 + 3 for j in range(i)] for i in range(12)]


def exact(output: GenerationOutput) -> list[tuple[int, float]]:
    return [(one.token, one.logprob) for one in output.logprobs]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_answers_among_many_equal_answers_alone(tiny_folder: Callable[[str], Path], family: str, dtype: str) -> None:
    folder = tiny_folder(family)
    engine = LLMEngine.from_folder(folder, dtype=dtype, kv_cache_gb=0.01, compile=False, deterministic=True)
    alone = [exact(engine.generate([prompt], GREEDY)[0]) for prompt in prompts()]
    cold = LLMEngine.from_folder(folder, dtype=dtype, kv_cache_gb=0.01, compile=False, deterministic=True)
    for _ in range(2):  # without cached prefixes, then with them
        assert [exact(output) for output in cold.generate(prompts(), GREEDY)] == alone
    assert cold.blocks.prefix_hits > 0


def test_preemption_does_not_show(tiny_folder: Callable[[str], Path]) -> None:
    folder = tiny_folder("llama")
    roomy = LLMEngine.from_folder(folder, kv_cache_gb=0.01, compile=False, deterministic=True)
    blocks = roomy.plan.bytes_per_block * 20 / 2**30
    cramped = LLMEngine.from_folder(folder, kv_cache_gb=blocks, compile=False, deterministic=True, max_model_len=300)
    params = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True, logprobs=0)
    short = [prompt[:40] for prompt in prompts()]
    expected = [exact(roomy.generate([prompt], params)[0]) for prompt in short]
    assert [exact(output) for output in cramped.generate(short, params)] == expected
    assert cramped.scheduler.num_preemptions > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_plain_linears_in_fixed_blocks(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear = FixedRows(PlainLinear(torch.randn(1536, 576).to(dtype), None))
    x = torch.randn(37, 576).to(dtype)
    assert torch.equal(linear(x), torch.cat([linear(row[None]) for row in x]))


def test_budget_must_hold_whole_chunks() -> None:
    with pytest.raises(ValueError, match="at least 160"):
        EngineConfig(deterministic=True, max_num_batched_tokens=100)
