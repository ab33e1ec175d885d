"""
What a router is told about one KV cache, as events.

    log = KvEventLog(block_size)
    for event in log.stored(request, hashes): ...     blocks came into the cache (`KvBlocks.observer`)
    for event in log.removed(hashes): ...             blocks were evicted
    for event in log.clear(): ...                     the cache is gone

A router keeps a tree: a block is found only under its parent, and what is stored under a parent that
it does not know is lost. A cache can keep a block whose parent was evicted: two requests computed the same
beginning, the copy of one has the name, and the other has gone on from a copy of its own. Nobody can find such a
block, so it counts as removed until its parent is back. What was told is thus always what `KvBlocks.num_prefix_blocks`
finds, and a parent is told of before its children and taken back after them.

Nothing here knows Dynamo or time. `kv_feed` calls it, on a thread of its own.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from mock_engine.request import Request

MAX_EVENT_BLOCKS = 4096  # in one event; the planes that carry them limit a message's size


@dataclass(frozen=True, slots=True)
class Stored:
    """A chain of full blocks, each the parent of the next. `parent_hash` is that of the first, None for a prompt's."""

    parent_hash: int | None
    block_hashes: list[int]
    token_ids: list[int]  # of all blocks, one after the other


@dataclass(frozen=True, slots=True)
class Removed:
    """Blocks that cannot be found any more, children before their parents."""

    block_hashes: list[int]


KvEvent = Stored | Removed


class _Block:
    """A block in the cache. `is_told`: the router knows it."""

    __slots__ = ("is_told", "parent_hash", "token_ids")

    def __init__(self, parent_hash: int | None, token_ids: array[int]) -> None:
        self.parent_hash = parent_hash
        self.token_ids = token_ids
        self.is_told = False


class KvEventLog:
    """See the module."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._blocks: dict[int, _Block] = {}
        # Blocks in the cache by their parents, which may be out of it. The inner ones are sets that keep their order.
        self._children: dict[int | None, dict[int, None]] = {}

    def stored(self, request: Request, hashes: Collection[int]) -> list[Stored]:
        """These blocks of `request`, in its order, came into the cache. Without its token ids nothing is told."""
        of_request = iter(enumerate(request.block_hashes))
        for block_hash in hashes:
            index = next(index for index, each in of_request if each == block_hash)
            parent_hash = request.block_hashes[index - 1] if index else None
            token_ids = array("q", request.token_ids[index * self.block_size : (index + 1) * self.block_size])
            if len(token_ids) == self.block_size:
                self._blocks[block_hash] = _Block(parent_hash, token_ids)
                self._children.setdefault(parent_hash, {})[block_hash] = None
        told = [found for block_hash in hashes if block_hash in self._blocks for found in self._tell(block_hash)]
        return list(self._chains(told))

    def removed(self, hashes: Sequence[int]) -> list[Removed]:
        """These blocks were evicted. Those that came before the log did are left out."""
        taken_back: list[int] = []
        for block_hash in hashes:
            if block_hash not in self._blocks:
                continue
            taken_back += reversed(self._take_back(block_hash))
            parent_hash = self._blocks.pop(block_hash).parent_hash
            siblings = self._children[parent_hash]
            del siblings[block_hash]
            if not siblings:
                del self._children[parent_hash]
        return _removals(taken_back)

    def clear(self) -> list[Removed]:
        """Take back all that was told."""
        told = [found for root in self._children.get(None, ()) for found in reversed(self._take_back(root))]
        self._blocks.clear()
        self._children.clear()
        return _removals(told)

    def _tell(self, block_hash: int) -> list[int]:
        """The block and what is below it in the cache, parents first, if the router can be told and has not been."""
        block = self._blocks[block_hash]
        parent = None if block.parent_hash is None else self._blocks.get(block.parent_hash)
        if block.is_told or (block.parent_hash is not None and (parent is None or not parent.is_told)):
            return []
        return self._mark(block_hash, True)

    def _take_back(self, block_hash: int) -> list[int]:
        """The block and what is below it, parents first, if the router knows them."""
        return self._mark(block_hash, False) if self._blocks[block_hash].is_told else []

    def _mark(self, block_hash: int, is_told: bool) -> list[int]:
        marked: list[int] = []
        open_hashes = [block_hash]
        while open_hashes:
            block_hash = open_hashes.pop()
            block = self._blocks[block_hash]
            if block.is_told is not is_told:
                block.is_told = is_told
                marked.append(block_hash)
                open_hashes += reversed(self._children.get(block_hash, {}))
        return marked

    def _chains(self, hashes: Iterable[int]) -> Iterator[Stored]:
        """One event for each run of blocks that follow one another."""
        event: Stored | None = None
        for block_hash in hashes:
            block = self._blocks[block_hash]
            if event is None or event.block_hashes[-1] != block.parent_hash or _is_full(event):
                if event is not None:
                    yield event
                event = Stored(block.parent_hash, [], [])
            event.block_hashes.append(block_hash)
            event.token_ids.extend(block.token_ids)
        if event is not None:
            yield event


def _is_full(event: Stored) -> bool:
    return len(event.block_hashes) == MAX_EVENT_BLOCKS


def _removals(hashes: list[int]) -> list[Removed]:
    starts = range(0, len(hashes), MAX_EVENT_BLOCKS)
    return [Removed(hashes[start : start + MAX_EVENT_BLOCKS]) for start in starts]
