"""What each sampling parameter promises, on logits whose distribution is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from serve.engine.sampler import NotFiniteError, Sampler, candidates, logprobs_of
from serve.engine.sampling_params import SamplingParams
from serve.engine.sequence import Sequence

LOGITS = np.log(np.array([0.05, 0.4, 0.1, 0.25, 0.2], np.float32))


def draw(params: SamplingParams, count: int = 1, prompt: tuple[int, ...] = (0,)) -> list[int]:
    sampler, seq, tokens = Sampler(frozenset({4})), Sequence(list(prompt), params), []
    for _ in range(count):
        tokens.append(sampler(LOGITS.copy(), seq).token)
    return tokens


def test_zero_temperature_takes_the_likeliest() -> None:
    assert draw(SamplingParams(temperature=0.0), count=5) == [1] * 5


def test_plain_sampling_follows_the_distribution() -> None:
    tokens = draw(SamplingParams(seed=3), count=8000)
    shares = np.bincount(tokens, minlength=5) / 8000
    np.testing.assert_allclose(shares, np.exp(LOGITS), atol=0.02)


def test_temperature_sharpens() -> None:
    tokens = draw(SamplingParams(seed=3, temperature=0.5), count=8000)
    expected = np.exp(2 * LOGITS) / np.exp(2 * LOGITS).sum()
    shares = np.bincount(tokens, minlength=5) / 8000
    np.testing.assert_allclose(shares, expected, atol=0.02)


def test_seed_repeats_and_differs_between_answers() -> None:
    params = SamplingParams(seed=7)
    assert draw(params, count=50) == draw(params, count=50)
    assert draw(params, count=50) != draw(SamplingParams(seed=8), count=50)
    sampler = Sampler(frozenset())
    pair = [Sequence([0], params, index) for index in (0, 1)]
    drawn = [[sampler(LOGITS, seq).token for seq in pair] for _ in range(50)]
    assert [a for a, _ in drawn] == draw(params, count=50) != [b for _, b in drawn]


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p", "kept"),
    [
        (2, 1.0, 0.0, {1, 3}),
        (0, 0.5, 0.0, {1, 3}),
        (0, 0.66, 0.0, {1, 3, 4}),
        (0, 0.0001, 0.0, {1}),
        (0, 1.0, 0.4, {1, 3, 4}),
        (3, 0.9, 0.6, {1, 3}),
        (-1, 1.0, 0.0, {0, 1, 2, 3, 4}),
        (100, 1.0, 0.0, {0, 1, 2, 3, 4}),
    ],
)
def test_truncation_keeps_the_right_tokens(top_k: int, top_p: float, min_p: float, kept: set[int]) -> None:
    probs, ids = candidates(LOGITS, top_k, top_p, min_p)
    found = set(range(5)) if ids is None else set(ids.tolist())
    assert found == kept
    expected = np.exp(LOGITS)[list(range(5)) if ids is None else ids]
    np.testing.assert_allclose(probs / probs.sum(), expected / expected.sum(), rtol=1e-5)


def test_nucleus_of_peaked_and_long_tailed_logits() -> None:
    rng = np.random.default_rng(0)
    for spread in (0.5, 3.0, 12.0):
        logits = (rng.standard_normal(3000) * spread).astype(np.float32)
        probs = np.exp(logits - logits.max(), dtype=np.float64)
        order = np.argsort(-probs)
        keep = int((probs[order].cumsum() < 0.97 * probs.sum()).sum()) + 1
        _, ids = candidates(logits, 0, 0.97, 0.0)
        assert ids is not None
        assert ids.tolist() == order[:keep].tolist()


def test_top_p_over_a_flat_distribution_needs_more_than_the_guess() -> None:
    logits = np.linspace(0, 0.001, 5000, dtype=np.float32)
    _, ids = candidates(logits, 0, 0.9, 0.0)
    assert ids is not None
    assert 4480 < len(ids) <= 4502


def test_penalties() -> None:
    sampler = Sampler(frozenset())
    seq = Sequence([3], SamplingParams(temperature=0.0, frequency_penalty=2.0))
    chosen = []
    for _ in range(4):
        chosen.append(sampler(LOGITS.copy(), seq).token)
        seq.append(chosen[-1])
    assert chosen == [1, 3, 4, 2]  # the prompt's 3 is not penalised, generated tokens are
    assert draw(SamplingParams(temperature=0.0, repetition_penalty=3.0), prompt=(1, 3))[0] == 4
    seq = Sequence([0], SamplingParams(temperature=0.0, presence_penalty=1.0))
    seq.append(1)
    assert sampler(LOGITS.copy(), seq).token == 3


def test_bias_and_least_length() -> None:
    assert draw(SamplingParams(temperature=0.0, logit_bias={0: 100.0})) == [0]
    assert draw(SamplingParams(logit_bias={1: -100.0}, seed=1), count=300).count(1) == 0
    assert draw(SamplingParams(temperature=0.0, logit_bias={4: 50.0})) == [4]
    assert draw(SamplingParams(temperature=0.0, logit_bias={4: 50.0}, min_tokens=1)) == [1]


def test_logits_are_left_as_they_are() -> None:
    logits = LOGITS.copy()
    params = SamplingParams(logit_bias={1: -5.0}, repetition_penalty=2.0, temperature=0.7, logprobs=2)
    Sampler(frozenset())(logits, Sequence([1], params))
    assert np.array_equal(logits, LOGITS)


def test_logprobs_are_the_model_own() -> None:
    found = logprobs_of(LOGITS, 3, 2)
    assert found.logprob == pytest.approx(math.log(0.25))
    assert found.rank == 2
    assert [token for token, _ in found.top] == [1, 3]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {}, {"top_p": 0.9}, {"min_p": 0.1}, {"logprobs": 1}])
def test_logits_that_are_not_finite_are_told(bad: float, settings: dict[str, float]) -> None:
    logits = LOGITS.copy()
    logits[2] = bad
    with pytest.raises(NotFiniteError):
        Sampler(frozenset())(logits, Sequence([0], SamplingParams(**settings)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": 2.0},
        {"n": 0},
        {"n": 1000},
        {"logprobs": 21},
        {"stop": ("",)},
        {"stop": ("x",) * 17},
        {"stop": ("x" * 257,)},
        {"logit_bias": {1: 101.0}},
        {"seed": 2**63},
        {"max_tokens": -1},
        {"presence_penalty": 3.0},
        {"repetition_penalty": 1e-38},
    ],
)
def test_parameters_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SamplingParams(**wrong)
