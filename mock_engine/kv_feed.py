"""
Dynamo's router is told what the KV caches of a worker hold, and how full they are.

    feed = KvFeed(block_size, schedulers)      one scheduler for each data-parallel rank
    feed.attach_kv(rank, publisher)            Dynamo hands a publisher over: from now on events go out
    feed.attach_loads(publish)                 the same for loads
    feed.note_load(rank)                       it may have changed; published 20 times a second at most
    feed.close()                               all that was stored is removed; nothing goes out after this

Both are published by one thread, which starts when there is somebody to publish to. Whoever changes the cache
(the loop, or any thread on which a request is cancelled) only puts a note into a queue; events are worked out here.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from mock_engine.kv_events import KvEvent, KvEventLog, Stored
from mock_engine.request import Request
from mock_engine.scheduler import Scheduler

logger = logging.getLogger(__name__)

_LOAD_INTERVAL_S = 0.05
_PATIENCE_S = 5.0  # for the thread to end


class KvPublisher(Protocol):
    """The part of Dynamo's `KvEventPublisher` that is used. The same in 1.3.1 to 1.6.1."""

    def publish_stored(
        self, token_ids: list[int], num_block_tokens: list[int], block_hashes: list[int], parent_hash: int | None
    ) -> None: ...

    def publish_removed(self, block_hashes: list[int]) -> None: ...


@dataclass(frozen=True, slots=True)
class KvLoad:
    """Blocks of one KV cache that are held, of all; and its prefix cache's hit rate, None before the first request."""

    num_used_blocks: int
    num_blocks: int
    hit_rate: float | None


def _load_of(scheduler: Scheduler) -> KvLoad:
    blocks, num_queries = scheduler.blocks, scheduler.num_prefix_queries_tokens
    has_rate = num_queries and blocks.enable_prefix_caching
    hit_rate = scheduler.num_prefix_hits_tokens / num_queries if has_rate else None
    return KvLoad(blocks.num_used, blocks.num_blocks, hit_rate)


class KvFeed:
    """See the module. All methods but `note_load` may be called on any thread, at any time."""

    def __init__(
        self,
        block_size: int,
        schedulers: Sequence[Scheduler],
        keeps_event: Callable[[str, int], bool] = lambda _event, _rank: True,
    ) -> None:
        """`keeps_event` is asked, with "stored" or "removed" and the rank, which events are to go out: a fault."""
        self._schedulers = schedulers
        self._keeps_event = keeps_event
        self._logs = [KvEventLog(block_size) for _ in schedulers]
        self._publishers: list[KvPublisher | None] = [None] * len(schedulers)
        self._publish_load: Callable[[int, KvLoad], None] | None = None
        self._loads = [_load_of(scheduler) for scheduler in schedulers]
        self._published_loads: list[KvLoad | None] = [None] * len(schedulers)
        self._loads_published_s = float("-inf")
        self._has_new_loads = False
        # Reentrant, unlike `queue.Queue`: a request can be cancelled by a garbage collection in the middle of `put`.
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._is_closed = False

    # Who is told.

    def attach_kv(self, rank: int, publisher: KvPublisher) -> None:
        """Send the events of that rank there."""
        self._publishers[rank] = publisher
        self._schedulers[rank].blocks.observer = _Observer(self, rank)
        self._start()

    def attach_loads(self, publish: Callable[[int, KvLoad], None]) -> None:
        """Send the loads of all ranks there, beginning with those noted last."""
        self._publish_load = publish
        self._start()
        self._put(self._loads_are_new)

    # What is told.

    def note_load(self, rank: int) -> None:
        """The cache of a rank may be more or less full than before. To be called while nobody else can change it."""
        self._loads[rank] = _load_of(self._schedulers[rank])
        if self._publish_load is not None and not self._has_new_loads:
            self._has_new_loads = True
            self._put(self._loads_are_new)

    def close(self) -> None:
        """Send out what is under way, take back all that was stored, and end. Safe twice, and if nobody listened."""
        with self._lock:
            self._is_closed = True
            thread, self._thread = self._thread, None
        if thread is None:
            return
        self._work.put(None)
        thread.join(_PATIENCE_S)  # a few ms: a loop may wait for it
        if thread.is_alive():
            logger.error("a publisher of KV events has hung for %g s and is left behind", _PATIENCE_S)

    def _start(self) -> None:
        with self._lock:
            if self._thread is None and not self._is_closed:
                self._thread = threading.Thread(target=self._run, name="mock-engine-kv-feed", daemon=True)
                self._thread.start()

    def _put(self, work: Callable[[], None]) -> None:
        if not self._is_closed:
            self._work.put(work)

    # On the thread.

    def _run(self) -> None:
        while True:
            try:
                work = self._work.get(timeout=self._until_loads_s())
            except queue.Empty:
                self._publish_loads()
                continue
            if work is None:
                break
            work()
            if self._until_loads_s() == 0:  # the queue may never be empty
                self._publish_loads()
        for rank, log in enumerate(self._logs):
            self._publish(rank, log.clear())

    def _stored(self, rank: int, request: Request, hashes: Collection[int]) -> None:
        self._publish(rank, self._logs[rank].stored(request, hashes))

    def _removed(self, rank: int, hashes: Sequence[int]) -> None:
        self._publish(rank, self._logs[rank].removed(hashes))

    def _publish(self, rank: int, events: Sequence[KvEvent]) -> None:
        publisher = self._publishers[rank]
        if publisher is None:
            return
        for event in events:
            if not self._keeps_event("stored" if isinstance(event, Stored) else "removed", rank):
                continue
            try:
                if isinstance(event, Stored):
                    sizes = [self._logs[rank].block_size] * len(event.block_hashes)
                    publisher.publish_stored(event.token_ids, sizes, event.block_hashes, event.parent_hash)
                else:
                    publisher.publish_removed(event.block_hashes)
            except Exception:
                logger.exception("a KV event of rank %d was lost", rank)

    def _loads_are_new(self) -> None:
        self._has_new_loads = True

    def _until_loads_s(self) -> float | None:
        """Until loads may be published again; None if there are none to publish."""
        if not self._has_new_loads:
            return None
        return max(0.0, self._loads_published_s + _LOAD_INTERVAL_S - time.monotonic())

    def _publish_loads(self) -> None:
        self._has_new_loads = False  # first: what is noted from here on is published next time
        self._loads_published_s = time.monotonic()
        for rank, load in enumerate(self._loads):
            if self._publish_load is None or load == self._published_loads[rank]:
                continue
            self._published_loads[rank] = load
            try:
                self._publish_load(rank, load)
            except Exception:
                logger.exception("the load of rank %d was not published", rank)


class _Observer:
    """Puts what happens in one cache into the feed's queue."""

    __slots__ = ("_feed", "_rank")

    def __init__(self, feed: KvFeed, rank: int) -> None:
        self._feed = feed
        self._rank = rank

    def stored(self, request: Request, hashes: Collection[int]) -> None:
        self._feed._put(partial(self._feed._stored, self._rank, request, hashes))

    def removed(self, hashes: Sequence[int]) -> None:
        self._feed._put(partial(self._feed._removed, self._rank, hashes))
