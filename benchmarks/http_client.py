"""A client that costs next to nothing while answers stream: it keeps bytes and their times, and reads them afterwards.

With 32 streams a comfortable client takes as much of two cores as the server does, and then measures itself.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from bisect import bisect_left
from dataclasses import dataclass, field
from typing import Any

EVENT = re.compile(rb"^data: (\{.*\})\r?$", re.MULTILINE)


@dataclass
class Answer:
    """What came over one connection: (time, bytes), as they came."""

    parts: list[tuple[float, bytes]] = field(default_factory=list)

    @property
    def raw(self) -> bytes:
        return b"".join(data for _, data in self.parts)

    @property
    def status(self) -> int:
        """0 when the server hung up without an answer."""
        return int(self.raw.split(b" ", 2)[1]) if self.parts else 0

    @property
    def body(self) -> bytes:
        return self._body()[0]

    def events(self) -> list[tuple[float, dict[str, Any]]]:
        """The server-sent events, and when the last byte of each had come."""
        body, ends = self._body()
        arrived, total = [], 0
        for _, data in self.parts:
            total += len(data)
            arrived.append(total)
        found = []
        for match in EVENT.finditer(body):
            end = ends[bisect_left(ends, (match.end(), 0))][1]
            found.append((self.parts[bisect_left(arrived, end)][0], json.loads(match[1])))
        return found

    def _body(self) -> tuple[bytes, list[tuple[int, int]]]:
        """The body without its framing, and where its pieces end: (in the body, in the raw bytes)."""
        raw = self.raw
        head, _, rest = raw.partition(b"\r\n\r\n")
        if b"transfer-encoding: chunked" not in head.lower():
            return rest, [(len(rest), len(raw))]
        at, body, ends = len(head) + 4, bytearray(), []
        while (line_end := raw.find(b"\r\n", at)) >= 0 and (size := int(raw[at:line_end].split(b";")[0], 16)):
            at = line_end + 2 + size
            body += raw[line_end + 2 : at]
            ends.append((len(body), at))
            at += 2
        return bytes(body), ends


class _Receiver(asyncio.Protocol):
    def __init__(self, request: bytes) -> None:
        self.request, self.answer = request, Answer()
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.answer.parts.append((time.perf_counter(), data))

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.closed.done():
            self.closed.set_result(None) if exc is None else self.closed.set_exception(exc)


async def ask(port: int, path: str, body: dict[str, Any] | None = None) -> Answer:
    """GET, or POST of `body`; OSError when nobody listens. Being cancelled cuts the connection."""
    data = b"" if body is None else json.dumps(body).encode()
    head = f"{'GET' if body is None else 'POST'} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    loop = asyncio.get_running_loop()
    transport, receiver = await loop.create_connection(lambda: _Receiver(head.encode() + data), "127.0.0.1", port)
    try:
        await receiver.closed
    finally:
        transport.close()
    return receiver.answer
