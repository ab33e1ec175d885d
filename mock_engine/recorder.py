"""
What an engine did, written down while it runs.

    <folder>/timeline.jsonl   four times a second: `TimelineRow`
    <folder>/requests.jsonl   one row a request when it ends: `RequestRow`
    <status file>             the latest `TimelineRow` alone

`bench` reads the folder for its report, and `serve` the status file, which
does not grow, for its live view. Times are model seconds since the engine
started; those that say `unix` are real.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TextIO

from mock_engine.errors import ConfigError

TIMELINE_FILE = "timeline.jsonl"
REQUESTS_FILE = "requests.jsonl"


@dataclass(frozen=True, slots=True)
class TimelineRow:
    """The state of an engine at one moment."""

    unix_s: float
    time_s: float
    num_open_requests: int  # streams that have neither ended nor been let go of
    num_running: int
    num_waiting: int
    kv_used_blocks: int
    kv_cached_blocks: int
    kv_total_blocks: int
    num_output_tokens: int  # since the start
    num_preemptions: int  # since the start
    prefix_queries_tokens: int  # since the start
    prefix_hits_tokens: int  # since the start
    lateness_p50_s: float | None  # since the start
    lateness_p99_s: float | None
    cpu_s: float  # processor seconds the process has used
    num_tasks: int  # asyncio tasks and Python threads of the process
    num_threads: int
    num_drafts: int = 0  # since the start; as in `speculation.SpeculationCounts`
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0


@dataclass(frozen=True, slots=True)
class RequestRow:
    """One request, from arrival to end; `due_s` and `sent_s` have one entry for each output token."""

    request_id: str
    choice: int
    arrival_unix_s: float
    arrival_s: float
    isl_tokens: int
    osl_tokens: int
    num_cached_tokens: int
    num_preemptions: int
    finish_reason: str
    due_s: list[float]
    sent_s: list[float]
    dp_rank: int = 0

    @property
    def is_whole(self) -> bool:
        """Whether all its tokens went out."""
        return self.finish_reason != "cancelled"

    @property
    def ttft_s(self) -> float:
        """Arrival at the engine to the moment the first token was due."""
        return self.due_s[0] - self.arrival_s

    @property
    def itl_s(self) -> float | None:
        """Mean time between due tokens, as AIPerf counts it; None for a single token."""
        return (self.due_s[-1] - self.due_s[0]) / (len(self.due_s) - 1) if len(self.due_s) > 1 else None


def joined(prefill_rows: Sequence[RequestRow], decode_rows: Sequence[RequestRow]) -> list[RequestRow]:
    """
    Requests as their clients saw them, of what prefill and decode workers recorded.

    A request has the same id on both. What it took the prefill worker to compute the prompt comes before what it took
    the decode worker; what lies between them is the host's doing. Requests that never came to a decode worker, or
    were none of a prefill worker, are as they are.
    """
    first = {row.request_id: row for row in prefill_rows}
    rows = []
    for row in decode_rows:
        prefill = first.pop(row.request_id, None)
        if prefill is None or not prefill.is_whole:
            rows.append(row)
            continue
        rows.append(
            replace(
                row,
                arrival_unix_s=prefill.arrival_unix_s,
                arrival_s=row.arrival_s - prefill.ttft_s,
                num_cached_tokens=prefill.num_cached_tokens,
                num_preemptions=row.num_preemptions + prefill.num_preemptions,
            )
        )
    return [*rows, *(row for row in first.values() if not row.is_whole)]


class Recorder:
    """
    Appends rows to the two files of `folder`, which it makes, and keeps `status_path` up to date; either may be None.

    Raises `ConfigError` if they cannot be written.
    """

    def __init__(self, folder: Path | None, status_path: Path | None) -> None:
        self._status_path = status_path
        self._timeline: TextIO | None = None
        self._requests: TextIO | None = None
        try:
            if status_path is not None:
                status_path.parent.mkdir(parents=True, exist_ok=True)
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                self._timeline = (folder / TIMELINE_FILE).open("w", encoding="utf-8")
                self._requests = (folder / REQUESTS_FILE).open("w", encoding="utf-8")
        except OSError as error:
            self.close()
            raise ConfigError(f"cannot record to {error.filename}: {error.strerror}. Name another folder.") from error

    @property
    def keeps_requests(self) -> bool:
        """Whether `add_request` has somewhere to write to."""
        return self._requests is not None

    def add_request(self, row: RequestRow) -> None:
        """Write a request's row."""
        if self._requests is not None:
            _write(self._requests, row)

    def add_state(self, row: TimelineRow) -> None:
        """Write a timeline row, and make everything written so far visible to readers."""
        if self._status_path is not None:
            write_status(self._status_path, row)
        if self._timeline is not None and self._requests is not None:
            _write(self._timeline, row)
            self._timeline.flush()
            self._requests.flush()

    def close(self) -> None:
        """Write out and close. Safe twice."""
        for file in (self._timeline, self._requests):
            if file is not None:
                file.close()


def _write(file: TextIO, row: TimelineRow | RequestRow) -> None:
    file.write(_to_json(row) + "\n")


def _to_json(row: TimelineRow | RequestRow) -> str:
    values = {field.name: getattr(row, field.name) for field in fields(row)}
    return json.dumps(values, separators=(",", ":"))


def write_status(path: Path, row: TimelineRow) -> None:
    """Replace the status file; a reader sees the old row or the new one, never half of one."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(_to_json(row), encoding="utf-8")
    fresh.replace(path)


def read_status(path: Path) -> TimelineRow | None:
    """The latest row; None before the first one."""
    if not path.exists():
        return None
    return TimelineRow(**json.loads(path.read_text(encoding="utf-8")))


def read_timeline(folder: Path) -> list[TimelineRow]:
    """All complete timeline rows of a recording; empty if there is none yet."""
    return [TimelineRow(**row) for row in _rows(folder / TIMELINE_FILE)]


def read_requests(folder: Path) -> list[RequestRow]:
    """All complete request rows of a recording; empty if there is none yet."""
    return [RequestRow(**row) for row in _rows(folder / REQUESTS_FILE)]


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):  # the writer may be in the middle of the last one
                yield json.loads(line)
