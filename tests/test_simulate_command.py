"""`mock-engine simulate` as the user types it: what it prints, writes and refuses."""

from __future__ import annotations

import json

import pytest

from mock_engine.cli import main
from mock_engine.profile import list_profiles

A100 = "a100-sxm/llama-3.1-8b/vllm-tp1-bf16"
SMALL = ["--isl", "64", "--osl", "16", "--request-count", "30"]
SLOS = "time_to_first_token:100ms inter_token_latency:20ms"


def simulate(*flags):
    return main(["simulate", *map(str, flags)])


def refused(capsys, *flags):
    """The one line that a wrong command prints."""
    try:
        status = simulate(*flags)
    except SystemExit as exit_:
        status = exit_.code
    printed = capsys.readouterr()
    assert status == 2
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    return printed.err


def test_it_prints_latencies_and_what_the_deployment_did(capsys):
    assert simulate(*SMALL, "--workers", 2, "--goodput", SLOS) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("2 x h100-sxm/llama-3.1-8b/vllm-tp1-bf16, round-robin\n")
    for words in ("TTFT (ms)", "ITL (ms)", "ICL (ms)", "30 finished", "100.0% of all", "GPU-hours", "simulated "):
        assert words in printed


def test_the_same_command_writes_the_same_json_byte_for_byte_and_another_seed_another(tmp_path):
    files = [tmp_path / name for name in ("first", "second", "third")]
    for file, seed in zip(files, (3, 3, 4), strict=True):
        flags = ("--isl-stddev", 20, "--request-rate", 50, "--router-mode", "kv", "--workers", 3, "--random-seed", seed)
        assert simulate(*SMALL, *flags, "--json", file, "--requests-out", f"{file}.jsonl") == 0
    first, second, third = (file.read_bytes() for file in files)
    assert first == second != third
    rows = [(tmp_path / f"{name}.jsonl").read_bytes() for name in ("first", "second", "third")]
    assert rows[0] == rows[1] != rows[2]
    assert rows[0].count(b"\n") == 30


def test_json_has_aiperf_s_schema_and_the_simulation_s_own_figures(tmp_path):
    assert simulate(*SMALL, "--goodput", SLOS, "--json", tmp_path / "out.json") == 0
    out = json.loads((tmp_path / "out.json").read_text())
    assert out["time_to_first_token"].keys() >= {"unit", "avg", "min", "max", "p1", "p99", "std"}
    assert out["requests"] == {"sent": 30, "finished": 30, "cancelled": 0, "failed": 0}
    assert out["goodput"]["avg"] == pytest.approx(out["request_throughput"]["avg"])
    assert out["output_token_throughput"]["avg"] * out["simulated_s"] == pytest.approx(30 * 16)
    assert out["gpu_hours"] * 3600 == pytest.approx(out["simulated_s"])
    assert 0 < out["kv_usage"]["avg"] <= out["kv_usage"]["max"] < 1


def test_rows_of_one_simulation_are_the_trace_of_another(tmp_path):
    """Sent again at their own times, the same requests do the same."""
    rows = tmp_path / "rows.jsonl"
    flags = ("--isl-stddev", 20, "--request-rate", 50)
    assert simulate(*SMALL, *flags, "--requests-out", rows, "--json", tmp_path / "a") == 0
    again = ("--input-file", rows, "--custom-dataset-type", "profile_export", "--fixed-schedule")
    assert simulate(*again, "--json", tmp_path / "b") == 0
    first, second = (json.loads((tmp_path / name).read_text()) for name in "ab")
    for name in ("input_sequence_length", "output_sequence_length", "request_count"):
        assert first[name] == second[name]
    assert second["time_to_first_token"]["avg"] == pytest.approx(first["time_to_first_token"]["avg"], rel=1e-3)


def test_a_sweep_simulates_each_combination_and_marks_the_pareto_front(tmp_path, capsys):
    swept = ("--sweep", "concurrency=1,8", "--sweep", f"profile={list_profiles()[0]},{A100}", "--processes", 2)
    assert simulate(*SMALL, *swept, "--json", tmp_path / "out.json") == 0
    out = json.loads((tmp_path / "out.json").read_text())
    assert [point["swept"]["concurrency"] for point in out["points"]] == [1, 1, 8, 8]
    assert all(point["request_count"]["avg"] == 30 for point in out["points"])
    places = [
        (point["output_token_throughput"]["avg"] / point["num_gpus"], point["output_token_throughput_per_user"]["avg"])
        for point in out["points"]
    ]
    beaten = {
        i for i, (x, y) in enumerate(places) if any(x2 >= x and y2 >= y and (x2, y2) != (x, y) for x2, y2 in places)
    }
    assert set(out["pareto"]) == {0, 1, 2, 3} - beaten
    assert "per GPU" in capsys.readouterr().out


