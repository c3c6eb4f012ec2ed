"""The HTTP contract, in process: what is answered, in which shape, and that no input makes a 500."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import PlainTextResponse

from serve.api import completions, parsing
from serve.api.app import build_app
from serve.api.limits import Gate, Limits
from serve.api.metrics import Metrics
from serve.api.state import ServerState
from serve.engine.async_engine import AsyncEngine
from serve.engine.llm_engine import LLMEngine
from serve.engine.sampling_params import SamplingParams
from serve.engine.tokenizer import Tokenizer

CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5, "temperature": 0, "ignore_eos": True}
TEXT = {"prompt": "The quick", "max_tokens": 5, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def engine(tiny_folder: Callable[[str], Path]) -> LLMEngine:
    return LLMEngine.from_folder(tiny_folder("llama"), dtype="float32", kv_cache_gb=0.01, compile=False)


@asynccontextmanager
async def serving(engine: LLMEngine, key: str | None = None, max_queue: int = 64, **limits: Any) -> AsyncIterator[Any]:
    wrapped = AsyncEngine(engine, max_queue)
    state = ServerState(wrapped, "tiny", Limits(**limits), Metrics(wrapped, "tiny"), "tiny-folder", ready=True)
    gate = Gate(build_app(state), key, state.limits)
    wrapped.start()
    transport = httpx.ASGITransport(app=gate, raise_app_exceptions=False)
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            client.state, client.gate = state, gate
            yield client
    finally:
        wrapped.stop()
        assert engine.blocks.num_used == 0


def ask(engine: LLMEngine, path: str, body: Any = None, method: str = "POST", **settings: Any) -> httpx.Response:
    async def go() -> httpx.Response:
        async with serving(engine, **settings) as client:
            content = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
            return await client.request(method, path, content=content)

    return asyncio.run(go())


def chunks_of(response: httpx.Response) -> list[dict[str, Any]]:
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


def assert_error(response: httpx.Response, status: int, code: str | None = None) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str) and error["message"]
    assert isinstance(error["type"], str)
    assert error["code"] is None or isinstance(error["code"], str)
    if code is not None:
        assert error["code"] == code


def test_models(engine: LLMEngine) -> None:
    listing = ask(engine, "/v1/models", method="GET").json()
    assert listing["object"] == "list"
    assert listing["data"][0]["id"] == "tiny"
    assert listing["data"][0]["max_model_len"] == 512
    assert ask(engine, "/v1/models/tiny", method="GET").json() == listing["data"][0] | {
        "created": ask(engine, "/v1/models/tiny", method="GET").json()["created"]
    }
    assert_error(ask(engine, "/v1/models/other", method="GET"), 404, "model_not_found")


def test_chat_answer_has_openai_shape(engine: LLMEngine) -> None:
    answer = ask(engine, "/v1/chat/completions", CHAT).json()
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    [choice] = answer["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["finish_reason"] == "length"
    usage = answer["usage"]
    assert usage["completion_tokens"] == 5
    assert usage["total_tokens"] == usage["prompt_tokens"] + 5


def test_stream_joins_to_the_whole_answer(engine: LLMEngine) -> None:
    whole = ask(engine, "/v1/chat/completions", CHAT).json()
    response = ask(engine, "/v1/chat/completions", CHAT | {"stream": True, "stream_options": {"include_usage": True}})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    *parts, last = chunks_of(response)
    assert parts[0]["choices"][0]["delta"]["role"] == "assistant"
    assert all(part["usage"] is None for part in parts)
    assert last["choices"] == []
    assert {**last["usage"], "prompt_tokens_details": None} == {**whole["usage"], "prompt_tokens_details": None}
    text = "".join(part["choices"][0]["delta"].get("content", "") for part in parts)
    assert text == whole["choices"][0]["message"]["content"]
    assert [part["choices"][0]["finish_reason"] for part in parts if part["choices"][0]["finish_reason"]] == ["length"]
    assert len({part["id"] for part in [*parts, last]}) == 1


@pytest.mark.parametrize(("path", "body"), [("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)])
def test_usage_in_every_chunk(engine: LLMEngine, path: str, body: dict[str, Any]) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *parts, last = chunks_of(ask(engine, path, body | {"stream": True, "stream_options": options}))
    counts = [part["usage"]["completion_tokens"] for part in parts]
    assert counts == sorted(counts) and counts[0] < 5 and counts[-1] == last["usage"]["completion_tokens"] == 5


def test_stream_without_usage_has_no_usage(engine: LLMEngine) -> None:
    parts = chunks_of(ask(engine, "/v1/completions", TEXT | {"stream": True}))
    assert all("usage" not in part for part in parts)
    whole = ask(engine, "/v1/completions", TEXT).json()
    assert "".join(part["choices"][0]["text"] for part in parts) == whole["choices"][0]["text"]


def test_several_prompts_and_answers_keep_their_order(engine: LLMEngine) -> None:
    prompts = ["The quick", "In the beginning", "def main"]
    body = TEXT | {"prompt": prompts, "n": 2, "seed": 5, "temperature": 1.0}
    answer = ask(engine, "/v1/completions", body).json()
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    alone = [ask(engine, "/v1/completions", body | {"prompt": p}).json()["choices"] for p in prompts]
    assert [c["text"] for c in answer["choices"]] == [c["text"] for pair in alone for c in pair]
    assert alone[0][0]["text"] != alone[0][1]["text"]
    streamed: dict[int, str] = {}
    for part in chunks_of(ask(engine, "/v1/completions", body | {"stream": True})):
        [choice] = part["choices"]
        streamed[choice["index"]] = streamed.get(choice["index"], "") + choice["text"]
    assert [streamed[index] for index in range(6)] == [c["text"] for c in answer["choices"]]


def test_token_prompts_and_tokenize_agree(engine: LLMEngine) -> None:
    tokens = ask(engine, "/tokenize", {"prompt": "The quick"}).json()
    assert tokens["count"] == len(tokens["tokens"])
    assert ask(engine, "/detokenize", {"tokens": tokens["tokens"]}).json() == {"prompt": "The quick"}
    by_text = ask(engine, "/v1/completions", TEXT).json()["choices"]
    assert ask(engine, "/v1/completions", TEXT | {"prompt": tokens["tokens"]}).json()["choices"] == by_text
    assert ask(engine, "/v1/completions", TEXT | {"prompt": [tokens["tokens"]]}).json()["choices"] == by_text
    chat = ask(engine, "/tokenize", {"messages": CHAT["messages"]}).json()
    usage = ask(engine, "/v1/chat/completions", CHAT).json()["usage"]
    assert chat["count"] == usage["prompt_tokens"]


def test_scoring_as_lm_eval_asks_for_it(engine: LLMEngine) -> None:
    body = {"prompt": "The quick brown", "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}
    [choice] = ask(engine, "/v1/completions", body).json()["choices"]
    found = choice["logprobs"]
    assert found["token_logprobs"][0] is None
    assert found["top_logprobs"][0] is None
    assert all(value <= 0 for value in found["token_logprobs"][1:])
    assert choice["text"].startswith("The quick brown")
    assert len({len(found[name]) for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")}) == 1
    assert "".join(found["tokens"]) == choice["text"]
    scored = ask(engine, "/v1/completions", body | {"max_tokens": 0}).json()
    assert scored["choices"][0]["text"] == "The quick brown"
    assert scored["choices"][0]["logprobs"]["token_logprobs"][1:] == pytest.approx(found["token_logprobs"][1:-1])


def test_chat_logprobs(engine: LLMEngine) -> None:
    body = CHAT | {"logprobs": True, "top_logprobs": 3}
    [choice] = ask(engine, "/v1/chat/completions", body).json()["choices"]
    tokens = choice["logprobs"]["content"]
    assert len(tokens) == 5
    assert all(len(token["top_logprobs"]) == 3 for token in tokens)
    assert all(token["logprob"] == pytest.approx(token["top_logprobs"][0]["logprob"]) for token in tokens)
    assert ask(engine, "/v1/chat/completions", CHAT | {"top_logprobs": 0}).json()["choices"][0]["logprobs"] is None


def test_tools_reach_the_chat_template(
    tiny_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the template writes them, with calls and their results; left out where no tool is to be called."""
    folder = tmp_path / "tools"
    shutil.copytree(tiny_folder("llama"), folder)
    template = (
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m | tojson }}{% endfor %}{{ mood }}"
        "{% if documents %}{{ documents[0].text }}{% endif %}{{ reasoning_effort }}"
    )
    (folder / "chat_template.jinja").write_text(template)
    own = LLMEngine.from_folder(folder, dtype="float32", kv_cache_gb=0.01, compile=False)
    seen: list[str] = []
    encode = own.tokenizer.encode

    def note(text: str, special: bool = True) -> list[int]:
        seen.append(text)
        return encode(text, special)

    monkeypatch.setattr(own.tokenizer, "encode", note)
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    called, broken = (
        {"id": "1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
        for arguments in ('{"city": "Köln"}', '{"city": "\\ud800"}')
    )
    messages = [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": None, "tool_calls": [called, broken]},
        {"role": "tool", "content": "dry", "tool_call_id": "1"},
    ]
    for choice in ("auto", "none"):
        body = CHAT | {"messages": messages, "tools": [tool], "tool_choice": choice}
        assert ask(own, "/v1/chat/completions", body).status_code == 200
    offered, withheld = seen
    assert offered == json.dumps([tool]) + withheld
    assert '"name": "weather", "arguments": {"city": "Köln"}' in withheld and '"tool_call_id": "1"' in withheld
    assert json.dumps(broken["function"]["arguments"]) in withheld
    seen.clear()
    for path in ("/v1/chat/completions", "/tokenize"):
        body = {"messages": messages, "max_tokens": 1, "chat_template_kwargs": {"mood": "cheerful", "self": 1}}
        assert ask(own, path, body).status_code == 200
    assert seen == [withheld + "cheerful"] * 2
    seen.clear()
    own_fields = {"documents": [{"text": "It rains."}], "reasoning_effort": "low"}
    for body in (own_fields, {"chat_template_kwargs": own_fields}):
        assert ask(own, "/v1/chat/completions", CHAT | {"messages": messages} | body).status_code == 200
    assert seen == [withheld + "It rains.low"] * 2


def test_templates_may_mark_what_the_model_writes(tiny_folder: Callable[[str], Path]) -> None:
    tokenizer = Tokenizer.from_folder(tiny_folder("llama"))
    tokenizer.chat_template = (
        "{% for m in messages %}\n{% generation %}\n{{ m.content }}<|im_end|>\n{% endgeneration %}\n{% endfor %}"
    )
    assert tokenizer.render_chat([{"role": "user", "content": text} for text in "ab"]) == "a<|im_end|>\nb<|im_end|>\n"


def test_templates_write_json_as_transformers_does(tiny_folder: Callable[[str], Path]) -> None:
    tokenizer = Tokenizer.from_folder(tiny_folder("llama"))
    tokenizer.chat_template = (
        "{{ messages[0] | tojson }}|{{ messages[0] | tojson(separators=(',', ':'), sort_keys=true) }}"
        "|{{ messages[0].content | tojson(ensure_ascii=true) }}|{{ [1] | tojson(indent=1) }}"
    )
    written = tokenizer.render_chat([{"role": "user", "content": "<ö>"}])
    assert written.split("|") == [
        '{"role": "user", "content": "<ö>"}', '{"content":"<ö>","role":"user"}', r'"<\u00f6>"', "[\n 1\n]",
    ]  # fmt: skip


def test_stop_string_ends_the_text(engine: LLMEngine) -> None:
    body = TEXT | {"max_tokens": 30}
    text = ask(engine, "/v1/completions", body).json()["choices"][0]["text"]
    stop = text[7:10]
    [choice] = ask(engine, "/v1/completions", body | {"stop": stop}).json()["choices"]
    assert choice["text"] == text[: text.index(stop)]
    assert choice["finish_reason"] == "stop"
    assert choice["stop_reason"] == stop
    [later] = ask(engine, "/v1/completions", body | {"stop": text[0], "min_tokens": 10}).json()["choices"]
    assert later["text"].startswith(text[0]) and len(later["text"]) > 1


def test_the_token_that_ends_an_answer_shows_where_stop_strings_do(engine: LLMEngine) -> None:
    written = ask(engine, "/v1/completions", TEXT | {"logprobs": 0}).json()["choices"][0]["logprobs"]["tokens"]
    [end] = ask(engine, "/tokenize", {"prompt": written[3], "add_special_tokens": False}).json()["tokens"]
    count = written.index(written[3])
    body = TEXT | {"stop_token_ids": [end]}
    for more, texts in (({}, written[:count]), ({"include_stop_str_in_output": True}, written[: count + 1])):
        for special in (True, False):
            [choice] = ask(engine, "/v1/completions", body | more | {"skip_special_tokens": special}).json()["choices"]
            assert (choice["text"], choice["stop_reason"]) == ("".join(texts), end)


def test_long_work_is_done_beside_the_event_loop(engine: LLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """However it is divided: many short prompts, many tokens, a body of many numbers."""
    threads: list[threading.Thread] = []

    def noting(work: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*given: Any, **named: Any) -> Any:
            threads.append(threading.current_thread())
            return work(*given, **named)

        return noted

    monkeypatch.setattr(engine.tokenizer, "encode", noting(engine.tokenizer.encode))
    monkeypatch.setattr(engine.tokenizer, "decode", noting(engine.tokenizer.decode))
    monkeypatch.setattr(parsing, "parse_json", noting(parsing.parse_json))
    for path, body in (
        ("/v1/completions", TEXT | {"prompt": ["word " * 20] * 50, "max_tokens": 0}),
        ("/detokenize", {"tokens": [7] * 5000}),
        ("/detokenize", {"tokens": [5] * 50_000}),
    ):
        threads.clear()
        assert ask(engine, path, body).status_code == 200
        assert threading.main_thread() not in threads[1:]  # the first reads the body
    assert threading.main_thread() not in threads
    monkeypatch.undo()
    monkeypatch.setattr(completions, "legacy_logprobs", noting(completions.legacy_logprobs))
    for stream in (False, True):
        threads.clear()
        scored = TEXT | {"prompt": [7] * 400, "echo": True, "logprobs": 20, "max_tokens": 0, "stream": stream}
        assert ask(engine, "/v1/completions", scored).status_code == 200
        assert threads and threading.main_thread() not in threads


def test_large_work_waits_for_its_turn_and_small_does_not(engine: LLMEngine) -> None:
    running: list[int] = []

    def work() -> int:
        running.append(1)
        assert len(running) == 1
        time.sleep(0.05)
        running.pop()
        return 5

    async def go() -> None:
        async with serving(engine) as client:
            aside = client.state.aside
            large = [asyncio.ensure_future(aside(10**6, work)) for _ in range(4)]
            await asyncio.sleep(0.01)
            large[0].cancel()  # its client hung up; the work itself goes on
            assert await aside(1, lambda: 7) == 7 and running
            assert await asyncio.gather(*large[1:]) == [5, 5, 5]

    asyncio.run(go())


BAD_BODIES = [
    b"",
    b"{",
    b"[]",
    b"null",
    b'"text"',
    b"\xff\xfe",
    b'{"prompt": NaN}',
    b'{"prompt": "a", "temperature": NaN}',
    b'{"prompt": "a", "temperature": 1e400}',
    b'{"prompt": "a", "temperature": -1}',
    b'{"prompt": "a", "temperature": "hot"}',
    b'{"prompt": "a", "temperature": true}',
    b'{"prompt": "a", "max_tokens": -1}',
    b'{"prompt": "a", "max_tokens": 1.5}',
    b'{"prompt": "a", "max_tokens": 99999999999999999999999999}',
    b'{"prompt": "a", "n": 0}',
    b'{"prompt": "a", "n": 100000}',
    b'{"prompt": "a", "logprobs": 1000}',
    b'{"prompt": "a", "top_p": 0}',
    b'{"prompt": "a", "seed": 1.5}',
    b'{"prompt": "a", "stop": [""]}',
    b'{"prompt": "a", "stop": ["1","2","3","4","5","6","7","8","9","a","b","c","d","e","f","g","h"]}',
    b'{"prompt": "a", "logit_bias": {"x": 1}}',
    b'{"prompt": "a", "logit_bias": {"-1": 1}}',
    b'{"prompt": "a", "logit_bias": {"99999": 1}}',
    b'{"prompt": "a", "stop_token_ids": [99999]}',
    b'{"prompt": "a", "best_of": 5}',
    b'{"prompt": "a", "suffix": "b"}',
    b'{"prompt": ""}',
    b'{"prompt": []}',
    b'{"prompt": [[]]}',
    b'{"prompt": [1, "a"]}',
    b'{"prompt": [-1]}',
    b'{"prompt": [99999]}',
    b'{"prompt": [1.5]}',
    b'{"prompt": {"a": 1}}',
    b'{"prompt": "\\ud800"}',
    b'{"max_tokens": 3}',
    b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"prompt": "a", "user": ' + b"[" * 100 + b"]" * 100 + b"}",
    b'{"prompt": ' + json.dumps([3] * 600).encode() + b"}",
    json.dumps({"prompt": "word " * 5000}).encode(),
]


def test_bad_completion_bodies_get_400(engine: LLMEngine) -> None:
    async def go() -> None:
        async with serving(engine) as client:
            for body in BAD_BODIES:
                for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
                    response = await client.post(path, content=body)
                    if path == "/v1/completions" or response.status_code != 200:
                        assert_error(response, 400)
                streamed = await client.post("/v1/completions", content=body.replace(b"{", b'{"stream": true, ', 1))
                assert_error(streamed, 400)
            assert (await client.post("/v1/completions", json=TEXT)).status_code == 200
            assert (await client.get("/health")).status_code == 200

    asyncio.run(go())


@pytest.mark.parametrize(
    "change",
    [
        {"messages": []},
        {"messages": "Hello"},
        {"messages": [{"role": "wizard", "content": "x"}]},
        {"messages": [{"content": "x"}]},
        {"messages": [{"role": "user", "content": 5}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
        {"top_logprobs": 2},
        {"chat_template_kwargs": {"tools": []}},
        {"response_format": {"type": "wizard"}},
        {"max_completion_tokens": 0},
        {"tool_choice": "required"},
        {"continue_final_message": True},
        {"structured_outputs": {}},
        {"structured_outputs": {"regex": "a", "grammar": "start: x"}},
        {"structured_outputs": {"regex": "(a"}},
        {"structured_outputs": {"grammar": "start: nothing"}},
        {"structured_outputs": {"choice": []}},
        {"structured_outputs": {"json_object": False}},
        {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
        {"guided_regex": "a"},
        {"guided_choice": ["a"]},
        {"functions": [{"name": "f"}]},
        {"function_call": "auto"},
        {"bad_words": ["a"]},
        {"allowed_token_ids": [1]},
        {"truncate_prompt_tokens": -1},
        {"use_beam_search": True},
        {"prompt_logprobs": 0},
        {"logits_processors": ["f"]},
        {"prompt_embeds": "AAAA"},
        {"best_of": 2},
        {"echo": True},
        {"add_special_tokens": True},
        {"chat_template": "{{ messages }}"},
        {"chat_template_kwargs": {"chat_template": "x"}},
        {"documents": "text"},
        {"reasoning_effort": 3},
        {"cache_salt": ""},
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "wizard"}}}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": []}}},
        {"model": 5},
    ],
)
def test_bad_chat_bodies_get_400(engine: LLMEngine, change: dict[str, Any]) -> None:
    assert_error(ask(engine, "/v1/chat/completions", CHAT | change), 400)


def test_answers_keep_to_a_schema(engine: LLMEngine) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "flag", "schema": schema, "strict": True}}
    body = CHAT | {"max_tokens": 60, "response_format": wanted}
    whole = ask(engine, "/v1/chat/completions", body).json()["choices"][0]
    assert whole["finish_reason"] == "stop"
    assert isinstance(json.loads(whole["message"]["content"])["a"], bool)
    parts = chunks_of(ask(engine, "/v1/chat/completions", body | {"stream": True}))
    assert "".join(part["choices"][0]["delta"].get("content", "") for part in parts) == whole["message"]["content"]
    plain = TEXT | {"max_tokens": 60, "guided_json": schema}
    assert set(json.loads(ask(engine, "/v1/completions", plain).json()["choices"][0]["text"])) == {"a"}
    for own, text in (({"choice": ["cat", "dog"]}, {"cat", "dog"}), ({"regex": "a[bc]"}, {"ab", "ac"})):
        [choice] = ask(engine, "/v1/completions", TEXT | {"structured_outputs": own}).json()["choices"]
        assert choice["text"] in text
    start = ask(engine, "/v1/chat/completions", CHAT | {"response_format": {"type": "json_object"}}).json()
    assert start["choices"][0]["message"]["content"].startswith("{")


