"""Tokens to text, piece by piece: never half a character, never a part of a stop string."""

from __future__ import annotations

import codecs
from typing import Protocol

REPLACEMENT = "\ufffd"
# A character has at most four bytes: more tokens than this without a whole one are bytes that will never be one.
MAX_PENDING = 6
CONTEXT = 6  # tokens of the prompt that the first new one may need; their own text is not part of the output


class Decoder(Protocol):
    @property
    def by_bytes(self) -> bool: ...
    def token_bytes(self, token: int, skip_special_tokens: bool, /) -> bytes: ...
    def decode(self, tokens: list[int], skip_special_tokens: bool = True) -> str: ...


class _ByBytes:
    """Where a token is some bytes, whatever stands beside it."""

    def __init__(self, decoder: Decoder, context: list[int], skip_special: bool) -> None:
        self._decoder, self._skip_special = decoder, skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        for token in context:
            self._utf8.decode(decoder.token_bytes(token, skip_special))
        self._own = False  # whether any byte is the answer's own

    def push(self, token: int) -> str:
        found = self._decoder.token_bytes(token, self._skip_special)
        self._own |= bool(found)
        return self._utf8.decode(found)

    def finish(self) -> str:
        """What is left of a character that never became whole, unless it is the context's."""
        return self._utf8.decode(b"", True) if self._own else ""


class _ByText:
    """Where a token's text depends on those before it: some tokenizers put the space between words into the next one.

    A new piece is the difference of two decodings, with and without the new tokens, both starting a little earlier.
    """

    def __init__(self, decoder: Decoder, context: list[int], skip_special: bool) -> None:
        self._decoder, self._skip_special = decoder, skip_special
        self._tokens = list(context)
        self._prefix, self._read = 0, len(self._tokens)

    def push(self, token: int) -> str:
        self._tokens.append(token)
        before, now = self._decode(self._read), self._decode(len(self._tokens))
        if now == before:  # nothing to show, so nothing that the next ones could belong to
            self._read = len(self._tokens)
        pending = len(self._tokens) - self._read
        if len(now) <= len(before) or (now.endswith(REPLACEMENT) and pending <= MAX_PENDING):
            return ""
        self._prefix, self._read = self._read, len(self._tokens)
        return now[len(before) :]

    def finish(self) -> str:
        return self._decode(len(self._tokens))[len(self._decode(self._read)) :]

    def _decode(self, end: int) -> str:
        return self._decoder.decode(self._tokens[self._prefix : end], skip_special_tokens=self._skip_special)


class TextStream:
    """Text of one growing token sequence; what may be the beginning of a stop string is held back until it is clear."""

    def __init__(
        self,
        decoder: Decoder,
        context: list[int],
        stop: tuple[str, ...] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
    ) -> None:
        kind = _ByBytes if decoder.by_bytes else _ByText
        self._pieces = kind(decoder, context[-CONTEXT:], skip_special_tokens)
        self._stop = stop
        self._include_stop = include_stop
        self._held = ""
        self.stopped_by: str | None = None

    def push(self, token: int, may_stop: bool = True) -> str:
        """The text that may be shown now that `token` came, which may not stop it while too little is written."""
        piece = self._pieces.push(token)
        return self._release(piece, may_stop) if piece and self._stop else piece

    def finish(self) -> str:
        """The text still held back when no more tokens come; bytes that never became a character show as U+FFFD."""
        if self.stopped_by is not None:
            return ""
        piece = self._pieces.finish()
        if not self._stop:
            return piece
        piece = self._release(piece)
        if self.stopped_by is not None:
            return piece
        held, self._held = self._held, ""
        return piece + held

    def _release(self, piece: str, may_stop: bool = True) -> str:
        text, old = self._held + piece, len(self._held) + 1
        places = [(text.find(stop, max(0, old - len(stop))), stop) for stop in self._stop if may_stop]
        if found := [hit for hit in places if hit[0] >= 0]:
            place, self.stopped_by = min(found, key=lambda hit: hit[0])
            shown, self._held = text[: place + len(self.stopped_by) * self._include_stop], ""
        else:
            keep = max(_overlap(text, stop) for stop in self._stop)
            shown, self._held = text[: len(text) - keep], text[len(text) - keep :]
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
