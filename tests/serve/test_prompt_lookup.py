"""Guessing ahead changes how fast an answer comes, never the answer: to the bit with --deterministic.

Without it that holds for packed weights (a low-rank branch aside) as long as their kernels round alike, which on AMX is
up to 16 tokens a step. Beyond, and with dense weights, whose products are torch's, answers may part where two tokens
are equally likely but for rounding: nothing more can be promised.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compressor import kernels
from compressor.cli import main as compress
from serve.engine.llm_engine import LLMEngine
from serve.engine.prompt_lookup import PromptLookup
from serve.engine.sampling_params import SamplingParams
from serve.engine.sequence import Sequence

TWO = {10: 50.0, 11: 50.0}
GREEDY = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True, logprobs=0, logit_bias=TWO)
SAMPLED = SamplingParams(max_tokens=60, temperature=0.7, seed=5, top_p=0.9, logprobs=2, logit_bias=TWO)
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


@pytest.fixture(scope="module")
def packed(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "out"
    settings = ("--set", "sparsity.criterion=magnitude", "--set", "quantization.quantizer=rtn")
    assert compress([str(tiny_folder("llama")), "--recipe", "one-shot-2of4-int4", "--out", str(out), *settings]) == 0
    return out


def both(folder: Path, dtype: str, **settings: Any) -> tuple[LLMEngine, LLMEngine]:
    """An engine that does not guess, and one that does."""
    plain, guessing = (
        LLMEngine.from_folder(folder, dtype=dtype, kv_cache_gb=0.01, compile=False, prompt_lookup=tokens, **settings)
        for tokens in (0, 4)
    )
    return plain, guessing


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_answers_are_the_same(tiny_folder: Callable[[str], Path], params: SamplingParams, dtype: str) -> None:
    plain, guessing = both(tiny_folder("llama"), dtype, deterministic=True)
    expected = [output.token_ids for output in plain.generate(PROMPTS, params)]
    assert [output.token_ids for output in guessing.generate(PROMPTS, params)] == expected
    assert guessing.stats.drafted_tokens > 0
    assert guessing.stats.generated_tokens == plain.stats.generated_tokens
    assert guessing.blocks.num_used == 0
    if params.greedy:  # an answer of two words repeats itself, which is what can be guessed
        assert guessing.stats.accepted_tokens > 20
        assert guessing.stats.steps < plain.stats.steps


@pytest.mark.skipif(not kernels.available(), reason="the kernels are not compiled here")
@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_answers_of_few_with_packed_weights_are_the_same_in_any_batch(packed: Path, params: SamplingParams) -> None:
    assert len(PROMPTS) * (1 + 4) <= 16
    plain, guessing = both(packed, "bfloat16")
    expected = [output.logprobs for output in plain.generate(PROMPTS, params)]
    assert [output.logprobs for output in guessing.generate(PROMPTS, params)] == expected
    assert guessing.stats.accepted_tokens > 20


@pytest.mark.parametrize(
    ("weights", "dtype", "rounding"),
    [("dense", "float32", 1e-4), ("dense", "bfloat16", 0.5), ("packed", "bfloat16", 0.5)],
)
def test_other_answers_part_only_where_tokens_are_as_likely(
    tiny_folder: Callable[[str], Path], packed: Path, weights: str, dtype: str, rounding: float
) -> None:
    """Twelve at once, up to 60 tokens a step; what follows a token that differs is another text."""
    prompts = [[prompt[0] + i] * 3 + prompt for i, prompt in enumerate(PROMPTS * 4)]
    folder = tiny_folder("llama") if weights == "dense" else packed
    plain, guessing = both(folder, dtype, max_num_batched_tokens=1024)
    compared = 0
    for one, other in zip(plain.generate(prompts, GREEDY), guessing.generate(prompts, GREEDY), strict=True):
        for expected, found in zip(one.logprobs, other.logprobs, strict=True):
            assert found.logprob == pytest.approx(expected.logprob, abs=rounding)
            compared += 1
            if found.token != expected.token:
                break
    assert compared > 300 and guessing.stats.accepted_tokens > 100
