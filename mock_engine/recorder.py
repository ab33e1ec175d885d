"""
What an engine did, written down while it runs.

    <folder>/timeline.jsonl   four times a second: `TimelineRow`
    <folder>/requests.jsonl   one row a request when it ends: `RequestRow`

`serve` reads the timeline for its live view, `bench` reads both for its
report. All times are seconds of the engine's own clock; `started_at_s` in the
first timeline row is the Unix time at which that clock was 0.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TextIO

from mock_engine.errors import ConfigError

TIMELINE_FILE = "timeline.jsonl"
REQUESTS_FILE = "requests.jsonl"


@dataclass(frozen=True, slots=True)
class TimelineRow:
    """The state of an engine at one moment."""

    time_s: float
    started_at_s: float
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


@dataclass(frozen=True, slots=True)
class RequestRow:
    """One request, from arrival to end; `due_s` and `sent_s` have one entry for each output token."""

    request_id: str
    choice: int
    arrival_s: float
    isl_tokens: int
    osl_tokens: int
    num_cached_tokens: int
    num_preemptions: int
    finish_reason: str
    due_s: list[float]
    sent_s: list[float]


class Recorder:
    """Appends rows to the two files of a folder, which it makes. Raises `ConfigError` if it cannot."""

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._timeline = (folder / TIMELINE_FILE).open("w", encoding="utf-8")
            self._requests = (folder / REQUESTS_FILE).open("w", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot record to {folder}: {error.strerror}. Name another folder.") from error

    def add_state(self, row: TimelineRow) -> None:
        """Write a timeline row, and make everything written so far visible to readers."""
        _write(self._timeline, row)
        self._timeline.flush()
        self._requests.flush()

    def add_request(self, row: RequestRow) -> None:
        """Write a request's row."""
        _write(self._requests, row)

    def close(self) -> None:
        """Write out and close. Safe twice."""
        self._timeline.close()
        self._requests.close()


def _write(file: TextIO, row: TimelineRow | RequestRow) -> None:
    values = {field.name: getattr(row, field.name) for field in fields(row)}
    file.write(json.dumps(values, separators=(",", ":")) + "\n")


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
