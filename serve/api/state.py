"""What the routes share: the engine, the model's name, the limits, and the steps between a request and its outputs."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from starlette.requests import Request as HTTPRequest

from serve.api.errors import APIError, bad_request, too_many, unavailable
from serve.api.limits import Limits
from serve.api.metrics import EncoderMetrics, Metrics
from serve.engine.async_encoder import AsyncEncoder
from serve.engine.async_engine import AsyncEngine, EngineDeadError, QueueFullError, Request
from serve.engine.constraints import Constraint, GrammarError
from serve.engine.encoder_models import EncoderInput
from serve.engine.grammar import TOO_SLOW, Grammar
from serve.engine.sampling_params import SamplingParams
from serve.engine.tokenizer import Tokenizer

T = TypeVar("T")

# Fewer characters, tokens or log-probabilities are worked on on the spot, more in a worker thread.
SMALL = 4096
GRAMMAR = "invalid_schema"
TOO_LONG = "context_length_exceeded"


class ClientGoneError(Exception):
    """The client hung up; nobody will read an answer."""


class Engine(Protocol):
    """What every engine tells and can be told, whatever it computes."""

    @property
    def alive(self) -> bool: ...
    @property
    def num_open(self) -> int: ...
    def start(self) -> None: ...
    def stop(self) -> None: ...


class Renders(Protocol):
    def render(self) -> str: ...


@dataclass
class ServedModel(ABC):
    """What the routes of language models and of encoders share."""

    engine: Engine
    model_name: str
    limits: Limits
    metrics: Renders
    folder_name: str = ""
    ready: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    _large: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    @abstractmethod
    def tokenizer(self) -> Tokenizer: ...

    @property
    @abstractmethod
    def max_model_len(self) -> int: ...

    @property
    @abstractmethod
    def vocab_size(self) -> int: ...

    def check_model(self, name: str | None) -> None:
        if name and name not in (self.model_name, self.folder_name):
            raise APIError(
                404,
                f"the model {name[:80]!r} does not exist; this server has {self.model_name!r}",
                param="model",
                code="model_not_found",
            )

    @property
    def max_characters(self) -> int:
        """No longer text fits into the model."""
        return self.max_model_len * self.tokenizer.longest_token

    def check_length(self, texts: list[str]) -> None:
        longest = max(map(len, texts))
        if longest > self.max_characters:
            raise bad_request(
                f"the prompt has {longest} characters and cannot fit into {self.max_model_len} tokens", code=TOO_LONG
            )

    async def encode(self, texts: list[str], add_special_tokens: bool = True) -> list[list[int]]:
        self.check_length(texts)
        size = sum(map(len, texts))
        return await self.aside(size, lambda: [self.tokenizer.encode(text, add_special_tokens) for text in texts])

    async def decode(self, tokens: list[int]) -> str:
        return await self.aside(len(tokens), lambda: self.tokenizer.decode(tokens, skip_special_tokens=False))

    async def aside(self, size: int, work: Callable[[], T]) -> T:
        """`work`'s result. What is not small is done in a worker thread, so that others are served meanwhile: one at a
        time, whether its client still waits or not, so that a crowd of large ones takes one processor and no more.
        """
        if size < SMALL:
            return work()
        await self._large.acquire()
        running = asyncio.ensure_future(asyncio.to_thread(work))
        running.add_done_callback(self._end_large)
        return await asyncio.shield(running)

    def _end_large(self, done: asyncio.Future[Any]) -> None:
        self._large.release()
        if not done.cancelled():
            done.exception()  # seen, even where nobody waits any more

    async def while_connected(self, http: HTTPRequest, work: Coroutine[Any, Any, T]) -> T:
        """`work`'s result; it is cancelled when the client hangs up or the time is over."""
        task = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(wait_for_disconnect(http))
        try:
            done, _ = await asyncio.wait(
                {task, gone}, timeout=self.limits.request_timeout, return_when=asyncio.FIRST_COMPLETED
            )
            if task in done:
                return task.result()
            if gone in done:
                raise ClientGoneError
            raise APIError(504, "the answer was not complete within the server's time limit", code="timeout")
        finally:
            for waiting in (task, gone):
                waiting.cancel()
            await asyncio.gather(task, gone, return_exceptions=True)


@dataclass
class ServerState(ServedModel):
    """Of a language model, which generates."""

    engine: AsyncEngine
    metrics: Metrics
    # One after the other: however many constraints come at once, the engine keeps its processors.
    _compiling: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def tokenizer(self) -> Tokenizer:
        return self.engine.engine.tokenizer

    @property
    def max_model_len(self) -> int:
        return self.engine.engine.max_model_len

    @property
    def vocab_size(self) -> int:
        return self.engine.engine.loaded.config.vocab_size

    @property
    def sampling_defaults(self) -> dict[str, Any]:
        """The model's generation config; only what it says about sampling."""
        found = self.engine.engine.loaded.generation_defaults
        if found.get("do_sample") is False:
            return {}
        return {name: found[name] for name in GENERATION_KEYS if isinstance(found.get(name), int | float)}

    async def grammar(self, wanted: Constraint | None) -> Grammar | None:
        """`wanted` compiled, within the limits."""
        if wanted is None:
            return None
        grammars = self.engine.engine.grammars
        known = grammars.cached(wanted)
        if known is not None:
            return known
        try:
            async with asyncio.timeout(self.limits.compile_wait):
                await self._compiling.acquire()
        except TimeoutError:
            raise too_many("schemas and grammars of others are being compiled; try again later") from None
        try:
            async with asyncio.timeout(self.limits.compile_timeout):
                return await grammars.compile_untrusted(wanted)
        except TimeoutError:
            raise bad_request(f"the {wanted.kind} cannot be used: {TOO_SLOW}", code=GRAMMAR) from None
        except GrammarError as error:
            raise bad_request(str(error), code=GRAMMAR) from None
        finally:
            self._compiling.release()

    def submit(self, prompts: list[list[int]], params: SamplingParams) -> Request:
        """Queue a request, or say as HTTP why not."""
        with refusals():
            return self.engine.submit(prompts, params)

    def forget(self, request: Request) -> None:
        """Free what `request` holds; at its end this does nothing."""
        self.engine.close(request)
        self.metrics.forget(request)


@dataclass
class EncoderState(ServedModel):
    """Of an encoder: a classifier, or a model that turns texts into vectors."""

    engine: AsyncEncoder
    metrics: EncoderMetrics

    @property
    def tokenizer(self) -> Tokenizer:
        return self.engine.engine.tokenizer

    @property
    def max_model_len(self) -> int:
        return self.engine.engine.max_model_len

    @property
    def vocab_size(self) -> int:
        return self.engine.engine.vocab_size

    async def compute(self, inputs: list[EncoderInput], activate: bool) -> list[list[float]]:
        """The numbers of each input, or as HTTP why not."""
        with refusals():
            job = self.engine.submit(inputs, activate)
        reason = "abort"
        try:
            found = await self.engine.results(job)
            reason = "stop"
            return found
        finally:
            self.metrics.observe(job, reason)


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Why an engine takes no request, as HTTP says it."""
    try:
        yield
    except ValueError as error:
        raise bad_request(str(error), code=TOO_LONG if "at most" in str(error) else None) from None
    except QueueFullError as error:
        raise too_many(str(error)) from None
    except EngineDeadError as error:
        raise unavailable(str(error), "engine_dead") from None


GENERATION_KEYS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


async def wait_for_disconnect(http: HTTPRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"
