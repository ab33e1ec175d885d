"""
AIPerf's metrics: their names, units, definitions and JSON schema, as of AIPerf 0.13.0.

    metrics = request_metrics(finished)          time_to_first_token and the like: a distribution over requests
    metrics |= run_metrics(totals)               request_throughput and the like: one figure a run

Whoever has the times of requests gets AIPerf's metrics from here: `bench_results` from what workers
recorded, `simulation_results` from virtual time. Units are AIPerf's, so latencies are milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.ma

FloatArray = np.ndarray[Any, np.dtype[np.float64]]
Metric = dict[str, Any]

PERCENTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99)


@dataclass(frozen=True, slots=True)
class FinishedRequests:
    """Requests that got all their tokens: columns with an entry for each, from which all their metrics follow."""

    ttft_ms: FloatArray
    ttst_ms: FloatArray  # first to second token; of no meaning where there is one token
    latency_ms: FloatArray
    isl_tokens: FloatArray
    osl_tokens: FloatArray
    cached_tokens: FloatArray  # of the prompt, found in the prefix cache

    @classmethod
    def from_times(
        cls,
        arrival_s: FloatArray,
        first_token_s: FloatArray,
        second_token_s: FloatArray,
        last_token_s: FloatArray,
        isl_tokens: FloatArray,
        osl_tokens: FloatArray,
        cached_tokens: FloatArray,
    ) -> FinishedRequests:
        """These requests as AIPerf sees them: its clock counts whole nanoseconds."""
        arrival_ns, first_token_ns = to_ns(arrival_s), to_ns(first_token_s)
        return cls(
            ttft_ms=(first_token_ns - arrival_ns) / 1e6,
            ttst_ms=(to_ns(second_token_s) - first_token_ns) / 1e6,
            latency_ms=(to_ns(last_token_s) - arrival_ns) / 1e6,
            isl_tokens=isl_tokens,
            osl_tokens=osl_tokens,
            cached_tokens=cached_tokens,
        )


def to_ns(seconds: FloatArray) -> FloatArray:
    """Whole nanoseconds."""
    return np.rint(seconds * 1e9)


@dataclass(frozen=True, slots=True)
class RequestMetric:
    """A metric that every request has a value of, unless it has none: NaN in `values(finished)`."""

    unit: str
    is_larger_better: bool
    values: Callable[[FinishedRequests], FloatArray]


def _ratio(numerator: FloatArray, denominator: FloatArray) -> FloatArray:
    """NaN where the denominator is nothing, as AIPerf leaves such a value out."""
    ratio: FloatArray = np.full(len(denominator), np.nan)
    np.divide(numerator, denominator, out=ratio, where=denominator > 0)
    return ratio


def _itl_ms(finished: FinishedRequests) -> FloatArray:
    return _ratio(finished.latency_ms - finished.ttft_ms, finished.osl_tokens - 1)


REQUEST_METRICS = {
    "time_to_first_token": RequestMetric("ms", False, lambda r: r.ttft_ms),
    "time_to_second_token": RequestMetric("ms", False, lambda r: np.where(r.osl_tokens > 1, r.ttst_ms, np.nan)),
    "request_latency": RequestMetric("ms", False, lambda r: r.latency_ms),
    "inter_token_latency": RequestMetric("ms", False, _itl_ms),
    "decode_duration": RequestMetric("ms", False, lambda r: r.latency_ms - r.ttft_ms),
    "output_token_throughput_per_user": RequestMetric(
        "tokens/sec/user", True, lambda r: _ratio(np.full(len(r.osl_tokens), 1e3), _itl_ms(r))
    ),
    "e2e_output_token_throughput": RequestMetric(
        "tokens/sec/user", True, lambda r: _ratio(r.osl_tokens * 1e3, r.latency_ms)
    ),
    "prefill_throughput_per_user": RequestMetric(
        "tokens/sec/user", True, lambda r: _ratio(r.isl_tokens * 1e3, r.ttft_ms)
    ),
    "output_sequence_length": RequestMetric("tokens", True, lambda r: r.osl_tokens),
    "input_sequence_length": RequestMetric("tokens", True, lambda r: r.isl_tokens),
    "usage_prompt_cache_read_tokens": RequestMetric("tokens", True, lambda r: r.cached_tokens),
}


@dataclass(frozen=True, slots=True)
class RunTotals:
    """What the metrics of a whole run follow from. Tokens and time are those of the finished requests."""

    num_finished: int
    isl_tokens: int
    osl_tokens: int
    duration_s: float  # first arrival to last token
    num_cancelled: int = 0
    num_good: int | None = None  # that met all SLOs; None without any


def request_metrics(finished: FinishedRequests) -> dict[str, Metric]:
    """Every metric of `REQUEST_METRICS` that at least one request has, summarized."""
    columns = {name: metric.values(finished) for name, metric in REQUEST_METRICS.items()}
    present = {name: values[~np.isnan(values)] for name, values in columns.items()}
    return {name: summarize(values, REQUEST_METRICS[name].unit) for name, values in present.items() if len(values)}


def run_metrics(totals: RunTotals) -> dict[str, Metric]:
    """
    The metrics of a run that are one figure each; none for a run without requests.

    A cancelled request is AIPerf's "error": counted, and in no other metric. It has goodput only where there
    are SLOs, and rates only where time passed.
    """
    num_completed = totals.num_finished + totals.num_cancelled
    if not num_completed:
        return {}
    metrics = {
        "completed_request_count": _figure(num_completed, "requests"),
        "request_error_rate": _figure(100 * totals.num_cancelled / num_completed, "%"),
    }
    if totals.num_cancelled:
        metrics["error_request_count"] = _figure(totals.num_cancelled, "requests")
    if totals.num_good is not None:
        metrics["good_request_count"] = _figure(totals.num_good, "requests")
        metrics["good_request_fraction"] = _figure(totals.num_good / num_completed, "ratio")
    if not totals.num_finished:
        return metrics
    metrics |= {
        "request_count": _figure(totals.num_finished, "requests"),
        "total_isl": _figure(totals.isl_tokens, "tokens"),
        "total_osl": _figure(totals.osl_tokens, "tokens"),
        "total_output_tokens": _figure(totals.osl_tokens, "tokens"),
    }
    if totals.duration_s > 0:
        all_tokens = totals.isl_tokens + totals.osl_tokens
        metrics |= {
            "benchmark_duration": _figure(totals.duration_s, "sec"),
            "request_throughput": _figure(totals.num_finished / totals.duration_s, "requests/sec"),
            "output_token_throughput": _figure(totals.osl_tokens / totals.duration_s, "tokens/sec"),
            "input_token_throughput": _figure(totals.isl_tokens / totals.duration_s, "tokens/sec"),
            "total_token_throughput": _figure(all_tokens / totals.duration_s, "tokens/sec"),
        }
        if totals.num_good is not None:
            metrics["goodput"] = _figure(totals.num_good / totals.duration_s, "requests/sec")
    return metrics


def summarize(values: FloatArray, unit: str) -> Metric:
    """One metric in AIPerf's schema (linear percentiles, population standard deviation); there must be a value."""
    return to_metric(
        unit,
        mean=float(values.mean()),
        percentiles=[float(value) for value in np.percentile(values, PERCENTILES)],
        smallest=float(values.min()),
        largest=float(values.max()),
        std=float(values.std()),
        count=len(values),
        total=float(values.sum()),
    )


def to_metric(
    unit: str,
    *,
    mean: float,
    percentiles: list[float],
    smallest: float,
    largest: float,
    std: float,
    count: int,
    total: float,
) -> Metric:
    """These figures, of which `percentiles` are those of `PERCENTILES`, in AIPerf's schema."""
    return {
        "unit": unit,
        "avg": mean,
        **{f"p{p}": value for p, value in zip(PERCENTILES, percentiles, strict=True)},
        "min": smallest,
        "max": largest,
        "std": std,
        "count": count,
        "sum": total,
    }


def _figure(value: float, unit: str) -> Metric:
    return {"unit": unit, "avg": float(value)}
