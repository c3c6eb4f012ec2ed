"""Uvicorn around the routes: signals drain instead of cutting off, and slow senders are shown the door."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import math
import signal
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn
from pydantic_core import to_json
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serve.api.app import build_app
from serve.api.errors import error_body
from serve.api.limits import Gate, Limits
from serve.api.metrics import EncoderMetrics, Metrics
from serve.api.state import EncoderState, ServedModel, ServerState
from serve.engine.async_encoder import AsyncEncoder
from serve.engine.async_engine import AsyncEngine
from serve.engine.encoder import EncoderEngine
from serve.engine.llm_engine import LLMEngine
from serve.options import ServeOptions

logger = logging.getLogger(__name__)

HEADER_SECONDS = 10.0
SEND_SECONDS = 60.0
MAX_HEADER_BYTES = 64 * 1024
IDLE_POLL_SECONDS = 0.02
WATCH_SECONDS = 0.5
WARN_SECONDS = 60.0


class Server:
    """One listening socket, one engine."""

    def __init__(self, engine: LLMEngine | EncoderEngine, options: ServeOptions, listener: socket.socket) -> None:
        self.options = options
        self.listener = listener
        self.state = _state(engine, options)
        self.engine = self.state.engine
        self.gate = Gate(build_app(self.state), options.api_key, self.state.limits)
        self._uvicorn = _Uvicorn(self._config())
        self._drainer: asyncio.Task[None] | None = None
        self._warned_at = -WARN_SECONDS

    async def run(self) -> int:
        """Serve until a signal; 0 when everything was answered, 1 when the engine failed."""
        loop = asyncio.get_running_loop()
        if not self.options.debug:  # a warning a write to a client that has hung up is no news to anybody
            logging.getLogger("asyncio").setLevel(logging.ERROR)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self._on_signal)
        loop.set_exception_handler(self._on_loop_error)
        self.engine.start()
        self.state.ready = True
        watcher = asyncio.ensure_future(self._watch())
        await self._uvicorn.serve(sockets=[self.listener])
        watcher.cancel()
        self.engine.stop()
        return 0 if self.engine.alive else 1

    def _on_loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Without descriptors asyncio reports thousands of failed accepts a second; one line a minute says it too.

        It tries each of them again a second later, even where the listener has been closed since: no news to anybody.
        """
        error = context.get("exception")
        if isinstance(error, ValueError) and self.listener.fileno() < 0:
            return
        if not (isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)):
            loop.default_exception_handler(context)
        elif loop.time() > self._warned_at + WARN_SECONDS:
            self._warned_at = loop.time()
            logger.warning("no file descriptors are left, so new connections wait; raise the limit (ulimit -n)")

    async def _watch(self) -> None:
        """End the server when the engine fails, so that whoever runs it starts it again."""
        while self.engine.alive:
            await asyncio.sleep(WATCH_SECONDS)
        self._uvicorn.should_exit = True

    def _on_signal(self) -> None:
        if self._drainer is not None:
            self._uvicorn.should_exit = self._uvicorn.force_exit = True
            return
        self.state.ready = False
        self.gate.draining = True
        self._drainer = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        """Let open answers finish, and reach their clients, for a while; then exit."""
        if self.gate.num_open:
            logger.warning("stopping: %d answers are finishing; again to stop now", self.gate.num_open)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.options.shutdown_timeout):
                while self.gate.num_open or self._unsent():
                    await asyncio.sleep(IDLE_POLL_SECONDS)
        self._uvicorn.should_exit = True

    def _unsent(self) -> bool:
        """Whether a client has not read all of its answer yet."""
        connections = self._uvicorn.server_state.connections
        return any(isinstance(one, HttpToolsProtocol) and one.flow.write_paused for one in connections)

    def _config(self) -> uvicorn.Config:
        options = self.options
        return uvicorn.Config(
            self.gate,
            http=DeadlineProtocol,
            ws="none",
            lifespan="off",
            log_level="info" if options.debug else "warning",
            access_log=options.debug,
            server_header=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=2,
            ssl_certfile=options.ssl_certfile,
            ssl_keyfile=options.ssl_keyfile,
        )


def _state(engine: LLMEngine | EncoderEngine, options: ServeOptions) -> ServedModel:
    name, folder_name = options.model_name, options.folder.resolve().name
    limits = Limits(int(options.max_body_mb * 2**20), request_timeout=options.request_timeout)
    if isinstance(engine, EncoderEngine):
        encoder = AsyncEncoder(engine, options.max_queue)
        return EncoderState(encoder, name, limits, EncoderMetrics(encoder, name), folder_name)
    generator = AsyncEngine(engine, options.max_queue)
    return ServerState(generator, name, limits, Metrics(generator, name), folder_name)


class _Uvicorn(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the Server's."""
        yield


class DeadlineProtocol(HttpToolsProtocol):
    """Closes connections whose requests have too large a head, or one that takes longer than HEADER_SECONDS.

    And those of clients that read nothing of an answer for SEND_SECONDS: what waits for the system to take is looked at
    so often, and must have become less.
    """

    _reading: asyncio.TimerHandle | None = None
    _deadline: asyncio.TimerHandle | None = None
    _between_requests = True
    _untold = (
        0  # bytes since the parser last told of something: of a head, or of what may stand between pieces of a body
    )

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._deadline = self.loop.call_later(HEADER_SECONDS, self._too_slow)
        transport.set_write_buffer_limits(high=1, low=0)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._look(math.inf)

    def resume_writing(self) -> None:
        self._stop_looking()
        super().resume_writing()

    def _look(self, unsent: float) -> None:
        size = self.transport.get_write_buffer_size()
        if size >= unsent:
            self.transport.abort()
        else:
            self._reading = self.loop.call_later(SEND_SECONDS, self._look, size)

    def _stop_looking(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def data_received(self, data: bytes) -> None:
        if self._deadline is None and self._between_requests:
            self._deadline = self.loop.call_later(HEADER_SECONDS, self._too_slow)
        self._untold += len(data)
        super().data_received(data)
        if self._untold > MAX_HEADER_BYTES and not self.transport.is_closing():
            self.send_400_response("The head of the request is too large.")

    def on_headers_complete(self) -> None:
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > MAX_HEADER_BYTES:
            raise ValueError("too large a head")
        self._untold, self._between_requests = 0, False
        self._cancel_deadline()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._untold = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._untold, self._between_requests = 0, True
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """What is not HTTP, or too large a head, gets an error in our shape too."""
        body = to_json(error_body(400, msg, code="invalid_http"))
        head = "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nconnection: close\r\n"
        self.transport.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_deadline()
        self._stop_looking()
        super().connection_lost(exc)

    def _cancel_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_slow(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()
