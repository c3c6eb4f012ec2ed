"""What stands before every route: the key, the draining server, and limits on what a client may send and how slowly.

Plain ASGI, because a streaming answer must pass through untouched. Bodies are read here, whole and bounded, with or
without a Content-Length, and handed on as one message.
"""

from __future__ import annotations

import asyncio
import hmac
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.api.errors import APIError, unavailable

OPEN_ROUTES = frozenset({"/", "/health"})  # the page asks for the key itself
DRAINING_ROUTES = frozenset({"/health", "/ready", "/metrics", "/version"})


@dataclass
class Limits:
    """Bounds that a server sets.

    Args:
        max_body_bytes: of a request's body.
        read_timeout: seconds in which a body must have arrived.
        request_timeout: seconds in which an answer must be complete.
        compile_timeout: seconds in which a schema must be compiled.
        compile_wait: seconds that it may wait until others are.
    """

    max_body_bytes: int = 8 * 2**20
    read_timeout: float = 30.0
    request_timeout: float = 600.0
    compile_timeout: float = 5.0
    compile_wait: float = 30.0


class Gate:
    """ASGI middleware; `draining` is switched on by the server when it is told to stop; `num_open` are being served."""

    def __init__(self, app: ASGIApp, api_key: str | None, limits: Limits) -> None:
        self.app = app
        self.limits = limits
        self.draining = False
        self.num_open = 0
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        self.num_open += 1  # before the body is there: a draining server waits for it
        try:
            await self._serve(scope, receive, send)
        finally:
            self.num_open -= 1

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._check_key(scope)
            self._check_draining(scope)
            body = await self._read_body(scope, receive)
        except APIError as error:
            if _has_body(scope):  # what has not come of it is not worth reading
                error.headers["Connection"] = "close"
            await error.response()(scope, receive, send)
        except _GoneError:
            pass
        else:
            await self.app(scope, _replay(body, receive), send)

    def _check_key(self, scope: Scope) -> None:
        if self._key is None or scope["path"] in OPEN_ROUTES or _is_preflight(scope):
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        kind, _, token = given.partition(b" ")
        if kind.lower() != b"bearer" or not hmac.compare_digest(token.strip(), self._key):
            raise APIError(
                401,
                "missing or wrong API key; send it as `Authorization: Bearer KEY`",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _check_draining(self, scope: Scope) -> None:
        if self.draining and scope["path"] not in DRAINING_ROUTES:
            raise unavailable("the server is shutting down and takes no new work", "shutting_down")

    async def _read_body(self, scope: Scope, receive: Receive) -> bytes:
        limit = self.limits.max_body_bytes
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > limit:
            raise _too_large(limit)
        try:
            async with asyncio.timeout(self.limits.read_timeout):
                return await _receive_all(receive, limit)
        except TimeoutError:
            raise APIError(408, "the request body did not arrive in time", code="request_timeout") from None


def _has_body(scope: Scope) -> bool:
    headers = dict(scope["headers"])
    return b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"


def _is_preflight(scope: Scope) -> bool:
    """Whether a browser asks what a page may send; it does so without the key, and vLLM answers before any route."""
    asks = {b"origin", b"access-control-request-method"} <= dict(scope["headers"]).keys()
    return asks and scope["method"] == "OPTIONS"


class _GoneError(Exception):
    """The client hung up before its request was complete."""


async def _receive_all(receive: Receive, limit: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _GoneError
        part = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise _too_large(limit)
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


def _too_large(limit: int) -> APIError:
    return APIError(413, f"the request body is larger than {limit} bytes, the most this server takes", code="too_large")


def _replay(body: bytes, receive: Receive) -> Receive:
    """A receive channel that gives the body once and then whatever the connection says, such as a disconnect."""
    given = False

    async def channel() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return channel