def test_schema_that_takes_too_long_to_compile_is_400_and_the_next_is_served(engine: LLMEngine) -> None:
    patterns = [{"type": "string", "pattern": f".*{letter}.*"} for letter in "abcdefghijklmnopqrstuvwx"]
    slow = CHAT | {"structured_outputs": {"json": {"allOf": patterns}}}

    async def go() -> None:
        async with serving(engine, compile_timeout=0.5) as client:
            assert_error(await client.post("/v1/chat/completions", json=slow), 400, "invalid_schema")
            client.state.limits.compile_timeout = 5.0
            quick = CHAT | {"structured_outputs": {"json": {"const": 1}}}
            assert (await client.post("/v1/chat/completions", json=quick)).status_code == 200
            client.state.limits.compile_timeout, client.state.limits.compile_wait = 0.01, 0.01
            async with client.state._compiling:  # others are compiled, for longer than one may wait
                assert (await client.post("/v1/chat/completions", json=quick)).status_code == 200  # is known
                new = CHAT | {"structured_outputs": {"json": {"const": 2}}}
                refused = await client.post("/v1/chat/completions", json=new)
                assert_error(refused, 429, "queue_full")
                assert int(refused.headers["retry-after"]) > 0

    asyncio.run(go())


def test_a_field_that_is_not_served_is_named_with_what_is(engine: LLMEngine) -> None:
    error = ask(engine, "/v1/completions", TEXT | {"guided_regex": "a"}).json()["error"]
    assert error["param"] == "guided_regex" and '{"regex": ...}' in error["message"]


