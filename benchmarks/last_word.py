"""Last-word accuracy: does the model end a sentence with the word that it must be?

Items are made from held-out C4 alone, in LAMBADA's manner: a sentence's last word, where it has occurred before in a
context of 50 to 160 words. An item counts when the model's most likely token is right at every token of the word.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from compressor.precision import widened

_WORDS = (50, 160)
_COMMON = 4


@dataclass(frozen=True)
class Item:
    """Token ids of a context, and of the word that ends it."""

    context: list[int]
    word: list[int]


def last_word_items(tokenizer: Any, limit: int) -> list[Item]:
    """At most two items of a document, so that no document outweighs others."""
    from compressor.data import NAMED, opening_of

    items: list[Item] = []
    opening = opening_of(tokenizer)
    for document in NAMED["heldout"]()[0]:
        for context, word in _pairs(document)[:2]:
            ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (context, context + " " + word)]
            if ids[1][: len(ids[0])] == ids[0] and len(ids[1]) > len(ids[0]):
                items.append(Item(opening + ids[0], ids[1][len(ids[0]) :]))
    return items[:limit]


def _pairs(document: str) -> list[tuple[str, str]]:
    """(context, last word) of each sentence whose last word is no short one and stands in the context already."""
    text = " ".join(document.split())
    found = []
    for match in re.finditer(r" ([A-Za-z]+)[.!?](?= [A-Z]|$)", text):
        words, word = text[: match.start()].split(" "), match[1]
        context = words[-_WORDS[1] :]
        seen = {re.sub(r"\W", "", each) for each in context}
        if len(context) >= _WORDS[0] and len(word) > _COMMON and word in seen:
            found.append((" ".join(context), word))
    return found


@torch.no_grad()
def accuracy(model: Any, items: Sequence[Item]) -> dict[str, Any]:
    """Share of items whose word the model would write greedily, with the standard error."""
    right = 0
    with widened(model):
        for item in items:
            ids = torch.tensor([item.context + item.word], device=model.device)
            guessed = model(input_ids=ids).logits[0, len(item.context) - 1 : -1].argmax(-1)
            right += int(guessed.tolist() == item.word)
    share = right / len(items)
    error = (share * (1 - share) / len(items)) ** 0.5
    return {"last_word_accuracy": share, "last_word_stderr": error, "last_word_items": len(items)}
