"""
What an engine gets as `context`: the documented part of Dynamo's `Context`, and nothing else.

Another attribute raises AttributeError and is remembered (`touched`), since
undocumented ones come and go between releases. What the installed release does
not have is absent here as well.
"""

from __future__ import annotations

import asyncio
from typing import Any

from conformance.release import core

_LATER_THAN_FIRST_RELEASE = ("metadata", "trace_headers", "current_span", "start_span", "detached")


class _Controller:
    """Shared by all context objects of one request. Stopped from any thread."""

    def __init__(self) -> None:
        self.is_stopped = False
        self.is_killed = False
        self.waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[bool]]] = []

    def stop(self, *, kill: bool = False) -> None:
        self.is_stopped = True
        self.is_killed = self.is_killed or kill
        waiters, self.waiters = self.waiters, []
        for loop, future in waiters:
            loop.call_soon_threadsafe(_resolve, future)


def _resolve(future: asyncio.Future[bool]) -> None:
    if not future.done():
        future.set_result(True)


class _Span:
    """A span that nobody records."""

    def set_attribute(self, key: str, value: Any) -> None:
        pass

    def add_event(self, name: str, attrs: dict[str, Any] | None = None) -> None:
        pass

    def set_status(self, status: str, description: str | None = None) -> None:
        pass

    def close(self) -> None:
        pass

    def __enter__(self) -> _Span:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class RequestContext:
    """One request's context. `kill` is the suite's own: Dynamo's Python API has none."""

    def __init__(self, request_id: str, controller: _Controller | None = None) -> None:
        self._id = request_id
        self._controller = controller or _Controller()
        self._metadata: dict[str, str] = {}
        self.touched: list[str] = []

    def id(self) -> str:
        return self._id

    def is_stopped(self) -> bool:
        return self._controller.is_stopped

    def is_killed(self) -> bool:
        return self._controller.is_killed

    def stop_generating(self) -> None:
        self._controller.stop()

    def async_killed_or_stopped(self) -> asyncio.Future[bool]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[bool] = loop.create_future()
        if self._controller.is_stopped:
            future.set_result(True)
        else:
            self._controller.waiters.append((loop, future))
        return future

    def notify_first_token(self) -> None:
        pass

    trace_id = None
    span_id = None
    parent_span_id = None

    def __getattr__(self, name: str) -> Any:
        # Reached only for what is not defined above.
        if name.startswith("__"):
            raise AttributeError(name)
        offered = core("Context")
        if name in _LATER_THAN_FIRST_RELEASE and hasattr(offered, name):
            return getattr(self, f"_{name}")
        self.touched.append(name)
        raise AttributeError(f"Dynamo's Context has no documented attribute {name!r}")

    def _trace_headers(self) -> dict[str, str] | None:
        return None

    def _current_span(self) -> _Span:
        return _Span()

    def _start_span(self, name: str, attrs: dict[str, Any] | None = None) -> _Span:
        del name, attrs
        return _Span()

    def _detached(self, id: str) -> RequestContext:
        return RequestContext(id)

    def kill(self) -> None:
        """As a lost connection does in Dynamo: killed, and therefore stopped too."""
        self._controller.stop(kill=True)

    def fresh(self) -> RequestContext:
        """Another object for the same request, as `abort` gets it."""
        return RequestContext(self._id, self._controller)
