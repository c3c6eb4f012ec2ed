"""Text comes in whole characters and never shows a part of a stop string."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.engine.detokenizer import TextStream


class Bytes:
    """A decoder whose tokens are bytes."""

    by_bytes = False

    def token_bytes(self, token: int, skip_special_tokens: bool) -> bytes:
        return bytes([token])

    def decode(self, tokens: list[int], skip_special_tokens: bool = True) -> str:
        return bytes(tokens).decode("utf-8", "replace")


class Fast(Bytes):
    """The same, asked for bytes."""

    by_bytes = True


def pieces(text: str, stop: tuple[str, ...] = (), include: bool = False) -> tuple[list[str], TextStream]:
    """What a stream gives, whichever way it asks for text."""
    (out, stream), (fast_out, fast) = (pieces_of(decoder, text, stop, include) for decoder in (Bytes(), Fast()))
    assert ("".join(fast_out), fast.stopped_by) == ("".join(out), stream.stopped_by)
    return out, stream


def pieces_of(decoder: Bytes, text: str, stop: tuple[str, ...], include: bool) -> tuple[list[str], TextStream]:
    stream = TextStream(decoder, list(b"before: "), stop, include)
    out = []
    for token in text.encode():
        out.append(stream.push(token))
        if stream.stopped_by is not None:
            return out, stream
    return [*out, stream.finish()], stream


@given(st.text(max_size=40))
@settings(max_examples=200, deadline=None)
def test_pieces_join_to_the_text(text: str) -> None:
    out, _ = pieces(text)
    assert "".join(out) == text


def test_no_piece_holds_half_a_character() -> None:
    out, _ = pieces("a☕é日本🎉b")
    assert "\ufffd" not in "".join(out)
    assert [piece for piece in out if piece] == list("a☕é日本🎉b")


def test_a_cut_character_shows_at_the_end() -> None:
    stream = TextStream(Bytes(), [])
    assert stream.push("☕".encode()[0]) == ""
    assert stream.finish() == "\ufffd"


@pytest.mark.parametrize("decoder", [Bytes(), Fast()])
def test_a_character_that_the_prompt_cuts_is_not_the_answers(decoder: Bytes) -> None:
    stream = TextStream(decoder, list(b"before \xe2\x98"))
    assert stream.finish() == ""


def test_a_character_that_the_answer_completes_is_the_answers() -> None:
    stream = TextStream(Fast(), list(b"before \xe2\x98"))
    assert stream.push(0x95) == "☕" and stream.finish() == ""


def test_bytes_that_are_no_text_are_not_held_for_ever() -> None:
    stream = TextStream(Bytes(), [])
    out = [stream.push(0x80) for _ in range(40)]
    assert sum(map(len, out)) >= 30


def test_tokens_without_text_do_not_cut_a_character() -> None:
    class Gaps(Bytes):
        """Whose token 256 has no text, as special ones have none."""

        def decode(self, tokens: list[int], skip_special_tokens: bool = True) -> str:
            return super().decode([token for token in tokens if token < 256])

    stream = TextStream(Gaps(), [])
    out = [stream.push(token) for token in [*b"a", *[256] * 8, *"🎉".encode(), *[256] * 8, *"é".encode()]]
    assert [piece for piece in out if piece] == ["a", "🎉", "é"]


@pytest.mark.parametrize(
    ("text", "stop", "shown", "by"),
    [
        ("hello world", ("o w",), "hell", "o w"),
        ("aaab", ("aab",), "a", "aab"),
        ("one two three", ("three", "two"), "one ", "two"),
        ("no stop here", ("xyz",), "no stop here", None),
        ("ends with th", ("the",), "ends with th", None),
        ("日本語", ("本",), "日", "本"),
    ],
)
def test_stop_strings(text: str, stop: tuple[str, ...], shown: str, by: str | None) -> None:
    out, stream = pieces(text, stop)
    assert "".join(out) == shown
    assert stream.stopped_by == by


def test_stop_string_may_be_included() -> None:
    out, _ = pieces("hello world", ("o w",), include=True)
    assert "".join(out) == "hello w"


@pytest.mark.parametrize("decoder", [Bytes(), Fast()])
@pytest.mark.parametrize(
    ("early", "late", "stop", "shown", "by"),
    [
        ("EN", "D x", ("END",), "", "END"),
        ("an END, EN", "D x", ("END",), "an END, ", "END"),
        ("EN", "x", ("END", "N"), "ENx", None),
        ("aa", "a", ("aa",), "a", "aa"),
    ],
)
def test_a_stop_string_may_begin_where_none_may_end(
    decoder: Bytes, early: str, late: str, stop: tuple[str, ...], shown: str, by: str | None
) -> None:
    stream = TextStream(decoder, [], stop)
    out = [stream.push(token, may_stop=False) for token in early.encode()]
    for token in late.encode():
        out.append(stream.push(token))
        if stream.stopped_by is not None:
            break
    assert ("".join(out) + stream.finish(), stream.stopped_by) == (shown, by)


@given(st.text("ab", max_size=30), st.text("ab", min_size=1, max_size=4))
@settings(max_examples=300, deadline=None)
def test_stop_equals_a_cut_of_the_whole_text(text: str, stop: str) -> None:
    out, _ = pieces(text, (stop,))
    assert "".join(out) == text.partition(stop)[0]


def test_any_tokens_join_to_what_the_tokenizer_decodes(tiny_folder: Callable[[str], Path]) -> None:
    """Special tokens, half characters and bytes that are no text too; `fast` decodes in Rust, the stream in Python."""
    from serve.engine.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(tiny_folder("llama"))
    assert tokenizer.by_bytes
    rng = random.Random(0)
    for _ in range(300):
        tokens = [rng.randrange(384) for _ in range(rng.randrange(30))]
        for skip in (True, False):
            stream = TextStream(tokenizer, [], skip_special_tokens=skip)
            out = [stream.push(token) for token in tokens]
            assert "".join(out) + stream.finish() == tokenizer.fast.decode(tokens, skip_special_tokens=skip)


def test_with_a_real_tokenizer(tiny_folder: Callable[[str], Path]) -> None:
    from serve.engine.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(tiny_folder("llama"))
    text = "The quick brown 🦊 jumps — naïvely — over 犬."
    tokens = tokenizer.encode(text)
    stream = TextStream(tokenizer, tokenizer.encode("Once upon"))
    out = [stream.push(token) for token in tokens]
    assert "".join(out) + stream.finish() == text
    assert not any("\ufffd" in piece for piece in out)
