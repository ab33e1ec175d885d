"""
An engine inside Dynamo's real worker, seen from the other end of the wire.

    driver = WorkerDriver("my_pkg:Engine", ["--flag"])
    await driver.start()                       # raises `WorkerError` with the end of the worker's log
    stream = driver.open(request, stop_after=3)
    await stream.finish(within_s=10)
    stream.events                              # [(time_s, "chunk", {...}), ..., (time_s, "end", None)]
    status = await driver.close()              # SIGTERM; the worker's exit code

or `async with WorkerDriver(...) as driver:`.

The worker and the Dynamo client are two child processes (`worker_child`), so nothing of Dynamo runs in this one;
they find each other by files in a temporary folder and talk over TCP on 127.0.0.1. A driver may be used from
several event loops one after the other; a stream belongs to the loop in which it was opened. Time is real.

What a Dynamo client can see (observed on ai-dynamo 1.2.1 to 1.6.1):

* After `stop` the stream ends with what was on its way: what the engine says to a cancel does not reach the client.
  It is in `said`, with all else that the engine said to the bridge.
* A dropped stream is noticed with the engine's next chunk, and only then.
* A request that the worker cannot parse is never answered: `finish` runs into its time limit.
* Every failure is an exception, even a broken chunk; its text begins with Dynamo's name for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple
from weakref import WeakValueDictionary

from conformance.worker_records import Record, read_records

START_LIMIT_S = 60.0
STOP_LIMIT_S = 20.0
_POLL_S = 0.01
_DYING_S = 0.5
_LOG_TAIL_LINES = 12

Kind = Literal["chunk", "error", "end", "stop", "drop"]
_LAST_KINDS = ("error", "end", "drop")  # nothing comes after one of these

# The parts talk to each other on this machine only, stop at once, and log what is worth reading.
_CHILD_ENVIRONMENT = {
    "DYN_DISCOVERY_BACKEND": "file",
    "DYN_REQUEST_PLANE": "tcp",
    "DYN_EVENT_PLANE": "zmq",
    "DYN_RESPONSE_PLANE": "tcp",
    "DYN_TCP_RPC_HOST": "127.0.0.1",
    "DYN_TCP_RESPONSE_STREAM_HOST": "lo" if sys.platform == "linux" else "lo0",  # it takes no address
    "DYN_SELF_HOST_METADATA": "0",
    "DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS": "0",
    "DYN_SDK_DISABLE_ANSI_LOGGING": "1",
    "PYTHONUNBUFFERED": "1",
}
# A port for one process: with several of them, the second one could not start.
_NOT_FOR_CHILDREN = ("DYN_SYSTEM_PORT", "DYN_SYSTEM_ENABLED", "DYN_FORWARDPASS_METRIC_PORT")


class WorkerError(Exception):
    """The worker or the client did not start, or is gone. The message ends with the last lines of the log."""


@dataclass(frozen=True, slots=True)
class StreamError:
    """What a client gets instead of the rest of an answer."""

    text: str  # as the exception says it: "BackendInvalidArgument: ValueError: invalid chunk shape: ..."
    dynamo_type: str | None  # Dynamo's name for it: BackendInvalidArgument, InvalidRequest, Unavailable...
    exception: str | None  # the Python class that the client raised: ValueError, InvalidArgument...

    def __str__(self) -> str:
        return self.text


class Event(NamedTuple):
    """Something that happened to a stream."""

    time_s: float  # since `open`, by the clock of the client's process, which is the same one as ours
    kind: Kind
    value: Any  # "chunk": the dict; "error": a `StreamError`; else None


@dataclass(frozen=True, slots=True)
class WorkerHealth:
    """Whether the worker still serves: what `observe_worker` found."""

    is_alive: bool  # the process
    exit_code: int | None
    is_routed_to: bool  # the router still sends requests to it, and gets an answer
    error: StreamError | None  # why not: "No workers available ..."


class WorkerStream:
    """One request. It reads by itself; `events` is what the client saw and did so far, `said` what the engine said."""

    def __init__(self, request: Mapping[str, Any], request_id: str, number: int, send: Callable[[str], None]) -> None:
        self.request = request
        self.request_id = request_id
        self.number = number
        self.events: list[Event] = []
        self.said: list[Record] = []
        self.opened_s = time.monotonic()
        self._send = send
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()

    @property
    def chunks(self) -> list[dict[str, Any]]:
        """What the engine said."""
        return [event.value for event in self.events if event.kind == "chunk"]

    @property
    def error(self) -> StreamError | None:
        """Why the answer broke off."""
        return next((event.value for event in self.events if event.kind == "error"), None)

    @property
    def is_over(self) -> bool:
        """Nothing more will come."""
        return bool(self.events) and self.events[-1].kind in _LAST_KINDS

    def stop(self) -> None:
        """Say that no more tokens are wanted."""
        self._send("stop")

    async def drop(self, within_s: float = 5.0) -> None:
        """Let go of the stream without a word, and wait until that is done."""
        self.leave()
        await self.finish(within_s)

    def leave(self) -> None:
        """The same, without waiting."""
        self._send("drop")

    async def wait_chunks(self, num_chunks: int, within_s: float) -> bool:
        """Whether that many chunks came. False as soon as the stream is over, or after `within_s`."""
        with contextlib.suppress(TimeoutError):
            await self._wait(lambda: self.is_over or len(self.chunks) >= num_chunks, within_s)
        return len(self.chunks) >= num_chunks

    async def finish(self, within_s: float) -> None:
        """Wait for the end, an error or the drop. Raises TimeoutError."""
        try:
            await self._wait(lambda: self.is_over, within_s)
        except TimeoutError:
            raise TimeoutError(
                f"request {self.request_id} is not over after {within_s:g} s; "
                f"so far: {[event.kind for event in self.events]}"
            ) from None

    async def _wait(self, is_true: Callable[[], bool], within_s: float) -> None:
        async with asyncio.timeout(within_s):
            while not is_true():
                await self.wait_news()

    async def wait_news(self) -> None:
        """Until something is added to `events` or `said`. For one waiter at a time."""
        self._news.clear()
        await self._news.wait()

    def record_soon(self, now_s: float, kind: Kind, value: Any) -> None:
        """Record what happened at `now_s`, a `time.monotonic()`. Called on any thread."""
        self._soon(self._record, Event(now_s - self.opened_s, kind, value))

    def hear_soon(self, record: Record) -> None:
        """Add to what the engine said. Called on any thread."""
        self._soon(self._hear, record)

    def _soon(self, call: Callable[[Any], None], value: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed; nobody waits any more
            self._loop.call_soon_threadsafe(call, value)

    def _record(self, event: Event) -> None:
        if not self.is_over:
            self.events.append(event)
            self._news.set()

    def _hear(self, record: Record) -> None:
        self.said.append(record)
        self._news.set()


class WorkerDriver:
    """See the module. `log_path` gets the worker's log, after what is there; by default it ends with the driver."""

    def __init__(
        self,
        engine: str,
        argv: Sequence[str] = (),
        *,
        log_path: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.engine = engine
        self.argv = list(argv)
        self._environment = dict(environment or {})
        self._given_log_path = log_path
        self._folder: Path | None = None
        self._endpoint = ""
        self._worker: _Worker | None = None
        self._client: _Client | None = None
        self._last_log = ""

    async def __aenter__(self) -> WorkerDriver:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def is_alive(self) -> bool:
        """The worker's process runs."""
        return self._worker is not None and self._worker.exit_code is None

    @property
    def exit_code(self) -> int | None:
        """Of the worker, -N if signal N ended it; None while it runs."""
        return None if self._worker is None else self._worker.exit_code

    @property
    def pids(self) -> list[int]:
        """Of the processes that run now: the worker and the client."""
        return [child.process.pid for child in (self._worker, self._client) if child and child.exit_code is None]

    def log_tail(self, num_lines: int = _LOG_TAIL_LINES) -> str:
        """The last lines of the worker's log, also after `close`."""
        log = self._worker.log() if self._folder is not None and self._worker is not None else self._last_log
        return "\n".join(log.splitlines()[-num_lines:])

    async def start(self, within_s: float = START_LIMIT_S) -> None:
        """Return when a client sees the worker. Raises `WorkerError`; then nothing is left running."""
        if self._folder is not None:
            raise WorkerError("this worker is started already; close it first")
        self._folder = Path(tempfile.mkdtemp(prefix="conformance-worker-"))
        try:
            await self._start(time.monotonic() + within_s, within_s)
        except BaseException:
            self._end()
            raise

    def open(
        self,
        request: Mapping[str, Any],
        *,
        request_id: str | None = None,
        stop_after: int | None = None,
        drop_after: int | None = None,
        is_routed: bool = False,
    ) -> WorkerStream:
        """
        Send a request, a `PreprocessedRequest` in wire form, and read the answer.

        `stop_after` and `drop_after` count chunks; the client acts right there, 0 at once. A request `is_routed`
        as a frontend's are, or goes to the worker directly: that also works where the router has given it up (not on
        1.2.1).
        """
        if self._client is None:
            raise WorkerError("this worker is not started")
        assert self._worker is not None
        stream = self._client.prepare(request, request_id or uuid.uuid4().hex)
        self._worker.expect(stream)
        self._client.open(stream, stop_after, drop_after, is_routed)
        return stream

    async def observe_worker(self, request: Mapping[str, Any], within_s: float = 10.0) -> WorkerHealth:
        """
        Whether the worker still serves: sends it `request` as a frontend would.

        Some errors make the router give a worker up. It comes back to it within 5 s; `renew_client` is faster.
        """
        error: StreamError | None = None
        if self.is_alive:
            stream = self.open(request, is_routed=True)
            try:
                await stream.finish(within_s)
                error = stream.error
            except TimeoutError as late:
                error = StreamError(str(late), None, "TimeoutError")
                stream.stop()
        if error is not None:
            await self.wait_ended()
        if not self.is_alive:
            error = error or StreamError(f"the worker ended with exit code {self.exit_code}", None, None)
        return WorkerHealth(self.is_alive, self.exit_code, error is None, error)

    async def wait_ended(self, within_s: float = _DYING_S) -> None:
        """Until the worker's process has ended, which is a little later than its sockets are gone."""
        if self._worker is not None:
            await self._worker.wait(within_s)

    async def renew_client(self, within_s: float = START_LIMIT_S) -> None:
        """Another client, whose router has no grudge against the worker. Open streams end with an error."""
        if self._client is None:
            raise WorkerError("this worker is not started")
        self._client.kill()
        await self._connect(time.monotonic() + within_s, within_s)

    async def restart(self, within_s: float = START_LIMIT_S) -> int | None:
        """Close what is left of the worker and start it again. Returns the exit code of the first one."""
        status = await self.close()
        await self.start(within_s)
        return status

    async def close(self, within_s: float = STOP_LIMIT_S) -> int | None:
        """
        SIGTERM the worker, wait, kill what is left. Returns its exit code: -9 if it had to be killed.

        The client stays until the worker is gone, as a frontend would. Nothing is left, whatever happens.
        """
        try:
            if self._worker is not None and self._worker.exit_code is None:
                self._worker.process.terminate()
                await self._worker.wait(within_s)
        finally:
            self._end()
        return self.exit_code

    def _end(self) -> None:
        """Kill both and remove the folder. The worker's exit code and log stay readable."""
        if self._folder is None:
            return
        if self._worker is not None:
            self._worker.kill()
            self._last_log = self._worker.log()
        if self._client is not None:
            self._client.kill()
            self._client = None
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder = None

    async def _start(self, deadline_s: float, within_s: float) -> None:
        assert self._folder is not None
        announced = self._folder / "endpoint"
        namespace = f"conformance-{uuid.uuid4().hex[:12]}"
        self._worker = _Worker(
            ["--engine", self.engine, "--namespace", namespace, "--announce", str(announced)],
            self.argv,
            self._child_environment({"DYN_NAMESPACE": namespace}),
            self._given_log_path or self._folder / "worker.log",
        )
        await self._until(announced.exists, "the engine's from_args has not returned", deadline_s, within_s)
        self._endpoint = announced.read_text(encoding="utf-8")
        await self._connect(deadline_s, within_s)

    async def _connect(self, deadline_s: float, within_s: float) -> None:
        assert self._folder is not None
        client = self._client = _Client(self._folder, self._child_environment({}))
        client.send({"do": "connect", "endpoint": self._endpoint})
        await self._until(client.is_connected.is_set, "the worker is not registered", deadline_s, within_s)

    async def _until(self, is_true: Callable[[], bool], what_if_not: str, deadline_s: float, within_s: float) -> None:
        while not is_true():
            for child in (self._worker, self._client):
                if child is not None and child.exit_code is not None:
                    raise WorkerError(f"the {child.name} ended with exit code {child.exit_code}.{child.last_words()}")
            if time.monotonic() > deadline_s:
                words = self._worker.last_words() if self._worker is not None else ""
                raise WorkerError(f"{what_if_not} within {within_s:g} s.{words}")
            await asyncio.sleep(_POLL_S)

    def _child_environment(self, extra: Mapping[str, str]) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if name not in _NOT_FOR_CHILDREN}
        return {
            "DYN_LOG": "warn",
            **inherited,
            "PYTHONPATH": _python_path(),
            "DYN_FILE_KV": str(self._folder / "discovery" if self._folder is not None else ""),
            **_CHILD_ENVIRONMENT,
            **extra,
            **self._environment,
        }


