"""What a report says, from what workers recorded: formulas, and what AIPerf made of the same numbers."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from mock_engine.bench_prediction import Prediction
from mock_engine.bench_report import comparison_rows, print_table, write_report
from mock_engine.bench_results import Results, model_metrics
from mock_engine.recorder import RequestRow, TimelineRow

TTFT_S, ITL_S = 0.25, 0.01


def make_row(number=0, osl=5, arrival_s=1.0, ttft_s=TTFT_S, itl_s=ITL_S, late_s=0.0, finish_reason="length"):
    """A request whose first token is due `ttft_s` after it came, and the others `itl_s` apart."""
    due_s = [arrival_s + ttft_s + index * itl_s for index in range(osl)]
    return RequestRow(
        request_id=f"r{number}",
        choice=0,
        arrival_unix_s=1e9 + arrival_s,
        arrival_s=arrival_s,
        isl_tokens=100,
        osl_tokens=osl,
        num_cached_tokens=0,
        num_preemptions=0,
        finish_reason=finish_reason,
        due_s=due_s,
        sent_s=[due + late_s for due in due_s],
    )


def make_timeline(num_rows=8):
    return [
        TimelineRow(
            unix_s=1e9 + index / 4,
            time_s=index / 4,
            num_open_requests=2,
            num_running=2,
            num_waiting=1,
            kv_used_blocks=10 * index,
            kv_cached_blocks=5,
            kv_total_blocks=100,
            num_output_tokens=20 * index,
            num_preemptions=0,
            prefix_queries_tokens=100,
            prefix_hits_tokens=25,
            lateness_p50_s=0.001,
            lateness_p99_s=0.002,
            cpu_s=0.1 * index,
            num_tasks=3,
            num_threads=2,
        )
        for index in range(num_rows)
    ]


def make_results(**changes):
    metric = {"unit": "ms", "avg": 300.0, "p50": 300.0, "p95": 310.0, "p99": 320.0}
    rows = [make_row(number) for number in range(4)]
    results = Results(
        command=["mock-engine", "bench", "--model-name", "a model"],
        facts={
            "profile": "gpu/model/engine",
            "num_workers": 1,
            "roles": {"agg": 1},
            "planes": {"discovery_backend": "etcd", "request_plane": "nats", "event_plane": "nats"},
            "total_kv_blocks": 100,
            "speedup_ratio": 1.0,
            "started": "now",
            "mock-engine": "1",
            "commit": "abc",
            "ai-dynamo": "2",
            "aiperf": "3",
        },
        aiperf={
            "time_to_first_token": metric,
            "request_count": {"unit": "requests", "avg": 4.0},
            "benchmark_duration": {"unit": "sec", "avg": 2.0},
            "error_summary": [],
        },
        records=[{"metrics": {"time_to_first_token": {"value": 300.0, "unit": "ms"}}}],
        model=model_metrics(rows, 1.0),
        prediction=Prediction({"time_to_first_token": {"unit": "ms", "p50": 290.0, "p95": 300.0, "p99": 310.0}}),
        lateness_s={"p50": 0.0, "p99": 0.001, "max": 0.002},
        kv_usage={"avg": 0.1, "max": 0.5},
        preemptions=0,
        prefix_cache_hit_rate=0.25,
        speculative_decoding=None,
        cpu_us_per_token=100.0,
        num_cancelled=0,
        requests=rows,
        timelines=[make_timeline()],
    )
    return replace(results, **changes)


@given(
    osls=st.lists(st.integers(2, 50), min_size=1, max_size=20),
    ttft_s=st.floats(0.001, 10),
    itl_s=st.floats(0.001, 1),
    speedup_ratio=st.sampled_from([0.25, 1.0, 8.0]),
)
def test_model_metrics_are_the_due_times_in_real_milliseconds(osls, ttft_s, itl_s, speedup_ratio):
    """TTFT and ITL are what they were made from; latency = TTFT + (OSL - 1) ITL; lateness plays no part."""
    rows = [make_row(n, osl, ttft_s=ttft_s, itl_s=itl_s, late_s=9.0) for n, osl in enumerate(osls)]
    metrics = model_metrics(rows, speedup_ratio)
    to_ms = 1e3 / speedup_ratio
    assert metrics["time_to_first_token"]["p50"] == pytest.approx(ttft_s * to_ms)
    assert metrics["inter_token_latency"]["avg"] == pytest.approx(itl_s * to_ms)
    longest_s = ttft_s + (max(osls) - 1) * itl_s
    assert metrics["request_latency"]["max"] == pytest.approx(longest_s * to_ms)
    # All came at once, so the run takes as long as its longest request.
    assert metrics["output_token_throughput"]["avg"] == pytest.approx(sum(osls) / longest_s * speedup_ratio, rel=1e-3)
    assert metrics["request_count"]["avg"] == len(osls)


def test_requests_of_one_token_have_no_itl():
    assert "inter_token_latency" not in model_metrics([make_row(osl=1)], 1.0)
    assert model_metrics([], 1.0) == {}


def test_the_comparison_holds_what_both_sides_have():
    rows = comparison_rows(make_results())
    assert [row.label for row in rows] == ["TTFT p50 (ms)", "TTFT p95 (ms)", "TTFT p99 (ms)"]
    assert (rows[0].measured, rows[0].model, rows[0].predicted) == (300.0, pytest.approx(250.0), 290.0)
    assert rows[0].cells() == ["TTFT p50 (ms)", "300.00", "250.00", "+20.0%", "290.00", "+3.4%"]


def test_without_a_prediction_its_columns_are_left_out_and_the_reason_is_said(capsys):
    results = make_results(prediction=Prediction({}, "a prediction is for --speedup-ratio 1"))
    assert comparison_rows(results)[0].cells() == ["TTFT p50 (ms)", "300.00", "250.00", "+20.0%"]
    print_table(results, Console())
    printed = capsys.readouterr().out
    assert "a prediction is for --speedup-ratio 1" in printed
    assert "predicted" not in printed


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "The profile set these times"),
        ({}, "HTTP, tokenizing and AIPerf itself add 50.0 ms to TTFT p50"),
        ({"lateness_s": {"p50": 0.001, "p99": 0.02, "max": 0.1}}, "The host set some of these times"),
        ({"facts": {**make_results().facts, "speedup_ratio": 0}}, "as fast as it could"),
    ],
)
def test_the_verdict_says_who_set_the_times(changes, words):
    assert words in make_results(**changes).verdict


def test_the_page_opens_with_command_and_versions_and_shows_errors_and_pictures(tmp_path):
    errors = [{"count": 3, "error_details": {"code": 503, "message": "no worker"}}]
    results = make_results(aiperf={**make_results().aiperf, "error_summary": errors})
    write_report(tmp_path, results)
    page = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert (
        page.index("mock-engine bench --model-name 'a model'")
        < page.index("commit abc")
        < page.index("| TTFT p50 (ms) |")
    )
    assert "**3 requests failed**" in page
    assert "no worker" in page
    assert "etcd, nats, nats" in page
    for name in ("latency.png", "timeline.png"):
        assert f"({name})" in page
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_a_run_without_a_whole_request_still_has_a_page(tmp_path):
    write_report(tmp_path, make_results(model={}, requests=[], records=[]))
    assert "png" not in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_the_console_gets_the_same_figures():
    console = Console(file=io.StringIO(), width=80)
    print_table(make_results(), console)
    text = console.file.getvalue()
    assert "300.00" in text
    assert "+20.0%" in text
    assert "The profile set these times" in text


def test_json_is_aiperf_s_export_with_ours_beside_it():
    results = make_results()
    written = results.to_json()
    assert results.aiperf.items() <= written.items()
    assert written["model"]["time_to_first_token"]["unit"] == "ms"
    assert {"lateness_s", "kv_usage", "preemptions", "prefix_cache_hit_rate", "wall_s"} <= set(written)
