"""
A monotonic clock to pace by, and a wait that is exact to a fraction of a millisecond.

`time.perf_counter` is the clock. An event loop's own timers are too coarse
(uvloop's tick once a millisecond), so the wait is a Linux timerfd that the
loop watches like any other file; elsewhere it is the loop's timer.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import sys
import time

_CLOCK_MONOTONIC = 1
_TFD_NONBLOCK = os.O_NONBLOCK
_TFD_CLOEXEC = os.O_CLOEXEC if hasattr(os, "O_CLOEXEC") else 0


class _Timespec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long))


class _Itimerspec(ctypes.Structure):
    _fields_ = (("it_interval", _Timespec), ("it_value", _Timespec))


class RealTimeClock:
    """Seconds since the clock was made. One waiter at a time; use it on the running loop, close it there."""

    def __init__(self) -> None:
        self._epoch_s = time.perf_counter()
        self._timer: int | None = None
        self._libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None

    def now_s(self) -> float:
        """Seconds since this clock was made; never runs back, unaffected by the date being set."""
        return time.perf_counter() - self._epoch_s

    async def wait_until(self, due_s: float) -> None:
        """Return at `due_s`, or at once if that is past; other tasks always get a turn in between."""
        remaining_s = due_s - self.now_s()
        if remaining_s <= 0:
            await asyncio.sleep(0)
        elif self._libc is None:
            await asyncio.sleep(remaining_s)
        else:
            await self._wait_timer(remaining_s)

    def close(self) -> None:
        """Give the timer back. Safe twice."""
        if self._timer is not None:
            os.close(self._timer)
            self._timer = None

    async def _wait_timer(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        timer = self._arm(seconds)
        done = loop.create_future()
        loop.add_reader(timer, _finish, done)
        try:
            await done
        finally:
            loop.remove_reader(timer)

    def _arm(self, seconds: float) -> int:
        assert self._libc is not None
        if self._timer is None:
            timer = self._libc.timerfd_create(_CLOCK_MONOTONIC, _TFD_NONBLOCK | _TFD_CLOEXEC)
            if timer < 0:
                raise OSError(ctypes.get_errno(), "timerfd_create failed")
            self._timer = timer
        nanoseconds = max(1, round(seconds * 1e9))
        value = _Timespec(nanoseconds // 1_000_000_000, nanoseconds % 1_000_000_000)
        if self._libc.timerfd_settime(self._timer, 0, ctypes.byref(_Itimerspec(_Timespec(0, 0), value)), None) != 0:
            raise OSError(ctypes.get_errno(), "timerfd_settime failed")
        return self._timer


def _finish(done: asyncio.Future[None]) -> None:
    if not done.done():
        done.set_result(None)
