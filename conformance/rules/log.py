"""The rule on what is logged for each request."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import re
from collections.abc import Iterator, Sequence
from typing import Any

from hypothesis import strategies as st

from conformance.bench import Bench, Draw
from conformance.reproducer import as_code
from conformance.rules import check
from conformance.transcript import Transcript, expect
from conformance.wire import prompts, wire_request

_CANCELLING = re.compile(r"cancel|abort|disconnect", re.IGNORECASE)
_NOT_THE_ENGINES = ("hypothesis", "conformance.streams", "conformance.bench")
_PLACES: dict[str, dict[str, Any]] = {
    "served": {},
    "stopped": {"stop_after": 1},
    "aborted": {"stop_after": 1, "aborts": True},
    "dropped": {"drop_after": 1},
    "wrong": {},
}


@check("log.levels", in_process=True, max_examples=5)
async def levels(bench: Bench, draw: Draw) -> None:
    for kind in _PLACES:
        request = wire_request(draw(prompts()), max_tokens=draw(st.integers(2, 12)))
        request = dict(await bench.prepared(_wrong(bench, draw) if kind == "wrong" else request))
        records, transcript = await _records_of(bench, request, kind)
        if kind == "served" and bad_records(records, kind):
            # What is said once, at the first request of an engine's life, is no flood.
            records, transcript = await _records_of(bench, request, kind)
        levels_of(records, transcript, kind)


def _wrong(bench: Bench, draw: Draw) -> dict[str, Any]:
    """A client's mistake, which an engine may refuse."""
    length = bench.numbers.get("context_length")
    if isinstance(length, int) and length <= 200_000 and draw(st.booleans()):
        return wire_request([7] * (length + draw(st.integers(0, 8))), max_tokens=4)
    return wire_request([], max_tokens=4)


async def _records_of(bench: Bench, request: dict[str, Any], kind: str) -> tuple[list[logging.LogRecord], Transcript]:
    with _all_records() as records:
        stream = await bench.open(request, as_is=True, **_PLACES[kind])
        transcript = await stream.finish(bench.answer_within_s())
        del stream
        for _ in range(2):  # a task that ended with an error nobody asked for says so when it is collected
            await asyncio.sleep(0)
            gc.collect(1)
    return records, transcript


@contextlib.contextmanager
def _all_records() -> Iterator[list[logging.LogRecord]]:
    """All records of INFO and above, of loggers that do not propagate too."""
    records: list[logging.LogRecord] = []
    usual = logging.Logger.handle
    root = logging.getLogger()
    level = root.level

    def keep(logger: logging.Logger, record: logging.LogRecord) -> None:
        if not record.name.startswith(_NOT_THE_ENGINES):
            records.append(record)
        if record.levelno >= level:
            usual(logger, record)

    logging.Logger.handle = keep  # type: ignore[method-assign, assignment]
    root.setLevel(min(level, logging.INFO))
    try:
        yield records
    finally:
        logging.Logger.handle = usual  # type: ignore[method-assign]
        root.setLevel(level)


def bad_records(records: Sequence[logging.LogRecord], kind: str) -> list[logging.LogRecord]:
    """Those that are too loud for what happened: "served", "stopped", "aborted", "dropped", "wrong"."""
    limit = logging.WARNING if kind == "served" else logging.ERROR
    is_cancel = kind in ("stopped", "aborted", "dropped")
    return [
        record
        for record in records
        if record.levelno >= limit
        or (is_cancel and record.levelno >= logging.INFO and _CANCELLING.search(record.getMessage()))
    ]


def levels_of(records: Sequence[logging.LogRecord], transcript: Transcript, kind: str) -> None:
    found = bad_records(records, kind)
    loudest = max(found, key=lambda record: record.levelno, default=None)
    said = f"{loudest.levelname} of {loudest.name}: {loudest.getMessage()!r}" if loudest is not None else ""
    happened = {
        "served": "an ordinary request, served to its end, logged",
        "stopped": "a request that its client stopped logged",
        "aborted": "a request that was aborted logged",
        "dropped": "a request whose client left logged",
        "wrong": "a client's mistake logged",
    }[kind]
    wanted = {
        "served": "at a thousand requests a second, nothing else can be found in that log: DEBUG",
        "wrong": "ERROR is for what cannot be recovered, and wakes somebody up",
    }.get(kind, "cancelling is everyday: DEBUG")
    expect(not found, f"{happened} {said}; {wanted}", transcript, code=_code(transcript, kind))


def _code(transcript: Transcript, kind: str) -> str:
    limit = "WARNING" if kind == "served" else "ERROR" if kind == "wrong" else "INFO"
    act = {"stopped": "context.stop_generating()", "dropped": "break"}.get(kind, "pass")
    if kind == "aborted":
        act = "context.stop_generating(); await engine.abort(Context('r1'))"
    return f"""
import gc, logging
from dynamo._core import Context
records = []
logging.Logger.handle = lambda _, record: records.append(record)
logging.getLogger().setLevel(logging.INFO)
engine, _ = await Engine.from_args(ARGV)
await engine.start(1)
request = {as_code(dict(transcript.request))}
for _ in range(2):
    records.clear(); context = Context("r1"); stream = engine.generate(request, context=context)
    try:
        async for _ in stream: {act}
    except Exception as error: print(error)
    del stream; gc.collect(); await asyncio.sleep(0.05)
await engine.cleanup()
loud = [record.getMessage() for record in records if record.levelno >= logging.{limit}]
assert not loud, loud
"""
