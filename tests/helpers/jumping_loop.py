"""
Asyncio tests in no time, on `conformance.virtual_loop`.

    run(main())        like asyncio.run
    now_s()            inside it
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from conformance.virtual_loop import VirtualLoop

T = TypeVar("T")


class LoopClock:
    """The loop's own time, as a clock for a drive."""

    def now_s(self) -> float:
        return now_s()

    async def wait_until(self, due_s: float) -> None:
        await asyncio.sleep(max(0.0, due_s - self.now_s()))

    def close(self) -> None:
        pass


def now_s() -> float:
    """The running loop's time."""
    return asyncio.get_running_loop().time()


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run `main` on a virtual loop; fail if it leaves a task behind."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:

        async def guarded() -> T:
            result = await main
            left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            assert not left, f"tasks left behind: {left}"
            return result

        return runner.run(guarded())
