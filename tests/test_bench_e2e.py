"""`mock-engine bench` with the real AIPerf: no errors, no warnings about tokens, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import sys

import pytest

from mock_engine.recorder import read_status
from tests.helpers.processes import Command, is_alive, session_members, wait_for

pytest.importorskip("aiperf", reason="needs the bench extra")

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]

SMALL = ["--isl", "64", "--osl", "16", "--concurrency", "4", "--output-dir", "out"]
# Blocks of a trace: all share two, the last of each is shorter. From ten blocks on AIPerf decodes them in parallel.
PROMPTS = [[0, 1, *range(10 * n, 10 * n + n + 1)] for n in range(1, 6)]


def bench(tmp_path, *arguments):
    """Run to the end; what it printed, and bench.json."""
    command = Command(["bench", *arguments], tmp_path)
    status = command.exit_status()
    assert status == 0, command.output
    assert "Discrepancy" not in command.output
    assert "Mismatch" not in command.output
    results = json.loads((tmp_path / "out" / "bench.json").read_text(encoding="utf-8"))
    assert results["error_summary"] == []
    return command.output, results


def test_aiperf_s_table_has_no_error_no_warning_and_the_model_s_figures_beside_it(tmp_path):
    output, results = bench(tmp_path, *SMALL, "--request-count", "24")
    assert "NVIDIA AIPerf | LLM Metrics" in output
    assert "ITL p50 (ms)" in output
    assert results["request_count"]["avg"] == results["model"]["request_count"]["avg"] == 24
    for side in (results, results["model"]):
        assert side["output_sequence_length"]["min"] == side["output_sequence_length"]["max"] == 16
    assert results["input_sequence_length"]["min"] == results["input_sequence_length"]["max"] == 64
    assert results["model"]["input_sequence_length"]["max"] <= 66  # and the chat template's tokens
    # The client cannot see a token before it was due. How much later it does is the host's business, not a test's.
    assert results["time_to_first_token"]["min"] > results["model"]["time_to_first_token"]["min"]
    page = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert results["facts"]["profile"] in page
    assert (tmp_path / "out" / "latency.png").stat().st_size > 1000
    assert (tmp_path / "out" / "timeline.png").stat().st_size > 1000


def test_a_mooncake_trace_is_replayed_at_its_own_times_and_hits_the_prefix_cache(tmp_path):
    rows = [  # a second apart, of which the model needs a tenth: each finds what the one before has left
        {"timestamp": 1000 * n, "input_length": 512 * len(ids) - 10, "output_length": 5 + n, "hash_ids": ids}
        for n, ids in enumerate(PROMPTS)
    ]
    trace = tmp_path / "trace.jsonl"
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    flags = ["--input-file", str(trace), "--custom-dataset-type", "mooncake_trace", "--fixed-schedule"]
    _, results = bench(tmp_path, *flags, "--output-dir", "out")
    assert results["output_sequence_length"]["sum"] == sum(range(5, 10))
    assert results["prefix_cache_hit_rate"] > 0.25
    # AIPerf has it from usage.prompt_tokens_details.cached_tokens.
    assert results["total_usage_prompt_cache_read_tokens"]["avg"] >= 4 * 2 * 496


def start_and_wait_for_aiperf(tmp_path):
    """A run of some minutes, and the parts once AIPerf is at work."""
    command = Command(["bench", *SMALL, "--request-count", "3000"], tmp_path)
    parts = wait_for(lambda: "aiperf" in (found := command.children()) and found, "AIPerf has started")
    status = tmp_path / "out" / "engine" / "worker-0.status.json"
    wait_for(lambda: read_status(status).num_output_tokens > 100, "tokens come out")
    return command, parts


@pytest.mark.parametrize("victim", ["worker-0", "frontend"])
def test_a_part_that_dies_ends_the_run_and_aiperf_with_it(tmp_path, victim):
    command, parts = start_and_wait_for_aiperf(tmp_path)
    os.kill(parts[victim], signal.SIGKILL)
    assert command.exit_status() == 1
    assert f"mock-engine: error: the run was cut short: {victim} was killed by SIGKILL." in command.output
    assert "Traceback" not in command.output.partition("mock-engine: error")[2]
    assert not any(map(is_alive, parts.values()))
    assert session_members(parts["aiperf"]) == []


def test_ctrl_c_ends_the_run_and_all_that_belongs_to_it(tmp_path):
    command, parts = start_and_wait_for_aiperf(tmp_path)
    command.interrupt()
    assert command.exit_status() == 130
    assert command.output.endswith("mock-engine: stopped\n")
    assert not any(map(is_alive, parts.values()))
    assert session_members(parts["aiperf"]) == []
