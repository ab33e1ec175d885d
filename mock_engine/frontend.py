"""
Dynamo's frontend, sending every chunk at once.

    python -m mock_engine.frontend --http-port 8000 ...      all other flags are dynamo.frontend's

Dynamo's frontend (1.2.1 to 1.6.1) leaves Nagle's algorithm on. On a connection that
is used again, the first chunk then waits for the client's delayed acknowledgement of
the response header: 40 ms of TTFT that no GPU takes. A socket that listens hands
TCP_NODELAY down to the connections it accepts, so it is set there.
"""

from __future__ import annotations

import os
import runpy
import socket
import stat
import sys
import threading
import time
from pathlib import Path

_FOLDER = Path("/proc/self/fd") if sys.platform == "linux" else Path("/dev/fd")
_POLL_S = 0.01
_GIVE_UP_S = 120.0


def set_nodelay(port: int) -> bool:
    """Set TCP_NODELAY on this process's socket that listens on `port`. False if there is none yet."""
    for name in os.listdir(_FOLDER):  # noqa: PTH208  (a Path for each of the numbers is no gain)
        try:
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as found:
                if found.family not in (socket.AF_INET, socket.AF_INET6) or found.type != socket.SOCK_STREAM:
                    continue
                if found.getsockname()[1] == port and found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                    found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    return True
        except OSError:
            continue  # closed since it was listed
    return False


def _wait_and_set(port: int) -> None:
    deadline_s = time.monotonic() + _GIVE_UP_S
    while not set_nodelay(port) and time.monotonic() < deadline_s:
        time.sleep(_POLL_S)


def main() -> None:
    """Run Dynamo's frontend in this process, on the port that `--http-port` says."""
    port = int(sys.argv[sys.argv.index("--http-port") + 1])
    threading.Thread(target=_wait_and_set, args=(port,), name="mock-engine-nodelay", daemon=True).start()
    runpy.run_module("dynamo.frontend", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
