"""`profiles fit` and `profiles record` on the command line: files that it reads, what it writes, and every mistake."""

from __future__ import annotations

import json
import shlex
import shutil
import socket
from pathlib import Path

import pytest

from mock_engine.cli import main, parse
from mock_engine.profile import check_profile, load_profile
from mock_engine.profile_fit import read_run
from mock_engine.profile_fit.flags import RecordSettings
from mock_engine.profile_fit.record import _load
from tests.helpers.observed_runs import benchmark
from tests.test_cli import complain

H100 = "h100-sxm/llama-3.1-8b/vllm-tp1-bf16"


def row(
    start_ns=1_700_000_000_000_000_000, ttft=50.0, latency=1050.0, isl=512, osl=101, metadata=None, error=None, **usage
):
    """A line of AIPerf's profile_export.jsonl, in milliseconds."""
    metrics = {
        "time_to_first_token": {"value": ttft, "unit": "ms"},
        "request_latency": {"value": latency, "unit": "ms"},
        "input_sequence_length": {"value": isl, "unit": "tokens"},
        "output_sequence_length": {"value": osl, "unit": "tokens"},
    } | {name: {"value": value, "unit": "tokens"} for name, value in usage.items()}
    about = {"request_start_ns": start_ns, "benchmark_phase": "profiling", "was_cancelled": False, **(metadata or {})}
    record = {"metadata": about, "metrics": {k: v for k, v in metrics.items() if v["value"] is not None}}
    return record if error is None else {**record, "error": error}


