"""Blocks and steps without a model: a random load must never lose a block, a token or a sequence."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from serve.engine.block_manager import BlockManager
from serve.engine.sampling_params import SamplingParams
from serve.engine.scheduler import Scheduler
from serve.engine.sequence import Sequence, Status

PARAMS = SamplingParams()


def test_equal_beginnings_share_blocks() -> None:
    blocks = BlockManager(8, 4)
    first, second = Sequence(list(range(10)), PARAMS), Sequence([*range(9), 77, 78], PARAMS)
    assert blocks.extend(first, 10)
    first.num_computed = 10
    blocks.register_full(first, 0)
    blocks.match_prefix(second)
    assert second.block_table == first.block_table[:2]
    assert second.num_computed == 8
    assert blocks.num_used == 3
    blocks.free(first)
    assert blocks.num_used == 2
    blocks.free(second)
    assert blocks.num_used == 0


def test_blocks_are_shared_within_a_salt() -> None:
    blocks, found = BlockManager(16, 4), []
    for salt in ("", "a", "b", "a"):
        seq = Sequence(list(range(9)), SamplingParams(cache_salt=salt))
        blocks.match_prefix(seq)
        found.append(seq.num_computed)
        blocks.extend(seq, 9)
        seq.num_computed = 9
        blocks.register_full(seq, 0)
    assert found == [0, 0, 0, 8]


def test_a_whole_cached_prompt_leaves_one_token_to_compute() -> None:
    blocks = BlockManager(8, 4)
    first, again = Sequence(list(range(8)), PARAMS), Sequence(list(range(8)), PARAMS)
    blocks.extend(first, 8)
    first.num_computed = 8
    blocks.register_full(first, 0)
    blocks.match_prefix(again)
    assert again.num_computed == 4


def test_own_output_does_not_count_as_cached_after_a_preemption() -> None:
    blocks = BlockManager(8, 4)
    seq = Sequence(list(range(5)), PARAMS)
    for token in range(100, 108):
        seq.append(token)
    blocks.extend(seq, 13)
    seq.num_computed = 13
    blocks.register_full(seq, 0)
    blocks.free(seq)
    seq.num_preemptions = 1
    blocks.match_prefix(seq)
    assert seq.num_computed == 12 and seq.num_cached == 0


def test_reused_blocks_are_forgotten() -> None:
    blocks = BlockManager(2, 4)
    first = Sequence(list(range(8)), PARAMS)
    blocks.extend(first, 8)
    first.num_computed = 8
    blocks.register_full(first, 0)
    blocks.free(first)
    other = Sequence(list(range(100, 108)), PARAMS)
    assert blocks.extend(other, 8)
    again = Sequence(list(range(9)), PARAMS)
    blocks.match_prefix(again)
    assert len(again.block_table) == 0


def test_extend_takes_all_or_nothing() -> None:
    blocks = BlockManager(2, 4)
    seq = Sequence(list(range(12)), PARAMS)
    assert not blocks.extend(seq, 12)
    assert len(seq.block_table) == 0
    assert blocks.num_free == 2


def test_decoding_goes_on_beside_a_long_prompt() -> None:
    blocks = BlockManager(64, 4)
    scheduler = Scheduler(blocks, max_num_seqs=4, max_num_batched_tokens=64, max_prefill_beside_decode=8)
    short, long = Sequence([1, 2, 3], PARAMS), Sequence(list(range(100)), PARAMS)
    scheduler.add(short)
    scheduler.commit(scheduler.schedule())
    short.append(4)
    scheduler.add(long)
    counts = []
    for _ in range(3):
        step = scheduler.schedule()
        counts.append({item.seq.id: item.count for item in step})
        scheduler.commit(step)
        short.append(5)
    assert counts == [{short.id: 1, long.id: 8}] * 3


def test_first_come_first_served() -> None:
    scheduler = Scheduler(BlockManager(64, 4), 2, 64, 64)
    sequences = [Sequence([1, 2, 3], PARAMS) for _ in range(4)]
    for seq in sequences:
        scheduler.add(seq)
    assert [item.seq for item in scheduler.schedule()] == sequences[:2]


@pytest.mark.parametrize(
    ("blocks", "tokens", "waiting", "guesses"),
    [(64, 64, 0, [5, 5]), (4, 64, 0, []), (5, 64, 0, [5]), (64, 9, 0, [5, 2]), (64, 9, 6, [1]), (6, 64, 8, [])],
)
def test_guesses_take_what_is_left(blocks: int, tokens: int, waiting: int, guesses: list[int]) -> None:
    """Of blocks and of tokens, after what running sequences must compute and prompts that wait."""
    scheduler = Scheduler(BlockManager(blocks, 4, prefix_caching=False), 4, tokens, 64, propose=lambda _: [7] * 5)
    running = [Sequence([1, 2, 3, 4], PARAMS) for _ in range(2)]
    for seq in running:
        scheduler.add(seq)
    scheduler.commit(scheduler.schedule())
    for seq in running:
        seq.append(5)
    if waiting:
        scheduler.add(Sequence([1] * waiting, PARAMS))
    step = scheduler.schedule()
    must = [item for item in step if item.draft is None]
    assert scheduler.num_preemptions == 0 and [item.count for item in must] == [1, 1, waiting][: 2 + bool(waiting)]
    found = Counter(item.seq.id for item in step if item.draft is not None)
    assert [found[seq.id] for seq in running if found[seq.id]] == guesses
    assert sum(item.count for item in step) <= tokens


@pytest.mark.parametrize("seed", range(8))
def test_random_load_loses_nothing(seed: int) -> None:
    rng = random.Random(seed)
    blocks = BlockManager(rng.randint(12, 40), 4, prefix_caching=rng.random() < 0.7)
    scheduler = Scheduler(blocks, rng.randint(1, 6), rng.randint(6, 30), rng.randint(1, 20))
    longest = blocks.num_blocks * 4
    left = [Sequence([rng.randint(0, 3) for _ in range(rng.randint(1, longest // 2))], PARAMS) for _ in range(40)]
    goal = {seq.id: rng.randint(1, longest - len(seq)) for seq in left}
    finished = 0
    for _ in range(20_000):
        if left and rng.random() < 0.2:
            scheduler.add(left.pop())
        step = scheduler.schedule()
        assert sum(item.count for item in step) <= scheduler.max_num_batched_tokens
        assert len({item.seq.id for item in step}) == len(step) <= scheduler.max_num_seqs
        for item in step:
            assert item.start == item.seq.num_computed
            assert len(item.seq.block_table) >= blocks.blocks_for(item.start + item.count)
        scheduler.commit(step)
        for item in step:
            if not item.samples:
                continue
            item.seq.append(rng.randint(0, 3))
            if item.seq.num_generated >= goal[item.seq.id] or rng.random() < 0.01:
                scheduler.finish(item.seq)
                finished += 1
        if scheduler.waiting and rng.random() < 0.01:
            scheduler.finish(scheduler.waiting[-1])
            finished += 1
        held = {block for seq in scheduler.running for block in seq.block_table}
        assert blocks.num_used == len(held)
        if not left and not scheduler.has_work:
            break
    assert finished == 40
    assert blocks.num_used == 0
    assert all(seq.status is Status.FINISHED for seq in scheduler.running)
