"""Workloads: lengths and arrivals follow the flags, turns build on one another, and wrong flags are refused."""

from __future__ import annotations

import argparse
import json
import tracemalloc
from dataclasses import fields
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mock_engine.cli import main
from mock_engine.errors import ConfigError
from mock_engine.flags import OneLineParser
from mock_engine.load import Load
from mock_engine.request import Request
from mock_engine.simulate_flags import add_workload_flags
from mock_engine.trace_files import DATASET_TYPES
from mock_engine.workload import Session, Turn, Workload

BLOCK_SIZE = 16
MOONCAKE = Path(__file__).parents[2] / "shared" / "data" / "mooncake_conversation_trace.jsonl.gz"
needs_mooncake = pytest.mark.skipif(
    not MOONCAKE.is_file(), reason="needs the published Mooncake trace (see profiles/README.md)"
)
quick = settings(max_examples=50, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])

seeds = st.integers(0, 2**32)
lengths = st.integers(1, 3000)


def sessions_of(workload: Workload, block_size: int = BLOCK_SIZE) -> list[Session]:
    return list(workload.sessions(block_size))


def turns_of(workload: Workload) -> list[Turn]:
    return [turn for session in workload.sessions(BLOCK_SIZE) for turn in session.turns]


@st.composite
def made_up(draw: st.DrawFn, **fixed: object) -> Workload:
    """Any workload that needs no file."""
    flags: dict[str, object] = {"isl": draw(lengths), "osl": draw(lengths), "random_seed": draw(seeds)}
    spread = draw(st.sampled_from(["none", "stddev", "ratio"]))
    if spread == "stddev":
        flags |= {"isl_stddev": draw(st.floats(0, 5000)), "osl_stddev": draw(st.floats(0, 5000))}
    elif spread == "ratio":
        flags["random_range_ratio"] = draw(st.floats(0, 1, exclude_max=True))
    if draw(st.booleans()):
        flags |= {"conversation_turn_mean": draw(st.integers(2, 5)), "conversation_turn_stddev": draw(st.floats(0, 3))}
        flags |= {"conversation_turn_delay_mean": draw(st.floats(0, 1e4))}
        flags |= {"conversation_turn_delay_stddev": draw(st.floats(0, 1e4))}
    prefix = draw(st.sampled_from(["none", "system", "pool"]))
    if prefix == "system":
        flags["shared_system_prompt_length"] = draw(lengths)
    elif prefix == "pool":
        flags |= {"num_prefix_prompts": draw(st.integers(1, 20)), "prefix_prompt_length": draw(lengths)}
    if draw(st.booleans()):
        flags["request_rate"] = draw(st.floats(1e-3, 1e5))
        flags["arrival_pattern"] = draw(st.sampled_from([None, "constant", "poisson", "gamma"]))
        if flags["arrival_pattern"] == "gamma":
            flags["arrival_smoothness"] = draw(st.floats(1e-2, 100))
    flags["request_count"] = draw(st.integers(1, 60))
    return Workload(**(flags | fixed))  # type: ignore[arg-type]


# Whatever the flags are


@given(workload=made_up())
@settings(max_examples=150)
def test_the_same_flags_give_the_same_requests_in_order_and_as_many_as_were_asked_for(workload):
    sessions = sessions_of(workload)
    assert sessions == sessions_of(workload)
    assert sum(len(session.turns) for session in sessions) == workload.request_count
    arrivals = [session.arrival_s for session in sessions]
    if workload.request_rate is None:
        assert set(arrivals) == {None}
    else:
        assert arrivals[0] == 0
        assert arrivals == sorted(arrivals)
    for turn in (turn for session in sessions for turn in session.turns):
        Request("r", turn.isl_tokens, turn.osl_tokens, turn.block_hashes)
        assert all(type(number) is int for number in (turn.isl_tokens, turn.osl_tokens, *turn.block_hashes))


