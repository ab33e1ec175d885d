"""Real processes: the command line as a user starts it, and what is left when it has ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

PATIENCE_S = 300.0  # for a condition to come true; never waited for in full when all is well


def wait_for(condition: Callable[[], Any], what: str | Callable[[], str]) -> Any:
    """What `condition` returns, once that is true; else fail and say `what` did not happen."""
    deadline_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline_s:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(f"not within {PATIENCE_S:g} s: {what() if callable(what) else what}")


class Command:
    """`mock-engine ...` under way; its output goes to a file. conftest stops what a failed test leaves running."""

    started: ClassVar[list[Command]] = []

    def __init__(self, arguments: list[str], folder: Path, temporary: Path | None = None) -> None:
        """`temporary` is where it puts temporary files. (AIPerf's sockets need a short path: leave that to it.)"""
        self.output_path = folder / "output.txt"
        with self.output_path.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mock_engine", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env=os.environ if temporary is None else {**os.environ, "TMPDIR": str(temporary)},
            )

        Command.started.append(self)

    @classmethod
    def stop_all(cls) -> None:
        """Stop what still runs, none of which may refuse to."""
        while cls.started:
            command = cls.started.pop()
            if command.process.poll() is None:
                command.interrupt(signal.SIGTERM)
                try:
                    command.exit_status()
                finally:
                    command.process.kill()
                    command.process.wait()

    @property
    def output(self) -> str:
        return self.output_path.read_text(encoding="utf-8")

    def interrupt(self, number: int = signal.SIGINT) -> None:
        self.process.send_signal(number)

    def exit_status(self) -> int:
        """Wait for the end."""
        return self.process.wait(PATIENCE_S)

    def children(self) -> dict[str, int]:
        """Process ids of the parts that run now, by what they are."""
        pids = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text(encoding="utf-8").split()
        return {name: int(pid) for pid in pids if (name := _part_name(int(pid)))}


def _part_name(pid: int) -> str | None:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    except OSError:
        return None
    if "profile" in words and any(word.endswith("aiperf") for word in words):
        return "aiperf"
    if "mock_engine.frontend" in words:
        return "frontend"
    if "--status" in words:
        return Path(words[words.index("--status") + 1]).name.removesuffix(".status.json")
    return None


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def num_inotify_instances(pid: int) -> int:
    """How many it has to watch files with."""
    found = 0
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):  # closed just now
            found += "inotify" in str(path.readlink())
    return found


def session_members(session: int) -> list[int]:
    """Process ids of all that still run in a session."""
    members = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it ended just now
            state, _, _, its_session = path.read_text(encoding="utf-8").rsplit(")", 1)[1].split()[:4]
            if int(its_session) == session and state != "Z":
                members.append(int(path.parent.name))
    return members


@contextmanager
def serving(folder: Path, *arguments: str) -> Iterator[tuple[Command, dict[str, Any]]]:
    """`mock-engine serve` on any free port, once it has answered, and what its --json says."""
    ready = folder / "ready.json"
    command = Command(["serve", "--port", "0", "--json", str(ready), *arguments], folder, temporary=folder)
    wait_for(lambda: ready.exists() or command.process.poll() is not None, "serve is ready")
    assert command.process.poll() is None, command.output
    yield command, json.loads(ready.read_text(encoding="utf-8"))
    Command.stop_all()
