"""
Child processes that come up together and go down together.

    parts = Parts(folder)
    parts.spawn("worker-0", ["-m", "mock_engine", "worker", ...], environment)
    parts.check()                          raises `ProcessError` if one has died
    parts.stop()                           the last one first; returns when all are gone

Each writes to `<name>.log` in the folder, and ends when this process does, even if that is killed (Linux).
All of it works on any thread.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

from mock_engine.errors import ConfigError, ProcessError
from mock_engine.faults import DEATH_STATUS
from mock_engine.parent_death import die_with_parent

_STOP_TIMEOUT_S = 30.0
_LOG_TAIL_LINES = 8
_PORTS = range(16_384, 32_768)


@dataclass(frozen=True, slots=True)
class Part:
    """One child process."""

    name: str
    process: subprocess.Popen[bytes]
    log_path: Path


class Parts:
    """Python processes, in the order in which they were started. See the module."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.all: list[Part] = []

    def spawn(self, name: str, arguments: Sequence[str], environment: Mapping[str, str]) -> Part:
        """Start Python with `arguments`; `environment` goes over this process's own."""
        self._folder.mkdir(parents=True, exist_ok=True)
        log_path = self._folder / f"{name}.log"
        with log_path.open("wb") as log, _interrupts_held():
            process = _on_a_thread_that_stays(
                lambda: subprocess.Popen(
                    [sys.executable, *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **environment},
                    start_new_session=True,  # Ctrl-C is ours to handle: workers first, then the frontend
                    preexec_fn=die_with_parent() if sys.platform == "linux" else None,
                )
            )
            part = Part(name, process, log_path)
            self.all.append(part)
        return part

    def check(self, may_end: Collection[str] = ()) -> None:
        """
        Raise `ProcessError`, saying which part died and its last words, if one did.

        Those named in `may_end` may, and any that a fault has ended.
        """
        for part in self.all:
            status = part.process.poll()
            if status is not None and status != DEATH_STATUS and part.name not in may_end:
                raise ProcessError(f"{part.name} {_how_it_ended(status)}.{last_words(part.log_path)}")

    def ended_by_fault(self) -> list[str]:
        """Names of those that a fault has ended."""
        return [part.name for part in self.all if part.process.poll() == DEATH_STATUS]

    def stop(self) -> None:
        """Stop all parts, the last one first, and wait until they are gone. Safe twice; not cut short by signals."""
        with _interrupts_ignored():
            for part in reversed(self.all):
                if part.process.poll() is None:
                    part.process.terminate()
            deadline_s = time.monotonic() + _STOP_TIMEOUT_S
            for part in reversed(self.all):
                try:
                    part.process.wait(max(0.0, deadline_s - time.monotonic()))
                except subprocess.TimeoutExpired:
                    part.process.kill()
                    part.process.wait()


def _on_a_thread_that_stays(start: Callable[[], subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
    """
    `start()`, on a thread that lives as long as this process.

    Linux takes the end of the *thread* that started a child for the death of its parent: started on a
    thread of a pool that shrinks, or of a test, children would get SIGTERM while the process lives on.
    """
    if threading.current_thread() is threading.main_thread():
        return start()
    return _spawner().submit(start).result()


@cache
def _spawner() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="mock-engine-spawner")


def last_words(log_path: Path) -> str:
    """The end of a log, to be put after a sentence."""
    lines = log_path.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_TAIL_LINES:]
    return "".join(f"\n  {line}" for line in [" The last lines of its log:", *lines]) if lines else " Its log is empty."


def http_json(url: str, body: dict[str, Any] | None = None, timeout_s: float = 5.0) -> Any:
    """GET, or POST with a body; the JSON that comes back. Raises OSError or ValueError. Proxies are not for this."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=timeout_s) as response:
        return json.loads(response.read())


def free_port(host: str, port: int) -> int:
    """`port`, or any free one for 0. Raises `ConfigError` if it is taken or the host is not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host}:{port}: {error.strerror}. Choose another --port; 0 takes any free one."
            ) from error
        return int(probe.getsockname()[1])


def free_ports(number: int) -> list[int]:
    """
    So many different ports of 127.0.0.1 that nobody listens on now. Raises `ConfigError` if there are too few.

    Below 32,768, where the kernel never takes one for a connection of its own; and Dynamo (to 1.6.1) reads
    DYN_SYSTEM_PORT as a signed 16-bit number.
    """
    found: list[int] = []
    with contextlib.ExitStack() as held:
        for port in random.sample(_PORTS, len(_PORTS)):
            if len(found) == number:
                break
            probe = held.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                found.append(port)
    if len(found) < number:
        raise ConfigError(f"only {len(found)} of 127.0.0.1's ports {_PORTS} are free, and {number} are needed")
    return found


def _how_it_ended(status: int) -> str:
    if status >= 0:
        return f"ended with exit status {status}"
    return f"was killed by {signal.Signals(-status).name}"


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """
    Ctrl-C or SIGTERM during the block has its effect after it, with the new part among those to be stopped.

    Python drops what a handler raises while it forks (in the functions of `os.register_at_fork`, such as logging's):
    the interrupt would be lost.
    """
    came: list[int] = []
    with _interrupts_handled_by(lambda number, _frame: came.append(number)):
        yield
    for number in came[:1]:
        signal.raise_signal(number)


def _interrupts_ignored() -> contextlib.AbstractContextManager[None]:
    """Neither Ctrl-C nor SIGTERM cuts the block short."""
    return _interrupts_handled_by(signal.SIG_IGN)


@contextlib.contextmanager
def _interrupts_handled_by(handler: signal.Handlers | Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Python's handlers run on the main thread, and harm no other."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, its_handler in before.items():
            signal.signal(number, its_handler)
