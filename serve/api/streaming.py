"""Server-sent events: one JSON per `data:`, a blank line; `[DONE]` at the end, or an error event instead of it."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable
from typing import Any

from starlette.requests import Request as HTTPRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serve.api.errors import APIError, error_body
from serve.api.state import ClientGoneError, ServerState
from serve.engine.async_engine import EngineDeadError

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

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        http = HTTPRequest(scope, receive)
        try:
            await self._state.while_connected(http, self._send_all(send))
        except ClientGoneError:
            return
        except Exception as error:
            await _write(send, event(_failure(error)))
        finally:
            self._at_end()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_all(self, send: Send) -> None:
        """All chunks; a comment when none came for a while, so that proxies keep the connection."""
        iterator = aiter(self._chunks)
        pending: asyncio.Future[Chunk] | None = None
        try:
            while True:
                pending = pending or asyncio.ensure_future(anext(iterator))
                done, _ = await asyncio.wait({pending}, timeout=KEEP_ALIVE_SECONDS)
                if not done:
                    await _write(send, b": keep-alive\n\n")
                    continue
                try:
                    chunk = pending.result()
                except StopAsyncIteration:
                    break
                pending = None
                await _write(send, event(chunk))
            await _write(send, DONE)
        finally:
            if pending is not None and not pending.done():
                pending.cancel()
                await asyncio.gather(pending, return_exceptions=True)
            await self._chunks.aclose()


def event(chunk: Chunk) -> bytes:
    return b"data: " + json.dumps(chunk, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def _write(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})


def _failure(error: Exception) -> Chunk:
    if isinstance(error, APIError):
        return error.body()
    if isinstance(error, EngineDeadError):
        return error_body(503, str(error), code="engine_dead")
    logger.error("a stream failed", exc_info=error)
    return error_body(500, "the server failed while writing this answer", code="internal_error")
