"""From logits to the next token of each sequence.

Shapes: V vocabulary; logits_V is float32, in numpy, whose arg-max over a vocabulary is twenty times
faster than torch's on a CPU. Every random draw comes from the sequence's own generator, and one uniform number picks
a token by the inverse of the cumulative distribution, so that a seeded request gives the same tokens whatever is
batched beside it (as far as the logits themselves are the same).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve.engine.grammar import Matcher
from serve.engine.sequence import Sequence, TokenLogprobs

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

# Tokens this far below the likeliest, in nats, are left out at first when the nucleus is sought; more only if need be.
NUCLEUS_DEPTH = 8.0


class NotFiniteError(ValueError):
    """The model produced NaN or infinite logits."""


@dataclass(frozen=True)
class Sampled:
    token: int
    logprobs: TokenLogprobs | None = None
    complete: bool = False  # the grammar allows nothing more


class Sampler:
    """Holds the random generator of each live sequence, and its way through its grammar."""

    def __init__(self, eos_token_ids: frozenset[int]) -> None:
        self.eos_token_ids = eos_token_ids
        self._generators: dict[int, np.random.Generator] = {}
        self._matchers: dict[int, Matcher] = {}

    def forget(self, seq: Sequence) -> None:
        self._generators.pop(seq.id, None)
        self._matchers.pop(seq.id, None)

    def __call__(self, raw_V: Floats, seq: Sequence) -> Sampled:
        """The next token of `seq`, which it must get before it is asked for the one after.

        GrammarError or NotFiniteError when there is none.
        """
        params = seq.params
        if params.plain_greedy:
            return Sampled(_likeliest_one(raw_V))
        matcher = self._matcher(seq)
        logits_V = self._adjusted(raw_V, seq, matcher)
        if not params.greedy and params.temperature != 1.0:
            logits_V = logits_V / params.temperature
        token = _likeliest_one(logits_V)
        if not params.greedy:
            token = self._draw(logits_V, seq)
        complete = False
        if matcher is not None:
            matcher.advance(token)
            complete = matcher.complete
        logprobs = None if params.logprobs is None else logprobs_of(raw_V, token, params.logprobs)
        return Sampled(token, logprobs, complete)

    def _matcher(self, seq: Sequence) -> Matcher | None:
        grammar = seq.params.grammar
        if grammar is not None and seq.id not in self._matchers:
            self._matchers[seq.id] = grammar.start()
        return self._matchers.get(seq.id)

    def _adjusted(self, logits_V: Floats, seq: Sequence, matcher: Matcher | None) -> Floats:
        """Penalties, bias and forbidden tokens; the given logits stay as they are."""
        params = seq.params
        blocked = self.eos_token_ids | params.stop_token_ids if seq.num_generated < params.min_tokens else frozenset()
        if not (params.has_penalties or params.logit_bias or blocked or matcher):
            return logits_V
        logits_V = logits_V.copy()
        if params.has_penalties:
            _penalise(logits_V, seq)
        if params.logit_bias:
            logits_V[list(params.logit_bias.keys())] += np.array(list(params.logit_bias.values()), np.float32)
        if matcher is not None:  # it knows best when the end may come
            matcher.forbid(logits_V)
        elif blocked:
            logits_V[list(blocked)] = -math.inf
        return logits_V

    def _draw(self, logits_V: Floats, seq: Sequence) -> int:
        weights, ids = candidates(logits_V, seq.params.top_k, seq.params.top_p, seq.params.min_p)
        cumulative = weights.cumsum(dtype=np.float64)
        point = self._generator(seq).random() * cumulative[-1]
        place = min(int(cumulative.searchsorted(point, side="right")), len(weights) - 1)
        return place if ids is None else int(ids[place])

    def _generator(self, seq: Sequence) -> np.random.Generator:
        generator = self._generators.get(seq.id)
        if generator is None:
            seed: Any = None if seq.params.seed is None else (seq.params.seed % 2**64, seq.index)
            generator = self._generators[seq.id] = np.random.Generator(np.random.PCG64(seed))
        return generator


def _likeliest_one(logits_V: Floats) -> int:
    token = int(logits_V.argmax())  # the first NaN, if there is one
    if not math.isfinite(logits_V[token]):
        raise NotFiniteError("the model gave NaN or infinite logits for this answer")
    return token


def candidates(logits_V: Floats, top_k: int, top_p: float, min_p: float) -> tuple[Floats, Ints | None]:
    """Relative probabilities that survive top_k, then top_p, then min_p, likeliest first; ids None: all, in order."""
    top_k = top_k if 0 < top_k < len(logits_V) else 0
    largest = logits_V.max()
    if not top_k and top_p >= 1.0:
        weights = np.exp(logits_V - largest)
        if min_p <= 0.0:
            return weights, None
        ids = np.flatnonzero(weights >= min_p)
        return weights[ids], ids
    ids = _likeliest(logits_V, top_k) if top_k else _nucleus(logits_V, top_p)
    weights = np.exp(logits_V[ids] - largest)
    if top_k and top_p < 1.0:
        weights, ids = _cut(weights, ids, top_p * weights.sum(dtype=np.float64))
    if min_p > 0.0:
        keep = int((weights >= min_p).sum())
        weights, ids = weights[:keep], ids[:keep]
    return weights, ids


def _likeliest(logits_V: Floats, count: int) -> Ints:
    """The ids of the `count` largest logits, sorted."""
    ids = np.argpartition(logits_V, -count)[-count:]
    return ids[np.argsort(-logits_V[ids], kind="stable")]


def _nucleus(logits_V: Floats, top_p: float) -> Ints:
    """The ids of the fewest likeliest tokens whose probability reaches `top_p`, sorted."""
    relative = logits_V - logits_V.max()
    wanted = top_p * np.exp(relative).sum(dtype=np.float64)
    depth = NUCLEUS_DEPTH
    while True:
        ids = np.flatnonzero(relative > -depth)
        weights = np.exp(relative[ids])
        if weights.sum(dtype=np.float64) >= wanted or len(ids) == len(relative) or depth > 1e4:
            order = np.argsort(-weights, kind="stable")
            return _cut(weights[order], ids[order], wanted)[1]
        depth *= 2


def _cut(weights: Floats, ids: Ints, wanted: float) -> tuple[Floats, Ints]:
    """The shortest beginning whose sum reaches `wanted`."""
    keep = int((weights.cumsum(dtype=np.float64) < wanted).sum()) + 1
    return weights[:keep], ids[:keep]


def logprobs_of(logits_V: Floats, token: int, count: int) -> TokenLogprobs:
    """Log-probabilities of the model itself, before temperature and penalties."""
    largest = logits_V.max()
    total = float(largest) + math.log(np.exp(logits_V - largest).sum(dtype=np.float64))
    rank = int((logits_V > logits_V[token]).sum()) + 1
    ids = _likeliest(logits_V, min(count, len(logits_V))) if count else np.empty(0, np.int64)
    top = tuple((int(i), float(logits_V[i]) - total) for i in ids)
    return TokenLogprobs(token, float(logits_V[token]) - total, rank, top)


def _penalise(logits_V: Floats, seq: Sequence) -> None:
    """Repetition over prompt and output; presence and frequency over the output only, as OpenAI and vLLM do."""
    params = seq.params
    if params.repetition_penalty != 1.0:
        seen = np.unique(np.array(seq.tokens, np.int64))
        values = logits_V[seen]
        penalty = params.repetition_penalty
        logits_V[seen] = np.where(values > 0, values / penalty, values * penalty)
    if seq.output_counts and (params.presence_penalty or params.frequency_penalty):
        ids = np.array(list(seq.output_counts.keys()), np.int64)
        counts = np.array(list(seq.output_counts.values()), np.float32)
        logits_V[ids] -= params.presence_penalty + params.frequency_penalty * counts