def write_rows(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "profile_export.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    return path


# AIPerf's files


def test_an_artifact_folder_becomes_a_run_of_the_requests_that_were_answered(tmp_path):
    start = 1_700_000_000_000_000_000
    rows = [
        row(start + 500_000_000),
        row(start, metadata={"benchmark_phase": "warmup"}),
        row(start, error={"code": 500, "message": "no"}),
        row(start, metadata={"was_cancelled": True}),
        row(start + 250_000_000, osl=1, latency=50.0),
    ]
    write_rows(tmp_path / "concurrency-2", rows)
    run = read_run(tmp_path / "concurrency-2")
    assert run.name == "concurrency-2"
    assert run.num_left_out == 3
    assert run.concurrency == 1  # the short one is over when the other begins
    short, long = run.requests
    assert (short.osl_tokens, short.itl_s) == (1, None)
    assert long.start_s - short.start_s == pytest.approx(0.25)
    assert (long.isl_tokens, long.osl_tokens, long.ttft_s) == (512, 101, 0.05)
    assert long.itl_s == pytest.approx(0.01)
    assert read_run(tmp_path / "concurrency-2" / "profile_export.jsonl") == run


def test_what_the_server_counts_goes_before_what_the_client_does(tmp_path):
    usage = {"usage_prompt_tokens": 530, "usage_completion_tokens": 201, "usage_prompt_cache_read_tokens": 16}
    (request,) = read_run(write_rows(tmp_path / "run", [row(**usage)])).requests
    assert (request.isl_tokens, request.osl_tokens, request.cached_tokens, request.new_tokens) == (530, 201, 16, 514)
    assert request.itl_s == pytest.approx(0.005)


def test_the_folder_of_a_bench_is_read_too(tmp_path):
    write_rows(tmp_path / "bench" / "aiperf", [row()])
    assert read_run(tmp_path / "bench").name == "bench"


# vLLM's files


def vllm(**changes):
    document = {
        "num_prompts": 3,
        "completed": 2,
        "request_rate": "inf",
        "max_concurrency": 2,
        "total_input_tokens": 300,
        "total_output_tokens": 8,
        "mean_ttft_ms": 40.0,
        "mean_tpot_ms": 10.0,
        "input_lens": [100, 50, 200],
        "output_lens": [3, 0, 5],
        "ttfts": [0.03, 0.0, 0.05],
        "itls": [[0.01, 0.02], [], [0.01, 0.01, 0.01, 0.01]],
        "errors": ["", "timed out", ""],
    }
    return {key: value for key, value in (document | changes).items() if value is not None}


def write_json_file(path, document):
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def test_an_answer_that_came_in_one_chunk_has_no_gap(tmp_path):
    """Its tokens have no time between them that could be compared."""
    run = read_run(write_rows(tmp_path / "one", [row(), row(ttft=50.0, latency=50.0)]))
    assert [each.itl_s for each in run.requests] == [pytest.approx(0.01), None]
    details = vllm(itls=[[], [], [0.01] * 4])
    assert [each.itl_s for each in read_run(write_json_file(tmp_path / "c.json", details)).requests] == [
        None,
        pytest.approx(0.01),
    ]


def test_vllm_s_details_become_requests_and_failed_ones_are_left_out(tmp_path):
    run = read_run(write_json_file(tmp_path / "c2.json", vllm()))
    assert (run.name, run.concurrency, run.num_left_out, run.has_only_means) == ("c2", 2, 1, False)
    assert [(each.isl_tokens, each.osl_tokens, each.start_s) for each in run.requests] == [
        (100, 3, None),
        (200, 5, None),
    ]
    assert [each.itl_s for each in run.requests] == [pytest.approx(0.015), pytest.approx(0.01)]
    timed = read_run(write_json_file(tmp_path / "timed.json", vllm(start_times=[7.5, 7.0, 7.0], request_rate=4.0)))
    assert [(each.isl_tokens, each.start_s) for each in timed.requests] == [(200, 7.0), (100, 7.5)]
    assert timed.concurrency == 1


def test_vllm_s_means_become_equal_requests(tmp_path):
    details = dict.fromkeys(("input_lens", "output_lens", "ttfts", "itls", "errors"))
    run = read_run(write_json_file(tmp_path / "means.json", vllm(**details)))
    assert run.has_only_means
    assert (len(run.requests), run.concurrency) == (2, 2)
    assert run.requests[0].isl_tokens == 150
    assert run.requests[0].osl_tokens == 4
    assert (run.requests[0].ttft_s, run.requests[0].itl_s) == (0.04, 0.01)


def vllm_file(folder, **changes):
    return write_json_file(folder / "x.json", vllm(**changes))


NOT_A_RUN = "Name an artifact folder of AIPerf, its profile_export.jsonl, or the JSON file of"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: d / "none", f"none does not exist. {NOT_A_RUN}"),
        (lambda d: d, f"is a folder without profile_export.jsonl. {NOT_A_RUN}"),
        (lambda d: write_rows(d, []), "has no request that was answered. Name a run that has some."),
        (lambda d: write_rows(d, [row(ttft=None)]), "line 1: metrics.time_to_first_token.value is missing"),
        (lambda d: write_rows(d, [row(ttft=0)]), "time_to_first_token.value is 0; it must be milliseconds above 0"),
        (lambda d: write_rows(d, [row(osl=0)]), "output_sequence_length.value is 0; it must be a whole number from 1"),
        (lambda d: write_rows(d, [row(start_ns="now")]), "metadata.request_start_ns is 'now'; it must be a whole"),
        (lambda d: write_rows(d, ["a row"]), "line 1: this line is 'a row'; it must be a JSON object"),
        (lambda d: write_json_file(d / "x.json", {"a": 1}), f"holds neither ttfts nor mean_ttft_ms. {NOT_A_RUN}"),
        (lambda d: vllm_file(d, itls=[[]]), "itls has 1 entries; there must be one for each of 3"),
        (lambda d: vllm_file(d, output_lens=None), "output_lens is missing; there must be one"),
        (lambda d: vllm_file(d, input_lens=["a", 1, 2]), "request 0: found input 'a'"),
        (lambda d: vllm_file(d, itls=[["a"], [], []]), "request 0: ttfts, itls and start_times"),
        (lambda d: vllm_file(d, request_rate=2.0), "has no start_times, and its requests"),
        (lambda d: vllm_file(d, ttfts=None, completed=0), "completed is 0; it must be"),
        (lambda d: vllm_file(d, ttfts=None, mean_ttft_ms="x"), "mean_ttft_ms is 'x'"),
        (
            lambda d: vllm_file(d, ttfts=None, request_rate=2.0, max_concurrency=None),
            "has only means, of requests sent at a rate",
        ),
    ],
)  # fmt: skip
def test_a_file_that_is_no_run_is_one_line(tmp_path, capsys, make, message):
    assert message in complain(capsys, "profiles", "fit", str(make(tmp_path)), "--out", str(tmp_path / "new"))


