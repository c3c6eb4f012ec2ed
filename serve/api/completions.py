"""/v1/completions: text or token prompts, several at once, with echo and log-probabilities as lm-eval asks for them."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from serve.api.errors import bad_request
from serve.api.schema import CompletionRequest, StreamOptions
from serve.api.state import ServerState, new_id
from serve.engine.async_engine import Request
from serve.engine.llm_engine import StepOutput
from serve.engine.sampling_params import SamplingParams
from serve.engine.sequence import TokenLogprobs
from serve.engine.tokenizer import Tokenizer

Json = dict[str, Any]


@dataclass
class Answer:
    """One choice as it grows."""

    text: str = ""
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    num_prompt: int = 0
    num_generated: int = 0
    num_cached: int = 0

    def add(self, output: StepOutput) -> None:
        self.text += output.text
        self.tokens += output.tokens
        self.logprobs += output.logprobs
        self.finish_reason, self.stop_reason = output.finish_reason, output.stop_reason
        self.num_prompt, self.num_generated = output.num_prompt, output.num_generated
        self.num_cached = output.num_cached


async def collect(state: ServerState, request: Request) -> list[Answer]:
    """All answers, complete."""
    answers = [Answer() for _ in range(request.num_answers)]
    async for index, output in state.engine.outputs(request):
        if output.prompt_logprobs is not None:
            answers[index].logprobs += output.prompt_logprobs
        answers[index].add(output)
    return answers


def size(answers: list[Answer]) -> int:
    """Log-probabilities in them, more or less."""
    return sum(1 if one is None else 1 + len(one.top) for answer in answers for one in answer.logprobs)


def usage(answers: list[Answer], n: int) -> Json:
    """Tokens read and written; a prompt counts once, however many answers it has."""
    prompt = sum(answer.num_prompt for answer in answers[::n])
    completion = sum(answer.num_generated for answer in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(answer.num_cached for answer in answers[::n])},
    }


def chunk_usage(options: StreamOptions | None, answers: list[Answer], n: int) -> Json:
    """What a chunk says of usage: nothing, null before the last, or what has been used so far."""
    if options is None or not options.include_usage:
        return {}
    return {"usage": usage(answers, n) if options.continuous_usage_stats else None}


class Completion:
    """One request to /v1/completions, from its checked body to its answer."""

    def __init__(self, state: ServerState, body: CompletionRequest) -> None:
        state.check_model(body.model)
        self.state, self.body = state, body
        self.id, self.created = new_id("cmpl"), int(time.time())
        self.echo = bool(body.echo)
        self.params = self._params()
        self.prompts: list[list[int]] = []

    def _params(self) -> SamplingParams:
        body = self.body
        try:
            return body.sampling(
                self.state.sampling_defaults, body.max_tokens, body.logprobs, body.logprobs if self.echo else None
            )
        except ValueError as error:
            raise bad_request(str(error)) from None

    async def submit(self) -> Request:
        self.prompts = await self._encode(self.body.prompt)
        grammar = await self.state.grammar(self.body.constraint())
        return self.state.submit(self.prompts, replace(self.params, grammar=grammar))

    async def _encode(self, prompt: str | list[str] | list[int] | list[list[int]]) -> list[list[int]]:
        given: list[Any] = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
        if isinstance(given[0], str):
            return await self.state.encode(given, self.body.add_special_tokens is not False)
        return given

    def whole(self, answers: list[Answer]) -> Json:
        choices = [self._whole_choice(index, answer) for index, answer in enumerate(answers)]
        return self._body(choices) | {"usage": usage(answers, self.params.n)}

    async def chunks(self, request: Request) -> AsyncGenerator[Json]:
        answers = [Answer() for _ in range(request.num_answers)]
        offsets = [0] * len(answers)
        options = self.body.stream_options
        async for index, output in self.state.engine.outputs(request):
            answer, text = answers[index], output.text
            shown: list[TokenLogprobs | None] = list(output.logprobs)
            tokens = list(output.tokens)
            if self.echo and answer.num_prompt == 0:
                text = self._prompt_text(index) + text
                shown = list(output.prompt_logprobs or ()) + shown
                tokens = self.prompts[index // self.params.n] + tokens
            answer.add(output)
            if not text and output.finish_reason is None and not shown:
                continue
            choice = self._choice(index, text, output.finish_reason, output.stop_reason)
            if self.params.logprobs is not None:
                told = partial(legacy_logprobs, self.state.tokenizer, tokens, shown, offsets[index])
                choice["logprobs"] = await self.state.aside(len(tokens) * (1 + self.params.logprobs), told)
                offsets[index] += len(text)
            yield self._body([choice]) | chunk_usage(options, answers, self.params.n)
        if options is not None and options.include_usage:
            yield self._body([]) | {"usage": usage(answers, self.params.n)}

    def _whole_choice(self, index: int, answer: Answer) -> Json:
        prompt = self.prompts[index // self.params.n] if self.echo else []
        text = (self._prompt_text(index) if self.echo else "") + answer.text
        choice = self._choice(index, text, answer.finish_reason, answer.stop_reason)
        if self.params.logprobs is not None:
            choice["logprobs"] = legacy_logprobs(self.state.tokenizer, prompt + answer.tokens, answer.logprobs, 0)
        return choice

    def _prompt_text(self, index: int) -> str:
        given, number = self.body.prompt, index // self.params.n
        if isinstance(given, str):
            return given
        one = given[number] if not isinstance(given[0], int) else None
        return one if isinstance(one, str) else self.state.tokenizer.decode(self.prompts[number])

    def _body(self, choices: list[Json]) -> Json:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.state.model_name,
            "choices": choices,
        }

    @staticmethod
    def _choice(index: int, text: str, finish: str | None, stop: str | int | None) -> Json:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": finish, "stop_reason": stop}


def legacy_logprobs(tokenizer: Tokenizer, tokens: list[int], found: list[TokenLogprobs | None], offset: int) -> Json:
    """The four parallel lists of the completions API; the first token of a prompt has no probability: null."""
    texts = [tokenizer.token_text(token) for token in tokens]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    top: list[Json | None] = []
    for text, one in zip(texts, found, strict=True):
        if one is None:
            top.append(None)
            continue
        likeliest = {tokenizer.token_text(token): finite(value) for token, value in reversed(one.top)}
        top.append(likeliest | {text: finite(one.logprob)})
    return {
        "tokens": texts,
        "token_logprobs": [None if one is None else finite(one.logprob) for one in found],
        "top_logprobs": top,
        "text_offset": offsets,
    }


def finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI writes the probability of an impossible token as -9999."""
    return max(logprob, -9999.0)
