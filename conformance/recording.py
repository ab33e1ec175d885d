"""
Publishers that write down what an engine publishes, handed out as Dynamo's worker does it.

    served = await serve(bench)            another engine, started, with all its publishers
    ...requests with engine=served.engine...
    await served.settle()                  what is under way gets published
    tree = Tree.of(served.kv[0].events)    what the router would know of rank 0 now

Engines may publish from threads of their own. Nothing here judges.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from conformance.bench import WORKER_ID, Bench
from conformance.bridge import on_foreign_thread
from conformance.facts import config_numbers
from conformance.release import core
from conformance.resources import held_now
from conformance.wire import wire_request

SNAPSHOT_FIELDS = ("kv_used_blocks", "kv_total_blocks", "gpu_cache_usage", "dp_rank", "kv_cache_hit_rate")
_VIRTUAL_SETTLING_S = 5.0  # of the loop's time: an engine may publish at intervals
_QUIET_S = 0.1  # real seconds without an event after which threads count as done
_PATIENCE_S = 2.0  # real seconds
_LOAD_OSL = 16  # tokens of each answer: long enough for all requests to be open at once
_MAX_LOAD_TOKENS = 40_000  # prompts that fill a larger cache take too long to make
_MAX_LOAD_REQUESTS = 64


@dataclass(frozen=True, slots=True)
class KvEvent:
    """One call of a publisher, with the values as the engine gave them (lists are copied)."""

    kind: str  # stored, removed
    block_hashes: Any
    token_ids: Any = ()
    num_block_tokens: Any = ()
    parent_hash: Any = None
    is_eagle: bool = False


class RecordingKvPublisher:
    """Takes what the installed release's `KvEventPublisher` takes, on any thread, and keeps it in order."""

    def __init__(self, dp_rank: int = 0) -> None:
        self.dp_rank = dp_rank
        self._events: list[KvEvent] = []
        self._lock = threading.Lock()

    @property
    def events(self) -> list[KvEvent]:
        with self._lock:
            return list(self._events)

    def publish_stored(self, *args: Any, **kwargs: Any) -> None:
        """See `dynamo._core.KvEventPublisher.publish_stored`."""
        self._keep([_event("stored", args, kwargs)])

    def publish_removed(self, *args: Any, **kwargs: Any) -> None:
        """See `dynamo._core.KvEventPublisher.publish_removed`."""
        self._keep([_event("removed", args, kwargs)])

    def shutdown(self) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        # Reached only for what is not defined above; 1.3 has no publish_batch.
        if name == "publish_batch" and hasattr(core("KvEventPublisher"), name):
            return self._publish_batch
        raise AttributeError(f"KvEventPublisher has no attribute {name!r}")

    def _publish_batch(self, events: Sequence[Mapping[str, Any]]) -> None:
        self._keep(
            [
                _event(event["type"], (), {key: value for key, value in event.items() if key != "type"})
                for event in events
            ]
        )

    def _keep(self, events: list[KvEvent]) -> None:
        with self._lock:
            self._events.extend(events)


@cache
def _signature(kind: str) -> inspect.Signature:
    return inspect.signature(getattr(core("KvEventPublisher"), f"publish_{kind}"))


def _event(kind: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> KvEvent:
    """Raises TypeError for arguments that the installed release does not have."""
    given = _signature(kind).bind(None, *args, **kwargs).arguments
    return KvEvent(
        kind,
        _copy(given["block_hashes"]),
        _copy(given.get("token_ids", ())),
        _copy(given.get("num_block_tokens", ())),
        given.get("parent_hash"),
        bool(given.get("is_eagle")),
    )


def _copy(value: Any) -> Any:
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str | bytes | tuple) else value


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One call of `SnapshotPublisher.publish`, with the fields as they were then."""

    rank: Any
    fields: Mapping[str, Any]  # of SNAPSHOT_FIELDS, those that the object had


class RecordingSnapshotPublisher:
    """Takes what Dynamo's `SnapshotPublisher` takes, on any thread."""

    def __init__(self) -> None:
        self._snapshots: list[Snapshot] = []
        self._lock = threading.Lock()

    @property
    def snapshots(self) -> list[Snapshot]:
        with self._lock:
            return list(self._snapshots)

    def publish(self, dp_rank: int, snapshot: Any) -> None:
        fields = {name: getattr(snapshot, name) for name in SNAPSHOT_FIELDS if hasattr(snapshot, name)}
        with self._lock:
            self._snapshots.append(Snapshot(dp_rank, fields))


class RecordingMetrics:
    """What `register_prometheus` gets: the installed release's `EngineMetrics`, as far as Python sees it."""

    def __init__(self, auto_labels: Mapping[str, str], callbacks: list[Any]) -> None:
        """The callbacks are kept by the runtime, and not by this handle: so too here."""
        self.auto_labels = dict(auto_labels)
        self._callbacks = callbacks

    def register_prometheus_expfmt_callback(self, callback: Callable[[], str]) -> None:
        self._callbacks.append(callback)

    def __getattr__(self, name: str) -> Any:
        if name == "register_prometheus_typed_callback" and _metrics_have(name):
            return self._callbacks.append
        raise AttributeError(f"EngineMetrics has no attribute {name!r}")


@cache
def _metrics_have(name: str) -> bool:
    return hasattr(getattr(core("backend"), "EngineMetrics", None), name)


# The router's view.


