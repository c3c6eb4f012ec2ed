"""What one request asks of the sampler, checked once, in OpenAI's and vLLM's words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from serve.engine.grammar import Grammar

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
MAX_N = 16


@dataclass(frozen=True)
class SamplingParams:
    """Sampling of one request; the defaults are plain sampling at temperature 1.

    `temperature=0` is greedy. `top_k=0` and `min_p=0` mean "off". `logprobs=n` asks for the n likeliest tokens beside
    the chosen one at every step, `prompt_logprobs` for the same over the prompt. `grammar` (see `GrammarCompiler`)
    bounds what may be written. Computed prompts are shared among requests of the same `cache_salt`.
    """

    max_tokens: int | None = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    min_tokens: int = 0
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    grammar: Grammar | None = None
    cache_salt: str = ""

    def __post_init__(self) -> None:
        _between("temperature", self.temperature, 0.0, 100.0)
        _between("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _between("min_p", self.min_p, 0.0, 1.0)
        _between("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _between("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _between("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _between("top_k", self.top_k, -1, 2**31 - 1)
        _between("n", self.n, 1, MAX_N)
        _between("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.max_tokens is not None:
            _between("max_tokens", self.max_tokens, 0, 2**31 - 1)
        if self.seed is not None:
            _between("seed", self.seed, -(2**63), 2**63 - 1)
        for name, value in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if value is not None:
                _between(name, value, 0, MAX_LOGPROBS)
        if len(self.stop) > MAX_STOP_STRINGS or not all(1 <= len(text) <= MAX_STOP_LENGTH for text in self.stop):
            raise ValueError(f"stop takes up to {MAX_STOP_STRINGS} strings of 1 to {MAX_STOP_LENGTH} characters")
        for token, bias in self.logit_bias.items():
            _between(f"logit_bias[{token}]", bias, -100.0, 100.0)

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-5

    @property
    def has_penalties(self) -> bool:
        return bool(self.repetition_penalty != 1.0 or self.presence_penalty or self.frequency_penalty)

    @property
    def plain_greedy(self) -> bool:
        """The next token is the arg-max of the logits as they are: the fast path of the sampler."""
        return (
            self.greedy
            and self.logprobs is None
            and not self.has_penalties
            and not self.logit_bias
            and self.min_tokens == 0
            and self.grammar is None
        )


def _between(name: str, value: float, low: float, high: float, open_low: bool = False) -> None:
    too_low = value <= low if open_low else value < low
    if not math.isfinite(value) or too_low or value > high:
        bracket = "(" if open_low else "["
        raise ValueError(f"{name} is {value}, but must lie in {bracket}{low}, {high}]")