def test_the_highest_rate_meets_the_objectives_and_one_per_cent_more_does_not(tmp_path):
    flags = ("--request-count", 1000, "--isl", 512, "--osl", 64, "--goodput", SLOS, "--processes", 2)
    assert simulate(*flags, "--find-max", "--json", tmp_path / "max.json") == 0
    found = json.loads((tmp_path / "max.json").read_text())
    is_met = {each["request_rate"]: each["attainment"] >= 0.95 and each["keeps_up"] for each in found["tried"]}
    best = found["max_request_rate"]
    assert is_met[best]
    above = min(rate for rate in is_met if rate > best)
    assert not is_met[above]
    assert above / best <= 1.01
    assert found["results"]["good_request_count"]["avg"] >= 950


def test_a_rate_at_which_the_queue_only_grows_does_not_count_however_good_each_token_is(tmp_path):
    """ITL stays low where few run at once: overload shows in TTFT alone, which nobody asked about."""
    flags = ("--isl", 512, "--osl", 64, "--max-num-seqs", 4, "--goodput", "inter_token_latency:50ms", "--processes", 2)
    assert simulate(*flags, "--find-max", "--json", tmp_path / "max.json") == 0
    found = json.loads((tmp_path / "max.json").read_text())
    assert any(each["attainment"] == 1.0 and not each["keeps_up"] for each in found["tried"])
    assert found["results"]["keeps_up"]
    assert found["results"]["answered_rate"] == pytest.approx(found["max_request_rate"], rel=0.1)


def test_overload_events_that_came_too_late_and_requests_sent_again_are_told(capsys):
    flags = ("--request-rate", 100, "--workers", 2, "--lose-worker", "0:0.2", "--lose-worker", "1:99")
    assert simulate(*flags, "--migration-limit", 1) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "Requests sent again after a loss" in printed
    assert "worker 1 was to be lost at 99 s" in printed
    assert "too much for this deployment, or a run too short to tell" in printed


def test_each_role_of_disaggregated_serving_has_its_own_line(tmp_path, capsys):
    flags = (*SMALL, "--prefill-workers", 1, "--decode-workers", 2, "--json", tmp_path / "out.json")
    assert simulate(*flags) == 0
    printed = capsys.readouterr().out
    assert "  prefill: running, waiting; KV usage" in printed
    assert "KV transfer, waiting for links included" in printed
    out = json.loads((tmp_path / "out.json").read_text())
    running = {role: usage["avg_num_running"] for role, usage in out["by_role"].items()}
    assert (running["prefill"] + 2 * running["decode"]) / 3 == pytest.approx(out["avg_requests_running"], rel=0.05)


def test_a_row_says_whether_a_request_was_cancelled_or_failed_and_why(tmp_path):
    rows = tmp_path / "rows.jsonl"
    assert simulate(*SMALL, "--workers", 2, "--lose-worker", "1:0.05", "--requests-out", rows) == 0
    failed = [row for row in map(json.loads, rows.read_text().splitlines()) if "error" in row]
    assert failed
    assert {row["error"]["message"] for row in failed} == {"its worker was lost"}
    assert not any(row["metadata"]["was_cancelled"] for row in failed)


def test_objectives_that_no_rate_meets_are_reported_not_searched_for_ever(capsys):
    flags = ("--request-count", 20, "--goodput", "time_to_first_token:1ms", "--find-max", "--processes", 2)
    assert simulate(*flags) == 1
    assert "No rate meets the objectives for 95% of the requests" in capsys.readouterr().out


def test_a_worker_that_is_lost_fails_its_requests_and_the_table_says_so(capsys):
    assert simulate(*SMALL, "--workers", 2, "--lose-worker", "1:0.05") == 0
    assert "requests failed: its worker was lost" in capsys.readouterr().out