def test_defaults_of_what_is_not_served_are_accepted(engine: LLMEngine) -> None:
    """As clients send them."""
    none = ("chat_template", "documents", "reasoning_effort", "prompt_logprobs", "truncate_prompt_tokens", "cache_salt")
    body = dict.fromkeys((*none, "logits_processors", "prompt_embeds", "functions", "bad_words"))
    body |= {"use_beam_search": False, "length_penalty": 1.0, "best_of": 1, "logits_processors": [], "echo": False}
    assert ask(engine, "/v1/completions", TEXT | body | {"add_special_tokens": True}).status_code == 200
    assert ask(engine, "/v1/chat/completions", CHAT | body | {"add_special_tokens": False}).status_code == 200
    for field, value in (("use_beam_search", True), ("prompt_logprobs", 1), ("truncate_prompt_tokens", 5)):
        refused = ask(engine, "/v1/completions", TEXT | {field: value})
        assert_error(refused, 400)
        assert refused.json()["error"]["param"] == field


def test_prompts_are_shared_within_a_salt(engine: LLMEngine) -> None:
    body = TEXT | {"prompt": list(range(3, 100))}
    salts = ["one", "two", "one"]
    answers = [ask(engine, "/v1/completions", body | {"cache_salt": salt}).json() for salt in salts]
    assert [one["usage"]["prompt_tokens_details"]["cached_tokens"] for one in answers] == [0, 0, 96]
    assert len({one["choices"][0]["text"] for one in answers}) == 1


