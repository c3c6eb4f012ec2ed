"""Tokens to text, piece by piece: never half a character, never a part of a stop string."""

from __future__ import annotations

from typing import Protocol

REPLACEMENT = "\ufffd"
# A character has at most four bytes: more tokens than this without a whole one are bytes that will never be one.
MAX_PENDING = 6


class Decoder(Protocol):
    def decode(self, tokens: list[int], skip_special_tokens: bool = True) -> str: ...


class TextStream:
    """Text of one growing token sequence.

    A token may end inside a UTF-8 character, and some tokenizers put the space between words into the next token, so a
    new piece is the difference of two decodings: with and without the new tokens, both starting a little earlier.
    Text that may be the beginning of a stop string is held back until it is clear.
    """

    def __init__(
        self,
        decoder: Decoder,
        context: list[int],
        stop: tuple[str, ...] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
    ) -> None:
        self._decoder = decoder
        self._skip_special = skip_special_tokens
        # A few tokens of the prompt give the first new token its context; their own text is not part of the output.
        self._tokens = list(context[-6:])
        self._prefix = 0
        self._read = len(self._tokens)
        self._stop = stop
        self._include_stop = include_stop
        self._held = ""
        self.text = ""
        self.stopped_by: str | None = None

    def push(self, token: int) -> str:
        """The text that may be shown now that `token` came."""
        self._tokens.append(token)
        before = self._decode(self._prefix, self._read)
        now = self._decode(self._prefix, len(self._tokens))
        pending = len(self._tokens) - self._read
        if len(now) <= len(before) or (now.endswith(REPLACEMENT) and pending <= MAX_PENDING):
            return ""
        self._prefix, self._read = self._read, len(self._tokens)
        return self._release(now[len(before) :])

    def finish(self) -> str:
        """The text still held back when no more tokens come; bytes that never became a character show as U+FFFD."""
        if self.stopped_by is not None:
            return ""
        before = self._decode(self._prefix, self._read)
        now = self._decode(self._prefix, len(self._tokens))
        piece = self._release(now[len(before) :])
        if self.stopped_by is not None:
            return piece
        held, self._held = self._held, ""
        self.text += held
        return piece + held

    def _decode(self, start: int, end: int) -> str:
        return self._decoder.decode(self._tokens[start:end], skip_special_tokens=self._skip_special)

    def _release(self, piece: str) -> str:
        if not self._stop:
            self.text += piece
            return piece
        text = self._held + piece
        found = [(place, stop) for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            place, self.stopped_by = min(found, key=lambda hit: hit[0])
            shown, self._held = text[: place + len(self.stopped_by) * self._include_stop], ""
        else:
            keep = max(_overlap(text, stop) for stop in self._stop)
            shown, self._held = text[: len(text) - keep], text[len(text) - keep :]
        self.text += shown
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
