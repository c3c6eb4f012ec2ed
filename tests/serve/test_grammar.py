"""Guided answers are what the schema asks for, even from a model that knows nothing; bad schemas are refused."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serve.engine import grammar as grammars
from serve.engine.constraints import ANY_OBJECT, Constraint, GrammarError
from serve.engine.grammar import GrammarCompiler
from serve.engine.llm_engine import LLMEngine
from serve.engine.sampling_params import SamplingParams

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["cat", "dog"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def engine(tiny_folder: Callable[[str], Path]) -> LLMEngine:
    return LLMEngine.from_folder(tiny_folder("llama"), dtype="float32", kv_cache_gb=0.01, compile=False)


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"temperature": 1.0, "seed": 3, "top_p": 0.9}])
def test_random_model_writes_what_the_schema_wants(engine: LLMEngine, settings: dict[str, Any]) -> None:
    compiled = engine.grammars.compile(Constraint.schema(SCHEMA))
    params = SamplingParams(max_tokens=200, grammar=compiled, ignore_eos=True, **settings)
    for output in engine.generate([[5, 77], [130, 9, 60]], params):
        assert output.finish_reason == "stop"
        found = json.loads(output.text)
        assert list(found) == ["name", "age", "kind"]
        assert len(found["name"]) <= 5
        assert 0 <= found["age"] <= 99
        assert found["kind"] in ("cat", "dog")
    assert not engine.sampler._matchers


def test_plain_answers_beside_guided_ones_stay_as_they_are(engine: LLMEngine) -> None:
    plain = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    [alone] = engine.generate([[5, 77]], plain)
    guided = SamplingParams(max_tokens=30, temperature=0.0, grammar=engine.grammars.compile(ANY_OBJECT))
    beside, other = engine.generate([[5, 77], [5, 77]], [plain, guided])
    assert beside.token_ids == alone.token_ids
    assert other.text.startswith("{")


@pytest.mark.parametrize(
    ("wanted", "texts"),
    [
        (Constraint("regex", "[ab]{3}c"), {"".join(letters) + "c" for letters in product("ab", repeat=3)}),
        (Constraint("grammar", 'start: "x" tail\ntail: "y" | "z"'), {"xy", "xz"}),
        (Constraint.choice(["a b", 'q"\n\x01', "\\☕"]), {"a b", 'q"\n\x01', "\\☕"}),
    ],
    ids=["regex", "grammar", "choice"],
)
def test_other_constraints(engine: LLMEngine, wanted: Constraint, texts: set[str]) -> None:
    grammar = asyncio.run(engine.grammars.compile_untrusted(wanted))
    params = SamplingParams(max_tokens=40, grammar=grammar, seed=1)
    assert {output.text for output in engine.generate([[5, 77], [9], [60]], params)} <= texts


def test_what_takes_hours_to_compile_is_given_up(engine: LLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the time limit of the process that tries it, and when nobody waits for it; then the next one is compiled."""
    patterns = [{"type": "string", "pattern": f".*{letter}.*"} for letter in "abcdefghijklmnopqrstuvwx"]
    slow, quick = Constraint.schema({"allOf": patterns}), Constraint.schema({"const": "quick"})
    tried: list[asyncio.subprocess.Process] = []
    start = asyncio.create_subprocess_exec

    async def note(*command: Any, **options: Any) -> asyncio.subprocess.Process:
        tried.append(await start(*command, **options))
        return tried[-1]

    async def go() -> None:
        monkeypatch.setattr(asyncio, "create_subprocess_exec", note)
        with pytest.raises(GrammarError, match="too long"):
            await engine.grammars.compile_untrusted(slow)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(engine.grammars.compile_untrusted(slow), 0.3)
        assert [process.returncode for process in tried] == [-signal.SIGKILL] * 2
        await engine.grammars.compile_untrusted(quick)

    asyncio.run(go())


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "wizard"},
        {"type": 5},
        {"$ref": "http://127.0.0.1:1/schema.json"},
        {"$ref": "file:///etc/hostname"},
        {"enum": []},
        {"description": "x" * grammars.MAX_SCHEMA_BYTES},
        {"type": "array", "items": {"type": "integer"}, "uniqueItems": True},
    ],
)
def test_unusable_schemas_are_refused(engine: LLMEngine, schema: dict[str, Any]) -> None:
    with pytest.raises(GrammarError, match="schema"):
        engine.grammars.compile(Constraint.schema(schema))


def test_cache_is_bounded(engine: LLMEngine) -> None:
    compiler = GrammarCompiler(engine.tokenizer, 384, frozenset({2}))
    zero, *others = (Constraint.schema({"const": number}) for number in range(grammars.MAX_CACHED + 1))
    first = compiler.compile(zero)
    assert compiler.compile(zero) is first
    for other in others:
        compiler.compile(other)
    assert len(compiler._cache) == grammars.MAX_CACHED
    assert compiler.compile(zero) is not first


def test_vocabulary_of_the_model_may_be_larger(engine: LLMEngine) -> None:
    matcher = GrammarCompiler(engine.tokenizer, 1000, frozenset({2})).compile(ANY_OBJECT).start()
    logits = np.zeros(1000, np.float32)
    matcher.forbid(logits)
    assert np.isneginf(logits[engine.tokenizer.vocab_size :]).all()
    assert np.isfinite(logits).any()


def test_grammar_that_becomes_too_complex_ends_its_own_answer_only(
    engine: LLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def give_up(*_: object) -> None:
        raise GrammarError("too complex")

    plain = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    guided = SamplingParams(max_tokens=4, temperature=0.0, grammar=engine.grammars.compile(ANY_OBJECT))
    monkeypatch.setattr(grammars.Matcher, "forbid", give_up)
    failed, whole = engine.add([5], guided), engine.add([6], plain)
    outputs = [output for _ in range(4) for output in engine.step()]
    assert [output.seq_id for output in outputs if isinstance(output.error, GrammarError)] == [failed.id]
    assert (failed.finish_reason, whole.num_generated, whole.finish_reason) == ("error", 4, "length")
    assert engine.blocks.num_used == 0 and not engine.has_work
    with pytest.raises(GrammarError, match="too complex"):
        engine.generate([[5], [6]], [guided, plain])
    assert engine.blocks.num_used == 0 and not engine.has_work