@given(workload=made_up(), block_size=st.sampled_from([1, 16, 64, 1000]))
@settings(max_examples=150)
def test_each_turn_repeats_all_that_went_before_and_shares_nothing_else_but_a_prefix(workload, block_size):
    sessions = sessions_of(workload, block_size)
    prefix_tokens = workload.shared_system_prompt_length or workload.prefix_prompt_length or 0
    prefix_blocks = prefix_tokens // block_size
    is_plain = prefix_tokens == 0 and workload.conversation_turn_mean is None
    prefixes = set()
    own: list[int] = []
    for session in sessions:
        assert session.turns[0].think_s == 0
        assert session.turns[0].isl_tokens > prefix_tokens
        for before, after in pairwise(session.turns):
            assert after.isl_tokens > before.isl_tokens + before.osl_tokens
            assert after.think_s >= 0
            assert list(after.block_hashes[: len(before.block_hashes)]) == list(before.block_hashes)
        for turn in session.turns:
            num_full = (turn.isl_tokens + turn.osl_tokens) // block_size
            assert len(turn.block_hashes) == (0 if is_plain else num_full)
        hashes = session.turns[-1].block_hashes
        prefixes.add(tuple(hashes[:prefix_blocks]))
        own += hashes[prefix_blocks:]
    assert len(prefixes) <= (workload.num_prefix_prompts or 1)
    shared = [block_hash for prefix in prefixes for block_hash in prefix]
    assert len({*own, *shared}) == len(own) + len(shared)
    assert all(-(2**63) <= block_hash < 2**63 for block_hash in (*own, *shared))


@given(workload=made_up(), other=st.integers(1, 60))
@quick
def test_how_many_are_asked_for_does_not_change_them(workload, other):
    shorter, longer = sorted((workload.request_count, other))
    flags = {field.name: getattr(workload, field.name) for field in fields(workload)}
    few = [(s.arrival_s, t) for s in sessions_of(Workload(**flags | {"request_count": shorter})) for t in s.turns]
    many = [(s.arrival_s, t) for s in sessions_of(Workload(**flags | {"request_count": longer})) for t in s.turns]
    few = [(arrival_s, turn._replace(block_hashes=list(turn.block_hashes))) for arrival_s, turn in few]
    many = [(arrival_s, turn._replace(block_hashes=list(turn.block_hashes))) for arrival_s, turn in many]
    assert few == many[: len(few)]


def test_another_seed_gives_other_requests_and_no_seed_is_seed_0():
    def drawn(seed):
        return sessions_of(Workload(isl_stddev=100.0, request_rate=5.0, random_seed=seed))

    assert drawn(None) == drawn(0) != drawn(1)


def test_the_rate_does_not_change_the_lengths():
    closed, slow = (turns_of(Workload(isl_stddev=100.0, request_rate=rate, request_count=3000)) for rate in (None, 1.0))
    assert closed == slow


# Arrivals


@pytest.mark.parametrize(
    ("flags", "cv"),
    [
        ({}, 1),
        ({"arrival_pattern": "poisson"}, 1),
        ({"arrival_pattern": "gamma"}, 1),
        ({"arrival_smoothness": 4.0}, 1 / 2),
        ({"arrival_pattern": "gamma", "arrival_smoothness": 0.25}, 2),
        ({"arrival_pattern": "constant"}, 0),
    ],
)
def test_gaps_between_arrivals_have_the_mean_of_the_rate_and_the_spread_of_the_pattern(flags, cv):
    num = 30_000
    workload = Workload(request_rate=20.0, request_count=num, **flags)
    gaps_s = np.diff([session.arrival_s for session in workload.sessions(BLOCK_SIZE)])
    assert gaps_s.mean() == pytest.approx(1 / 20, rel=5 * cv / num**0.5 + 1e-9)
    assert gaps_s.std() / gaps_s.mean() == pytest.approx(cv, rel=0.05, abs=1e-6)


@given(rate=st.floats(1e-3, 1e6))
@quick
def test_constant_arrivals_do_not_drift(rate):
    sessions = islice(Workload(request_rate=rate, arrival_pattern="constant", request_count=3000).sessions(1), 3000)
    assert [session.arrival_s for session in sessions] == [number / rate for number in range(3000)]


