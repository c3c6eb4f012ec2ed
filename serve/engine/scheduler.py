"""Which sequences compute which tokens in the next step: continuous batching with chunked prefill.

There is no prefill phase and no decode phase: a sequence has tokens that are not computed yet, one while it decodes,
many after it arrives, and a step computes up to `max_num_batched_tokens` of them. Running sequences go first, in
order of arrival, so a long prompt never starves a stream. When blocks run out, the youngest running sequence is
preempted: it gives up its blocks and is computed again later (recompute is cheaper than swapping at these sizes).

How a prompt is cut into chunks shows in the last bits of its keys and values. `fixed_chunk` cuts every prompt in the
same places whatever else is computed, shares only whole chunks, and computes generated tokens one by one even after a
preemption, so that an answer does not depend on the company it is in.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from serve.engine.block_manager import BlockManager
from serve.engine.sequence import Sequence, Status


@dataclass(slots=True)
class Scheduled:
    """`seq` computes the tokens `[start, start + count)` in this step, and samples if they are its last ones.

    With a `draft`, `seq` does not have the token at `start` yet: it is guessed, and samples in case the guess is right.
    """

    seq: Sequence
    start: int
    count: int
    draft: int | None = None

    @property
    def samples(self) -> bool:
        return self.draft is not None or self.start + self.count == len(self.seq)

    @property
    def confirmed(self) -> bool:
        """The draft is what the sequence got; asked after the tokens before it were sampled."""
        seq = self.seq
        return seq.status is Status.RUNNING and len(seq) == self.start + 1 and seq.tokens[self.start] == self.draft


class Scheduler:
    def __init__(
        self,
        blocks: BlockManager,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_prefill_beside_decode: int,
        propose: Callable[[Sequence], list[int]] | None = None,
        fixed_chunk: int | None = None,
    ) -> None:
        self.blocks = blocks
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_prefill_beside_decode = max_prefill_beside_decode
        self.propose = propose
        self.fixed_chunk = fixed_chunk
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0

    def add(self, seq: Sequence) -> None:
        self.waiting.append(seq)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def finish(self, seq: Sequence) -> None:
        """Take `seq` out, wherever it is, and free its blocks at once."""
        if seq.status is Status.RUNNING:
            self.running.remove(seq)
        elif seq.status is Status.WAITING:
            self.waiting.remove(seq)
        seq.status = Status.FINISHED
        self.blocks.free(seq)

    def schedule(self) -> list[Scheduled]:
        step: list[Scheduled] = []
        budget = self._budget()
        for seq in list(self.running):
            if seq.status is not Status.RUNNING:
                continue
            count = self._count(seq, budget)
            if count == 0 or not self._make_room(seq, seq.num_computed + count, step):
                continue
            step.append(Scheduled(seq, seq.num_computed, count))
            budget -= count
        if self.num_preempted_in_step == 0:
            budget = self._admit(step, budget)
            if self.propose is not None:
                step += self._drafts(step, budget, self.propose)
        return step

    def commit(self, step: list[Scheduled]) -> None:
        """The tokens of `step` are in the cache now; drafts count once the sequence has them."""
        for item in step:
            if item.seq.status is Status.RUNNING and item.start < len(item.seq):
                item.seq.num_computed = item.start + item.count
                if self.fixed_chunk is None or item.count == self.fixed_chunk:
                    self.blocks.register_full(item.seq, item.start)

    def _count(self, seq: Sequence, budget: int) -> int:
        """How many tokens `seq` computes next, 0 when the budget has no room for its chunk."""
        if self.fixed_chunk is None:
            return min(seq.num_uncomputed, budget)
        count = 1
        if seq.num_computed < seq.num_prompt:
            count = min(self.fixed_chunk - seq.num_computed % self.fixed_chunk, seq.num_prompt - seq.num_computed)
        return count if count <= budget else 0

    def _drafts(self, step: list[Scheduled], budget: int, propose: Callable[[Sequence], list[int]]) -> list[Scheduled]:
        """Guesses of what follows the sequences that decode, from the tokens and blocks that nobody else needs."""
        drafts: list[Scheduled] = []
        spare = max(0, self._admissible_blocks())
        for seq in [item.seq for item in step if item.seq.num_uncomputed == 1]:
            tokens = propose(seq)[: budget - len(drafts)] if len(drafts) < budget else []
            missing = max(0, self.blocks.blocks_for(len(seq) + len(tokens)) - len(seq.block_table))
            if missing <= spare:
                spare -= missing
                self.blocks.extend(seq, len(seq) + len(tokens))
                drafts += [Scheduled(seq, len(seq) + i, 1, token) for i, token in enumerate(tokens)]
        return drafts

    def _budget(self) -> int:
        self.num_preempted_in_step = 0
        decoding = sum(seq.num_uncomputed == 1 for seq in self.running)
        if decoding:
            return min(self.max_num_batched_tokens, decoding + self.max_prefill_beside_decode)
        return self.max_num_batched_tokens

    def _make_room(self, seq: Sequence, num_tokens: int, step: list[Scheduled]) -> bool:
        """Blocks for `seq`, taken from the youngest running sequences if need be, which may be `seq` itself."""
        while not self.blocks.extend(seq, num_tokens):
            victim = self.running[-1]
            self._preempt(victim)
            step[:] = [item for item in step if item.seq is not victim]
            if victim is seq:
                return False
        return True

    def _preempt(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self.blocks.free(seq)
        seq.status = Status.WAITING
        seq.num_preemptions += 1
        self.num_preemptions += 1
        self.num_preempted_in_step += 1
        self.waiting.appendleft(seq)

    def _admit(self, step: list[Scheduled], budget: int) -> int:
        """Start waiting sequences, first come first served, while tokens, seats and blocks last; the tokens left."""
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            seq = self.waiting[0]
            self.blocks.match_prefix(seq, 1 if self.fixed_chunk is None else self.fixed_chunk // self.blocks.block_size)
            count = self._count(seq, budget)
            # A whole prompt must fit, not only its first chunk: half-admitted prompts would preempt one another.
            if not count or self.blocks.blocks_for(len(seq)) - len(seq.block_table) > self._admissible_blocks():
                self.blocks.free(seq)
                return budget
            self.blocks.extend(seq, seq.num_computed + count)
            self.blocks.prefix_queries += len(seq)
            self.blocks.prefix_hits += seq.num_computed
            self.waiting.popleft()
            seq.status = Status.RUNNING
            self.running.append(seq)
            step.append(Scheduled(seq, seq.num_computed, count))
            budget -= count
        return budget

    def _admissible_blocks(self) -> int:
        """Free blocks less those that admitted prompts have not taken yet."""
        promised = sum(max(0, self.blocks.blocks_for(len(seq)) - len(seq.block_table)) for seq in self.running)
        return self.blocks.num_free - promised
