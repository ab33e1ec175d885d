"""The command line: every mistake is one line on stderr and exit status 2, and flags survive the way to a worker."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mock_engine import serve
from mock_engine.cli import main, parse
from mock_engine.engine_settings import EngineSettings
from mock_engine.errors import ConfigError
from mock_engine.flags import add_engine_flags
from mock_engine.load import Load
from mock_engine.profile import PROFILES_DIR, list_profiles

SHIPPED = "h100-sxm/llama-3.1-8b/vllm-tp1-bf16"


def complain(capsys, *argv):
    """Run a command that must fail with exit status 2 and one line; the line."""
    try:
        status = main(list(argv))
    except SystemExit as exit_:
        status = exit_.code
    captured = capsys.readouterr()
    assert status == 2, captured
    assert captured.out == ""
    assert captured.err.startswith("mock-engine")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize("command", ["serve", "bench"])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--profile", "h100/nope"], "no profile 'h100/nope', neither shipped nor a folder"),
        (["--workers", "0"], "--workers is 0; it must be at least 1"),
        (["--port", "70000"], "--port is 70000; it must be 1 to 65535, or 0"),
        (["--migration-limit", "-1"], "--migration-limit is -1; it must be 0 or more"),
        (["--host", "192.0.2.1"], "cannot listen on 192.0.2.1:"),
        (["--speedup-ratio", "-1"], "--speedup-ratio is -1; it must be 0 (as fast as possible) or a positive"),
        (["--jitter", "2"], "--jitter is 2; it is a coefficient of variation from 0 (none) to 1"),
        (["--gpu-memory-utilization", "0.1"], "Use --gpu-memory-utilization 0.21 or more"),
        (["--max-num-seqs", "none"], "argument --max-num-seqs: invalid int value: 'none'"),
        (["--num-gpu-blocks-override", "10", "--max-model-len", "1000"], "Use --max-model-len 160 or less"),
        (["--max-num-batched-tokens", "8", "--max-num-seqs", "9"], "Raise the first or lower the second"),
        (["--model-path", "nowhere"], "nowhere/tokenizer.json does not exist. --model-path must be"),
        (["--frob"], "unrecognized arguments: --frob"),
    ],
)
def test_a_wrong_flag_is_one_line(capsys, command, flags, message):
    assert message in complain(capsys, command, *flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--isl", "0"], "--isl is 0; it must be at least 1"),
        (["--request-rate", "-2"], "--request-rate is -2; it must be above 0"),
        (["--osl-stddev", "-1"], "--osl-stddev is -1; it must be 0 or more"),
        (["--fixed-schedule"], "--fixed-schedule is about a trace; name one with --input-file"),
        (["--input-file", "no.jsonl"], "--input-file no.jsonl does not exist"),
        (["--input-file", __file__], "--input-file needs --custom-dataset-type, such as mooncake_trace"),
        (
            ["--input-file", __file__, "--custom-dataset-type", "mooncake_trace", "--isl", "9"],
            "--isl is for made-up prompts",
        ),
        (
            ["--input-file", __file__, "--custom-dataset-type", "x", "--fixed-schedule", "--concurrency", "4"],
            "--fixed-schedule sends at the trace's own times",
        ),
        (
            ["--max-model-len", "100", "--isl", "90", "--osl", "11"],
            "are 101 tokens; the context length is 100. Lower them, or raise --max-model-len.",
        ),
        (["--output-dir", "/dev/null/x"], "Name a folder that can be written"),
        (["--output-dir", "/dev"], "--output-dir /dev is not empty; name a new folder"),
    ],
)
def test_a_wrong_load_is_one_line(capsys, flags, message):
    assert message in complain(capsys, "bench", *flags)


@pytest.mark.parametrize("module", ["aiperf", "matplotlib"])
def test_a_missing_extra_says_what_to_install(capsys, monkeypatch, module):
    found = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == module else found(name))
    assert "Run: pip install 'mock-engine[bench]'" in complain(capsys, "bench")


def test_a_corrupt_profile_is_one_line_with_file_and_place(capsys, tmp_path):
    folder = shutil.copytree(PROFILES_DIR / SHIPPED, tmp_path / "spoilt")
    (folder / "linear.csv").write_text("tokens,ms\n1,2\n2,-3\n", encoding="utf-8")
    for argv in (["serve", "--profile", str(folder)], ["profiles", "show", str(folder)]):
        assert f"{folder / 'linear.csv'}, line 3, column ms: found '-3'" in complain(capsys, *argv)


def test_profiles_check_names_every_problem(capsys, tmp_path):
    folder = shutil.copytree(PROFILES_DIR / SHIPPED, tmp_path / "spoilt")
    (folder / "linear.csv").unlink()
    (folder / "head.csv").write_text("nonsense", encoding="utf-8")
    assert main(["profiles", "check", SHIPPED, str(folder)]) == 2
    captured = capsys.readouterr()
    assert f"{SHIPPED}: fine" in captured.out
    assert "2 wrong" in captured.out
    assert "linear.csv: the file is missing" in captured.err
    assert "head.csv, line 1: found the header" in captured.err


def test_profiles_list_and_show_say_the_same_to_people_and_machines(capsys, tmp_path):
    out = tmp_path / "out.json"
    assert main(["profiles", "list", "--json", str(out)]) == 0
    listed = json.loads(out.read_text(encoding="utf-8"))
    assert [profile["name"] for profile in listed] == list_profiles()
    shown_in_list = capsys.readouterr().out
    assert main(["profiles", "show", SHIPPED, "--json", str(out)]) == 0
    assert json.loads(out.read_text(encoding="utf-8")) in listed
    shown = capsys.readouterr().out
    assert SHIPPED in shown_in_list
    assert "28,198" in shown
    assert "Apache-2.0" in shown


def test_profiles_list_says_where_figures_come_from_how_they_were_measured_and_how_far_to_trust_them(capsys):
    assert main(["profiles", "list"]) == 0
    out = capsys.readouterr().out
    for text in (
        "NVIDIA aiconfigurator-core, measured kernel tables (0.12.0, Apache-2.0): kernels, each timed alone, summed",
        "Mutinifni/splitwise-sim, data/perf_model.csv (8f99e7d, MIT): whole passes of a running engine",
        "error: a point left out and predicted from the others misses by this share of its pass",
    ):
        assert text in out
    assert re.search(rf"^{SHIPPED} +0\.24\.0 +451,168 +1\.7%$", out, re.MULTILINE)


def test_profiles_list_does_not_lay_out_step_times(monkeypatch, capsys):
    """It has many to list, and must be there at once."""
    monkeypatch.setattr("mock_engine.profiles_command.TimingModel", None)
    assert main(["profiles", "list"]) == 0
    assert SHIPPED in capsys.readouterr().out


def test_a_json_file_that_cannot_be_written_is_one_line(capsys, tmp_path):
    path = tmp_path / "nowhere" / "x.json"
    assert f"{path}: No such file or directory. Name another" in complain(
        capsys, "profiles", "list", "--json", str(path)
    )


def test_without_a_command_it_says_so(capsys):
    assert "required: COMMAND" in complain(capsys)


def test_importing_the_command_line_does_not_import_dynamo_or_aiperf():
    """Help, profiles and errors come at once."""
    code = "import sys, mock_engine.cli; print([m for m in ('dynamo', 'aiperf', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_file_of_serve_is_there_all_at_once(tmp_path, monkeypatch):
    """A script that waits for it reads it the moment it exists."""
    path = tmp_path / "ready.json"

    def write_slowly(there, _content):
        assert not path.exists()
        there.write_text("half", encoding="utf-8")
        assert not path.exists()
        there.write_text("whole", encoding="utf-8")

    monkeypatch.setattr(serve, "write_json", write_slowly)
    serve._write_whole(path, {})
    assert [(each.name, each.read_text(encoding="utf-8")) for each in tmp_path.iterdir()] == [("ready.json", "whole")]


def test_a_worker_does_not_load_what_the_other_commands_need():
    """It is waited for. The flag is wrong, so that nothing starts."""
    code = "import sys, atexit; atexit.register(lambda: print({'mock_engine.cli', 'rich'} & {*sys.modules}))"
    code += "; sys.argv[1:] = ['worker', '--seed', '-1']; from mock_engine.__main__ import run; run()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "set()\n")
    assert done.stderr == "mock-engine worker: error: --seed is -1; it must be 0 or more\n"


optional_counts = st.none() | st.integers(1, 10**6)
settings_strategy = st.builds(
    EngineSettings,
    profile=st.sampled_from(list_profiles()),
    max_num_seqs=optional_counts,
    max_num_batched_tokens=optional_counts,
    block_size=optional_counts,
    num_gpu_blocks_override=optional_counts,
    max_model_len=optional_counts,
    gpu_memory_utilization=st.floats(0.01, 1.0),
    enable_prefix_caching=st.booleans(),
    enable_chunked_prefill=st.booleans(),
    speedup_ratio=st.floats(0, 1e6),
    seed=st.integers(0, 2**40),
    jitter=st.none() | st.floats(0, 1),
    default_osl=st.integers(1, 10**6),
)


@given(settings_strategy)
def test_settings_survive_the_way_to_a_worker(settings):
    parser = argparse.ArgumentParser()
    add_engine_flags(parser)
    assert EngineSettings.from_flags(parser.parse_args(settings.to_argv())) == settings


def test_what_follows_two_dashes_goes_to_aiperf_as_it_is(tmp_path):
    flags = parse(["bench", "--isl", "100", "--", "--workers-max", "9", "--isl-block-size", "64"])
    command = Load.from_flags(flags).aiperf_command("m", "http://u", tmp_path)
    assert command[-4:] == ["--workers-max", "9", "--isl-block-size", "64"]
    assert command.count("--workers-max") == 1
    assert command[command.index("--isl") + 1] == "100"
    assert command[command.index("--concurrency") + 1] == "8"


def test_a_rate_or_a_schedule_leaves_concurrency_open(tmp_path):
    for load in (
        Load(request_rate=2.0),
        Load(input_file=PROFILES_DIR / "README.md", custom_dataset_type="mooncake_trace", fixed_schedule=True),
    ):
        assert "--concurrency" not in load.aiperf_command("m", "http://u", tmp_path)


@given(st.integers(-5, 5), st.floats(allow_nan=True))
def test_a_load_is_right_or_refused(count, rate):
    """No value gets through to AIPerf that it would choke on."""
    try:
        load = Load(request_count=count, request_rate=rate)
    except ConfigError:
        assert count < 1 or not 0 < rate < float("inf")
    else:
        assert load.request_count >= 1
        assert 0 < load.request_rate < float("inf")
