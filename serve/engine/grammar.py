"""JSON schemas as grammars: which tokens may come next, by llguidance.

A schema is compiled once, in milliseconds, and kept for a while; every answer walks through its own copy. Size and
complexity are bounded, because schemas come from clients. The library is imported, and its view of the tokenizer
built, with the first schema.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from serve.engine.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_SCHEMA_BYTES = 64 * 1024
MAX_CACHED = 64
# Between two parts of the JSON text: enough to indent it, not enough for a weak model to lose itself in.
WHITESPACE = r"[ \n\t]{0,20}"
# A tenth of the library's own bounds: some milliseconds of work for each step, a few hundred for compiling.
LIMITS: dict[str, Any] = {"initial_lexer_fuel": 1_000_000, "step_lexer_fuel": 100_000, "step_max_items": 10_000}
LIMITS |= {"max_lexer_states": 25_000, "max_grammar_size": 50_000}
ANY_OBJECT: dict[str, Any] = {"type": "object"}


class GrammarError(ValueError):
    """The grammar cannot be compiled, or became too complex while an answer was written."""


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
            raise GrammarError("the schema became too complex while the answer was written; simplify it")


class Grammar:
    """A compiled schema, as sampling parameters hold it."""

    def __init__(self, compiled: LLMatcher) -> None:
        self._compiled = compiled

    def start(self) -> Matcher:
        return Matcher(self._compiled)


class GrammarCompiler:
    """Compiles for one tokenizer, and remembers the schemas that were asked for last. May be used in any thread."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos = sorted(eos_token_ids)
        self._cache: OrderedDict[str, Grammar] = OrderedDict()
        self._lock = threading.Lock()
        self._view: LLTokenizer | None = None

    def compile(self, schema: dict[str, Any] | bool) -> Grammar:
        """The grammar of JSON texts that `schema` accepts; GrammarError says what is wrong with the schema."""
        text = json.dumps(schema)
        if len(text) > MAX_SCHEMA_BYTES:
            raise GrammarError(f"the schema has {len(text)} bytes; at most {MAX_SCHEMA_BYTES} are accepted")
        with self._lock:
            grammar = self._cache.get(text)
            if grammar is None:
                grammar = self._cache[text] = self._compile(text)
                if len(self._cache) > MAX_CACHED:
                    self._cache.popitem(last=False)
            self._cache.move_to_end(text)
            return grammar

    def _compile(self, schema: str) -> Grammar:
        from llguidance import LLMatcher, LLParserLimits

        overrides: Any = {"whitespace_pattern": WHITESPACE}
        try:
            grammar = LLMatcher.grammar_from_json_schema(schema, overrides=overrides)
        except ValueError as error:
            raise GrammarError(f"the schema cannot be used: {error}") from None
        limits = LLParserLimits(verbose_errors=False, **LIMITS)
        matcher = LLMatcher(self._tokens(), grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise GrammarError(f"the schema cannot be used: {matcher.get_error()}")
        return Grammar(matcher)

    def _tokens(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        if self._view is None:
            try:
                vocab_size = max(self._vocab_size, self._tokenizer.vocab_size)
                self._view = LLTokenizer(self._tokenizer.fast.to_str(), vocab_size, self._eos or None)
            except ValueError as error:
                raise GrammarError(f"this model's tokenizer cannot be guided by a schema: {error}") from None
        return self._view
