"""
Dynamo's frontend and N mock workers as child processes of this one.

    with Fleet(settings, folder) as fleet:     returns when the model has answered
        fleet.url, fleet.status(worker=0)
        fleet.check()                          raises `ProcessError` if a part has died

No etcd, no NATS: the parts find each other by files in `folder`, talk over TCP
on 127.0.0.1, and write their logs to `folder`. Leaving the `with` block, by
whatever way, stops every part and waits until it is gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mock_engine.engine_settings import DEFAULT_TOKENIZER, Engine, EngineSettings, build_engine
from mock_engine.errors import ConfigError, ProcessError
from mock_engine.output_tokens import find_tokenizer
from mock_engine.parent_death import die_with_parent
from mock_engine.recorder import TimelineRow, read_status

START_TIMEOUT_S = 120.0
_ANSWER_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 10.0
_POLL_S = 0.1
_LOG_TAIL_LINES = 8

# The parts talk to each other on this machine only, stop at once, and log what is worth reading.
_CHILD_ENVIRONMENT = {
    "DYN_TCP_RPC_HOST": "127.0.0.1",
    "DYN_TCP_RESPONSE_STREAM_HOST": "lo" if sys.platform == "linux" else "lo0",  # it takes no address
    "DYN_SELF_HOST_METADATA": "0",
    "DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS": "0",
    "DYN_SDK_DISABLE_ANSI_LOGGING": "1",
    "PYTHONUNBUFFERED": "1",
}
PLANES = ("--discovery-backend", "file", "--request-plane", "tcp", "--event-plane", "zmq")


@dataclass(frozen=True, slots=True)
class FleetSettings:
    """What to start. `port` 0 takes any free one. Raises `ConfigError` for values out of range."""

    engine: EngineSettings
    model_path: Path = DEFAULT_TOKENIZER
    model_name: str | None = None  # default: the profile's model
    num_workers: int = 1
    host: str = "127.0.0.1"
    port: int = 8000

    def __post_init__(self) -> None:
        if self.num_workers < 1:
            raise ConfigError(f"--workers is {self.num_workers}; it must be at least 1")
        if not 0 <= self.port <= 65_535:
            raise ConfigError(f"--port is {self.port}; it must be 1 to 65535, or 0 for any free one")
        find_tokenizer(self.model_path)


@dataclass(frozen=True, slots=True)
class Part:
    """One child process."""

    name: str
    process: subprocess.Popen[bytes]
    log_path: Path


class Fleet:
    """See the module. `folder` gets the logs; with `is_recorded`, each worker's recording too."""

    def __init__(self, settings: FleetSettings, folder: Path, is_recorded: bool = False) -> None:
        self.settings = settings
        self.folder = folder
        self.engine: Engine = build_engine(settings.engine)  # finds wrong settings; nothing runs in it
        self.model = settings.model_name or self.engine.profile.model
        self.port = _free_port(settings.host, settings.port)
        self.parts: list[Part] = []
        self._is_recorded = is_recorded

    @property
    def url(self) -> str:
        """Where clients connect."""
        host = "127.0.0.1" if self.settings.host in ("0.0.0.0", "::") else self.settings.host
        return f"http://{host}:{self.port}"

    def record_folder(self, worker: int) -> Path:
        """Where that worker records."""
        return self.folder / f"worker-{worker}"

    def status(self, worker: int) -> TimelineRow | None:
        """The latest state of a worker; None before it has started."""
        return read_status(self._status_path(worker))

    def __enter__(self) -> Fleet:
        try:
            self._start()
            self._wait_until_it_answers()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def check(self) -> None:
        """Raise `ProcessError`, saying which part died and its last words, if one did."""
        for part in self.parts:
            status = part.process.poll()
            if status is not None:
                raise ProcessError(f"{part.name} {_how_it_ended(status)}.{_last_words(part.log_path)}")

    def stop(self) -> None:
        """Stop all parts, workers first, and wait until they are gone. Safe twice; not cut short by signals."""
        with _signals_ignored():
            for part in reversed(self.parts):
                if part.process.poll() is None:
                    part.process.terminate()
            deadline_s = time.monotonic() + _STOP_TIMEOUT_S
            for part in reversed(self.parts):
                try:
                    part.process.wait(max(0.0, deadline_s - time.monotonic()))
                except subprocess.TimeoutExpired:
                    part.process.kill()
                    part.process.wait()

    def _start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        frontend = (
            "-m",
            "mock_engine.frontend",
            "--http-host",
            self.settings.host,
            "--http-port",
            str(self.port),
            *PLANES,
        )
        self._spawn("frontend", frontend)
        for worker in range(self.settings.num_workers):
            # All with the same seed: an answer does not depend on the worker that gives it.
            command = ["-m", "mock_engine", "worker", *self.settings.engine.to_argv(), *PLANES]
            command += ["--model-path", str(self.settings.model_path), "--model-name", self.model]
            command += ["--status", str(self._status_path(worker))]
            if self._is_recorded:
                command += ["--record", str(self.record_folder(worker))]
            self._spawn(f"worker-{worker}", command)

    def _spawn(self, name: str, arguments: Sequence[str]) -> None:
        log_path = self.folder / f"{name}.log"
        environment = {"DYN_LOG": "warn", **os.environ, **_CHILD_ENVIRONMENT}
        environment["DYN_FILE_KV"] = str(self.folder / "discovery")
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C is ours to handle: workers first, then the frontend
                preexec_fn=die_with_parent() if sys.platform == "linux" else None,
            )
        self.parts.append(Part(name, process, log_path))

    def _wait_until_it_answers(self) -> None:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while self._num_registered() < self.settings.num_workers:
            self.check()
            if time.monotonic() > deadline_s:
                logs = "".join(f"\n{part.name}:{_last_words(part.log_path)}" for part in self.parts)
                raise ProcessError(f"the model did not answer within {START_TIMEOUT_S:g} s.{logs}")
            time.sleep(_POLL_S)
        message = {"role": "user", "content": "hello"}
        body = {"model": self.model, "messages": [message], "max_tokens": 1}
        try:
            _http(f"{self.url}/v1/chat/completions", body, _ANSWER_TIMEOUT_S)
        except (OSError, ValueError) as error:
            self.check()
            raise ProcessError(f"the model is registered but does not answer: {error}") from error

    def _num_registered(self) -> int:
        """Workers that the frontend can send requests to; 0 as long as it does not list the model."""
        try:
            models = _http(f"{self.url}/v1/models")["data"]
            instances = _http(f"{self.url}/health").get("instances", [])
        except (OSError, ValueError):
            return 0
        if self.model not in [model["id"] for model in models]:
            return 0
        return sum(instance["endpoint"] == "generate" for instance in instances)

    def _status_path(self, worker: int) -> Path:
        return self.folder / f"worker-{worker}.status.json"


def _http(url: str, body: dict[str, Any] | None = None, timeout_s: float = 5.0) -> Any:
    """GET, or POST with a body; the JSON that comes back. Raises OSError or ValueError. Proxies are not for this."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=timeout_s) as response:
        return json.loads(response.read())


def _free_port(host: str, port: int) -> int:
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


def _how_it_ended(status: int) -> str:
    if status >= 0:
        return f"ended with exit status {status}"
    return f"was killed by {signal.Signals(-status).name}"


def _last_words(log_path: Path) -> str:
    lines = log_path.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_TAIL_LINES:]
    return "".join(f"\n  {line}" for line in [" The last lines of its log:", *lines]) if lines else " Its log is empty."


@contextlib.contextmanager
def _signals_ignored() -> Iterator[None]:
    """Neither Ctrl-C nor SIGTERM cuts the block short. On the main thread only."""
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
