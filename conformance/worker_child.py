"""
The two processes behind `worker_driver`: Dynamo's own worker around an engine, and a Dynamo client.

    python -m conformance.worker_child worker --engine my_pkg:Engine --namespace N --announce FILE --records 3 -- FLAGS
    python -m conformance.worker_child client --folder FOLDER

The worker is what `dynamo.common.backend.run.run(Engine)` starts, except that the engine's `WorkerConfig` is turned
to file discovery, TCP and ZMQ first: most engines know no flag for that, and etcd is Dynamo's default.
`--announce` gets the name of the endpoint, once `from_args` has said it; `--records` is a pipe that gets what the
engine says (`worker_records`).

The client reads commands from its standard input and writes what happens to its standard output, both as JSON
lines. It is a process of its own because a Dynamo runtime belongs to one event loop, lives as long as its
process, and may crash it when it ends (1.4.2). Both processes end when their standard input does, that is, when
the process that started them has ended, however it did; the client then removes the folder that they shared.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from conformance.worker_records import Recorder

_STOP_LIMIT_S = 10.0  # between SIGTERM and SIGKILL once nobody is there to send them

# `BackendInvalidArgument: ...` (to 1.5.1) or `InvalidRequest: ...` (1.6.1)
_ERROR_TYPE = re.compile(r"([A-Z][A-Za-z]+): ")


def dynamo_module(name: str) -> Any:
    """A module of Dynamo's backend SDK, which may move from `dynamo.common.backend` to `dynamo.backend`."""
    try:
        return importlib.import_module(f"dynamo.common.backend.{name}")
    except ModuleNotFoundError as error:
        try:
            return importlib.import_module(f"dynamo.backend.{name}")
        except ModuleNotFoundError:
            raise error from None


def find_engine(name: str) -> Any:
    """The class that `my_pkg.module:Engine` names."""
    module, _, attribute = name.partition(":")
    found: Any = importlib.import_module(module)
    for part in attribute.split("."):
        found = getattr(found, part)
    return found


class LocalEngine:
    """Stands for the engine class in `run`, which asks it for nothing but `from_args`."""

    def __init__(self, engine_class: Any, namespace: str, announce: Path, recorder: Recorder) -> None:
        self._engine_class = engine_class
        self._namespace = namespace
        self._announce = announce
        self._recorder = recorder

    async def from_args(self, argv: list[str] | None) -> tuple[Any, Any]:
        """The engine and its config, turned to this machine."""
        engine, config = await self._engine_class.from_args(argv)
        config.namespace = self._namespace
        config.discovery_backend = "file"
        config.request_plane = "tcp"
        config.event_plane = "zmq"
        if hasattr(config, "response_plane"):  # from 1.6
            config.response_plane = "tcp"
        if not Path(config.model_name).is_dir():  # Dynamo would look it up on the internet
            config.model_name = ""
        unfinished = self._announce.with_suffix(".part")
        unfinished.write_text(f"{config.namespace}.{config.component}.{config.endpoint}", encoding="utf-8")
        unfinished.replace(self._announce)
        self._recorder.watch(engine)
        return engine, config


def serve(engine_name: str, namespace: str, announce: Path, records: int, argv: list[str]) -> None:
    """Run the engine in Dynamo's worker, until SIGTERM."""
    os.set_inheritable(records, False)  # it is not for the engine's own children
    with _private_stdin() as lifeline:
        threading.Thread(target=_end_with_parent, args=(lifeline,), name="lifeline", daemon=True).start()
        sys.argv = [engine_name, *argv]  # for an engine that looks there
        engine = LocalEngine(find_engine(engine_name), namespace, announce, Recorder(records))
        dynamo_module("run").run(engine, argv)


@contextlib.contextmanager
def _private_stdin() -> Any:
    """Standard input, which the engine finds empty."""
    private = os.dup(0)
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.close(empty)
    yield private


def _end_with_parent(lifeline: int) -> None:
    while os.read(lifeline, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_STOP_LIMIT_S)
    os.killpg(0, signal.SIGKILL)


class Client:
    """One Dynamo client, and the requests that it has under way."""

    def __init__(self, runtime: Any, write: Callable[[Mapping[str, Any]], None]) -> None:
        self._runtime = runtime
        self._write = write
        self._client: Any = None
        self._streams: dict[int, ClientStream] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def obey(self, command: Mapping[str, Any]) -> None:
        """Do what a line on standard input says."""
        match command["do"]:
            case "connect":
                self._spawn(self._connect(command["endpoint"]))
            case "open":
                stream = ClientStream(command, self._write)
                self._streams[command["stream"]] = stream
                call = self._client.generate if command["is_routed"] else self._direct
                self._spawn(self._read(command["stream"], stream, call))
            case "stop" if command["stream"] in self._streams:
                self._streams[command["stream"]].stop()
            case "drop" if command["stream"] in self._streams:
                self._streams[command["stream"]].drop()

    async def _connect(self, endpoint: str) -> None:
        self._client = await self._runtime.endpoint(endpoint).client()
        self._instances = await self._client.wait_for_instances()
        self._write({"kind": "connected"})

    async def _direct(self, request: Any, context: Any) -> Any:
        return await self._client.direct(request, self._instances[0], context=context)

    async def _read(self, number: int, stream: ClientStream, call: Callable[..., Awaitable[Any]]) -> None:
        try:
            await stream.read(call)
        finally:
            del self._streams[number]

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            traceback.print_exception(error)
            os._exit(1)