@dataclass
class Tree:
    """
    The blocks of one rank as the router's radix tree has them: by hash, each under its parent.

    What does not fit is left out of it and named: `orphans`, stored under a parent that is not there;
    `strangers`, removed and not there.
    """

    live: dict[int, list[int]] = field(default_factory=dict)  # hash -> all tokens up to the block's end
    most_live: int = 0
    orphans: list[KvEvent] = field(default_factory=list)
    strangers: list[int] = field(default_factory=list)
    stored: list[list[int]] = field(default_factory=list)  # the tokens up to the end of each block ever stored

    @classmethod
    def of(cls, events: Sequence[KvEvent]) -> Tree:
        tree = cls()
        for event in events:
            with suppress(TypeError, ValueError):  # of a wrong shape; that is for kv.block_shape to say
                tree.store(event) if event.kind == "stored" else tree.remove(event)
        return tree

    def store(self, event: KvEvent) -> None:
        if event.parent_hash is not None and event.parent_hash not in self.live:
            self.orphans.append(event)
            return
        tokens = list(self.live[event.parent_hash]) if event.parent_hash is not None else []
        place = 0
        for block_hash, num_tokens in zip(event.block_hashes, event.num_block_tokens, strict=False):
            tokens = [*tokens, *event.token_ids[place : place + num_tokens]]
            place += num_tokens
            self.live[block_hash] = tokens
            self.stored.append(tokens)
        self.most_live = max(self.most_live, len(self.live))

    def remove(self, event: KvEvent) -> None:
        for block_hash in event.block_hashes:
            if self.live.pop(block_hash, None) is None:
                self.strangers.append(block_hash)


# As the worker does it.


@dataclass
class Served:
    """An engine of a check's own, with its publishers."""

    engine: Any
    numbers: Mapping[str, Any]  # what its EngineConfig advertises
    ranks: list[Any]  # of component_metrics_dp_ranks
    kv: list[RecordingKvPublisher]  # one for each PushSource
    other_sources: list[Any]
    snapshots: RecordingSnapshotPublisher
    bench: Bench
    threads_before: frozenset[threading.Thread]
    kv_problem: str = ""  # how an on_ready failed

    @property
    def has_threads(self) -> bool:
        return bool(held_now().threads - self.threads_before)

    @property
    def num_events(self) -> int:
        return sum(len(publisher.events) for publisher in self.kv)

    def trees(self) -> list[Tree]:
        return [Tree.of(publisher.events) for publisher in self.kv]

    def too_much(self) -> list[dict[str, Any]]:
        """Requests that together need more KV blocks than there are; none where that takes too many tokens."""
        names = ("total_kv_blocks", "kv_cache_block_size", "context_length")
        total, block_size, context = (self.numbers[name] for name in names)
        if not all(isinstance(number, int) for number in (total, block_size, context)):
            return []
        length = max(1, context - 2 * _LOAD_OSL)
        count = total // max(1, length // block_size) + 2
        if total * block_size > _MAX_LOAD_TOKENS or count > _MAX_LOAD_REQUESTS:
            return []
        return [wire_request([i + 1] * length, max_tokens=_LOAD_OSL) for i in range(count)]

    async def settle(self) -> None:
        """Let be published what is under way: some of the loop's time, and real time where threads publish."""
        if self.bench.is_virtual:
            await self.bench.let_pass(_VIRTUAL_SETTLING_S)
            if not self.has_threads:
                return
        last = [self.num_events, time.monotonic()]

        def is_quiet() -> bool:
            if self.num_events != last[0]:
                last[:] = [self.num_events, time.monotonic()]
            return time.monotonic() - last[1] > _QUIET_S

        await self.bench.let_threads_run(is_quiet, _PATIENCE_S)

    async def eventually(self, is_so: Callable[[], bool], patience_s: float = _PATIENCE_S) -> bool:
        """Whether it becomes so within `patience_s` real seconds; at once where no thread could bring it about."""
        if is_so() or (self.bench.is_virtual and not self.has_threads):
            return is_so()
        return await self.bench.let_threads_run(is_so, patience_s)


async def serve(bench: Bench, *, with_kv: bool = True, with_snapshots: bool = True) -> Served:
    """
    An engine, started, and given its publishers as the worker does it: KV publishers first, then that of snapshots.

    Calls that are not asynchronous are made on a thread without an event loop. Observed on the real worker of
    ai-dynamo 1.3.1, 1.4.2 and 1.6.1. Without KV routing (`WorkerConfig.enable_kv_routing`) it hands out neither kind.
    """
    threads_before = held_now().threads
    engine = await bench.make()
    numbers = config_numbers(await engine.start(WORKER_ID))
    served = Served(engine, numbers, [], [], [], RecordingSnapshotPublisher(), bench, threads_before)
    with suppress(Exception):  # that is for metrics.prometheus to say
        await engine.register_prometheus(RecordingMetrics({"model": "suite"}, []))
    with suppress(Exception):  # metrics.ranks
        served.ranks = list(await on_foreign_thread(engine.component_metrics_dp_ranks))
    if with_kv:
        await _hand_out_kv_publishers(served)
    if with_snapshots and served.ranks:
        await on_foreign_thread(lambda: engine.attach_snapshot_publisher(served.snapshots))
    return served


async def _hand_out_kv_publishers(served: Served) -> None:
    sources = served.engine.kv_event_sources()
    if isinstance(sources, Awaitable):
        sources = await sources
    for source in sources or ():
        if getattr(source, "on_ready", None) is None:
            served.other_sources.append(source)
            continue
        publisher = RecordingKvPublisher(getattr(source, "dp_rank", 0))
        served.kv.append(publisher)
        problem = await hand_over(source, publisher)
        served.kv_problem = served.kv_problem or problem


async def hand_over(source: Any, publisher: RecordingKvPublisher) -> str:
    """Call `on_ready` as the worker does; how that failed, or ""."""
    try:
        result = await on_foreign_thread(lambda: source.on_ready(publisher))
    except Exception as error:
        return f"on_ready raised {type(error).__name__}: {error}"
    if asyncio.iscoroutine(result):
        result.close()  # nobody awaits it there either
    return ""
