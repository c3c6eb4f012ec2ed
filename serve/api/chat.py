"""/v1/chat/completions: messages through the model's chat template, whole or streamed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from dataclasses import replace

from serve.api.completions import Answer, Json, chunk_usage, finite, usage
from serve.api.errors import bad_request
from serve.api.schema import ChatCompletionRequest, ChatMessage
from serve.api.state import ServedModel, ServerState, new_id
from serve.engine.async_engine import Request
from serve.engine.llm_engine import StepOutput
from serve.engine.sampling_params import SamplingParams
from serve.engine.sequence import TokenLogprobs
from serve.engine.tokenizer import ChatTemplateError, Tokenizer

LONG_CONVERSATION = 16


class ChatCompletion:
    """One request to /v1/chat/completions, from its checked body to its answer."""

    def __init__(self, state: ServerState, body: ChatCompletionRequest) -> None:
        state.check_model(body.model)
        if body.top_logprobs and not body.logprobs:
            raise bad_request("top_logprobs needs logprobs: true", param="top_logprobs")
        self.state, self.body = state, body
        self.id, self.created = new_id("chatcmpl"), int(time.time())
        self.params = self._params()

    def _params(self) -> SamplingParams:
        body = self.body
        limit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        try:
            return body.sampling(self.state.sampling_defaults, limit, logprobs)
        except ValueError as error:
            raise bad_request(str(error)) from None

    async def submit(self) -> Request:
        prompt = await self._prompt()
        grammar = await self.state.grammar(self.body.constraint())
        return self.state.submit([prompt], replace(self.params, grammar=grammar))

    async def _prompt(self) -> list[int]:
        body = self.body
        tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()] if body.tool_choice != "none" else []
        prompted, variables = body.add_generation_prompt is not False, body.chat_template_kwargs
        text = await render(self.state, body.messages, prompted, tools or None, variables)
        [tokens] = await self.state.encode([text], add_special_tokens=False)
        return tokens

    def whole(self, answers: list[Answer]) -> Json:
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": answer.text, "refusal": None},
                "logprobs": self._logprobs(answer.logprobs),
                "finish_reason": answer.finish_reason,
                "stop_reason": answer.stop_reason,
            }
            for index, answer in enumerate(answers)
        ]
        return self._body("chat.completion", choices) | {"usage": usage(answers, self.params.n)}

    async def chunks(self, request: Request) -> AsyncGenerator[Json]:
        answers = [Answer() for _ in range(request.num_answers)]
        options = self.body.stream_options
        async for index, output in self.state.engine.outputs(request):
            first = answers[index].num_prompt == 0
            answers[index].add(output)
            tail = chunk_usage(options, answers, self.params.n)
            if first:
                yield self._chunk(index, {"role": "assistant", "content": ""}) | tail
            if output.text or output.logprobs:
                yield self._chunk(index, {"content": output.text}, self._logprobs(list(output.logprobs))) | tail
            if output.finish_reason is not None:
                yield self._chunk(index, {}, None, output) | tail
        if options is not None and options.include_usage:
            yield self._body("chat.completion.chunk", []) | {"usage": usage(answers, self.params.n)}

    def _chunk(self, index: int, delta: Json, logprobs: Json | None = None, end: StepOutput | None = None) -> Json:
        choice: Json = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}
        if end is not None:
            choice |= {"finish_reason": end.finish_reason, "stop_reason": end.stop_reason}
        return self._body("chat.completion.chunk", [choice])

    def _body(self, kind: str, choices: list[Json]) -> Json:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.state.model_name,
            "choices": choices,
        }

    def _logprobs(self, found: list[TokenLogprobs | None]) -> Json | None:
        if self.params.logprobs is None:
            return None
        return {"content": [_token(self.state.tokenizer, one) for one in found if one is not None], "refusal": None}


async def render(
    state: ServedModel,
    given: list[ChatMessage],
    add_generation_prompt: bool,
    tools: list[Json] | None = None,
    variables: Json | None = None,
) -> str:
    """The conversation as text; a long one in a worker thread, since the checkpoint's template may be slow."""
    messages = [message.for_template() for message in given]
    size = sum(len(message["content"]) for message in messages)
    if size > state.max_model_len * state.tokenizer.longest_token:
        raise bad_request(
            f"the messages have {size} characters and cannot fit into {state.max_model_len} tokens",
            code="context_length_exceeded",
        )
    try:
        if len(messages) > LONG_CONVERSATION:
            return await asyncio.to_thread(
                state.tokenizer.render_chat, messages, add_generation_prompt, tools, variables
            )
        return state.tokenizer.render_chat(messages, add_generation_prompt, tools, variables)
    except ChatTemplateError as error:
        raise bad_request(str(error), param="messages") from None


def _token(tokenizer: Tokenizer, found: TokenLogprobs) -> Json:
    top = [_one(tokenizer, token, logprob) for token, logprob in found.top]
    return _one(tokenizer, found.token, found.logprob) | {"top_logprobs": top}


def _one(tokenizer: Tokenizer, token: int, logprob: float) -> Json:
    text = tokenizer.token_text(token)
    # A token that is a part of a character has no text of its own, and its bytes are not known here.
    return {"token": text, "logprob": finite(logprob), "bytes": None if "\ufffd" in text else list(text.encode())}
