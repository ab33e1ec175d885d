"""The log of a simulation says what AIPerf would have said of the same requests, in memory that does not grow."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mock_engine import simulation_results
from mock_engine.aiperf_schema import REQUEST_METRICS
from mock_engine.errors import ConfigError
from mock_engine.simulation_results import RequestLog
from mock_engine.slos import parse_slos
from mock_engine.trace_files import read_trace

SLOS = "time_to_first_token:300ms inter_token_latency:10ms"


def make_requests(number, seed=0):
    """Arguments of `RequestLog.add` for requests that differ in everything."""
    rng = np.random.default_rng(seed)
    for index in range(number):
        osl = int(rng.integers(1, 40))
        arrival_s = float(rng.uniform(0, 100))
        first_s = arrival_s + float(rng.uniform(0.05, 0.5))
        second_s = first_s + float(rng.uniform(0.001, 0.02)) if osl > 1 else first_s
        last_s = second_s + (osl - 2) * float(rng.uniform(0.001, 0.02)) if osl > 1 else first_s
        isl = int(rng.integers(1, 4000))
        session = f"s{index % 3}" if index % 2 else None
        turn = index // 3 if session else None
        yield f"r{index}", arrival_s, first_s, second_s, last_s, isl, osl, isl // 3, index % 2, index % 4, session, turn


def fill(log, number=50, seed=0):
    for number_so_far, request in enumerate(make_requests(number, seed)):
        log.add(*request)
        if number_so_far % 5 == 0:
            log.add_cancelled("gone", request[1], request[2], 100, 7, 30, 0, 1, None, None)
        log.add_gaps(np.asarray([0.01, 0.02, 0.011 + number_so_far / 1e5]), number_so_far % 9)
    log.close()
    return log


def test_an_empty_log_has_no_metrics():
    assert RequestLog(parse_slos(SLOS)).metrics() == {}


def test_cancelled_requests_are_counted_and_nothing_else():
    log = RequestLog()
    log.add_cancelled("r", 1.0, 2.0, 10, 5, 0, 0, 0, None, None)
    assert {name: metric["avg"] for name, metric in log.metrics().items()} == {
        "completed_request_count": 1,
        "request_error_rate": 100,
        "error_request_count": 1,
    }


@pytest.fixture
def aiperf_with_slos():
    """AIPerf's registry of metrics, whose goodput knows our objectives."""
    registry = pytest.importorskip("aiperf.metrics.metric_registry").MetricRegistry
    good_class = registry.get_class("good_request_count")
    good_class.set_slos({slo.metric: slo.value for slo in parse_slos(SLOS)})
    yield registry
    good_class.set_slos(None)


def test_aiperf_itself_says_the_same_of_these_requests(aiperf_with_slos):
    """Every metric that we give, worked out by AIPerf's own classes from the same times."""
    registry = aiperf_with_slos
    dicts = pytest.importorskip("aiperf.metrics.metric_dicts")
    no_value = pytest.importorskip("aiperf.common.exceptions").NoMetricValue
    log = RequestLog(parse_slos(SLOS))
    series, run = {}, dicts.MetricResultsDict()
    names = ["time_to_first_token", "request_latency", "output_sequence_length", "input_sequence_length"]
    names += [name for name in REQUEST_METRICS if name not in names]  # after those that they are made of
    for request in make_requests(80):
        log.add(*request)
        record = to_aiperf_record(*request[1:8])
        values = dicts.MetricRecordDict()
        for name in [*names, "good_request_count", "min_request_timestamp", "max_response_timestamp"]:
            try:
                values[name] = registry.get_class(name)().parse_record(record, values)
            except no_value:
                continue
            series.setdefault(name, []).append(values[name])
    run["request_count"] = len(series["request_latency"])
    run["error_request_count"] = 0
    run["good_request_count"] = sum(series["good_request_count"])
    run["total_output_tokens"] = run["total_osl"] = sum(series["output_sequence_length"])
    run["total_isl"] = sum(series["input_sequence_length"])
    run["min_request_timestamp"] = min(series["min_request_timestamp"])
    run["max_response_timestamp"] = max(series["max_response_timestamp"])
    ours = log.metrics()
    assert 0 < ours["good_request_count"]["avg"] < 80
    # The duration first, as rates are derived from it.
    for name, metric in sorted(ours.items(), key=lambda item: item[0] != "benchmark_duration"):
        theirs = registry.get_class(name)
        unit = theirs.display_unit or theirs.unit
        if name in REQUEST_METRICS:
            array = np.asarray(series[name], dtype=np.float64)
            result = dicts.metric_result_from_array(name, "", str(theirs.unit), array, float(array.sum()))
            expected = result.to_display_unit().to_json_result().model_dump(exclude_none=True)
        else:
            if name not in run:
                run[name] = theirs().derive_value(run)
            expected = {"unit": str(unit), "avg": run[name] / 1e9 if str(theirs.unit) == "ns" else run[name]}
        assert metric.keys() == expected.keys(), name
        assert metric.pop("unit") == expected.pop("unit")
        assert metric == pytest.approx(expected, rel=1e-12, abs=1e-12), name


