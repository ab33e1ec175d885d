"""
The KV cache as blocks: who holds what, what is shared, what can be reused.

    table = BlockTable()
    blocks.claim_prefix(table, hashes)   share blocks that are in the cache already
    blocks.grow(table, num_blocks)       take new ones; False when there are too few
    blocks.publish(table, hashes)        full blocks can be shared from now on
    blocks.release(table)                give everything back

A block is in one of three states, and the three always sum to `num_blocks`:
used (held by at least one table), cached (held by nobody, content kept for
reuse, evicted least recently used first) and free (no content).

Only blocks with a hash need an identity; all others are counted. That makes
taking and giving back cheap enough for a simulator that does little else. An `observer`
is told which hashes come and go; `Scheduler` tells it whose they are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from typing import Protocol

from mock_engine.request import Request


class KvObserver(Protocol):
    """Who wants to know which blocks can be found in the cache. Called in the middle of a change: do little."""

    def stored(self, request: Request, hashes: Collection[int]) -> None:
        """From now on these blocks of `request`, in its order, can be found."""

    def removed(self, hashes: Sequence[int]) -> None:
        """They were evicted."""


class BlockTable:
    """The blocks that one sequence holds: `hashes` are shared or shareable, `num_private` are not."""

    __slots__ = ("hashes", "num_private")

    def __init__(self) -> None:
        self.hashes: list[int] = []
        self.num_private = 0

    @property
    def num_blocks(self) -> int:
        return len(self.hashes) + self.num_private


class KvBlocks:
    """`num_blocks` blocks of `block_size` tokens, reference-counted, with prefix caching."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.num_free = num_blocks
        self.observer: KvObserver | None = None
        # Every hash in the cache -> how many tables hold it, or, when nobody does, minus the number of the release that
        # left it so. And all releases, oldest first, each with its hashes in the order of their sequence: those that
        # have been claimed since then count there no more.
        self._holders: dict[int, int] = {}
        self._releases: deque[tuple[int, list[int]]] = deque()
        self._num_releases = 0
        self._num_claimed = 0  # hashes in `_releases` that count no more...
        self._claimed_from: set[int] = set()  # ...and the releases they are in
        self._num_private = 0
        self.num_cached = 0  # blocks that nobody holds and whose content can still be reused

    @property
    def num_used(self) -> int:
        """Blocks held by at least one table."""
        return len(self._holders) - self.num_cached + self._num_private

    @property
    def num_available(self) -> int:
        """Blocks that can be taken now: free ones, and cached ones by eviction."""
        return self.num_free + self.num_cached

    def num_prefix_blocks(self, hashes: Sequence[int]) -> int:
        """How many of `hashes`, from the first, are in the cache."""
        if not self.enable_prefix_caching:
            return 0
        holders = self._holders
        for index, block_hash in enumerate(hashes):
            if block_hash not in holders:
                return index
        return len(hashes)

    def num_unheld(self, hashes: Sequence[int]) -> int:
        """How many of `hashes`, all in the cache, would have to move from cached to used."""
        return sum(self._holders[block_hash] < 0 for block_hash in hashes)

    def claim_prefix(self, table: BlockTable, hashes: Sequence[int]) -> None:
        """Let `table` hold the cached blocks `hashes` (from `num_prefix_blocks`) too."""
        holders = self._holders
        for block_hash in hashes:
            num_holders = holders[block_hash]
            if num_holders > 0:
                holders[block_hash] = num_holders + 1
            else:
                holders[block_hash] = 1
                self.num_cached -= 1
                self._num_claimed += 1
                self._claimed_from.add(-num_holders)
        table.hashes += hashes

    def grow(self, table: BlockTable, num_blocks: int) -> bool:
        """Make `table` hold `num_blocks` blocks in all. False, and nothing changes, when too few are available."""
        missing = num_blocks - len(table.hashes) - table.num_private
        if missing <= 0:
            return True
        if not self.take(missing):
            return False
        table.num_private += missing
        return True

    def take(self, num_blocks: int) -> bool:
        """
        Take private blocks that the caller enters into tables (`num_private`) before they are released.

        False, and nothing changes, when too few are available.
        """
        to_evict = num_blocks - self.num_free
        if to_evict > 0:
            if to_evict > self.num_cached:
                return False
            self._evict(to_evict)
        self.num_free -= num_blocks
        self._num_private += num_blocks
        return True

    def publish(self, table: BlockTable, hashes: Sequence[int]) -> Collection[int]:
        """
        As many private blocks of `table` are full; from now on others can find them by `hashes`.

        Where the same content is in the cache already, the block stays a private copy. Returns the hashes of
        the others.
        """
        if not self.enable_prefix_caching:
            return ()
        holders = self._holders
        if not holders.keys().isdisjoint(hashes):
            hashes = [block_hash for block_hash in hashes if block_hash not in holders]
        fresh = dict.fromkeys(hashes, 1)
        holders.update(fresh)
        self._num_private -= len(fresh)
        table.num_private -= len(fresh)
        table.hashes += fresh
        return fresh

    def release(self, table: BlockTable) -> None:
        """Give back all that `table` holds. Hashed blocks stay cached, a sequence's last ones evicted first."""
        holders, hashes = self._holders, table.hashes
        if sum(map(holders.__getitem__, hashes)) > len(hashes):  # others hold some of them too
            shared = [block_hash for block_hash in hashes if holders[block_hash] > 1]
            for block_hash in shared:
                holders[block_hash] -= 1
            still_held = set(shared)
            hashes = [block_hash for block_hash in hashes if block_hash not in still_held]
        if hashes:
            self._num_releases += 1
            holders.update(dict.fromkeys(hashes, -self._num_releases))
            self._releases.append((self._num_releases, hashes))
            self.num_cached += len(hashes)
            self._forget_claimed()
        self.num_free += table.num_private
        self._num_private -= table.num_private
        table.hashes = []
        table.num_private = 0

    def drop_cached(self) -> int:
        """Forget the content of all blocks that nobody holds; they are free. Returns how many they were."""
        num_dropped = self.num_cached
        self._evict(num_dropped)
        return num_dropped

    def _evict(self, num_blocks: int) -> None:
        self.num_free += num_blocks
        self.num_cached -= num_blocks
        while num_blocks:
            release, hashes = self._releases[0]
            last = hashes[-num_blocks:]
            del hashes[-num_blocks:]
            evicted = last
            if release in self._claimed_from:
                evicted = [block_hash for block_hash in last if self._holders.get(block_hash) == -release]
                self._num_claimed -= len(last) - len(evicted)
            if not hashes:
                self._releases.popleft()
                self._claimed_from.discard(release)
            deque(map(self._holders.__delitem__, evicted), maxlen=0)  # a loop, at half the cost of one in Python
            if self.observer is not None and evicted:
                self.observer.removed(evicted)
            num_blocks -= len(evicted)

    def _forget_claimed(self) -> None:
        """Keep `_releases` from growing where blocks are claimed and released, and nothing is evicted."""
        if self._num_claimed > self.num_cached + 1024:
            holders = self._holders
            kept = (
                (release, [block_hash for block_hash in hashes if holders.get(block_hash) == -release])
                for release, hashes in self._releases
            )
            self._releases = deque((release, hashes) for release, hashes in kept if hashes)
            self._num_claimed = 0
            self._claimed_from.clear()
