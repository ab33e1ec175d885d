"""
What an engine says to Dynamo's real bridge, written down beside it.

    records = Recorder(pipe)                in the worker's process
    records.watch(engine)                   `generate` and `abort` of this engine, from now on
    for record in read_records(pipe): ...   in the process that judges

A Dynamo client does not see all of it: nothing after it has stopped or left, and not how an exception was typed.
Nothing changes for the engine: each call is made at once on the thread on which the bridge makes it, and nothing here
keeps a stream. Where the bridge lets go of one without holding the GIL, it goes with the next call into Rust on any
thread (pyo3); this comes within 20 ms here, from the thread that writes the records.
"""

from __future__ import annotations

import os
import pickle
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import IO, Any, NamedTuple

from conformance.release import core

_NUDGE_AFTER_S = 0.02


class Record(NamedTuple):
    """One thing that happened between the bridge and the engine."""

    request_id: str  # `context.id()`, which is the id that the client gave
    number: int  # of the call of `generate`; two calls may have the same id. 0: a call of `abort`
    time_s: float  # `time.monotonic()`, which is one clock for all processes
    kind: str  # begin, chunk, end, error, gone: the bridge let go of the stream; abort: it called that
    value: Any  # chunk: what was yielded; error: the exception; else None
    is_stopped: bool  # the request's context, by then


class Recorder:
    """The worker's end of the pipe."""

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe
        self._num_calls = 0
        # The bridge's threads may not let go of the GIL in here, as they would in a write: when Python ends
        # meanwhile, it ends such a thread, and with it the whole process (SIGABRT, "exception not rethrown").
        self._waiting: queue.SimpleQueue[Record] = queue.SimpleQueue()
        self._touch_rust = core("Context")("").is_stopped
        threading.Thread(target=self._write_all, name="conformance-records", daemon=True).start()

    def watch(self, engine: Any) -> None:
        """Write down what `engine` says from now on."""
        generate, abort = engine.generate, engine.abort

        def recorded_generate(request: Any, *args: Any, **kwargs: Any) -> Any:
            self._num_calls += 1
            note = _Note(self, self._num_calls, kwargs.get("context", args[0] if args else None))
            note("begin")
            try:
                stream = generate(request, *args, **kwargs)
            except BaseException as error:
                note("error", error)
                note("gone")
                raise
            if not hasattr(stream, "__anext__"):  # the bridge will refuse it
                note("gone")
                return stream
            return _Stream(stream, note)

        def recorded_abort(context: Any) -> Any:
            _Note(self, 0, context)("abort")
            return abort(context)

        object.__setattr__(engine, "generate", recorded_generate)
        object.__setattr__(engine, "abort", recorded_abort)

    def add(self, record: Record) -> None:
        self._waiting.put(record)

    def _write_all(self) -> None:
        num_open = 0
        while True:
            try:
                record = self._waiting.get(timeout=_NUDGE_AFTER_S if num_open else None)
            except queue.Empty:
                # What Rust let go of without holding the GIL goes when any thread next calls into Rust. On a worker
                # with nothing to do that is when the next request comes; nobody wants to wait for it.
                self._touch_rust()
                continue
            num_open += {"begin": 1, "gone": -1}.get(record.kind, 0)
            data = pickle.dumps(record)
            with suppress(OSError):  # nobody reads any more
                while data:
                    data = data[os.write(self._pipe, data) :]


class _Note:
    """Writes what happens in one call."""

    def __init__(self, recorder: Recorder, number: int, context: Any) -> None:
        self._recorder = recorder
        self._number = number
        self._context = context
        self._request_id = context.id()

    def __call__(self, kind: str, value: Any = None) -> None:
        is_stopped = bool(self._context.is_stopped())
        self._recorder.add(Record(self._request_id, self._number, time.monotonic(), kind, _packed(value), is_stopped))


class _Stream:
    """What `generate` returned, and a note of each thing that comes out of it."""

    def __init__(self, stream: Any, note: _Note) -> None:
        self._stream = stream
        self._note = note

    def __aiter__(self) -> _Stream:
        return self

    def __anext__(self) -> Any:
        return _noted(self._stream.__anext__(), self._note)

    def __del__(self) -> None:
        self._note("gone")  # the stream itself goes next


async def _noted(step: Any, note: _Note) -> Any:
    try:
        chunk = await step
    except StopAsyncIteration:
        note("end")
        raise
    except BaseException as error:
        note("error", error)
        raise
    note("chunk", chunk)
    return chunk


# The way to the other process.


def read_records(pipe: IO[bytes]) -> Iterator[Record]:
    """All records, as they come, until the worker has ended."""
    while True:
        try:
            record = pickle.load(pipe)
        except (EOFError, pickle.UnpicklingError):  # it may have ended in the middle of one
            return
        yield record._replace(value=pickle.loads(record.value))


def _packed(value: Any) -> bytes:
    """As it is at this moment; the engine may go on to change it."""
    try:
        data = pickle.dumps(value)
        pickle.loads(data)
    except Exception:
        return pickle.dumps(_sendable(value))
    return data


def _sendable(value: Any) -> Any:
    """As much of it as can be sent: its type's name, what it derives from, its parts."""
    if _is_sendable(value):
        return value
    if type(value) is dict:
        return {_sendable(key): _sendable(part) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_sendable(part) for part in value)
    return _StandIn(value)


def _is_sendable(value: Any) -> bool:
    try:
        pickle.loads(pickle.dumps(value))
    except Exception:
        return False
    return True


class _StandIn:
    """Becomes, in the other process, an object whose type has the same name; an exception of the same kind."""

    def __init__(self, value: Any) -> None:
        kinds = type(value).__mro__ if isinstance(value, BaseException) else (object,)
        self._parts = (type(value).__name__, next(filter(_is_sendable, kinds)), str(value))

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _stand_in, self._parts


def _stand_in(name: str, kind: type, text: str) -> Any:
    made = type(name, (kind,), {"__repr__": lambda _: text, "__str__": lambda _: text})
    thing: Any = made.__new__(made)  # type: ignore[call-overload]
    return thing
