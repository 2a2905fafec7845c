"""A GPU's memory as torch's caching allocator deals it out: what is in use, and what is reserved for it.

Rules, sizes and the choice among free blocks are those of torch 2.1 and later (c10/cuda/CUDACachingAllocator.cpp:
`round_size`, `get_allocation_size`, `get_free_block`, `should_split`, `release_cached_blocks`).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from operator import attrgetter

UNIT = 512  # a block's size is a multiple of it
SMALL = 1 << 20  # up to this size blocks come from segments of their own, and larger ones are not split for less
SMALL_SEGMENT, LARGE_SEGMENT, ROUND = 2 << 20, 20 << 20, 2 << 20
LARGE = 10 << 20  # from this size on a segment is made for one block

KINDS = ("weights", "cache", "logits", "activations")


class OutOfMemory(Exception):
    """The card can't give what is asked for, although all that is free has been returned to it."""


class Block:
    """A piece of a segment, between its neighbours; `free` ones lie in the pool of their kind of segment."""

    __slots__ = ("after", "before", "free", "place", "pool", "size")

    def __init__(self, size: int, address: int, pool: list[Block]) -> None:
        self.size, self.pool, self.free = size, pool, False
        self.place = size, address
        self.before: Block | None = None
        self.after: Block | None = None

    @property
    def is_segment(self) -> bool:
        return self.before is None and self.after is None

    def move(self, size: int, address: int) -> None:
        self.size, self.place = size, (size, address)


_place = attrgetter("place")  # free blocks lie in a pool by size, and then by address


class Tensor:
    """Memory in use, until nothing names the object: as long as Python's own references keep a torch tensor."""

    __slots__ = ("_block", "_kind", "_memory", "_nbytes")

    def __init__(self, memory: Memory, kind: str, nbytes: int, block: Block) -> None:
        self._memory, self._kind, self._nbytes, self._block = memory, kind, nbytes, block

    def __del__(self) -> None:
        self._memory.free(self._kind, self._nbytes, self._block)


class Memory:
    """A card's memory, of which `capacity` bytes can be had (None: any number).

    `used` are the bytes of tensors by kind, and `allocated` those of their blocks, some of which are not split though
    they are larger. `peak` is what was used when `allocated` was most, `most_allocated`. `reserved` are the bytes of
    segments, at most `most_reserved`.
    """

    def __init__(self, capacity: int | None = None) -> None:
        self.capacity = capacity
        self.used = dict.fromkeys(KINDS, 0)
        self.peak = dict(self.used)
        self.allocated = self.most_allocated = 0
        self.reserved = self.most_reserved = 0
        self._pools: tuple[list[Block], list[Block]] = ([], [])  # of small and of large blocks
        # CUDA puts a large segment below the one before (seen on an H200); among free blocks of one
        # size the lowest is taken.
        self._lowest = 1 << 47

    def __call__(self, nbytes: int, kind: str = "activations") -> Tensor:
        """A tensor of so many bytes. Raises OutOfMemory."""
        size = max(UNIT, -(-nbytes // UNIT) * UNIT)
        pool = self._pools[size > SMALL]
        index = bisect_left(pool, (size, 0), key=_place)
        block = pool.pop(index) if index < len(pool) else self._segment(size, pool)
        block.free = False
        rest = block.size - size
        if rest >= UNIT if size <= SMALL else rest > SMALL:
            self._split(block, size)
        self.used[kind] += nbytes
        self.allocated += block.size
        if self.allocated > self.most_allocated:
            self.most_allocated, self.peak = self.allocated, dict(self.used)
        return Tensor(self, kind, nbytes, block)

    def free(self, kind: str, nbytes: int, block: Block) -> None:
        """Return a tensor's block to its pool, joined with neighbours that are free."""
        self.used[kind] -= nbytes
        self.allocated -= block.size
        for other in (block.before, block.after):
            if other is not None and other.free:
                other.pool.pop(bisect_left(other.pool, other.place, key=_place))
                first, last = (other, block) if other is block.before else (block, other)
                block.before, block.after = first.before, last.after
                block.move(first.size + last.size, first.place[1])
        if block.before is not None:
            block.before.after = block
        if block.after is not None:
            block.after.before = block
        self._insert(block)

    def _insert(self, block: Block) -> None:
        block.free = True
        insort(block.pool, block, key=_place)

    def _split(self, block: Block, size: int) -> None:
        """Leave the front of a block, and return what is behind to the pool."""
        address = block.place[1]
        rest = Block(block.size - size, address + size, block.pool)
        block.move(size, address)
        rest.before, rest.after, block.after = block, block.after, rest
        if rest.after is not None:
            rest.after.before = rest
        self._insert(rest)

    def _segment(self, size: int, pool: list[Block]) -> Block:
        nbytes = SMALL_SEGMENT if size <= SMALL else LARGE_SEGMENT if size < LARGE else -(-size // ROUND) * ROUND
        if not self._fits(nbytes):
            self._release()
            if not self._fits(nbytes):
                raise OutOfMemory
        self.reserved += nbytes
        self.most_reserved = max(self.most_reserved, self.reserved)
        self._lowest -= nbytes
        return Block(nbytes, self._lowest, pool)

    def _fits(self, nbytes: int) -> bool:
        return self.capacity is None or self.reserved + nbytes <= self.capacity

    def _release(self) -> None:
        """Give segments back to the card in which nothing is in use."""
        for pool in self._pools:
            self.reserved -= sum(block.size for block in pool if block.is_segment)
            pool[:] = [block for block in pool if not block.is_segment]