def test_a_run_without_a_single_answer_is_told_apart_not_tripped_over(capsys):
    flags = (*SMALL, "--request-cancellation-rate", 100, "--request-cancellation-delay", 0.001)
    assert simulate(*flags) == 1
    assert "0 finished, 30 cancelled" in capsys.readouterr().out
    assert simulate(*flags, "--sweep", "workers=1,2", "--processes", 1) == 0
    assert capsys.readouterr().out.count("no request was answered") == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workers", 0], "--workers is 0; it must be at least 1"),
        (["--prefill-workers", 0, "--decode-workers", 1], "--prefill-workers is 0; it must be at least 1"),
        (["--prefill-workers", 1], "disaggregated serving needs both --prefill-workers and --decode-workers"),
        (["--prefill-workers", 1, "--decode-workers", 1, "--workers", 2], "give the one or the other"),
        (["--decode-profile", A100], "--decode-profile is about disaggregated serving"),
        (["--add-workers", "two"], "found 'two'; needed is N:PROFILE"),
        (["--add-workers", "0:" + A100], "--workers is 0; it must be at least 1"),
        (["--data-parallel-size", 0], "--data-parallel-size is 0; it must be at least 1"),
        (["--request-rate", -1], "--request-rate is -1; it must be above 0, in requests a second"),
        (["--goodput", "time_to_first_token:200"], "time_to_first_token:200ms"),
        (["--goodput", ""], "--goodput is empty"),
        (["--router-mode", "best"], "--router-mode is 'best'; allowed is round-robin, random, power-of-two"),
        (["--router-temperature", -1], "--router-temperature is -1; it must be 0 or more"),
        (["--kv-transfer-bandwidth", 0], "--kv-transfer-bandwidth is 0; it must be above 0, in GB/s"),
        (["--kv-transfer-timing-mode", "x"], "allowed is full_prompt, destination_missing"),
        (["--lose-worker", "3:1"], "--lose-worker names worker 3; there are 0 to 0"),
        (["--lose-worker", "soon"], "found 'soon'; needed is WORKER:SECONDS"),
        (["--start-worker", "0:-1"], "--start-worker 0:-1 has no time of 0 s or more"),
        (["--startup-time", "nan"], "--startup-time is nan; it must be 0 or more, in seconds"),
        (["--migration-limit", -1], "--migration-limit is -1; it must be 0 or more"),
        (["--client-turnaround", -1], "--client-turnaround is -1; it must be 0 or more, in ms"),
        (["--isl", 500_000], "tokens; the context length is"),
        (["--find-max"], "--find-max needs --goodput"),
        (["--find-max", "--goodput", SLOS, "--request-rate", 3], "leave out --request-rate"),
        (["--find-max", "--goodput", SLOS, "--concurrency", 3], "leave out --concurrency"),
        (["--workers", 2, "--sweep", "workers=1"], "--workers and --sweep workers=... contradict each other"),
        (["--seed", -1], "--seed is -1; it must be 0 or more"),
        (["--json", "no-such-folder/out.json"], "--json no-such-folder/out.json: there is no folder no-such-folder"),
        (["--find-max", "--goodput", SLOS, "--slo-attainment-fraction", 2], "must be above 0 and at most 1"),
        (["--find-max", "--goodput", SLOS, "--sweep", "workers=1"], "leave one out"),
        (["--find-max", "--goodput", SLOS, "--timeline", "t.json"], "--timeline is about one simulation"),
        (["--sweep", "colour=1"], "with NAME one of concurrency, workers, prefill-workers"),
        (["--sweep", "workers="], "needed is NAME=A,B,C"),
        (["--sweep", "workers=one"], "the values of workers are numbers"),
        (["--sweep", "workers=1", "--sweep", "workers=2"], "--sweep names workers 2 times"),
        (["--sweep", "workers=0"], "--workers is 0; it must be at least 1"),
        (["--sweep", "workers=1", "--processes", 0], "--processes is 0; it must be at least 1"),
        (["--processes", 2], "are for many simulations; add --sweep or --find-max"),
        (["--sweep", "workers=1", "--ray"], "--ray needs Ray, which is not installed"),
        (["--profile", "h200"], "h200"),
        (["--speedup-ratio", 2], "unrecognized arguments: --speedup-ratio"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_in_one_line(flags, message, capsys):
    assert message in refused(capsys, *flags)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ('{"timestamp": 0, "input_length": 10, "output_length": 5}\n{"timestamp": 1,', "line 2"),
        (
            '{"timestamp": 9, "input_length": 10, "output_length": 5}\n'
            '{"timestamp": 1, "input_length": 10, "output_length": 5}\n',
            "line 2",
        ),
        ('{"timestamp": 0, "input_length": -1, "output_length": 5}\n', "line 1"),
    ],
)
def test_a_wrong_row_of_a_trace_is_named_by_its_line(rows, message, tmp_path, capsys):
    trace = tmp_path / "trace.jsonl"
    trace.write_text(rows)
    error = refused(capsys, "--input-file", trace, "--custom-dataset-type", "mooncake_trace", "--fixed-schedule")
    assert f"{trace}, {message}" in error


def test_an_output_file_that_cannot_be_written_is_refused_in_one_line(tmp_path, capsys):
    assert "no-such-folder" in refused(capsys, *SMALL, "--requests-out", tmp_path / "no-such-folder" / "rows.jsonl")