class ClientStream:
    """One request. Everything that happens is written with the time at which it did."""

    def __init__(self, command: Mapping[str, Any], write: Callable[[Mapping[str, Any]], None]) -> None:
        from dynamo.runtime import Context

        self._number: int = command["stream"]
        self._request = command["request"]
        self._stop_after: int | None = command["stop_after"]
        self._drop_after: int | None = command["drop_after"]
        self._context = Context(command["request_id"])
        self._write = write
        self._reader: asyncio.Task[None] | None = None

    async def read(self, call: Callable[..., Awaitable[Any]]) -> None:
        """Read to the end, or until dropped."""
        self._reader = asyncio.get_running_loop().create_task(self._pump(call))
        with contextlib.suppress(asyncio.CancelledError):
            await self._reader

    async def _pump(self, call: Callable[..., Awaitable[Any]]) -> None:
        num_chunks = 0
        try:
            stream = await call(self._request, context=self._context)
            if self._stop_after == 0:
                self.stop()
            if self._drop_after == 0:
                return self._report("drop", None)
            async for item in stream:
                if item.is_error():
                    return self._report("error", _describe(None, "; ".join(item.comments() or ()) or "no comment"))
                if item.data() is None:  # an annotation
                    continue
                self._report("chunk", item.data())
                num_chunks += 1
                if num_chunks == self._stop_after:
                    self.stop()
                if num_chunks == self._drop_after:
                    return self._report("drop", None)
        except Exception as error:
            return self._report("error", _describe(error, str(error)))
        self._report("end", None)
        return None

    def stop(self) -> None:
        """What a client does that wants no more tokens."""
        self._report("stop", None)
        self._context.stop_generating()

    def drop(self) -> None:
        """Let go of the stream without a word."""
        if self._reader is not None and self._reader.cancel():
            self._report("drop", None)

    def _report(self, kind: str, value: Any) -> None:
        self._write({"stream": self._number, "time_s": time.monotonic(), "kind": kind, "value": value})


def _describe(error: Exception | None, text: str) -> dict[str, str | None]:
    exception = type(error).__name__ if error is not None else None
    if error is not None and any(base.__name__ == "DynamoException" for base in type(error).__mro__):
        return {"exception": exception, "dynamo_type": exception, "text": text}
    found = _ERROR_TYPE.match(text)
    return {"exception": exception, "dynamo_type": found[1] if found else None, "text": text}


async def run_client(commands: BinaryIO, answers: BinaryIO) -> None:
    """Obey until the commands end."""
    from dynamo.runtime import DistributedRuntime

    loop = asyncio.get_running_loop()
    over = asyncio.Event()

    def write(message: Mapping[str, Any]) -> None:
        answers.write(json.dumps(message, default=repr).encode() + b"\n")
        answers.flush()

    client = Client(DistributedRuntime(loop, "file", "tcp"), write)

    def listen() -> None:
        for line in commands:
            loop.call_soon_threadsafe(client.obey, json.loads(line))
        loop.call_soon_threadsafe(over.set)

    threading.Thread(target=listen, name="commands", daemon=True).start()
    await over.wait()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m conformance.worker_child")
    parts = parser.add_subparsers(dest="part", required=True)
    worker = parts.add_parser("worker")
    worker.add_argument("--engine", required=True)
    worker.add_argument("--namespace", required=True)
    worker.add_argument("--announce", required=True, type=Path)
    worker.add_argument("--records", required=True, type=int)
    worker.add_argument("argv", nargs="*")
    client = parts.add_parser("client")
    client.add_argument("--folder", required=True, type=Path)
    arguments = parser.parse_args()
    if arguments.part == "worker":
        serve(arguments.engine, arguments.namespace, arguments.announce, arguments.records, arguments.argv)
        return
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever Dynamo prints belongs into the log
    asyncio.run(run_client(sys.stdin.buffer, answers))
    shutil.rmtree(arguments.folder, ignore_errors=True)
    os._exit(0)  # the runtime's own end may crash (1.4.2: segmentation fault)


if __name__ == "__main__":
    main()
