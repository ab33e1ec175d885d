"""
An asyncio loop whose time jumps to the next timer instead of waiting for it.

    run(main())        like asyncio.run, in no time
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

_PATIENCE_S = 10.0  # real seconds for another thread to hand something over
_LONGEST_S = 100_000.0  # of the loop's own time; a test that goes on for longer waits for what never comes


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
        events = super().select(0)
        if not events:
            self.now_s += max(timeout, 0)
            if self.now_s > _LONGEST_S:
                raise RuntimeError(f"more than {_LONGEST_S:g} s have passed on this loop: something never ends")
        return events


class JumpingLoop(asyncio.SelectorEventLoop):
    """Time moves only when there is nothing to do, and then straight to the next timer."""

    def __init__(self) -> None:
        self._jumping_selector = _JumpingSelector()
        super().__init__(self._jumping_selector)

    def time(self) -> float:
        return self._jumping_selector.now_s

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> Any:
        """While a thread is at work, time stands still."""
        self._jumping_selector.num_thread_calls += 1
        future = super().run_in_executor(executor, func, *args)
        future.add_done_callback(self._thread_call_ended)
        return future

    def _thread_call_ended(self, _: Any) -> None:
        self._jumping_selector.num_thread_calls -= 1


class LoopClock:
    """The loop's own time, as a clock for a drive."""

    def now_s(self) -> float:
        return asyncio.get_running_loop().time()

    async def wait_until(self, due_s: float) -> None:
        await asyncio.sleep(max(0.0, due_s - self.now_s()))

    def close(self) -> None:
        pass


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run `main` on a jumping loop; fail if it leaves a task behind."""
    with asyncio.Runner(loop_factory=JumpingLoop) as runner:

        async def guarded() -> T:
            result = await main
            left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            assert not left, f"tasks left behind: {left}"
            return result

        return runner.run(guarded())