def test_content_parts_are_joined(engine: LLMEngine) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    body = CHAT | {"messages": [{"role": "user", "content": parts}]}
    whole, joined = (ask(engine, "/v1/chat/completions", b).json() for b in (CHAT, body))
    assert whole["choices"] == joined["choices"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("POST", "/v1/models", 405),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/health", 405),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/%00%ff", 404),
    ],
)
def test_other_routes_answer_in_openai_shape(engine: LLMEngine, method: str, path: str, status: int) -> None:
    assert_error(ask(engine, path, method=method), status)


def test_unknown_model_is_404(engine: LLMEngine) -> None:
    assert_error(ask(engine, "/v1/completions", TEXT | {"model": "gpt-5"}), 404, "model_not_found")
    assert ask(engine, "/v1/completions", TEXT | {"model": "tiny-folder"}).status_code == 200


def test_other_media_types_are_415(engine: LLMEngine) -> None:
    async def go() -> httpx.Response:
        async with serving(engine) as client:
            return await client.post("/v1/completions", content="a=b", headers={"content-type": "text/csv"})

    assert_error(asyncio.run(go()), 415)


def test_every_route_but_health_and_the_page_wants_the_key(engine: LLMEngine) -> None:
    async def go() -> None:
        async with serving(engine, key="sësame") as client:
            routes = {
                (m, r.path)
                for r in client.state and client.gate.app.routes
                for m in getattr(r, "methods", ())
                if m != "HEAD"
            }
            assert len(routes) > 12
            for method, path in sorted(routes):
                path = path.replace("{model_id:path}", "tiny")
                for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic sësame".encode()}):
                    response = await client.request(method, path, headers=headers)
                    if path not in ("/health", "/"):
                        assert_error(response, 401, "invalid_api_key")
            right = {"authorization": "Bearer sësame".encode()}
            assert (await client.get("/v1/models", headers=right)).status_code == 200
            assert (await client.get("/health")).status_code == 200
            assert (await client.get("/")).status_code == 200
            assert_error(await client.get("/invocations"), 401)

    asyncio.run(go())


