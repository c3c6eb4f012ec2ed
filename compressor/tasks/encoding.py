"""Examples as token ids, and batches of them: right-padded to the longest.

Shapes: N examples, B of a batch, L tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compressor.data import opening_of
from compressor.tasks.task import Example, Task


@dataclass(frozen=True)
class Labelled:
    """Encoded sentences or pairs with a class or a number each.

    Args:
        types: which of two sentences a token belongs to, for models that ask.
        length: the most tokens that an example may have.
    """

    ids: list[list[int]]
    types: list[list[int]] | None
    labels: Tensor
    length: int
    padding: int
    regression: bool

    def batch(self, chosen: Sequence[int]) -> dict[str, Tensor]:
        """What the model takes of some examples."""
        rows = [self.ids[place] for place in chosen]
        batch = {"input_ids": _padded(rows, self.padding), "attention_mask": _padded([[1] * len(r) for r in rows], 0)}
        if self.types is not None:
            batch["token_type_ids"] = _padded([self.types[place] for place in chosen], 0)
        return batch


@dataclass(frozen=True)
class Answers:
    """Encoded prompts, and the targets that are to be written after them; a target ends with the end-of-text token."""

    prompts: list[list[int]]
    targets: list[list[int]]
    length: int

    def batch(self, chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Ids [B, L], and which of them belong to an answer [B, L]. What is padded comes last, so nothing sees it."""
        rows = [self.prompts[place] + self.targets[place] for place in chosen]
        marks = [[0] * len(self.prompts[place]) + [1] * len(self.targets[place]) for place in chosen]
        return _padded(rows, 0), _padded(marks, 0).bool()


def _padded(rows: list[list[int]], value: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def encode(tokenizer: Any, task: Task, examples: Sequence[Example], length: int) -> Labelled | Answers:
    """Encodes examples of a task, cut to `length` tokens."""
    if not examples:
        raise ValueError(f"task {task.name!r} has no such examples")
    if task.kind == "generation":
        return encode_answers(tokenizer, examples, length)
    return encode_labelled(tokenizer, examples, length, task.kind == "regression")


def encode_labelled(tokenizer: Any, examples: Sequence[Example], length: int, regression: bool) -> Labelled:
    """Encodes sentences or pairs."""
    pairs = [example.pair for example in examples] if examples[0].pair is not None else None
    found = tokenizer([example.text for example in examples], pairs, truncation=True, max_length=length)
    labels = torch.tensor([example.label for example in examples], dtype=torch.float32 if regression else torch.int64)
    types = found.get("token_type_ids")
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return Labelled(found["input_ids"], types, labels, length, int(padding or 0), regression)


def encode_prompts(tokenizer: Any, examples: Sequence[Example]) -> list[list[int]]:
    """The texts that answers are written after, each opened as the model's texts are."""
    found = tokenizer([example.text for example in examples], add_special_tokens=False)["input_ids"]
    return [[*opening_of(tokenizer), *ids] for ids in found]


def cut_prompt(prompt: list[int], opening: int, length: int) -> list[int]:
    """A prompt of at most so many tokens, cut at its front; its opening stays where there is room for more."""
    if len(prompt) <= length:
        return prompt
    return [*prompt[:opening], *prompt[opening - length :]] if length > opening else prompt[-length:]


def encode_answers(tokenizer: Any, examples: Sequence[Example], length: int) -> Answers:
    """Encodes prompts and their first references; a prompt that leaves no room for its answer is cut at its front."""
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer names no end-of-text token, which tells where a written answer ends")
    starts, opening = encode_prompts(tokenizer, examples), len(opening_of(tokenizer))
    ends = tokenizer([example.references[0] for example in examples], add_special_tokens=False)["input_ids"]
    prompts, targets = [], []
    for start, end in zip(starts, ends, strict=True):
        target = [*end, tokenizer.eos_token_id][: length - 1]
        targets.append(target)
        prompts.append(cut_prompt(start, opening, length - len(target)))
    return Answers(prompts, targets, length)
