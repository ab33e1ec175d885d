"""AIPerf's metrics from the times of requests: AIPerf's own classes say the same, and formulas do."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mock_engine.aiperf_schema import (
    REQUEST_METRICS,
    FinishedRequests,
    RunTotals,
    request_metrics,
    run_metrics,
    summarize,
)

# From profile_export_aiperf.json and profile_export.jsonl of a run of AIPerf 0.13.0 with 10 requests.
AIPERF_TTFT_MS = [53.487922, 44.119, 47.012, 61.25, 70.1, 44.9, 45.66, 98.003, 112.7, 57.42]


def make_finished(osl, ttft_s=0.2, itl_s=0.01, isl=100):
    """Requests that came at zero and differ in their output length alone."""
    osl = np.asarray(osl, dtype=np.float64)
    ones = np.ones(len(osl))
    first_s = ttft_s * ones
    second_s = first_s + np.where(osl > 1, itl_s, 0.0)
    last_s = first_s + itl_s * (osl - 1)
    return FinishedRequests.from_times(0 * ones, first_s, second_s, last_s, isl * ones, osl, 0 * ones)


def test_a_summary_has_aiperf_s_keys_and_numpy_s_linear_percentiles():
    summary = summarize(np.asarray(AIPERF_TTFT_MS), "ms")
    percentiles = ["p1", "p5", "p10", "p25", "p50", "p75", "p90", "p95", "p99"]
    assert list(summary) == ["unit", "avg", *percentiles, "min", "max", "std", "count", "sum"]
    assert summary["p50"] == pytest.approx((53.487922 + 57.42) / 2)
    assert summary["count"] == 10
    assert summary["min"] <= summary["p1"] <= summary["p99"] <= summary["max"]


@given(osl=st.integers(2, 500), ttft_us=st.integers(1, 10**6), itl_us=st.integers(1, 10**5))
def test_request_metrics_are_aiperf_s_formulas(osl, ttft_us, itl_us):
    metrics = request_metrics(make_finished([osl], ttft_us / 1e6, itl_us / 1e6))
    value = {name: metric["avg"] for name, metric in metrics.items()}
    assert value["time_to_first_token"] == ttft_us / 1e3
    assert value["time_to_second_token"] == pytest.approx(itl_us / 1e3, abs=1e-6)
    assert value["inter_token_latency"] == pytest.approx(itl_us / 1e3)
    assert value["request_latency"] == pytest.approx((ttft_us + itl_us * (osl - 1)) / 1e3)
    assert value["decode_duration"] == pytest.approx(itl_us * (osl - 1) / 1e3)
    assert value["output_token_throughput_per_user"] == pytest.approx(1e6 / itl_us)
    assert value["prefill_throughput_per_user"] == pytest.approx(100 * 1e6 / ttft_us)
    assert value["e2e_output_token_throughput"] == pytest.approx(osl * 1e3 / value["request_latency"])


def test_a_request_of_one_token_is_left_out_of_what_lies_between_tokens():
    metrics = request_metrics(make_finished([1, 1, 3]))
    assert metrics["time_to_first_token"]["count"] == 3
    for name in ("time_to_second_token", "inter_token_latency", "output_token_throughput_per_user"):
        assert metrics[name]["count"] == 1
        assert name not in request_metrics(make_finished([1]))


def test_no_time_at_all_is_not_divided_by():
    metrics = request_metrics(make_finished([4], ttft_s=0.0, itl_s=0.0))
    assert metrics["inter_token_latency"]["avg"] == 0
    rates = {name for name, metric in REQUEST_METRICS.items() if "sec" in metric.unit}
    assert rates
    assert not rates & metrics.keys()
    assert "request_throughput" not in run_metrics(RunTotals(1, isl_tokens=10, osl_tokens=1, duration_s=0.0))


def test_the_rates_of_a_run_are_totals_over_its_duration():
    totals = RunTotals(num_finished=30, isl_tokens=3000, osl_tokens=600, duration_s=15.0, num_cancelled=10, num_good=15)
    assert {name: metric["avg"] for name, metric in run_metrics(totals).items()} == {
        "completed_request_count": 40,
        "request_error_rate": 25,
        "error_request_count": 10,
        "good_request_count": 15,
        "good_request_fraction": 15 / 40,
        "request_count": 30,
        "total_isl": 3000,
        "total_osl": 600,
        "total_output_tokens": 600,
        "benchmark_duration": 15,
        "request_throughput": 2,
        "output_token_throughput": 40,
        "input_token_throughput": 200,
        "total_token_throughput": 240,
        "goodput": 1,
    }


def test_names_and_units_are_those_that_aiperf_exports():
    registry = pytest.importorskip("aiperf.metrics.metric_registry").MetricRegistry
    flags = pytest.importorskip("aiperf.common.enums").MetricFlags
    run = run_metrics(RunTotals(2, isl_tokens=2, osl_tokens=2, duration_s=1.0, num_cancelled=1, num_good=1))
    units = {name: metric["unit"] for name, metric in run.items()}
    units |= {name: metric.unit for name, metric in REQUEST_METRICS.items()}
    for name, unit in units.items():
        theirs = registry.get_class(name)
        assert unit == str(theirs.display_unit or theirs.unit), name
        assert not theirs.has_flags(flags.INTERNAL), name
    for name, metric in REQUEST_METRICS.items():
        assert metric.is_larger_better == registry.get_class(name).has_flags(flags.LARGER_IS_BETTER), name
