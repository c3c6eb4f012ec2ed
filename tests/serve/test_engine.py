"""Batching, chunking, caching and preemption must not show in the answers; memory must come back."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from serve.engine.config import EngineConfig, plan_cache
from serve.engine.llm_engine import LLMEngine, NotFiniteError
from serve.engine.models.config import parse_config
from serve.engine.sampling_params import SamplingParams
from serve.engine.scheduler import Scheduled
from serve.engine.tokenizer import read_json

Folder = Callable[[str], Path]
GREEDY = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)


def load(folder: Path, blocks: int = 64, **settings: object) -> LLMEngine:
    """A float32 engine with that many cache blocks of 16 tokens."""
    plan = plan_cache(EngineConfig(dtype="float32"), parse_config(read_json(folder / "config.json")))
    gb = blocks * plan.bytes_per_block / 2**30
    config = {"dtype": "float32", "compile": False, "kv_cache_gb": gb, "max_model_len": min(512, blocks * 16)}
    return LLMEngine.from_folder(folder, **(config | settings))


def prompts(count: int, length: int = 40) -> list[list[int]]:
    return [[(7 * i + 13 * j + i * j) % 380 + 3 for j in range(length + i)] for i in range(count)]


def test_batch_does_not_change_answers(tiny_folder: Folder) -> None:
    engine = load(tiny_folder("llama"), prefix_caching=False)
    alone = [engine.generate([prompt], GREEDY)[0].token_ids for prompt in prompts(6)]
    together = [output.token_ids for output in engine.generate(prompts(6), GREEDY)]
    assert together == alone
    assert len({tuple(answer) for answer in alone}) == 6


def test_chunked_prefill_does_not_change_answers(tiny_folder: Folder) -> None:
    whole = load(tiny_folder("llama"), prefix_caching=False)
    chunked = load(tiny_folder("llama"), prefix_caching=False, max_num_seqs=4, max_num_batched_tokens=7)
    expected = [output.token_ids for output in whole.generate(prompts(4), GREEDY)]
    assert [output.token_ids for output in chunked.generate(prompts(4), GREEDY)] == expected
    assert chunked.stats.steps > whole.stats.steps


def test_prefix_cache_is_hit_and_does_not_change_answers(tiny_folder: Folder) -> None:
    engine = load(tiny_folder("llama"))
    prompt = prompts(1, 100)[0]
    [first] = engine.generate([prompt], GREEDY)
    computed = engine.stats.prompt_tokens
    [second] = engine.generate([prompt], GREEDY)
    assert second.token_ids == first.token_ids
    assert engine.blocks.prefix_hits == 96
    assert engine.stats.prompt_tokens - computed == len(prompt) - 96
    other = [*prompt[:50], *reversed(prompt[50:])]
    [third] = engine.generate([other], GREEDY)
    assert third.token_ids == load(tiny_folder("llama")).generate([other], GREEDY)[0].token_ids


def test_preemption_loses_nothing(tiny_folder: Folder) -> None:
    roomy = load(tiny_folder("llama"), prefix_caching=False)
    params = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
    expected = [output.token_ids for output in roomy.generate(prompts(4), params)]
    assert roomy.scheduler.num_preemptions == 0
    cramped = load(tiny_folder("llama"), blocks=16, prefix_caching=False)
    outputs = cramped.generate(prompts(4), params)
    assert cramped.scheduler.num_preemptions > 0
    assert [output.token_ids for output in outputs] == expected
    assert cramped.blocks.num_used == 0


def test_seeded_sampling_survives_preemption(tiny_folder: Folder) -> None:
    params = SamplingParams(max_tokens=60, temperature=1.0, seed=11, ignore_eos=True)
    expected = [o.token_ids for o in load(tiny_folder("llama"), prefix_caching=False).generate(prompts(4), params)]
    cramped = load(tiny_folder("llama"), blocks=16, prefix_caching=False)
    assert [o.token_ids for o in cramped.generate(prompts(4), params)] == expected
    assert cramped.scheduler.num_preemptions > 0


def test_abort_frees_everything_at_once(tiny_folder: Folder) -> None:
    engine = load(tiny_folder("llama"))
    running, waiting = engine.add(prompts(1)[0], GREEDY), None
    engine.step()
    waiting = engine.add(prompts(2)[1], GREEDY)
    assert engine.blocks.num_used > 0
    engine.abort(running.id)
    engine.abort(waiting.id)
    engine.abort(12345)
    assert engine.blocks.num_used == 0
    assert not engine.has_work
    assert engine.step() == []


def test_answer_ends_at_the_context_limit(tiny_folder: Folder) -> None:
    engine = load(tiny_folder("llama"), max_model_len=64)
    params = SamplingParams(max_tokens=None, temperature=0.0, ignore_eos=True)
    [output] = engine.generate([prompts(1, 50)[0]], params)
    assert len(output.token_ids) == 14
    assert output.finish_reason == "length"


def test_end_token_and_stop_token_end_the_answer(tiny_folder: Folder) -> None:
    engine = load(tiny_folder("llama"))
    [free] = engine.generate(prompts(1), GREEDY)
    third = free.token_ids[2]
    place = free.token_ids.index(third)
    stopping = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True, stop_token_ids=frozenset({third}))
    [output] = engine.generate(prompts(1), stopping)
    assert output.token_ids == free.token_ids[: place + 1]
    assert output.finish_reason == "stop"
    always_end = SamplingParams(max_tokens=20, temperature=0.0, logit_bias={2: 100.0})
    [ended] = engine.generate(prompts(1), always_end)
    assert ended.token_ids == [2]
    assert ended.text == ""
    at_least = SamplingParams(max_tokens=20, temperature=0.0, logit_bias={2: 100.0}, min_tokens=5)
    [longer] = engine.generate(prompts(1), at_least)
    assert longer.token_ids.index(2) == 5


def test_the_tokenizers_end_ends_too(tiny_folder: Folder, tmp_path: Path) -> None:
    """Beside the tokens that the configurations name, and by itself."""
    folder = tmp_path / "other"
    shutil.copytree(tiny_folder("llama"), folder)
    end = load(folder).tokenizer.eos_token_id
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9999]}')
    assert load(folder).eos_token_ids == {7, end}
    (folder / "generation_config.json").write_text('{"eos_token_id": null}')
    assert load(folder).eos_token_ids == {end}


def test_an_answer_that_fails_is_not_swallowed(tiny_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load(tiny_folder("llama"))
    sample = engine.runner.sample_logits

    def damaged(hidden: torch.Tensor, step: list[Scheduled]) -> torch.Tensor:
        logits = sample(hidden, step).clone()
        logits[0] = float("nan")
        return logits

    monkeypatch.setattr(engine.runner, "sample_logits", damaged)
    with pytest.raises(NotFiniteError, match="NaN"):
        engine.generate(prompts(3), GREEDY)
    assert engine.blocks.num_used == 0 and not engine.has_work
    monkeypatch.undo()
    assert len(engine.generate(prompts(1), GREEDY)[0].token_ids) == 20


def test_prompt_logprobs_equal_transformers(tiny_folder: Folder) -> None:
    from transformers import AutoModelForCausalLM

    engine = load(tiny_folder("llama"), max_num_batched_tokens=32)
    prompt = prompts(1, 70)[0]
    engine.generate([prompt], GREEDY)  # a cached prefix must not hide positions
    [output] = engine.generate([prompt], SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=2))
    with torch.inference_mode():
        logits = AutoModelForCausalLM.from_pretrained(tiny_folder("llama")).eval()(torch.tensor([prompt])).logits[0]
    expected = torch.log_softmax(logits.float(), -1)
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(prompt)
    for place, found in enumerate(output.prompt_logprobs[1:], start=1):
        assert found is not None
        assert found.logprob == pytest.approx(float(expected[place - 1, prompt[place]]), abs=1e-3)
        assert found.rank == 1 + int((expected[place - 1] > expected[place - 1, prompt[place]]).sum())
        assert len(found.top) == 2


@pytest.mark.parametrize(
    ("prompt", "message"), [([], "empty"), ([3] * 513, "at most 512"), ([384], "vocabulary"), ([-1], "vocabulary")]
)
def test_unusable_prompts_are_refused(tiny_folder: Folder, prompt: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(tiny_folder("llama")).add(prompt, GREEDY)


def test_cache_too_small_for_the_wanted_context_is_refused(tiny_folder: Folder) -> None:
    with pytest.raises(ValueError, match="--kv-cache-gb"):
        load(tiny_folder("llama"), blocks=4, max_model_len=512)
    limited = load(tiny_folder("llama"), blocks=4, max_model_len=None)
    assert limited.max_model_len == 64
    assert "KV cache" in limited.plan.note


def test_times_of_tokens_are_recorded(tiny_folder: Folder) -> None:
    [output] = load(tiny_folder("llama")).generate(prompts(1), GREEDY)
    assert len(output.token_times) == 20
    assert output.token_times == sorted(output.token_times)
    assert output.time_to_first_token == output.token_times[0] > 0