def test_at_a_request_rate_each_turn_of_a_conversation_counts():
    workload = Workload(request_rate=10.0, conversation_turn_mean=4, conversation_turn_stddev=1.0, request_count=20_000)
    sessions = sessions_of(workload)
    num_requests = sum(len(session.turns) for session in sessions)
    assert num_requests / sessions[-1].arrival_s == pytest.approx(10, rel=0.05)


def test_a_benchmark_ends_after_its_duration():
    arrivals = [s.arrival_s for s in sessions_of(Workload(request_rate=10.0, benchmark_duration=500.0))]
    assert arrivals[-1] < 500
    assert len(arrivals) == pytest.approx(5000, rel=0.1)


def test_made_up_requests_are_1000_unless_something_else_ends_them():
    assert len(sessions_of(Workload())) == 1000
    assert len(sessions_of(Workload(conversation_num=2500))) == 2500
    assert len(list(islice(Workload(benchmark_duration=1.0).sessions(BLOCK_SIZE), 2500))) == 2500
    assert len(sessions_of(Workload(conversation_num=5, conversation_turn_mean=3))) == 5
    cut = sessions_of(Workload(conversation_num=5, conversation_turn_mean=3, request_count=7))
    assert [len(session.turns) for session in cut] == [3, 3, 1]


@pytest.mark.parametrize(
    ("flags", "limit"),
    [
        ({}, 8),
        ({"concurrency": 3}, 3),
        ({"arrival_pattern": "concurrency-burst"}, 8),
        ({"request_rate": 2.0}, None),
        ({"request_rate": 2.0, "concurrency": 3}, 3),
        ({"input_file": Path(__file__), "custom_dataset_type": "csv"}, 8),
        ({"input_file": Path(__file__), "custom_dataset_type": "csv", "fixed_schedule": True}, None),
    ],
)
def test_how_many_requests_may_be_under_way(flags, limit):
    assert Workload(**flags).max_concurrency == limit


# Lengths


@given(isl=lengths, osl=lengths, ratio=st.floats(0, 1, exclude_max=True), seed=seeds)
@quick
def test_lengths_lie_within_the_range_around_their_mean(isl, osl, ratio, seed):
    workload = Workload(isl=isl, osl=osl, random_range_ratio=ratio, random_seed=seed, request_count=300)
    for turn in turns_of(workload):
        for length, mean in ((turn.isl_tokens, isl), (turn.osl_tokens, osl)):
            assert max(1, mean * (1 - ratio) - 1) <= length <= mean * (1 + ratio) + 1


def test_a_range_of_lengths_is_even_and_reached_to_both_ends():
    turns = turns_of(Workload(isl=1000, osl=100, random_range_ratio=0.1, request_count=20_000))
    isls, osls = (np.array(column) for column in list(zip(*turns, strict=True))[:2])
    assert (isls.min(), isls.max()) == (900, 1100)
    assert isls.mean() == pytest.approx(1000, abs=2)
    assert isls.std() == pytest.approx(201 / 12**0.5, rel=0.02)
    assert (osls.min(), osls.max()) == (90, 110)


def test_lengths_have_the_mean_and_spread_of_the_flags():
    """Half a token above the mean, for they are rounded up, as AIPerf does it."""
    workload = Workload(isl=2000, isl_stddev=300.0, osl=200, osl_stddev=20.0, request_count=20_000)
    isls, osls = (np.array(column) for column in list(zip(*turns_of(workload), strict=True))[:2])
    assert isls.mean() == pytest.approx(2000.5, abs=5 * 300 / 20_000**0.5)
    assert isls.std() == pytest.approx(300, rel=0.03)
    assert osls.mean() == pytest.approx(200.5, abs=5 * 20 / 20_000**0.5)
    assert osls.std() == pytest.approx(20, rel=0.03)
    assert abs(np.corrcoef(isls, osls)[0, 1]) < 0.05


