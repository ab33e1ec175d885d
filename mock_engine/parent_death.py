"""
Children that end when their parent does, even if it is killed by SIGKILL (Linux only; elsewhere nothing happens).
"""

from __future__ import annotations

import ctypes
import signal
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> Callable[[], None]:
    """What a child calls as it begins, so that it gets SIGTERM when the thread that started it ends."""
    if sys.platform != "linux":
        return lambda: None
    libc = ctypes.CDLL(None)
    return lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
