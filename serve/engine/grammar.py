"""Which tokens may come next, by llguidance, where an answer must keep to a JSON schema or the like.

A constraint is compiled once, in milliseconds, and kept for a while; every answer walks through its own copy. Size and
complexity are bounded, because constraints come from clients. The library is imported, and its view of the tokenizer
built, with the first one.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from asyncio.subprocess import DEVNULL, PIPE
from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from serve.engine import constraints
from serve.engine.constraints import Constraint, GrammarError, build
from serve.engine.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_SCHEMA_BYTES = 64 * 1024
MAX_CACHED = 64
TOO_SLOW = "it takes too long to compile; simplify it"


class Matcher:
    """The way of one answer through a grammar."""

    def __init__(self, start: LLMatcher) -> None:
        self._matcher = start.deep_copy()

    def forbid(self, logits_V: NDArray[np.float32]) -> None:
        """Set the logits of tokens that may not come next to -inf, in place."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        allowed = np.unpackbits(bits, count=len(logits_V), bitorder="little")
        logits_V[allowed == 0] = -np.inf

    def advance(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._check()

    @property
    def complete(self) -> bool:
        """Nothing may follow but the end."""
        return self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError("what the answer must keep to became too complex while it was written; simplify it")


class Grammar:
    """A compiled constraint, as sampling parameters hold it."""

    def __init__(self, compiled: LLMatcher) -> None:
        self._compiled = compiled

    def start(self) -> Matcher:
        return Matcher(self._compiled)


class GrammarCompiler:
    """Compiles for one tokenizer, and remembers the constraints that came last. May be used in any thread."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos = sorted(eos_token_ids)
        self._cache: OrderedDict[Constraint, Grammar] = OrderedDict()
        self._lock = threading.Lock()
        self._view: LLTokenizer | None = None

    async def compile_untrusted(self, wanted: Constraint) -> Grammar:
        """`compile`, but first in a process of its own, which ends when that takes too long or nobody waits for it."""
        _check_size(wanted)
        if self.cached(wanted) is None:
            await _try(wanted)
        return await asyncio.to_thread(self.compile, wanted)

    def cached(self, wanted: Constraint) -> Grammar | None:
        """The grammar, where it has been compiled not long ago."""
        return self._cache.get(wanted)

    def compile(self, wanted: Constraint) -> Grammar:
        """The grammar of texts that keep to `wanted`; GrammarError says what is wrong with it."""
        _check_size(wanted)
        with self._lock:
            grammar = self._cache.get(wanted)
            if grammar is None:
                grammar = self._cache[wanted] = Grammar(build(self._tokens(), wanted))
                if len(self._cache) > MAX_CACHED:
                    self._cache.popitem(last=False)
            self._cache.move_to_end(wanted)
            return grammar

    def _tokens(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        if self._view is None:
            try:
                vocab_size = max(self._vocab_size, self._tokenizer.vocab_size)
                self._view = LLTokenizer(self._tokenizer.fast.to_str(), vocab_size, self._eos or None)
            except ValueError as error:
                raise GrammarError(f"this model's tokenizer cannot be guided: {error}") from None
        return self._view


def _check_size(wanted: Constraint) -> None:
    if len(wanted.text) > MAX_SCHEMA_BYTES:
        raise GrammarError(
            f"the {wanted.kind} has {len(wanted.text)} characters; up to {MAX_SCHEMA_BYTES} are accepted"
        )


async def _try(wanted: Constraint) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-P", constraints.__file__, stdin=PIPE, stdout=PIPE, stderr=DEVNULL
    )
    try:
        said, _ = await process.communicate(json.dumps([wanted.kind, wanted.text]).encode())
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise GrammarError(f"the {wanted.kind} cannot be used: {TOO_SLOW}")
    if said:
        raise GrammarError(said.decode())
