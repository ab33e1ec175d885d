"""
An asyncio loop whose time jumps to the next timer instead of waiting for it.

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(main())          in no time

Time stands still while a thread that the loop knows of (`run_in_executor`) is at work. While the loop
watches a file or socket (`add_reader`), what comes there comes in real time, so time is real.
"""

from __future__ import annotations

import asyncio
import selectors
import time
from typing import Any

_PATIENCE_S = 10.0  # real seconds for another thread to hand something over
_LONGEST_S = 100_000.0  # of the loop's own time; what goes on for longer waits for what never comes


class _JumpingSelector(selectors.DefaultSelector):
    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.num_thread_calls = 0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None or (timeout > 0 and self.num_thread_calls):
            events = super().select(_PATIENCE_S)
            if not events:
                raise RuntimeError("nothing will ever happen on this loop: no timer, and no thread is at work")
            return events
        if timeout > 0 and len(self.get_map()) > 1:  # the first is the loop's own pipe
            began_s = time.monotonic()
            events = super().select(timeout)
            self.now_s += min(time.monotonic() - began_s, timeout) if events else timeout
            return events
        events = super().select(0)
        if not events:
            self.now_s += max(timeout, 0)
            if self.now_s > _LONGEST_S:
                raise RuntimeError(f"more than {_LONGEST_S:g} s have passed on this loop: something never ends")
        return events


class VirtualLoop(asyncio.SelectorEventLoop):
    """Time moves only when there is nothing to do, and then straight to the next timer."""

    def __init__(self) -> None:
        self._jumping_selector = _JumpingSelector()
        super().__init__(self._jumping_selector)

    def time(self) -> float:
        return self._jumping_selector.now_s

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> Any:  # type: ignore[override]
        """While a thread is at work, time stands still."""
        self._jumping_selector.num_thread_calls += 1
        future = super().run_in_executor(executor, func, *args)
        future.add_done_callback(self._thread_call_ended)
        return future

    def _thread_call_ended(self, _: Any) -> None:
        self._jumping_selector.num_thread_calls -= 1
