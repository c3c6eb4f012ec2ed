"""Guessing ahead changes how fast an answer comes, never the answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from serve.engine.llm_engine import LLMEngine
from serve.engine.prompt_lookup import PromptLookup
from serve.engine.sampling_params import SamplingParams
from serve.engine.sequence import Sequence

TWO = {10: 50.0, 11: 50.0}
PROMPTS = [[5, 77, 130, 9] * 6, [(7 * i) % 380 + 3 for i in range(40)], [42, 18, 300] * 9]


def test_proposes_what_followed_before() -> None:
    lookup, seq = PromptLookup(3, 100), Sequence([1, 2, 3, 4, 5, 6, 1, 2, 3], SamplingParams(max_tokens=20))
    assert lookup(seq) == [4, 5, 6]
    seq.append(9)
    assert lookup(seq) == []
    for token in (1, 2, 3):
        seq.append(token)
    assert lookup(seq) == [9], "the latest place counts, and a wrong guess makes the next shorter"


def test_never_beyond_the_end() -> None:
    seq = Sequence([1, 2, 3, 4, 5, 6, 1, 2, 3], SamplingParams(max_tokens=2))
    assert PromptLookup(3, 100)(seq) == [4]
    assert PromptLookup(3, 10)(seq) == []
    assert PromptLookup(3, 100)(Sequence([1, 2], SamplingParams())) == []


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True, logit_bias=TWO),
        SamplingParams(max_tokens=60, temperature=0.7, seed=5, top_p=0.9, logprobs=2, logit_bias=TWO),
    ],
    ids=["greedy", "sampled"],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_answers_are_the_same(tiny_folder: Callable[[str], Path], params: SamplingParams, dtype: str) -> None:
    def load(**settings: int) -> LLMEngine:
        return LLMEngine.from_folder(
            tiny_folder("llama"), dtype=dtype, kv_cache_gb=0.01, compile=False, deterministic=True, **settings
        )

    plain, guessing = load(), load(prompt_lookup=4)
    expected = [output.token_ids for output in plain.generate(PROMPTS, params)]
    assert [output.token_ids for output in guessing.generate(PROMPTS, params)] == expected
    assert guessing.stats.drafted_tokens > 0
    assert guessing.stats.generated_tokens == plain.stats.generated_tokens
    assert guessing.blocks.num_used == 0
    if params.greedy:  # an answer of two words repeats itself, which is what can be guessed
        assert guessing.stats.accepted_tokens > 20
        assert guessing.stats.steps < plain.stats.steps
