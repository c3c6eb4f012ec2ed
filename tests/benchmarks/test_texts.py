from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.last_word import last_word_items
from benchmarks.texts import plain_wikitext, read_windows
from compressor import data
from compressor.models import load_tokenizer


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("a well @-@ known 1 @,@ 500 @.@ 5", "a well-known 1,500.5"),
        ("Hello , world . ( a note ) !", "Hello, world. (a note)!"),
        ('He said " not now " to her .', 'He said "not now" to her.'),
        ("It 's John 's and they don 't", "It's John's and they don 't"),
        (" = = Early life = = \n\n He was born .", "== Early life ==\n\nHe was born."),
        (" = = = Notes = = = ", "=== Notes ==="),
        ("an <unk> stays", "an <unk> stays"),
    ],
)
def test_wikitext_becomes_ordinary_text(given: str, wanted: str) -> None:
    assert plain_wikitext(given) == wanted


def test_windows_are_the_text_in_order_without_overlap(tiny_llama: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    text = "0123456789" * 7
    file = tmp_path / "text.txt"
    file.write_text(text)
    windows = read_windows(str(file), tokenizer, window=16, max_tokens=None, wikitext=False)
    assert windows.tokens.shape == (4, 16)
    assert tokenizer.decode(windows.tokens.flatten()) == text[:64]
    assert windows.text == "text.txt"
    assert not windows.opened_by_bos
    fewer = read_windows(str(file), tokenizer, window=16, max_tokens=40, wikitext=False)
    assert fewer.tokens.equal(windows.tokens[:2])


class _Opening:
    """A tokenizer that begins every text with its BOS, as Gemma's does."""

    bos_token_id = 256

    def __init__(self, folder: Path) -> None:
        self.inner = load_tokenizer(folder)

    def __call__(self, text: str | list[str], add_special_tokens: bool = True, **options: object) -> object:
        encoded = self.inner(text, add_special_tokens=False, **options)
        if add_special_tokens:
            many = isinstance(text, list)
            opened = [[self.bos_token_id, *ids] for ids in (encoded["input_ids"] if many else [encoded["input_ids"]])]
            encoded["input_ids"] = opened if many else opened[0]
        return encoded

    @property
    def eos_token_id(self) -> int | None:
        return self.inner.eos_token_id


def test_a_tokenizer_that_writes_bos_opens_every_window(tiny_llama: Path, tmp_path: Path) -> None:
    tokenizer = _Opening(tiny_llama)
    file = tmp_path / "text.txt"
    file.write_text("0123456789" * 4)
    windows = read_windows(str(file), tokenizer, window=11, max_tokens=None, wikitext=False)
    assert windows.tokens.shape == (4, 11)
    assert windows.tokens[:, 0].eq(256).all()
    assert windows.tokens[0, 1:].equal(windows.tokens[3, 1:])


def test_held_out_text_is_opened_once(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sentence = "The miller walked to the old bridge and sang of the miller who had built it. "
    document = sentence * 6 + "Nobody in the whole valley had ever seen the bridge before that day of the miller."
    monkeypatch.setitem(data.NAMED, "heldout", lambda: ([document], "none"))
    tokenizer = _Opening(tiny_llama)
    windows = read_windows("heldout", tokenizer, window=33, max_tokens=None, wikitext=False)
    assert windows.opened_by_bos
    assert windows.tokens.eq(256).sum(dim=1).eq(1).all()
    assert windows.tokens[:, 0].eq(256).all()
    items = last_word_items(tokenizer, 10)
    assert items
    assert all(item.context[0] == 256 and 256 not in item.context[1:] + item.word for item in items)


def test_missing_and_short_texts_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    with pytest.raises(ValueError, match="is not a file"):
        read_windows(str(tmp_path / "none.txt"), tokenizer, window=16, max_tokens=None, wikitext=False)
    file = tmp_path / "short.txt"
    file.write_text("short")
    with pytest.raises(ValueError, match="fewer than one window"):
        read_windows(str(file), tokenizer, window=16, max_tokens=None, wikitext=False)
    with pytest.raises(ValueError, match="at least 2"):
        read_windows(str(file), tokenizer, window=1, max_tokens=None, wikitext=False)
