"""Server-sent events: one JSON per `data:`, a blank line; `[DONE]` at the end, or an error event instead of it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable
from functools import partial
from typing import Any

from pydantic_core import to_json
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serve.api.errors import APIError, error_body
from serve.api.state import GRAMMAR, ClientGoneError, ServerState
from serve.engine.async_engine import EngineDeadError
from serve.engine.constraints import GrammarError

logger = logging.getLogger(__name__)

KEEP_ALIVE_SECONDS = 15.0
DONE = b"data: [DONE]\n\n"
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", "Connection": "keep-alive"}

Chunk = dict[str, Any]


class EventStream(Response):
    """Sends chunks as they come; hanging up or running out of time ends the iterator, which frees the request."""

    media_type = "text/event-stream"

    def __init__(self, state: ServerState, chunks: AsyncGenerator[Chunk], at_end: Callable[[], None]) -> None:
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]
        self._state = state
        self._chunks = chunks
        self._at_end = at_end
        self._latest = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        keep_alive = asyncio.ensure_future(self._keep_alive(send))
        try:
            await self._state.while_connected(HTTPRequest(scope, receive), self._send_all(send))
        except ClientGoneError:
            return
        except Exception as error:
            self._at_end()  # before the client, who may not read, is told
            await self._write(send, event(_failure(error)))
        finally:
            keep_alive.cancel()
            self._at_end()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_all(self, send: Send) -> None:
        async with contextlib.aclosing(self._chunks) as chunks:
            async for chunk in chunks:
                written = await self._state.aside(_size(chunk), partial(event, chunk))
                await self._write(send, written)
        await self._write(send, DONE)

    async def _keep_alive(self, send: Send) -> None:
        """A comment whenever nothing was sent for a while, so that proxies keep the connection."""
        while True:
            await asyncio.sleep(KEEP_ALIVE_SECONDS)
            if time.monotonic() - self._latest >= KEEP_ALIVE_SECONDS:
                await self._write(send, b": keep-alive\n\n")

    async def _write(self, send: Send, body: bytes) -> None:
        self._latest = time.monotonic()
        await send({"type": "http.response.body", "body": body, "more_body": True})


def event(chunk: Chunk) -> bytes:
    return b"data: " + to_json(chunk) + b"\n\n"


def _size(chunk: Chunk) -> int:
    """Log-probabilities in it, of each token up to 20 or so; many only where a prompt is echoed."""
    told = (choice.get("logprobs") for choice in chunk["choices"])
    return sum(20 * len(one.get("tokens", ())) for one in told if one)


def _failure(error: Exception) -> Chunk:
    if isinstance(error, APIError):
        return error.body()
    if isinstance(error, EngineDeadError):
        return error_body(503, str(error), code="engine_dead")
    if isinstance(error, GrammarError):
        return error_body(400, str(error), code=GRAMMAR)
    logger.error("a stream failed", exc_info=error)
    return error_body(500, "the server failed while writing this answer", code="internal_error")
