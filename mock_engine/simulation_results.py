"""
What came of a simulation: every request that ended, and every gap between two tokens.

    log = RequestLog(slos, requests_out)
    log.add("r1", arrival_s, first_token_s, ...)      a request that got all its tokens
    log.add_cancelled("r2", arrival_s, ...)
    log.add_gaps(step_times_s, num_sequences)         each step time, as each decoding sequence sees it
    metrics = log.metrics()                           AIPerf's, under AIPerf's names
    log.close()

Percentiles are exact, and memory does not grow with requests or tokens: figures wait in a temporary file
(`columns`). Times are seconds of simulated time, read in whole nanoseconds, as AIPerf's clock gives them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mock_engine.aiperf_records import RecordWriter
from mock_engine.aiperf_schema import (
    REQUEST_METRICS,
    FinishedRequests,
    FloatArray,
    Metric,
    RequestMetric,
    RunTotals,
    run_metrics,
    summarize,
    to_ns,
)
from mock_engine.columns import Columns, WeightedColumn, summarize_weighted
from mock_engine.slos import Slo, meets_all

_MAX_IN_MEMORY = 1 << 20  # requests; one metric of so many takes 8 MB, and is sorted faster than it is searched


class RequestLog:
    """
    What happened to every request. `requests_out` names a file for a row each (`aiperf_records`).

    Raises `ConfigError` if files cannot be written.
    """

    def __init__(self, slos: Sequence[Slo] = (), requests_out: Path | None = None) -> None:
        self._slos = tuple(slos)
        self._writer = None if requests_out is None else RecordWriter(requests_out)
        self._finished = Columns(7)
        self._gaps_s = WeightedColumn()
        self.num_finished = 0
        self.num_cancelled = 0
        self.num_preemptions = 0

    def add(
        self,
        request_id: str,
        arrival_s: float,
        first_token_s: float,
        second_token_s: float,
        last_token_s: float,
        isl_tokens: int,
        osl_tokens: int,
        num_cached_tokens: int,
        num_preemptions: int,
        worker: int,
        session_id: str | None,
        turn_index: int | None,
    ) -> None:
        """A request that got all its tokens; `second_token_s` is `first_token_s` where there is one token."""
        self.num_finished += 1
        self.num_preemptions += num_preemptions
        self._finished.add(
            arrival_s, first_token_s, second_token_s, last_token_s, isl_tokens, osl_tokens, num_cached_tokens
        )
        if self._writer is not None:
            figures = (
                arrival_s,
                first_token_s,
                second_token_s,
                last_token_s,
                isl_tokens,
                osl_tokens,
                num_cached_tokens,
                num_preemptions,
            )
            self._writer.add(request_id, figures, worker, session_id, turn_index, None)

    def add_cancelled(
        self,
        request_id: str,
        arrival_s: float,
        cancelled_s: float,
        isl_tokens: int,
        num_output_tokens: int,
        num_cached_tokens: int,
        num_preemptions: int,
        worker: int,
        session_id: str | None,
        turn_index: int | None,
        failure: str = "",
    ) -> None:
        """
        A request that its client let go of, or that failed for the reason `failure`. AIPerf counts both as errors.

        It is counted, and in no other metric; its gaps so far stay.
        """
        self.num_cancelled += 1
        self.num_preemptions += num_preemptions
        if self._writer is not None:
            times = (arrival_s, cancelled_s, cancelled_s, cancelled_s)
            figures = (*times, isl_tokens, num_output_tokens, num_cached_tokens, num_preemptions)
            self._writer.add(request_id, figures, worker, session_id, turn_index, failure)

    def add_gaps(self, gaps_s: FloatArray, num_sequences: int) -> None:
        """
        Times between two tokens, each seen by `num_sequences` sequences. The array is kept: it must not change.

        A run of decode steps is one call, with the step times. A sequence that was preempted, or waited for its next
        token for any other reason, saw one longer gap, which is a call of its own.
        """
        self._gaps_s.add(gaps_s, num_sequences)

    def metrics(self) -> dict[str, Metric]:
        """AIPerf's metrics of all requests so far; empty before the first one ended."""
        metrics = run_metrics(self._totals())
        for name, definition in REQUEST_METRICS.items():
            metric = self._summarize(definition)
            if metric is not None:
                metrics[name] = metric
        gaps = summarize_weighted(self._gaps_ms, "ms") if metrics else None
        if gaps is not None:
            metrics["inter_chunk_latency"] = gaps
        return metrics

    def close(self) -> None:
        """Write out all rows. Safe twice."""
        if self._writer is not None:
            self._writer.close()

    def _totals(self) -> RunTotals:
        isl_tokens = osl_tokens = num_good = 0
        first_ns, last_ns = np.inf, -np.inf
        for chunk in self._finished.chunks():
            finished = FinishedRequests.from_times(*chunk)
            isl_tokens += int(finished.isl_tokens.sum())
            osl_tokens += int(finished.osl_tokens.sum())
            num_good += int(meets_all(self._slos, finished).sum())
            first_ns = min(first_ns, float(to_ns(chunk[0]).min()))
            last_ns = max(last_ns, float(to_ns(chunk[3]).max()))
        return RunTotals(
            num_finished=self.num_finished,
            isl_tokens=isl_tokens,
            osl_tokens=osl_tokens,
            duration_s=(last_ns - first_ns) / 1e9,
            num_cancelled=self.num_cancelled,
            num_good=num_good if self._slos else None,
        )

    def _summarize(self, metric: RequestMetric) -> Metric | None:
        if self.num_finished > _MAX_IN_MEMORY:
            return summarize_weighted(lambda: _weigh_one(self._values(metric)), metric.unit)
        values = list(self._values(metric))
        return summarize(np.concatenate(values), metric.unit) if values else None

    def _values(self, metric: RequestMetric) -> Iterator[FloatArray]:
        """The metric of all requests that have it, in arrays that are not empty."""
        for chunk in self._finished.chunks():
            values = metric.values(FinishedRequests.from_times(*chunk))
            present = values[~np.isnan(values)]
            if len(present):
                yield present

    def _gaps_ms(self) -> Iterator[FloatArray]:
        for gaps_s, weights in self._gaps_s.chunks():
            yield np.stack([to_ns(gaps_s) / 1e6, weights])


def _weigh_one(arrays: Iterator[FloatArray]) -> Iterator[FloatArray]:
    for values in arrays:
        yield np.stack([values, np.ones(len(values))])
