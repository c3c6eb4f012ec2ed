"""One token stream being generated: its tokens, how many of them the KV cache holds, and where."""

from __future__ import annotations

import itertools
import time
from array import array
from collections import Counter
from dataclasses import dataclass, field
from enum import Enum

from serve.engine.sampling_params import SamplingParams

_ids = itertools.count()


class Status(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(frozen=True)
class TokenLogprobs:
    """The chosen token's log-probability, its rank (1 = likeliest), and the likeliest tokens beside it."""

    token: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


@dataclass(eq=False)
class Sequence:
    """Tokens `[0, num_computed)` have their keys and values in the blocks of `block_table`, in order.

    Preemption forgets the blocks and sets `num_computed` back to 0: the tokens, generated ones included, are computed
    again as if they were a prompt, so nothing is lost but time.
    """

    prompt_tokens: list[int]
    params: SamplingParams
    index: int = 0
    id: int = field(default_factory=lambda: next(_ids))
    status: Status = Status.WAITING
    tokens: list[int] = field(init=False)
    num_computed: int = 0
    num_cached: int = 0
    num_preemptions: int = 0
    block_table: array[int] = field(default_factory=lambda: array("i"))
    block_digests: list[bytes] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    finish_reason: str | None = None
    arrival: float = field(default_factory=time.perf_counter)
    first_scheduled: float | None = None

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt_tokens)
        self.output_counts: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_prompt(self) -> int:
        return len(self.prompt_tokens)

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - len(self.prompt_tokens)

    @property
    def output_tokens(self) -> list[int]:
        return self.tokens[len(self.prompt_tokens) :]

    @property
    def num_uncomputed(self) -> int:
        return len(self.tokens) - self.num_computed

    def append(self, token: int) -> None:
        self.tokens.append(token)
        self.output_counts[token] += 1