def to_aiperf_record(arrival_s, first_s, second_s, last_s, isl, osl, cached):
    """What AIPerf's metrics look at, of a response of which every token was a chunk."""
    times = [first_s, second_s, *[last_s] * (osl - 2)][:osl]
    start_ns = round(arrival_s * 1e9)
    return SimpleNamespace(
        valid=True,
        timestamp_ns=start_ns,
        start_perf_ns=start_ns,
        request=SimpleNamespace(start_perf_ns=start_ns),
        content_responses=[SimpleNamespace(perf_ns=round(time_s * 1e9)) for time_s in times],
        token_counts=SimpleNamespace(input=isl, output=osl, reasoning=None, first_content_chunk_tokens=None),
        final_usage=SimpleNamespace(prompt_cache_read_tokens=cached),
    )


@given(runs=st.lists(st.tuples(st.lists(st.integers(0, 10**9), max_size=6), st.integers(0, 50)), max_size=8))
@settings(max_examples=50)
def test_icl_is_every_gap_as_often_as_a_sequence_saw_it(runs):
    log = RequestLog()
    log.add("r", 0.0, 1.0, 1.0, 1.0, 10, 1, 0, 0, 0, None, None)
    for gaps_ns, num_sequences in runs:
        log.add_gaps(np.asarray(gaps_ns, dtype=np.float64) / 1e9, num_sequences)
    repeated = np.asarray([gap / 1e6 for gaps, number in runs for gap in gaps for _ in range(number)])
    metric = log.metrics().get("inter_chunk_latency")
    if not len(repeated):
        assert metric is None
        return
    assert metric["unit"] == "ms"
    assert metric["count"] == len(repeated)
    assert metric["p99"] == np.percentile(repeated, 99)
    assert metric["avg"] == pytest.approx(repeated.mean())


def test_more_requests_than_are_sorted_in_memory_have_the_same_metrics(monkeypatch):
    expected = fill(RequestLog(parse_slos(SLOS))).metrics()
    monkeypatch.setattr(simulation_results, "_MAX_IN_MEMORY", 0)
    metrics = fill(RequestLog(parse_slos(SLOS))).metrics()
    assert metrics.keys() == expected.keys()
    for name, metric in metrics.items():
        assert metric.pop("unit") == expected[name].pop("unit")
        assert metric == pytest.approx(expected[name], rel=1e-12, abs=1e-9), name


def test_memory_does_not_grow_with_requests_and_tokens():
    """300,000 requests and 3 million gaps: 60 MB of figures, of which no more than a few are in memory."""
    log = RequestLog()
    gaps_s = np.linspace(0.005, 0.05, 1000)
    tracemalloc.start()
    for index in range(300_000):
        at = index * 1e-3
        log.add("request", at, at + 0.1 + index % 977 / 1e4, at + 1.0, at + 2.0, 1000, 200, 0, 0, 0, None, None)
        if index % 100 == 0:
            log.add_gaps(gaps_s, 64)
    _, peak_of_adding = tracemalloc.get_traced_memory()
    metrics = log.metrics()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert metrics["inter_chunk_latency"]["count"] == 3_000_000 * 64
    assert metrics["inter_chunk_latency"]["p50"] == pytest.approx(27.5)
    assert peak_of_adding < 5e6
    assert peak < 32e6