def test_a_spread_wider_than_the_mean_is_cut_off_at_0_and_not_heaped_there():
    isls = np.array([turn.isl_tokens for turn in turns_of(Workload(isl=10, isl_stddev=1000.0, request_count=20_000))])
    assert isls.min() >= 1
    assert (isls == 1).mean() < 0.01
    assert isls.mean() == pytest.approx(1000 * (2 / np.pi) ** 0.5, rel=0.05)


def test_turns_and_waits_have_the_mean_and_spread_of_the_flags():
    workload = Workload(
        conversation_num=5000,
        conversation_turn_mean=9,
        conversation_turn_stddev=2.0,
        conversation_turn_delay_mean=1500.0,
        conversation_turn_delay_stddev=200.0,
    )
    sessions = sessions_of(workload)
    counts = np.array([len(session.turns) for session in sessions])
    assert counts.mean() == pytest.approx(9.5, abs=5 * 2 / 5000**0.5)
    assert counts.std() == pytest.approx(2, rel=0.05)
    waits_s = np.array([turn.think_s for session in sessions for turn in session.turns[1:]])
    assert waits_s.mean() == pytest.approx(1.5005, abs=0.01)
    assert waits_s.std() == pytest.approx(0.2, rel=0.03)


def test_prefixes_are_taken_from_the_pool_evenly_and_come_on_top_of_the_lengths():
    workload = Workload(isl=50, num_prefix_prompts=4, prefix_prompt_length=100, request_count=8000)
    turns = turns_of(workload)
    assert {turn.isl_tokens for turn in turns} == {150}
    prefixes = [
        tuple(turn.block_hashes[:6]) for turn in turns
    ]  # 100 tokens fill 6 blocks of 16; the next is half shared
    assert {prefixes.count(prefix) // 200 for prefix in set(prefixes)} <= {9, 10}
    assert len(set(prefixes)) == 4
    assert len({turn.block_hashes[6] for turn in turns}) == 8000


def test_many_requests_take_little_memory():
    workload = Workload(isl_stddev=50.0, request_rate=100.0, request_count=60_000)
    list(islice(workload.sessions(BLOCK_SIZE), 3))
    tracemalloc.start()
    try:
        assert sum(1 for _ in workload.sessions(BLOCK_SIZE)) == 60_000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 500_000


# Traces


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.csv"
    rows = [f"{number / 4},{10 * (number + 1)},{number + 1}" for number in range(20)]
    path.write_text("\n".join(["arrival_s,isl_tokens,osl_tokens", *rows]), encoding="utf-8")
    return path


def replay(trace: Path, **flags: object) -> list[tuple[float | None, int, int]]:
    workload = Workload(input_file=trace, custom_dataset_type="csv", **flags)  # type: ignore[arg-type]
    return [(s.arrival_s, turn.isl_tokens, turn.osl_tokens) for s in workload.sessions(BLOCK_SIZE) for turn in s.turns]


def test_a_fixed_schedule_keeps_the_traces_times(trace):
    assert replay(trace, fixed_schedule=True) == [(n / 4, 10 * (n + 1), n + 1) for n in range(20)]
    assert len(replay(trace, fixed_schedule=True, benchmark_duration=2.5)) == 10
    assert len(replay(trace, fixed_schedule=True, request_count=3)) == 3


def test_a_schedules_window_has_both_ends_in_it_and_starts_anew(trace):
    window = {"fixed_schedule_start_offset": 1000, "fixed_schedule_end_offset": 2000}
    assert [row[:2] for row in replay(trace, fixed_schedule=True, **window)] == [
        (0.0, 50),
        (0.25, 60),
        (0.5, 70),
        (0.75, 80),
        (1.0, 90),
    ]
    faster = replay(trace, fixed_schedule=True, **window, synthesis_speedup_ratio=2.0)
    assert [row[0] for row in faster] == [0.0, 0.125, 0.25, 0.375, 0.5]


def test_nothing_after_the_window_is_read(trace):
    with trace.open("a", encoding="utf-8") as file:
        file.write("\nspoilt")
    assert len(replay(trace, fixed_schedule=True, fixed_schedule_end_offset=4500)) == 19
    assert len(replay(trace, request_count=20)) == 20
    with pytest.raises(ConfigError, match=r"trace\.csv, line 22: 1 values under 3 columns: 'spoilt'"):
        replay(trace, fixed_schedule=True)


def test_without_a_schedule_rows_are_sent_in_their_order_at_a_rate_or_as_the_concurrency_allows(trace):
    assert replay(trace) == [(None, 10 * (n + 1), n + 1) for n in range(20)]
    at_rate = replay(trace, request_rate=2.0, arrival_pattern="constant", request_count=5)
    assert at_rate == [(n / 2, 10 * (n + 1), n + 1) for n in range(5)]


def test_long_inputs_are_left_out_of_a_trace_and_long_outputs_cut(trace):
    rows = replay(trace, synthesis_max_isl=60, synthesis_max_osl=5)
    assert rows == [(None, 10 * (n + 1), min(n + 1, 5)) for n in range(6)]


def test_a_trace_of_which_nothing_is_left_is_an_error(trace):
    for limits in (
        {"synthesis_max_isl": 9},
        {"fixed_schedule": True, "fixed_schedule_start_offset": 9000},
        {"fixed_schedule": True, "fixed_schedule_start_offset": 1, "benchmark_duration": 0.2},
    ):
        with pytest.raises(ConfigError, match=r"trace\.csv has requests, but all are beyond the limits"):
            replay(trace, **limits)


def test_a_schedule_needs_times(tmp_path):
    path = tmp_path / "inputs.json"
    payload = {"messages": [{"role": "user", "content": " love"}], "max_completion_tokens": 5}
    path.write_text(json.dumps({"data": [{"session_id": "a", "payloads": [payload]}]}), encoding="utf-8")
    workload = Workload(input_file=path, custom_dataset_type="inputs_json", fixed_schedule=True)
    with pytest.raises(ConfigError, match="session 1 has no time, which --fixed-schedule needs"):
        sessions_of(workload)


@needs_mooncake
def test_mooncakes_trace_as_bench_replays_it():
    """The README's command: the first five minutes, without the longest inputs."""
    workload = Workload(
        input_file=MOONCAKE,
        custom_dataset_type="mooncake_trace",
        fixed_schedule=True,
        fixed_schedule_end_offset=300_000,
        synthesis_max_isl=8192,
    )
    sessions = sessions_of(workload)
    assert len(sessions) == 456  # what AIPerf 0.13.0 sent
    assert max(session.turns[0].isl_tokens for session in sessions) <= 8192
    assert sessions[-1].arrival_s <= 300


# Flags


def parse(*argv: str) -> Workload:
    parser = OneLineParser()
    add_workload_flags(parser)
    return Workload.from_flags(parser.parse_args(argv))


def test_every_field_is_a_flag_and_none_has_a_default_of_its_own():
    parser = argparse.ArgumentParser()
    add_workload_flags(parser)
    assert set(vars(parser.parse_args([]))) == {field.name for field in fields(Workload)}
    assert parse() == Workload()


def test_flags_are_what_they_say():
    assert parse("--isl", "100", "--request-rate", "2.5", "--arrival-smoothness", "0.5", "--random-seed", "7") == (
        Workload(isl=100, request_rate=2.5, arrival_smoothness=0.5, random_seed=7)
    )
    trace = ("--input-file", __file__, "--custom-dataset-type", "csv", "--fixed-schedule")
    assert parse(*trace, "--fixed-schedule-end-offset", "9") == Workload(
        input_file=Path(__file__), custom_dataset_type="csv", fixed_schedule=True, fixed_schedule_end_offset=9
    )


def test_help_names_every_type_of_trace():
    parser = argparse.ArgumentParser()
    add_workload_flags(parser)
    text = " ".join(parser.format_help().split())
    assert all(dataset_type in text for dataset_type in DATASET_TYPES)


def test_help_of_bench_says_its_own_defaults(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    assert "requests in all (64)" in " ".join(capsys.readouterr().out.split())


CSV = {"input_file": Path(__file__), "custom_dataset_type": "csv"}
NAN = float("nan")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"isl": 0}, "--isl is 0; it must be at least 1"),
        ({"concurrency": -1}, "--concurrency is -1; it must be at least 1"),
        ({"request_rate": NAN}, "--request-rate is nan; it must be above 0, in requests a second"),
        ({"isl_stddev": NAN}, "--isl-stddev is nan; it must be 0 or more"),
        ({"conversation_num": 0}, "--conversation-num is 0; it must be at least 1"),
        ({"conversation_turn_mean": 0}, "--conversation-turn-mean is 0; it must be at least 1"),
        ({"conversation_turn_stddev": -0.5}, "--conversation-turn-stddev is -0.5; it must be 0 or more"),
        ({"conversation_turn_delay_mean": -1.0}, "--conversation-turn-delay-mean is -1; it must be 0 or more"),
        ({"shared_system_prompt_length": 0}, "--shared-system-prompt-length is 0; it must be at least 1"),
        ({"num_prefix_prompts": 0}, "--num-prefix-prompts is 0; it must be at least 1"),
        ({"random_seed": -1}, "--random-seed is -1; it must be 0 or more"),
        ({"benchmark_duration": 0.0}, "--benchmark-duration is 0; it must be above 0"),
        ({"benchmark_duration": float("inf")}, "--benchmark-duration is inf; it must be above 0"),
        ({"concurrency_ramp_duration": NAN}, "--concurrency-ramp-duration is nan; it must be above 0"),
        ({"arrival_smoothness": 0.0}, "--arrival-smoothness is 0; it must be above 0"),
        ({"random_range_ratio": 1.0}, "--random-range-ratio is 1; it must be from 0 to below 1"),
        ({"random_range_ratio": NAN}, "--random-range-ratio is nan; it must be from 0 to below 1"),
        ({"request_cancellation_rate": 101.0}, "--request-cancellation-rate is 101; it is a percentage, from 0 to 100"),
        ({"request_cancellation_delay": 1.0}, "--request-cancellation-delay needs --request-cancellation-rate"),
        ({"request_cancellation_rate": 5.0, "request_cancellation_delay": -1.0}, "it must be 0 or more"),
        ({"arrival_pattern": "gama", "request_rate": 1.0}, "--arrival-pattern is gama; it must be one of constant, po"),
        ({"arrival_pattern": "poisson"}, "--arrival-pattern is about arrivals at a rate; give --request-rate"),
        ({"arrival_smoothness": 2.0}, "--arrival-smoothness is about arrivals at a rate; give --request-rate"),
        ({"arrival_pattern": "concurrency_burst", "request_rate": 1.0}, "sends at no rate; leave out --request-rate"),
        (
            {"arrival_pattern": "constant", "arrival_smoothness": 2.0, "request_rate": 1.0},
            "--arrival-smoothness is for --arrival-pattern gamma, not constant; leave one of them out",
        ),
        (
            {"request_rate": 1.0, "concurrency_ramp_duration": 5.0},
            "--concurrency-ramp-duration needs --concurrency, up to which it goes",
        ),
        ({"isl_stddev": 5.0, "random_range_ratio": 0.5}, "--isl-stddev and --random-range-ratio are two ways"),
        ({"num_prefix_prompts": 5}, "--num-prefix-prompts and --prefix-prompt-length belong together"),
        ({"prefix_prompt_length": 5}, "--num-prefix-prompts and --prefix-prompt-length belong together"),
        (
            {"num_prefix_prompts": 5, "prefix_prompt_length": 5, "shared_system_prompt_length": 5},
            "--num-prefix-prompts and --shared-system-prompt-length are two kinds of shared prefix",
        ),
        ({"conversation_turn_delay_mean": 5.0}, "--conversation-turn-delay-mean is a wait between turns"),
        (
            {"conversation_turn_mean": 2, "conversation_turn_delay_stddev": 5.0},
            "--conversation-turn-delay-stddev needs --conversation-turn-delay-mean",
        ),
        ({"fixed_schedule": True}, "--fixed-schedule is about a trace; name one with --input-file"),
        ({"synthesis_max_isl": 5}, "--synthesis-max-isl is about a trace; name one with --input-file"),
        ({"fixed_schedule_start_offset": 0}, "--fixed-schedule-start-offset is about the trace's own times; add --fix"),
        (CSV | {"synthesis_speedup_ratio": 2.0}, "--synthesis-speedup-ratio is about the trace's own times; add --fix"),
        (
            CSV | {"fixed_schedule": True, "fixed_schedule_start_offset": 5000, "fixed_schedule_end_offset": 4000},
            "--fixed-schedule-start-offset is 5000, after --fixed-schedule-end-offset 4000; it must be before",
        ),
        (CSV | {"fixed_schedule": True, "request_rate": 1.0}, "--fixed-schedule sends at the trace's own times"),
        (
            CSV | {"fixed_schedule": True, "arrival_pattern": "concurrency_burst"},
            "--arrival-pattern is about arrivals at a rate",
        ),
        (CSV | {"fixed_schedule": True, "concurrency_ramp_duration": 1.0}, "--concurrency-ramp-duration needs --conc"),
        (CSV | {"osl": 5}, "--osl is for made-up prompts; test_workload.py brings its own lengths"),
        (CSV | {"conversation_num": 5}, "--conversation-num is for made-up prompts; test_workload.py brings its own"),
        (
            CSV | {"custom_dataset_type": "sharegpt"},
            "--custom-dataset-type is sharegpt; it must be one of mooncake_tra",
        ),
        ({"input_file": Path("no.csv")}, "--input-file no.csv does not exist or is no file. Name a trace file"),
        ({"input_file": Path(__file__)}, "--input-file needs --custom-dataset-type, such as mooncake_trace"),
    ],
)
def test_flags_that_cannot_be_are_refused_in_one_line(flags, message):
    with pytest.raises(ConfigError) as raised:
        Workload(**flags)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_requests_that_never_fit_are_refused_early():
    Workload(isl=50, osl=50).check_fits(100)
    with pytest.raises(ConfigError, match="--isl 50 and --osl 51 are 101 tokens; the context length is 100"):
        Workload(isl=50, osl=51).check_fits(100)
    long = Workload(isl=50, osl=50, conversation_turn_mean=3, shared_system_prompt_length=40)
    assert long.max_total_tokens() == sessions_of(long)[0].turns[-1].isl_tokens + 50
    with pytest.raises(ConfigError, match="--isl 50 and --osl 50, and 240 before them, are 340 tokens"):
        long.check_fits(339)
    Workload(**CSV).check_fits(1)


INTEGERS = ("isl", "conversation_turn_mean", "num_prefix_prompts", "prefix_prompt_length", "random_seed")
FLOATS = ("osl_stddev", "request_rate", "arrival_smoothness", "random_range_ratio", "conversation_turn_delay_mean")


@given(
    st.fixed_dictionaries({}, optional=dict.fromkeys(INTEGERS, st.integers(-2, 3))),
    st.fixed_dictionaries({}, optional=dict.fromkeys(FLOATS, st.floats())),
)
@settings(max_examples=200)
def test_flags_are_refused_or_make_a_workload(integers, floats):
    try:
        workload = Workload(**integers, **floats, request_count=3)
    except ConfigError:
        return
    assert len(turns_of(workload)) == 3


def test_bench_and_simulations_share_the_rules_of_a_load():
    for flags in ({"isl": 0}, {"request_rate": 0.0}, {"fixed_schedule": True}, CSV | {"isl": 5}):
        errors = []
        for kind in (Load, Workload):
            with pytest.raises(ConfigError) as raised:
                kind(**flags)
            errors.append(str(raised.value))
        assert errors[0] == errors[1]
