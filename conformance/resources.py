"""
What an engine holds: threads, tasks, processes, files, containers. Compared before and after.

Exact where the engine offers a probe (see `Probe`), by counting otherwise.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from conformance.bridge import FOREIGN_THREAD
from conformance.context import RequestContext

_OURS = ("conformance-", FOREIGN_THREAD)
_MAX_OBJECTS = 20_000
_MAX_DEPTH = 8
_LEAVES = (
    "asyncio",
    "threading",
    "_thread",
    "logging",
    "concurrent",
    "torch",
    "numpy",
    "builtins",
    "weakref",
    "typing",
)


@runtime_checkable
class Probe(Protocol):
    """
    What an engine may offer as `conformance_probe()`, so that leak checks are exact. Optional.

    `in_use`: how much of each resource requests hold now, e.g. {"kv_blocks": 0, "slots": 0, "requests": 0};
    all 0 when no request is open. May be called on any thread, at any time after `start`.
    """

    def in_use(self) -> Mapping[str, int]: ...


@runtime_checkable
class FaultProbe(Protocol):
    """
    The other half of a probe, for engines that can fail on demand. Optional too.

    `fault_points`: names of places; those that begin with "start" are inside `start`, and a failure at those that
    begin with "request" is one request's and no other's. `inject(point)`: the next time that place is reached,
    something fails there once.
    """

    def fault_points(self) -> Sequence[str]: ...

    def inject(self, point: str) -> None: ...


def probe_of(engine: Any) -> Any:
    """The engine's probe, or None."""
    offered = getattr(engine, "conformance_probe", None)
    return offered() if callable(offered) else None


@dataclass(frozen=True, slots=True)
class Held:
    """What this process holds at one moment, without what belongs to the suite."""

    threads: frozenset[threading.Thread]
    tasks: frozenset[Any]
    children: frozenset[int]
    files: frozenset[str]  # descriptor and what it is, such as "12 socket:[345]"

    def beyond(self, before: Held) -> list[str]:
        """What is held now and was not held `before`, for people."""
        return [
            *(f"thread {thread.name}" for thread in self.threads - before.threads),
            *(f"task {task.get_name()}" for task in self.tasks - before.tasks),
            *(f"child process {pid}" for pid in self.children - before.children),
            *(f"open file {name}" for name in self.files - before.files),
        ]


def held_now() -> Held:
    """Call it on the loop's thread; without a running loop there are no tasks."""
    try:
        current = asyncio.current_task()
        tasks = asyncio.all_tasks()
    except RuntimeError:
        current, tasks = None, set()
    return Held(
        threads=frozenset(t for t in threading.enumerate() if not t.name.startswith(_OURS) and t.is_alive()),
        tasks=frozenset(t for t in tasks if t is not current and not t.get_name().startswith(_OURS)),
        children=frozenset(_children()),
        files=frozenset(_open_files()),
    )


def _children() -> set[int]:
    children: set[int] = set()
    for folder in Path("/proc/self/task").glob("*/children"):
        try:
            children.update(int(pid) for pid in folder.read_text().split())
        except OSError:
            continue
    return {pid for pid in children if not _is_zombie(pid)}


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def _open_files() -> set[str]:
    files = set()
    for entry in Path("/proc/self/fd").glob("*"):
        try:
            target = str(entry.readlink())
        except OSError:
            continue
        if not target.startswith(("/proc/", "/dev/null")):
            files.add(f"{entry.name} {target}")
    return files


async def settled(before: Held, patience_s: float = 1.0) -> list[str]:
    """
    What is still held beyond `before` after the loop and other threads had their turn.

    Threads need real time to end, so this waits up to `patience_s` real seconds, and not a moment longer than needed.
    """
    end_s = time.monotonic() + patience_s
    while True:
        for _ in range(3):
            await asyncio.sleep(0)
        left = held_now().beyond(before)
        if not left or time.monotonic() > end_s:
            return left
        time.sleep(0.002)  # noqa: ASYNC251  (the loop's own time may be virtual)


def container_sizes(engine: Any) -> dict[str, int]:
    """
    The number of elements of every container that can be reached from the engine, by its path.

    {"._running": 0, "._pool._free": 100}. Containers of bounded length (deque with maxlen) are left out.
    """
    sizes: dict[str, int] = {}
    seen: set[int] = set()
    waiting: deque[tuple[str, Any, int]] = deque([("", engine, 0)])
    while waiting and len(seen) < _MAX_OBJECTS:
        path, thing, depth = waiting.popleft()
        if id(thing) in seen or depth > _MAX_DEPTH:
            continue
        seen.add(id(thing))
        size = _size_of(thing)
        if size is not None:
            sizes[path or "."] = size
        for name, part in _parts_of(thing):
            waiting.append((f"{path}{name}", part, depth + 1))
    return sizes


def _size_of(thing: Any) -> int | None:
    if isinstance(thing, deque):
        return len(thing) if thing.maxlen is None else None
    if isinstance(thing, dict | list | set):
        return len(thing)
    qsize = getattr(thing, "qsize", None)
    if callable(qsize) and not isinstance(thing, type):
        return int(qsize())
    return None


def _parts_of(thing: Any) -> list[tuple[str, Any]]:
    if isinstance(thing, dict):
        few = list(thing.items())[:8] if len(thing) <= 64 else []
        return [(f"[{key!r}]", value) for key, value in few if not _is_leaf(value)]
    if isinstance(thing, list | tuple | deque):
        return [(f"[{i}]", value) for i, value in enumerate(thing) if not _is_leaf(value)] if len(thing) <= 8 else []
    if _is_leaf(thing):
        return []
    attributes = dict(getattr(thing, "__dict__", {}))
    for kind in type(thing).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else slots:
            if hasattr(thing, slot):
                attributes[slot] = getattr(thing, slot)
    return [(f".{name}", value) for name, value in attributes.items() if not _is_leaf(value)]


def _is_leaf(thing: Any) -> bool:
    if isinstance(thing, dict | list | set | tuple | deque):
        return False
    if isinstance(thing, type) or (callable(thing) and not hasattr(thing, "__dict__")):
        return True
    kind = type(thing)
    if isinstance(thing, asyncio.AbstractEventLoop | RequestContext):
        return True  # not the engine's own
    if callable(getattr(thing, "qsize", None)):
        return False
    return kind.__module__.split(".")[0] in _LEAVES or kind.__name__ in ("module", "function", "method")


def process_sizes() -> dict[str, int]:
    """How many tasks, threads, children and files there are, in the form of `container_sizes`."""
    held = held_now()
    return {
        "asyncio tasks": len(held.tasks),
        "threads": len(held.threads),
        "child processes": len(held.children),
        "open files": len(held.files),
    }


def grown(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, int]:
    """By how many elements each container grew, where it did."""
    return {path: size - before.get(path, 0) for path, size in after.items() if size > before.get(path, 0)}