ODD_NAMES = ['say "no"', "back\\slash", "new\nline\x00", "日本語", "💡", "\ud800"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_any_name_is_written_so_that_it_can_be_read(tmp_path, name):
    log = RequestLog(requests_out=tmp_path / "rows.jsonl")
    log.add(name, 0.0, 1.0, 1.0, 1.0, 10, 1, 0, 0, 0, name, 3)
    log.close()
    (row,) = (json.loads(line) for line in (tmp_path / "rows.jsonl").read_text(encoding="ascii").split("\n") if line)
    assert row["metadata"]["x_request_id"] == row["metadata"]["conversation_id"] == name
    assert row["metadata"]["turn_index"] == 3


@pytest.mark.parametrize("number", [1, 50, 1023, 1024, 1025, 3000])
def test_every_request_has_its_row_in_the_order_in_which_they_ended(tmp_path, number):
    path = tmp_path / "rows.jsonl"
    fill(RequestLog(requests_out=path), number).close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["metadata"]["session_num"] for row in rows] == list(range(len(rows)))
    finished = [row for row in rows if "error" not in row]
    for request, row in zip(make_requests(number), finished, strict=True):
        request_id, arrival_s, first_s, _, last_s, isl, osl, cached, preemptions, worker, session_id, turn_index = (
            request
        )
        metadata, value = row["metadata"], {name: metric["value"] for name, metric in row["metrics"].items()}
        assert metadata["x_request_id"] == request_id
        assert metadata["worker_id"] == f"worker_{worker}"
        assert metadata.get("conversation_id") == session_id
        assert metadata.get("turn_index") == turn_index
        assert metadata["request_start_ns"] == round(arrival_s * 1e9)
        assert metadata["request_end_ns"] == round(last_s * 1e9)
        assert value["time_to_first_token"] == (round(first_s * 1e9) - round(arrival_s * 1e9)) / 1e6
        assert ("inter_token_latency" in value) == (osl > 1)
        assert (value["input_sequence_length"], value["output_sequence_length"]) == (isl, osl)
        assert (value["usage_prompt_cache_read_tokens"], value["num_preemptions"]) == (cached, preemptions)
    assert len(rows) - len(finished) == (number + 4) // 5
    assert finished[0]["metrics"].keys() <= {*REQUEST_METRICS, "num_preemptions"}


def test_aiperf_s_own_model_reads_every_row(tmp_path):
    model = pytest.importorskip("aiperf.common.models.record_models").MetricRecordInfo
    path = tmp_path / "rows.jsonl"
    fill(RequestLog(requests_out=path))
    num_cancelled = 0
    for line in path.read_text().splitlines():
        row = model.model_validate_json(line)
        assert not row.model_extra
        assert not row.metadata.model_extra
        assert row.metadata.was_cancelled == (row.error is not None)
        if row.metadata.was_cancelled:
            num_cancelled += 1
            assert row.error.code == 499
            assert row.metadata.cancellation_time_ns == row.metadata.request_end_ns
            assert {name: metric.value for name, metric in row.metrics.items()} == {
                "error_isl": 100,
                "num_output_tokens": 7,
            }
    assert num_cancelled == 10


def test_a_trace_reader_reads_the_rows_of_what_was_finished(tmp_path):
    path = tmp_path / "rows.jsonl"
    fill(RequestLog(requests_out=path))
    sessions = list(read_trace(path, "profile_export", 16))
    requests = sorted(make_requests(50), key=lambda request: request[1])
    assert [(s.turns[0].isl_tokens, s.turns[0].osl_tokens) for s in sessions] == [(r[5], r[6]) for r in requests]
    assert [s.arrival_s for s in sessions] == pytest.approx([r[1] - requests[0][1] for r in requests], abs=1e-9)


def test_the_same_requests_give_the_same_bytes(tmp_path):
    written = []
    for path in (tmp_path / "one", tmp_path / "two"):
        metrics = fill(RequestLog(parse_slos(SLOS), path), 2000).metrics()
        written.append((json.dumps(metrics).encode(), path.read_bytes()))
    assert written[0] == written[1]


def test_rows_that_cannot_be_written_are_an_error_of_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot write requests to .*: Is a directory\. Name another file"):
        RequestLog(requests_out=tmp_path)
    log = RequestLog(requests_out=Path("/dev/full"))
    log.add(*next(make_requests(1)))
    with pytest.raises(ConfigError, match="/dev/full: No space left on device"):
        log.close()
    log.close()
