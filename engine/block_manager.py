"""BlockManager: which cache block belongs to whom. Ids and counts only, never tensors.

A block is owned (referenced by one or more block tables), cached (referenced by none, but its contents are known by
their hash and may be taken again) or blank. Cached and blank blocks are free: both can be allocated, blank ones first,
then cached ones, the least recently used first.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable
from hashlib import blake2b

import msgspec

from engine.sequence import Sequence


class BlockStats(msgspec.Struct, frozen=True):
    """Blocks by what they are. used + free = all; cached is a part of free, shared a part of used."""

    num_blocks: int
    used: int
    free: int
    cached: int
    shared: int
    saved: int
    """Blocks that there would be more of without sharing."""


class BlockManager:
    """Allocates blocks of `block_size` tokens, shares them between sequences and finds them again by their contents."""

    def __init__(self, num_blocks: int, block_size: int, *, caching: bool = True) -> None:
        self.block_size, self.caching = block_size, caching
        self.reset(num_blocks)

    def reset(self, num_blocks: int) -> None:
        """Forget everything: all blocks are blank. Tables of sequences must be emptied by their owner."""
        self.num_blocks = num_blocks
        self._ref = [0] * num_blocks
        self._blank = list(range(num_blocks - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()
        """Cached blocks, least recently used first."""
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self._num_shared = 0
        self._num_saved = 0

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated now."""
        return len(self._blank) + len(self._idle)

    def stats(self) -> BlockStats:
        """Counts of now, in constant time."""
        free = self.num_free
        return BlockStats(
            num_blocks=self.num_blocks,
            used=self.num_blocks - free,
            free=free,
            cached=len(self._idle),
            shared=self._num_shared,
            saved=self._num_saved,
        )

    def cached_blocks(self) -> Iterable[int]:
        """Blocks that nobody owns and the prefix cache knows."""
        return self._idle.keys()

    def shared_blocks(self) -> Iterable[int]:
        """Blocks of more than one owner."""
        return (block for block, count in enumerate(self._ref) if count > 1)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self, sequence: Sequence, count: int = 1) -> list[int]:
        """Append `count` blocks to the sequence's table; their ids. There must be as many free."""
        blocks = [self._take() for _ in range(count)]
        sequence.block_table.extend(blocks)
        return blocks

    def take_back(self, sequence: Sequence, count: int) -> None:
        """Undo `allocate` for the last `count` blocks of the sequence's table, which nothing was written to."""
        for _ in range(count):
            block = sequence.block_table.pop()
            assert self._ref[block] == 1 and block not in self._hash_of, "a block just allocated"
            self._ref[block] = 0
            self._blank.append(block)

    def free(self, sequence: Sequence) -> None:
        """Give back all blocks of a sequence, its last first, so that the tails of prefixes are evicted first."""
        ref = self._ref
        for block in reversed(sequence.block_table):
            count = ref[block] = ref[block] - 1
            if count:
                self._num_saved -= 1
                if count == 1:
                    self._num_shared -= 1
            elif block in self._hash_of:
                self._idle[block] = None
            else:
                self._blank.append(block)
        sequence.block_table = []

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Let child share all of parent's blocks. No block is copied until one of them writes."""
        assert not child.block_table
        for block in parent.block_table:
            self._share(block)
        child.block_table = list(parent.block_table)
        child.hashes = list(parent.hashes)
        child.num_registered = parent.num_registered

    def num_owners(self, block: int) -> int:
        """Block tables that hold it."""
        return self._ref[block]

    def copy_on_write(self, sequence: Sequence, index: int) -> tuple[int, int] | None:
        """Make entry `index` of the table the sequence's own, to be written. (source, target) when it must be copied.

        A block that the sequence shares with nobody is written in place. There must be one free block otherwise.
        """
        source = sequence.block_table[index]
        if self._ref[source] == 1:
            return None
        target = self._take()
        self._ref[source] -= 1
        self._num_saved -= 1
        if self._ref[source] == 1:
            self._num_shared -= 1
        sequence.block_table[index] = target
        return source, target

    def match(self, sequence: Sequence) -> list[int]:
        """Blocks that already hold the first tokens of a waiting sequence; never all of its tokens.

        The last token is left out because its logits are wanted, which no cache holds. Nothing is taken yet.
        """
        if not self.caching or sequence.computes_all:
            return []
        hits: list[int] = []
        for index in range((len(sequence.tokens) - 1) // self.block_size):
            block = self._block_of.get(self._hash(sequence, index))
            if block is None:
                break
            hits.append(block)
        return hits

    def num_idle(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` are free, so that taking them leaves fewer to allocate."""
        return sum(1 for block in blocks if self._ref[block] == 0)

    def adopt(self, sequence: Sequence, hits: list[int]) -> None:
        """Begin a sequence's table with the blocks that `match` found."""
        assert not sequence.block_table
        for block in hits:
            self._share(block)
        sequence.block_table = list(hits)
        sequence.num_registered = len(hits)

    def register(self, sequence: Sequence, num_tokens: int) -> None:
        """Let others find the full blocks of a sequence's first `num_tokens`.

        These must be known, and computed by steps already submitted. A block whose contents another block holds already
        stays unknown.
        """
        if not self.caching:
            return
        for index in range(sequence.num_registered, num_tokens // self.block_size):
            digest = self._hash(sequence, index)
            if digest not in self._block_of:
                block = sequence.block_table[index]
                assert block not in self._hash_of, "a block's contents are registered once"
                self._block_of[digest] = block
                self._hash_of[block] = digest
            sequence.num_registered = index + 1

    def check(self, sequences: Iterable[Sequence]) -> None:
        """Assert that the books balance, given all sequences that hold blocks. For tests: slow."""
        owners = Counter(block for sequence in sequences for block in sequence.block_table)
        assert all(self._ref[block] == owners[block] for block in range(self.num_blocks)), "references"
        blank, idle = set(self._blank), set(self._idle)
        assert len(blank) == len(self._blank) and not blank & idle, "a block is free once"
        assert blank | idle == {block for block in range(self.num_blocks) if not owners[block]}, "free blocks"
        assert idle <= self._hash_of.keys() and not blank & self._hash_of.keys(), "hashes of free blocks"
        assert {block: digest for digest, block in self._block_of.items()} == self._hash_of, "hashes"
        assert self._num_shared == sum(1 for count in owners.values() if count > 1), "shared"
        assert self._num_saved == sum(count - 1 for count in owners.values()), "saved"

    def _take(self) -> int:
        """A blank block, or the cached one unused for longest; it is referenced once."""
        if self._blank:
            block = self._blank.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            del self._block_of[self._hash_of.pop(block)]
        self._ref[block] = 1
        return block

    def _share(self, block: int) -> None:
        count = self._ref[block] = self._ref[block] + 1
        if count == 1:
            del self._idle[block]
        else:
            self._num_saved += 1
            if count == 2:
                self._num_shared += 1

    def _hash(self, sequence: Sequence, index: int) -> bytes:
        """The hash of a full block's tokens and all before them: 128 bits, chained, so that equal means same prefix."""
        hashes = sequence.hashes
        while len(hashes) <= index:
            start = len(hashes) * self.block_size
            state = blake2b(hashes[-1] if hashes else _root(sequence.salt), digest_size=16)
            state.update(sequence.tokens[start : start + self.block_size].tobytes())
            hashes.append(state.digest())
        return hashes[index]


def _root(salt: str) -> bytes:
    """The hash of no tokens; no chain can lead to it."""
    return blake2b(salt.encode(), digest_size=16, person=b"root").digest()