def test_a_browser_may_ask_without_the_key_what_it_may_send() -> None:
    """A preflight carries none, and CORS answers it before any route; without an Origin it would reach the route."""

    async def go() -> None:
        whole = {"origin": "http://page", "access-control-request-method": "POST"}
        app = CORSMiddleware(PlainTextResponse("served"), allow_origins=["*"], allow_methods=["*"])
        transport = httpx.ASGITransport(app=Gate(app, "sesame", Limits()))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            answer = await client.options("/v1/models", headers=whole)
            assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "*")
            assert answer.text != "served"
            assert_error(await client.post("/v1/models", headers=whole), 401)
            for name in whole:
                assert_error(await client.options("/v1/models", headers={name: whole[name]}), 401)

    asyncio.run(go())


def test_large_bodies_are_413(engine: LLMEngine) -> None:
    async def chunked() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b" " * 1000

    async def go() -> None:
        async with serving(engine, max_body_bytes=10_000) as client:
            assert_error(await client.post("/v1/completions", content=b" " * 20_000), 413, "too_large")
            assert_error(await client.post("/v1/completions", content=chunked()), 413, "too_large")
            assert (await client.post("/v1/completions", json=TEXT)).status_code == 200

    asyncio.run(go())


def test_a_connection_whose_body_is_not_read_ends(engine: LLMEngine) -> None:
    """Or a client without the key could hold it for ever."""

    async def go() -> None:
        async with serving(engine, key="sesame") as client:
            refused = await client.post("/v1/completions", json=TEXT)
            assert_error(refused, 401)
            assert refused.headers["connection"] == "close"
            assert "connection" not in (await client.get("/v1/models")).headers

    asyncio.run(go())