def test_text_that_is_no_json_is_one_line(tmp_path, capsys):
    path = tmp_path / "x.json"
    path.write_text("{", encoding="utf-8")
    assert "cannot be read as JSON" in complain(capsys, "profiles", "fit", str(path), "--out", str(tmp_path / "new"))


# fit


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    benchmark(folder, H100, {1: 20, 4: 20})
    return sorted(str(path) for path in folder.iterdir())


def test_a_fit_writes_a_profile_and_says_all_there_is_to_know(runs, tmp_path, capsys):
    out, json_path = tmp_path / "new", tmp_path / "fit.json"
    start = "h100-sxm/llama-3.1-8b/sglang-tp1-bf16"
    argv = ["profiles", "fit", *runs, "--out", str(out), "--from", start, "--name", "//vllm-tp1-bf16", "--json"]
    assert main([*argv, str(json_path), "--async-scheduling", "--max-num-seqs", "512"]) == 0
    printed = capsys.readouterr().out
    assert "concurrency-1: 20 requests, concurrency 1" in printed
    assert f"mock-engine simulate --profile {out}" in printed
    assert not check_profile(out)
    profile = load_profile(out)
    assert (profile.name, profile.max_num_seqs, profile.async_scheduling) == (H100, 512, True)
    assert profile.build_command == (
        f"mock-engine profiles fit concurrency-1 concurrency-4 --from {start} --name //vllm-tp1-bf16 "
        "--max-num-seqs 512 --async-scheduling --out DIR"
    )
    assert str(tmp_path) not in (out / "profile.toml").read_text(encoding="utf-8")
    document = json.loads(json_path.read_text(encoding="utf-8"))
    assert document["start"] == start
    assert [run["concurrency"] for run in document["runs"]] == [1, 4]
    assert all(abs(run["itl_error_after"]) < 0.02 for run in document["runs"])
    assert document["visited"]["max_decode_batch_size"] == 4
    by_name = {parameter["name"]: parameter for parameter in document["parameters"]}
    assert by_name["overhead_step_s"]["start"] == load_profile(start).overhead_step_s
    for note in document["notes"]:
        assert note in printed
    assert "not an empty folder" in complain(capsys, *argv[:-1])


