"""Speculative decoding without a second model: what followed the same words before is likely to follow them again.

The last tokens of a sequence are looked up in its own prompt and answer, and what came after them is proposed. The
engine computes the proposed tokens in the same step, and keeps a proposal only where it samples the same token itself,
so answers are what they would be without. It pays where an answer quotes its prompt: summaries, code, corrections.
(Saxena 2023, "Prompt Lookup Decoding".)
"""

from __future__ import annotations

from dataclasses import dataclass, field

from serve.engine.sequence import Sequence

WORDS = 3  # tokens that must agree


@dataclass
class _History:
    """Where each run of WORDS tokens was last followed by another token."""

    follows: dict[tuple[int, ...], int] = field(default_factory=dict)
    indexed: int = WORDS
    limit: int = 0
    length: int = 0  # of the sequence when it got the latest proposal; 0: none is open


class PromptLookup:
    """Proposes up to `num_tokens`; fewer to a sequence whose proposals were wrong of late, or whose end is near."""

    def __init__(self, num_tokens: int, max_model_len: int) -> None:
        self.num_tokens = num_tokens
        self.max_model_len = max_model_len
        self._histories: dict[int, _History] = {}

    def __call__(self, seq: Sequence) -> list[int]:
        history = self._histories.get(seq.id)
        if history is None:
            history = self._histories[seq.id] = _History(limit=self.num_tokens)
        tokens = seq.tokens
        for end in range(history.indexed, len(tokens)):
            history.follows[tuple(tokens[end - WORDS : end])] = end
        history.indexed = max(len(tokens), WORDS)
        self._learn(history, len(tokens))
        place = history.follows.get(tuple(tokens[-WORDS:]))
        if place is None:
            return []
        history.length = len(tokens)
        return tokens[place : place + min(history.limit, self._room(seq))]

    def forget(self, seq: Sequence) -> None:
        self._histories.pop(seq.id, None)

    def _room(self, seq: Sequence) -> int:
        """Tokens that may follow the next one."""
        room = self.max_model_len - len(seq) - 1
        if seq.params.max_tokens is not None:
            room = min(room, seq.params.max_tokens - seq.num_generated - 1)
        return max(room, 0)

    def _learn(self, history: _History, length: int) -> None:
        """Double what was right, halve what was wrong."""
        if history.length:
            right = length - history.length - 1
            history.limit = min(self.num_tokens, 2 * right) if right else max(1, history.limit // 2)
            history.length = 0
