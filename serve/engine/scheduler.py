"""Which sequences compute which tokens in the next step: continuous batching with chunked prefill.

There is no prefill phase and no decode phase: a sequence has tokens that are not computed yet, one while it decodes,
many after it arrives, and a step computes up to `max_num_batched_tokens` of them. Running sequences go first, in
order of arrival, so a long prompt never starves a stream. When blocks run out, the youngest running sequence is
preempted: it gives up its blocks and is computed again later (recompute is cheaper than swapping at these sizes).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from serve.engine.block_manager import BlockManager
from serve.engine.sequence import Sequence, Status


@dataclass(frozen=True)
class Scheduled:
    """`seq` computes the tokens `[start, start + count)` in this step, and samples if they are its last ones."""

    seq: Sequence
    start: int
    count: int

    @property
    def samples(self) -> bool:
        return self.start + self.count == len(self.seq)


class Scheduler:
    def __init__(
        self,
        blocks: BlockManager,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_prefill_beside_decode: int,
    ) -> None:
        self.blocks = blocks
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_prefill_beside_decode = max_prefill_beside_decode
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
            count = min(seq.num_uncomputed, budget)
            if count == 0 or not self._make_room(seq, seq.num_computed + count, step):
                continue
            step.append(Scheduled(seq, seq.num_computed, count))
            budget -= count
        if self.num_preempted_in_step == 0:
            self._admit(step, budget)
        return step

    def commit(self, step: list[Scheduled]) -> None:
        """The tokens of `step` are in the cache now."""
        for item in step:
            if item.seq.status is Status.RUNNING:
                item.seq.num_computed = item.start + item.count
                self.blocks.register_full(item.seq, item.start)

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

    def _admit(self, step: list[Scheduled], budget: int) -> None:
        """Start waiting sequences, first come first served, while tokens, seats and blocks last."""
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            seq = self.waiting[0]
            self.blocks.match_prefix(seq)
            count = min(seq.num_uncomputed, budget)
            # A whole prompt must fit, not only its first chunk: half-admitted prompts would preempt one another.
            if self.blocks.blocks_for(len(seq)) - len(seq.block_table) > self._admissible_blocks():
                self.blocks.free(seq)
                return
            self.blocks.extend(seq, seq.num_computed + count)
            self.blocks.prefix_queries += len(seq)
            self.blocks.prefix_hits += seq.num_computed
            self.waiting.popleft()
            seq.status = Status.RUNNING
            self.running.append(seq)
            step.append(Scheduled(seq, seq.num_computed, count))
            budget -= count

    def _admissible_blocks(self) -> int:
        """Free blocks less those that admitted prompts have not taken yet."""
        promised = sum(self.blocks.blocks_for(len(seq)) - len(seq.block_table) for seq in self.running)
        return self.blocks.num_free - promised
