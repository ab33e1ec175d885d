"""A router's tree as a model, and a listener that keeps one: every event must fit what came before."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from mock_engine.kv_events import KvEvent, KvEventLog, Stored
from mock_engine.request import Request


class RouterTree:
    """All blocks that a router knows, by hash: `tokens` up to each block's end, and its parent."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.tokens: dict[int, list[int]] = {}
        self.parents: dict[int, int | None] = {}

    def apply(self, event: KvEvent) -> None:
        """What the event says. Fails on what a real router would warn of, or lose in silence."""
        if isinstance(event, Stored):
            self.store(event.parent_hash, event.block_hashes, event.token_ids)
        else:
            self.remove(event.block_hashes)

    def store(self, parent_hash: int | None, hashes: Sequence[int], token_ids: Sequence[int]) -> None:
        assert hashes
        assert len(token_ids) == len(hashes) * self.block_size
        assert parent_hash is None or parent_hash in self.tokens, "an orphan"
        tokens = [] if parent_hash is None else self.tokens[parent_hash]
        for index, block_hash in enumerate(hashes):
            assert block_hash not in self.tokens, "stored twice"
            assert -(2**63) <= block_hash < 2**63
            tokens = [*tokens, *token_ids[index * self.block_size : (index + 1) * self.block_size]]
            self.tokens[block_hash], self.parents[block_hash] = tokens, parent_hash
            parent_hash = block_hash

    def remove(self, hashes: Sequence[int]) -> None:
        assert hashes
        for block_hash in hashes:
            assert block_hash not in self.parents.values(), "removed before its children"
            del self.tokens[block_hash], self.parents[block_hash]


class KvListener:
    """An observer of `KvBlocks` that applies every event to a tree at once."""

    def __init__(self, block_size: int) -> None:
        self.log = KvEventLog(block_size)
        self.tree = RouterTree(block_size)
        self.events: list[KvEvent] = []

    def stored(self, request: Request, hashes: Collection[int]) -> None:
        self._apply(self.log.stored(request, hashes))

    def removed(self, hashes: Sequence[int]) -> None:
        self._apply(self.log.removed(hashes))

    def clear(self) -> None:
        self._apply(self.log.clear())

    def _apply(self, events: Sequence[KvEvent]) -> None:
        self.events += events
        for event in events:
            self.tree.apply(event)