def test_the_commands_of_the_page_work_as_they_stand_there(tmp_path, monkeypatch, capsys):
    """All of `fit`, and the simulation of its result; `record` needs a server, and is run in the e2e test."""
    page = Path(__file__).parents[1].joinpath("docs", "calibrate.md").read_text(encoding="utf-8")
    lines = [line.strip() for line in page.splitlines()]
    commands = [line.removeprefix("mock-engine ") for line in lines if line.startswith("mock-engine ")]
    fits = [shlex.split(command) for command in commands if command.startswith("profiles fit ")]
    (simulate,) = [shlex.split(command) for command in commands if command.startswith("simulate --profile")]
    assert len(fits) == 3
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    benchmark(tmp_path / "runs", H100, {1: 20, 4: 20})
    for words in fits:
        shutil.rmtree("my-profile", ignore_errors=True)
        at = words.index("runs/*")
        words[at : at + 1] = sorted(map(str, Path("runs").iterdir()))
        assert main(words) == 0
        assert not check_profile("my-profile")
    assert load_profile("my-profile").gpu == "my-gpu"
    assert json.loads(Path("fit.json").read_text(encoding="utf-8"))["profile"] == "my-gpu/llama-3.1-8b/vllm-tp1-bf16"
    printed = capsys.readouterr().out
    assert printed.count("Nearest profiles:\n  h100-sxm/llama-3.1-8b/vllm-tp1-bf16: off by") == 2
    assert main([*simulate, "--request-count", "20"]) == 0
    assert "TTFT" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--from", H100, "--gpu", "h100-sxm"],
            "--from names the start profile, and --gpu looks for one; leave out either",
        ),
        (["--from", "nope"], "no profile 'nope', neither shipped nor a folder"),
        (["--gpu", "abacus"], "no shipped profile is of that --gpu, --model, --engine and --tp together"),
        (["--json", "none/fit.json"], "--json none/fit.json: there is no folder none. Make it, or name another file."),
        (["--max-num-seqs", "0"], "--max-num-seqs is 0; it must be at least 1"),
    ],
)
def test_a_wrong_flag_of_fit_is_one_line(runs, tmp_path, capsys, flags, message):
    try:
        status = main(["profiles", "fit", runs[0], "--out", str(tmp_path / "new"), *flags])
    except SystemExit as exit_:
        status = exit_.code
    error = capsys.readouterr().err
    assert status == 2
    assert error.count("\n") == 1
    assert message in error


# record


RECORD = ["profiles", "record", "--url", "http://127.0.0.1:9", "--model", "m", "--out", "runs"]


def test_record_runs_aiperf_once_for_each_concurrency_with_its_own_flags(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = RecordSettings.from_flags(
        parse([*RECORD, "--concurrency", "16,1", "--", "--request-timeout-seconds", "9"])
    )
    assert settings.concurrencies == (1, 16)
    commands = [
        _load(settings, each).aiperf_command(settings.model, settings.url, tmp_path, settings.tokenizer, "chat")
        for each in settings.concurrencies
    ]
    for command, concurrency, count in zip(commands, ("1", "16"), ("64", "128"), strict=True):
        assert command[command.index("--concurrency") + 1] == concurrency
        assert command[command.index("--request-count") + 1] == count
        assert command[command.index("--tokenizer") + 1] == "m"
        assert command[command.index("--isl-stddev") + 1] == "300"
        assert command[-2:] == ["--request-timeout-seconds", "9"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--url", "my-server:8000"], "--url is 'my-server:8000'; it must begin with http:// or https://"),
        (["--concurrency", "1,many"], "--concurrency is '1,many'; it must be counts of at least 1, such as 1,4,16,64"),
        (["--concurrency", "0"], "--concurrency is '0'; it must be counts"),
        (["--isl", "0"], "--isl is 0; it must be at least 1"),
        (["--request-count", "-1"], "--request-count is -1; it must be at least 1"),
    ],
)
def test_a_wrong_flag_of_record_is_one_line(tmp_path, monkeypatch, capsys, flags, message):
    pytest.importorskip("aiperf", reason="needs the bench extra")
    monkeypatch.chdir(tmp_path)
    assert message in complain(capsys, *RECORD, *flags)
    assert not (tmp_path / "runs").exists()


def test_a_server_that_is_not_there_is_one_line(tmp_path, monkeypatch, capsys):
    pytest.importorskip("aiperf", reason="needs the bench extra")
    monkeypatch.chdir(tmp_path)
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        line = complain(capsys, *RECORD, "--url", url)
    assert f"--url {url}: nothing answers there" in line
    assert "Start the server, or name another." in line
    assert "--url http://127.0.0.1:8OOO: nothing answers there" in complain(
        capsys, *RECORD, "--url", "http://127.0.0.1:8OOO"
    )


def test_aiperf_that_is_not_installed_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    assert "profiles record needs AIPerf, which is not installed" in complain(capsys, *RECORD)