def test_slow_bodies_are_408(engine: LLMEngine) -> None:
    async def dribble() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(5)
        yield b"}"

    async def go() -> httpx.Response:
        async with serving(engine, read_timeout=0.1) as client:
            return await client.post("/v1/completions", content=dribble())

    assert_error(asyncio.run(go()), 408)


def test_full_queue_is_429(engine: LLMEngine) -> None:
    async def go() -> list[httpx.Response]:
        async with serving(engine, max_queue=4) as client:
            bodies = [TEXT | {"max_tokens": 60, "n": 8} for _ in range(12)]
            return await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies))

    responses = asyncio.run(go())
    refused = [response for response in responses if response.status_code != 200]
    assert 0 < len(refused) < 12
    for response in refused:
        assert_error(response, 429, "queue_full")
        assert int(response.headers["retry-after"]) > 0


def test_finished_answers_make_room(engine: LLMEngine) -> None:
    async def go() -> None:
        async with serving(engine, max_queue=0) as client:
            room = engine.max_num_seqs
            wrapped = client.state.engine
            long = wrapped.submit([[7]] * room, SamplingParams(max_tokens=2, ignore_eos=True))
            ends = 0
            async for _, output in wrapped.outputs(long):
                ends += output.finish_reason is not None
                if ends == room - 1:
                    break
            assert wrapped._unanswered <= 1
            assert (await client.post("/v1/completions", json=TEXT)).status_code == 200
            client.state.forget(long)
            assert wrapped._unanswered == 0

    asyncio.run(go())


