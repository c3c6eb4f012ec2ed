"""What an answer may be asked to keep to, and its compilation by llguidance.

Run as a program, this says whether the library compiles what stands on standard input: some schemas of a kilobyte take
it hours, outside the bounds that it can be given, so a process tries each that can be killed. It imports nothing else.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

Kind = Literal["schema", "regex", "grammar"]

CPU_SECONDS = 2
# Between two parts of the JSON text: enough to indent it, not enough for a weak model to lose itself in.
WHITESPACE = r"[ \n\t]{0,20}"
# A tenth of the library's own bounds: some milliseconds of work for each step, a few hundred for compiling.
LIMITS: dict[str, Any] = {"initial_lexer_fuel": 1_000_000, "step_lexer_fuel": 100_000, "step_max_items": 10_000}
LIMITS |= {"max_lexer_states": 25_000, "max_grammar_size": 50_000}


class GrammarError(ValueError):
    """The grammar cannot be compiled, or became too complex while an answer was written."""


@dataclass(frozen=True)
class Constraint:
    """A JSON schema, a regular expression, or a grammar in Lark's notation."""

    kind: Kind
    text: str

    @classmethod
    def schema(cls, schema: dict[str, Any] | bool) -> Constraint:
        return cls("schema", json.dumps(schema))

    @classmethod
    def choice(cls, texts: list[str]) -> Constraint:
        """One of `texts`."""
        return cls("grammar", "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts))


ANY_OBJECT = Constraint.schema({"type": "object"})


def build(tokens: LLTokenizer, wanted: Constraint) -> LLMatcher:
    """The beginning of an answer; GrammarError says what is wrong with `wanted`."""
    from llguidance import LLMatcher, LLParserLimits

    overrides: Any = {"whitespace_pattern": WHITESPACE}
    try:
        if wanted.kind == "schema":
            grammar = LLMatcher.grammar_from_json_schema(wanted.text, overrides=overrides)
        elif wanted.kind == "regex":
            grammar = LLMatcher.grammar_from_regex(wanted.text)
        else:
            grammar = LLMatcher.grammar_from_lark(wanted.text)
    except ValueError as error:
        raise GrammarError(f"the {wanted.kind} cannot be used: {error}") from None
    matcher = LLMatcher(tokens, grammar, log_level=0, limits=LLParserLimits(verbose_errors=False, **LIMITS))
    if matcher.is_error():
        raise GrammarError(f"the {wanted.kind} cannot be used: {matcher.get_error()}")
    return matcher


def main() -> int:
    """Read a constraint's kind and text, as a JSON array; write what is wrong with it."""
    from llguidance import LLTokenizer

    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    os.nice(10)
    try:
        build(LLTokenizer("byte"), Constraint(*json.load(sys.stdin)))
    except GrammarError as error:
        sys.stdout.write(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
