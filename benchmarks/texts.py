"""Held-out text as token windows.

The convention, which every table states: documents are joined in order and cut into windows of L tokens that do not
overlap; the model sees one window at a time, and every token of a window but its first is scored. Where the tokenizer
begins a text with a token of its own (BOS), that token opens every window and all tokens of text are scored.

WikiText is distributed in a tokenised form (`@-@`, spaces before punctuation); models were trained on ordinary text, so
`plain_wikitext` undoes it first.

Shapes: N windows, L tokens in a window.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.data import load_text, opening_of


@dataclass(frozen=True)
class Windows:
    """Token windows [N, L] and the name of the text that they come from."""

    tokens: Tensor
    text: str
    opened_by_bos: bool


_WIKITEXT = (
    (r" @([-,.])@ ", r"\1"),
    (r" ([.,;:!?%)\]}])", r"\1"),
    (r"([(\[{$£€#]) ", r"\1"),
    (r" (n't|'s|'re|'ve|'ll|'d|'m|')(?=\s|$)", r"\1"),
    (r'" ([^"\n]*?) "', r'"\1"'),
    (r"(?m)^ +| +$", ""),
    (r"(?m)^= = = (.*?) = = =$", r"=== \1 ==="),
    (r"(?m)^= = (.*?) = =$", r"== \1 =="),
)


def plain_wikitext(text: str) -> str:
    """WikiText's tokenised form as ordinary text: `@-@` and spaces around punctuation are undone, `<unk>` stays."""
    for pattern, replacement in _WIKITEXT:
        text = re.sub(pattern, replacement, text)
    return text


def read_windows(source: str, tokenizer: Any, *, window: int, max_tokens: int | None, wikitext: bool) -> Windows:
    """Windows of `heldout`, or of a text file in its own order.

    Raises:
        ValueError: no such text, or less text than one window.
    """
    opening = opening_of(tokenizer)
    length = window - len(opening)
    if length < 2:
        raise ValueError(f"a window of {window} tokens given; at least {2 + len(opening)} are needed")
    if source == "heldout":
        blocks = load_text(source, tokenizer, length=window, max_tokens=max_tokens).blocks  # with their opening
        return Windows(blocks, "held-out C4", bool(opening))
    tokens = file_blocks(Path(source), tokenizer, length, max_tokens, wikitext)
    head = torch.tensor(opening, dtype=tokens.dtype).expand(len(tokens), len(opening))
    name = f"{Path(source).name}{', detokenised' if wikitext else ''}"
    return Windows(torch.cat([head, tokens], dim=1), name, bool(opening))


def file_blocks(path: Path, tokenizer: Any, length: int, max_tokens: int | None, wikitext: bool) -> Tensor:
    """Token blocks [N, length] of a whole text file."""
    if not path.is_file():
        raise ValueError(f"text {str(path)!r} is not a file; give a UTF-8 text file, or heldout")
    text = path.read_text("utf-8")
    ids = tokenizer(plain_wikitext(text) if wikitext else text, add_special_tokens=False, verbose=False)["input_ids"]
    count = len(ids[:max_tokens]) // length
    if count == 0:
        raise ValueError(f"text {path} has {len(ids)} tokens, fewer than one window of {length}: give more text")
    return torch.tensor(ids[: count * length], dtype=torch.int64).view(count, length)
