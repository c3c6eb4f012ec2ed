"""The KV cache's blocks: a fixed number, shared by prefix, freed by reference count.

A full block whose tokens are computed is registered under the digest of *all* tokens up to its end, and of the salt
that the request came with, so equal digests mean equal keys and values. Freed blocks keep their content until they are
needed again, the least recently freed first: a later request with the same beginning takes them back. The digest is
keyed with random bytes of this process, so that a client cannot construct two prompts that collide.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections import OrderedDict

from serve.engine.sequence import Sequence


class BlockManager:
    def __init__(self, num_blocks: int, block_size: int, prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self._references = [0] * num_blocks
        self._digest_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._key = os.urandom(32)
        self.prefix_queries = 0
        self.prefix_hits = 0

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def match_prefix(self, seq: Sequence, unit: int = 1) -> None:
        """Take over the cached blocks that begin `seq`, in units of so many; at least one token is left to compute."""
        if not self.prefix_caching or seq.params.prompt_logprobs is not None:
            return
        for index in range((len(seq) - 1) // self.block_size):
            block = self._block_of.get(self._digest(seq, index))
            if block is None:
                break
            self._take(block)
            seq.block_table.append(block)
        self._release(seq, len(seq.block_table) // unit * unit)
        seq.num_computed = len(seq.block_table) * self.block_size
        if not seq.num_preemptions:  # after one, its own output may be found
            seq.num_cached = seq.num_computed

    def extend(self, seq: Sequence, num_tokens: int) -> bool:
        """Give `seq` blocks for its first `num_tokens` tokens; False, and nothing done, when too few are free."""
        missing = -(-num_tokens // self.block_size) - len(seq.block_table)
        if missing <= 0:
            return True
        if missing > len(self._free):
            return False
        for _ in range(missing):
            block = next(iter(self._free))
            self._forget(block)
            self._take(block)
            seq.block_table.append(block)
        return True

    def register_full(self, seq: Sequence, first_token: int) -> None:
        """Make the blocks that became full since `first_token` findable by their content."""
        if not self.prefix_caching:
            return
        for index in range(first_token // self.block_size, seq.num_computed // self.block_size):
            digest = self._digest(seq, index)
            block = seq.block_table[index]
            if self._digest_of[block] is None and digest not in self._block_of:
                self._digest_of[block] = digest
                self._block_of[digest] = block

    def free(self, seq: Sequence) -> None:
        self._release(seq, 0)
        seq.num_computed = 0

    def _release(self, seq: Sequence, kept: int) -> None:
        """Give back all blocks of `seq` but the first `kept`."""
        # Last block first: the beginning of a sequence is the likeliest to be asked for again, so it is reused last.
        for block in reversed(seq.block_table[kept:]):
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
        del seq.block_table[kept:]

    def _take(self, block: int) -> None:
        if self._references[block] == 0:
            del self._free[block]
        self._references[block] += 1

    def _forget(self, block: int) -> None:
        digest = self._digest_of[block]
        if digest is not None:
            del self._block_of[digest]
            self._digest_of[block] = None

    def _digest(self, seq: Sequence, index: int) -> bytes:
        """Digest of the tokens up to the end of block `index`; remembered per sequence, tokens are only appended."""
        size = self.block_size
        while len(seq.block_digests) <= index:
            start = len(seq.block_digests) * size
            before = seq.block_digests[-1] if seq.block_digests else seq.params.cache_salt.encode()
            content = before + array("q", seq.tokens[start : start + size]).tobytes()
            seq.block_digests.append(hashlib.blake2b(content, digest_size=16, key=self._key).digest())
        return seq.block_digests[index]