class _Child:
    """A process in a session of its own, so that Ctrl-C is not for it and its children can be ended with it."""

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        log_path: Path,
        pipes: Sequence[int] = (),
    ) -> None:
        self.name = name
        self._log_path = log_path
        with log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "conformance.worker_child", *arguments],
                stdin=subprocess.PIPE,  # its end tells the child that we are gone
                stdout=subprocess.PIPE if name == "client" else log,
                stderr=log,
                env=environment,
                start_new_session=True,
                pass_fds=pipes,
            )

    @property
    def exit_code(self) -> int | None:
        return self.process.poll()

    async def wait(self, within_s: float) -> None:
        """Return when it has ended, or after that time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while True:
                    if self.exit_code is not None:
                        return
                    await asyncio.sleep(_POLL_S)

    def log(self) -> str:
        """All of it."""
        try:
            return self._log_path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""

    def last_words(self) -> str:
        """What ends an error message."""
        lines = self.log().splitlines()[-_LOG_TAIL_LINES:]
        return (
            "".join(f"\n  {line}" for line in [" The last lines of its log:", *lines])
            if lines
            else " Its log is empty."
        )

    def kill(self) -> None:
        """End it and its children, if it did not end itself, and wait."""
        with contextlib.suppress(OSError):  # there is nothing left of it
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        if self.process.stdin is not None:
            with contextlib.suppress(OSError):
                self.process.stdin.close()


class _Worker(_Child):
    """The process with the engine, and a thread here that tells each stream what the engine says to it."""

    def __init__(
        self, arguments: Sequence[str], argv: Sequence[str], environment: Mapping[str, str], log_path: Path
    ) -> None:
        ours, its = os.pipe()
        self._records = os.fdopen(ours, "rb")
        try:
            words = ["worker", *arguments, "--records", str(its), "--", *argv]
            super().__init__("worker", words, environment, log_path, [its])
        finally:
            os.close(its)
        self._expected: dict[str, deque[WorkerStream]] = {}  # by request id: not yet come to the engine
        self._calls: dict[int, WorkerStream] = {}  # by the number of the call of `generate`
        self._latest: WeakValueDictionary[str, WorkerStream] = WeakValueDictionary()  # by request id
        self._listener = threading.Thread(target=self._listen, name="conformance-records", daemon=True)
        self._listener.start()

    def expect(self, stream: WorkerStream) -> None:
        """It is about to be sent."""
        self._expected.setdefault(stream.request_id, deque()).append(stream)

    def kill(self) -> None:
        super().kill()
        self._listener.join(_DYING_S)  # a process that left the worker's session may hold the pipe open

    def _listen(self) -> None:
        with self._records:
            for record in read_records(self._records):
                self._take(record)
        for number, stream in list(self._calls.items()):
            stream.hear_soon(Record(stream.request_id, number, time.monotonic(), "lost", None, True))

    def _take(self, record: Record) -> None:
        if record.kind == "begin" and (expected := self._expected.get(record.request_id)):
            self._calls[record.number] = expected.popleft()
            if not expected:
                del self._expected[record.request_id]
            self._latest[record.request_id] = self._calls[record.number]
        stream = self._latest.get(record.request_id) if record.kind == "abort" else self._calls.get(record.number)
        if stream is not None:
            stream.hear_soon(record)
        if record.kind == "gone":
            self._calls.pop(record.number, None)


class _Client(_Child):
    """The process with the Dynamo client."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        super().__init__("client", ["client", "--folder", str(folder)], environment, folder / "client.log")
        self.is_connected = threading.Event()
        self._is_gone = False
        self._numbers = itertools.count()
        self._streams: dict[int, WorkerStream] = {}
        assert self.process.stdout is not None
        self._listener = threading.Thread(target=self._listen, args=(self.process.stdout,), daemon=True)
        self._listener.start()

    def prepare(self, request: Mapping[str, Any], request_id: str) -> WorkerStream:
        """A stream that is not sent yet."""
        number = next(self._numbers)
        stream = WorkerStream(request, request_id, number, lambda what: self.send({"do": what, "stream": number}))
        self._streams[number] = stream
        return stream

    def open(self, stream: WorkerStream, stop_after: int | None, drop_after: int | None, is_routed: bool) -> None:
        command = {"do": "open", "stream": stream.number, "request": stream.request, "request_id": stream.request_id}
        self.send({**command, "stop_after": stop_after, "drop_after": drop_after, "is_routed": is_routed})
        if self._is_gone:
            self._give_up()

    def send(self, command: Mapping[str, Any]) -> None:
        assert self.process.stdin is not None
        line = json.dumps(command).encode() + b"\n"
        with contextlib.suppress(OSError, ValueError):  # it is gone: `_listen` tells the streams
            self.process.stdin.write(line)
            self.process.stdin.flush()

    def kill(self) -> None:
        super().kill()
        self._listener.join()

    def _listen(self, answers: IO[bytes]) -> None:
        with answers:
            for line in answers:
                if line.endswith(b"\n"):  # else it was killed while it wrote
                    self._take(json.loads(line))
        self._is_gone = True
        self._give_up()

    def _give_up(self) -> None:
        gone = StreamError("the client's process is gone", None, None)
        for stream in list(self._streams.values()):
            stream.record_soon(time.monotonic(), "error", gone)

    def _take(self, message: Mapping[str, Any]) -> None:
        if message["kind"] == "connected":
            self.is_connected.set()
            return
        value = StreamError(**message["value"]) if message["kind"] == "error" else message["value"]
        self._streams[message["stream"]].record_soon(message["time_s"], message["kind"], value)
        if message["kind"] in _LAST_KINDS:
            del self._streams[message["stream"]]


def _python_path() -> str:
    """Where this process finds modules, less what every process of this Python finds by itself."""
    standard = sysconfig.get_path("stdlib")
    installed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    return os.pathsep.join(
        str(Path(folder).absolute())
        for folder in sys.path
        if folder not in installed and not folder.startswith(standard) and not folder.endswith(".zip")
    )
