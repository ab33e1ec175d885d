"""
One line a request as it ends, as in AIPerf's `profile_export.jsonl` (0.13.0).

    writer = RecordWriter(path)
    writer.add("r1", 0.0, 0.2, ...)
    writer.close()

Time zero of a simulation is 0 ns. A cancelled request has AIPerf's error 499 and, like AIPerf's own, none of
the metrics. Beside AIPerf's metrics there are `num_preemptions`, and `num_output_tokens` of a cancelled request.
AIPerf's list of single gaps (`inter_chunk_latency`) is left out: nothing in a simulation holds it for one request.
"""

from __future__ import annotations

from json.encoder import encode_basestring_ascii
from pathlib import Path

import numpy as np

from mock_engine.aiperf_schema import REQUEST_METRICS, FinishedRequests, FloatArray, to_ns
from mock_engine.errors import ConfigError

_BATCH = 1024  # rows formatted at once
_WHOLE = ("tokens", "count")  # units of which there are only whole numbers
_CANCELLED = '"error":{"code":499,"type":"RequestCancellationError","message":"Request cancelled by external signal"}'
_FAILED = '"error":{"code":500,"type":"ServerError","message":%s}'

# Request, worker, session, turn, and how it ended: None with all its tokens, "" when cancelled, else why it failed.
_Name = tuple[str, int, str | None, int | None, str | None]


class RecordWriter:
    """Writes rows to `path`, a batch at a time. Raises `ConfigError` if it cannot be written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._num_rows = 0
        self._names: list[_Name] = []
        self._figures: list[tuple[float, ...]] = []
        try:
            self._file = path.open("w", encoding="ascii")
        except OSError as error:
            raise self._cannot_write(error) from error

    def add(
        self,
        request_id: str,
        figures: tuple[float, ...],
        worker: int,
        session_id: str | None,
        turn_index: int | None,
        ended_by: str | None,
    ) -> None:
        """
        Write the row of a request that has ended. `ended_by` is None if it got all its tokens, empty if its client
        cancelled it, else why it failed.

        `figures` are the arguments of `FinishedRequests.from_times`, and after them the number of preemptions. For a
        request that did not get all, all token times are when it ended, and the output length is what it got by then.
        """
        self._names.append((request_id, worker, session_id, turn_index, ended_by))
        self._figures.append(figures)
        if len(self._names) == _BATCH:
            self._write_batch()

    def close(self) -> None:
        """Write out and close. Safe twice."""
        if self._file.closed:
            return
        self._write_batch()
        try:
            self._file.close()
        except OSError as error:
            raise self._cannot_write(error) from error

    def _write_batch(self) -> None:
        if not self._names:
            return
        lines = _format(self._num_rows, self._names, np.asarray(self._figures, dtype=np.float64).T)
        self._num_rows += len(self._names)
        self._names, self._figures = [], []
        try:
            self._file.write("".join(lines))
        except OSError as error:
            raise self._cannot_write(error) from error

    def _cannot_write(self, error: OSError) -> ConfigError:
        return ConfigError(f"cannot write requests to {self._path}: {error.strerror}. Name another file.")


def _format(first_row: int, names: list[_Name], figures: FloatArray) -> list[str]:
    finished = FinishedRequests.from_times(*figures[:-1])
    start_ns, end_ns = (to_ns(times).astype(np.int64).tolist() for times in (figures[0], figures[3]))
    columns = [_metric_texts(name, metric.unit, metric.values(finished)) for name, metric in REQUEST_METRICS.items()]
    columns.append(_metric_texts("num_preemptions", "count", figures[-1]))
    of_others = [
        _metric_texts("error_isl", "tokens", finished.isl_tokens),
        _metric_texts("num_output_tokens", "tokens", finished.osl_tokens),
    ]
    lines = []
    for index, (name, start, end, metrics, made) in enumerate(
        zip(names, start_ns, end_ns, zip(*columns, strict=True), zip(*of_others, strict=True), strict=True)
    ):
        metadata = _metadata(first_row + index, name, start, end)
        ended_by = name[-1]
        if ended_by is None:
            lines.append(f'{{"metadata":{{{metadata}}},"metrics":{{{",".join(filter(None, metrics))}}}}}\n')
        else:
            error = _FAILED % encode_basestring_ascii(ended_by) if ended_by else _CANCELLED
            lines.append(f'{{"metadata":{{{metadata}}},"metrics":{{{",".join(made)}}},{error}}}\n')
    return lines


def _metadata(row: int, name: _Name, start_ns: int, end_ns: int) -> str:
    request_id, worker, session_id, turn_index, ended_by = name
    session = ""
    if session_id is not None:
        text = encode_basestring_ascii(session_id)
        session = f'"x_correlation_id":{text},"conversation_id":{text},'
    turn = f'"turn_index":{turn_index},' if turn_index is not None else ""
    cancelled = f'true,"cancellation_time_ns":{end_ns}' if ended_by == "" else "false"
    return (
        f'"session_num":{row},"x_request_id":{encode_basestring_ascii(request_id)},{session}{turn}'
        f'"credit_issued_ns":{start_ns},"request_start_ns":{start_ns},"request_end_ns":{end_ns},'
        f'"worker_id":"worker_{worker}","record_processor_id":"mock-engine","benchmark_phase":"profiling",'
        f'"was_cancelled":{cancelled}'
    )


def _metric_texts(name: str, unit: str, values: FloatArray) -> list[str]:
    """The metric of each request; nothing for those that have none. Six decimals are nanoseconds of a millisecond."""
    text = f'"{name}":{{"value":{"%d" if unit in _WHOLE else "%.6f"},"unit":"{unit}"}}'
    return [text % value if value == value else "" for value in values.tolist()]
