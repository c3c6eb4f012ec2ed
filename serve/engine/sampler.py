"""From logits to the next token of each sequence.

Shapes: S sequences, V vocabulary; logits_SV is float32. Every random draw comes from the sequence's own generator and
one uniform number picks a token by the inverse of the cumulative distribution, so that a seeded request gives the
same tokens whatever is batched beside it (as far as the logits themselves are the same).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from serve.engine.sequence import Sequence, TokenLogprobs

# How many of the likeliest tokens are sorted at first for top_p: nearly always enough, else all are.
NUCLEUS_GUESS = 256


@dataclass(frozen=True)
class Sampled:
    token: int
    logprobs: TokenLogprobs | None = None


class Sampler:
    """Holds the random generator of each live sequence."""

    def __init__(self, eos_token_ids: frozenset[int]) -> None:
        self.eos_token_ids = eos_token_ids
        self._generators: dict[int, torch.Generator] = {}

    def forget(self, seq: Sequence) -> None:
        self._generators.pop(seq.id, None)

    def __call__(self, logits_SV: Tensor, seqs: list[Sequence]) -> list[Sampled]:
        if all(seq.params.plain_greedy for seq in seqs):
            return [Sampled(token) for token in logits_SV.argmax(dim=-1).tolist()]
        return [self._one(logits, seq) for logits, seq in zip(logits_SV, seqs, strict=True)]

    def _one(self, raw_V: Tensor, seq: Sequence) -> Sampled:
        params = seq.params
        if params.plain_greedy:
            return Sampled(int(raw_V.argmax()))
        logits_V = self._adjusted(raw_V, seq)
        token = int(logits_V.argmax()) if params.greedy else self._draw(logits_V / params.temperature, seq)
        return Sampled(token, logprobs_of(raw_V, token, params.logprobs) if params.logprobs is not None else None)

    def _adjusted(self, logits_V: Tensor, seq: Sequence) -> Tensor:
        """Penalties, bias and forbidden tokens; the given logits stay as they are."""
        params = seq.params
        blocked = self.eos_token_ids | params.stop_token_ids if seq.num_generated < params.min_tokens else frozenset()
        if not (params.has_penalties or params.logit_bias or blocked):
            return logits_V
        logits_V = logits_V.clone()
        if params.has_penalties:
            _penalise(logits_V, seq)
        if params.logit_bias:
            ids = torch.tensor(list(params.logit_bias.keys()))
            logits_V[ids] += torch.tensor(list(params.logit_bias.values()), dtype=logits_V.dtype)
        if blocked:
            logits_V[torch.tensor(list(blocked))] = -math.inf
        return logits_V

    def _draw(self, logits_V: Tensor, seq: Sequence) -> int:
        probs, ids = candidates(logits_V, seq.params.top_k, seq.params.top_p, seq.params.min_p)
        cumulative = probs.cumsum(0)
        point = torch.rand((), generator=self._generator(seq)) * cumulative[-1]
        place = int(torch.searchsorted(cumulative, point, right=True))
        place = min(place, len(probs) - 1)
        return place if ids is None else int(ids[place])

    def _generator(self, seq: Sequence) -> torch.Generator:
        generator = self._generators.get(seq.id)
        if generator is None:
            generator = torch.Generator()
            if seq.params.seed is None:
                generator.seed()
            else:
                generator.manual_seed(seq.params.seed + seq.index)
                _skip(generator, seq.num_generated)
            self._generators[seq.id] = generator
        return generator


def candidates(logits_V: Tensor, top_k: int, top_p: float, min_p: float) -> tuple[Tensor, Tensor | None]:
    """Unnormalised probabilities that survive top_k, then top_p, then min_p, and their ids (None: all, in order)."""
    top_k = top_k if 0 < top_k < len(logits_V) else 0
    if not top_k and top_p >= 1.0 and min_p <= 0.0:
        return torch.softmax(logits_V, dim=-1), None
    values, ids = _nucleus(logits_V, top_k, top_p)
    if min_p > 0.0:
        keep = int((values >= values[0] + math.log(min_p)).sum())
        values, ids = values[:keep], ids[:keep]
    return torch.softmax(values, dim=-1), ids


def _nucleus(logits_V: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """The top_k likeliest tokens, of them the fewest whose probability reaches top_p; sorted."""
    if top_p >= 1.0:
        return logits_V.topk(top_k or len(logits_V))
    size = top_k or min(NUCLEUS_GUESS, len(logits_V))
    values, ids = logits_V.topk(size)
    total = values.logsumexp(-1) if top_k else logits_V.logsumexp(-1)
    cumulative = (values - total).exp().cumsum(-1)
    if not top_k and size < len(logits_V) and cumulative[-1] < top_p:
        values, ids = logits_V.sort(descending=True)
        cumulative = (values - total).exp().cumsum(-1)
    keep = int((cumulative < top_p).sum()) + 1
    return values[:keep], ids[:keep]


def logprobs_of(logits_V: Tensor, token: int, count: int) -> TokenLogprobs:
    """Log-probabilities of the model itself, before temperature and penalties."""
    logprobs_V = torch.log_softmax(logits_V, dim=-1)
    chosen = logprobs_V[token]
    rank = int((logprobs_V > chosen).sum()) + 1
    top: tuple[tuple[int, float], ...] = ()
    if count:
        values, ids = logprobs_V.topk(min(count, len(logprobs_V)))
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprobs(token, float(chosen), rank, top)


def _penalise(logits_V: Tensor, seq: Sequence) -> None:
    """Repetition over prompt and output; presence and frequency over the output only, as OpenAI and vLLM do."""
    params = seq.params
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(seq.tokens)))
        values = logits_V[seen]
        penalty = params.repetition_penalty
        logits_V[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if seq.output_counts and (params.presence_penalty or params.frequency_penalty):
        ids = torch.tensor(list(seq.output_counts.keys()))
        counts = torch.tensor(list(seq.output_counts.values()), dtype=logits_V.dtype)
        logits_V[ids] -= params.presence_penalty + params.frequency_penalty * counts


def _skip(generator: torch.Generator, draws: int) -> None:
    for _ in range(draws):
        torch.rand((), generator=generator)