def test_more_answers_than_the_queue_holds_are_400(engine: LLMEngine) -> None:
    room = 4 + engine.max_num_seqs
    body = TEXT | {"max_tokens": 1, "prompt": ["a"] * (room // 4), "n": 4}
    assert ask(engine, "/v1/completions", body, max_queue=4).status_code == 200
    refused = ask(engine, "/v1/completions", body | {"n": 5}, max_queue=4)
    assert_error(refused, 400)
    assert f"asks for {room // 4 * 5} answers" in refused.text and f"up to {room}" in refused.text


def test_time_limit_ends_the_answer(engine: LLMEngine) -> None:
    long = TEXT | {"max_tokens": 450}
    assert_error(ask(engine, "/v1/completions", long, request_timeout=0.05), 504, "timeout")
    response = ask(engine, "/v1/completions", long | {"stream": True}, request_timeout=0.05)
    assert "[DONE]" not in response.text
    assert json.loads(response.text.split("data: ")[-1])["error"]["code"] == "timeout"


def test_draining_refuses_new_work(engine: LLMEngine) -> None:
    async def go() -> None:
        async with serving(engine) as client:
            client.state.ready, client.gate.draining = False, True
            assert_error(await client.get("/ready"), 503)
            refused = await client.post("/v1/completions", json=TEXT)
            assert_error(refused, 503, "shutting_down")
            assert "retry-after" in refused.headers
            assert (await client.get("/health")).status_code == 200
            assert client.gate.num_open == 0

    asyncio.run(go())


def test_a_body_on_its_way_is_waited_for(engine: LLMEngine) -> None:
    async def go() -> None:
        async with serving(engine) as client:
            gate, whole = client.gate, json.dumps(TEXT).encode()

            async def pieces() -> AsyncIterator[bytes]:
                yield whole[:5]
                gate.draining = True
                seen.append(gate.num_open)
                yield whole[5:]

            seen: list[int] = []
            assert (await client.post("/v1/completions", content=pieces())).status_code == 200
            assert seen == [1] and gate.num_open == 0

    asyncio.run(go())


def test_dead_engine_ends_streams_with_an_error(tiny_folder: Callable[[str], Path]) -> None:
    engine = LLMEngine.from_folder(tiny_folder("llama"), dtype="float32", kv_cache_gb=0.01, compile=False)
    steps = 0

    def failing_step() -> Any:
        nonlocal steps
        steps += 1
        if steps > 3:
            engine.scheduler.finish(engine.scheduler.running[0])
            raise RuntimeError("injected")
        return LLMEngine.step(engine)

    engine.step = failing_step

    async def go() -> None:
        async with serving(engine) as client:
            response = await client.post("/v1/chat/completions", json=CHAT | {"stream": True, "max_tokens": 50})
            assert "[DONE]" not in response.text
            last = json.loads(response.text.strip().split("data: ")[-1])
            assert last["error"]["code"] == "engine_dead"
            assert_error(await client.get("/health"), 503, "engine_dead")
            assert_error(await client.get("/ready"), 503)
            assert_error(await client.post("/v1/completions", json=TEXT), 503, "engine_dead")

    asyncio.run(go())


def test_answer_that_is_not_finite_fails_alone(engine: LLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = engine.runner.sample_logits

    def damaged(hidden: Any, step: list[Any]) -> Any:
        logits = sample(hidden, step).clone()
        sampling = [item.seq for item in step if item.samples]
        for row, seq in enumerate(sampling):
            if seq.params.top_p < 1:
                logits[row, 7] = float("nan")
        return logits

    monkeypatch.setattr(engine.runner, "sample_logits", damaged)

    async def go() -> None:
        async with serving(engine) as client:
            bad = TEXT | {"temperature": 1, "top_p": 0.9}
            answers = await asyncio.gather(*(client.post("/v1/completions", json=body) for body in (TEXT, bad, TEXT)))
            assert [answer.status_code for answer in answers] == [200, 500, 200]
            assert_error(answers[1], 500, "internal_error")
            stream = await client.post("/v1/completions", json=bad | {"stream": True})
            assert "internal_error" in stream.text and "[DONE]" not in stream.text
            assert (await client.get("/health")).status_code == 200

    asyncio.run(go())


def test_metrics_count(engine: LLMEngine) -> None:
    before = engine.stats.generated_tokens

    async def go() -> str:
        async with serving(engine) as client:
            await client.post("/v1/completions", json=TEXT)
            counts = (await client.get("/metrics")).text
            gone = client.state.submit([[7], [8]], SamplingParams(max_tokens=50))
            client.state.forget(gone)
            client.state.forget(gone)
            aborts = 'vllm:request_success_total{model_name="tiny",finished_reason="abort"} '
            assert f"{aborts}0\n" in counts and f"{aborts}2\n" in (await client.get("/metrics")).text
            return counts

    text = asyncio.run(go())
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values['vllm:num_requests_running{model_name="tiny"}']) == 0
    assert float(values['vllm:request_success_total{model_name="tiny",finished_reason="length"}']) == 1
    assert float(values['vllm:generation_tokens_total{model_name="tiny"}']) - before == 5
    assert float(values['vllm:time_to_first_token_seconds_count{model_name="tiny"}']) == 1
    assert float(values['vllm:inter_token_latency_seconds_count{model_name="tiny"}']) == 4


def test_openapi_document_names_every_route(engine: LLMEngine) -> None:
    document = ask(engine, "/openapi.json", method="GET").json()
    assert {"/v1/completions", "/v1/chat/completions", "/v1/models", "/tokenize", "/health"} <= set(document["paths"])
    text = json.dumps(document)
    for reference in {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}:
        assert reference in document["components"]["schemas"]


def test_page_is_self_contained(engine: LLMEngine) -> None:
    page = ask(engine, "/", method="GET").text
    assert "<!doctype html>" in page
    assert "https://" not in page
    assert page.count("http://") == page.count("http://www.w3.org")
