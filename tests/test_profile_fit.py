"""A profile that is fitted to benchmarks: replays are exact, slopes are right, hidden profiles are found again."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mock_engine.engine_settings import EngineSettings
from mock_engine.errors import ConfigError
from mock_engine.profile import load_profile, to_document
from mock_engine.profile_fit import ObservedRequest, ObservedRun, fit_profile, make_run, read_run, replay, run_of_means
from mock_engine.profile_fit.observations import group_requests
from mock_engine.profile_fit.parameters import OVERHEADS, parameters_of
from mock_engine.profile_fit.replay import plan_replay, visited
from mock_engine.profile_fit.report import (
    ParameterRow,
    not_identified,
    only_together,
    parameter_rows,
    scheduling_note,
    step_rows,
    warnings,
)
from mock_engine.profile_fit.sensitivity import request_slopes, step_slopes, step_times
from mock_engine.profile_fit.start import Server, as_server, choose_names, nearest_profiles
from mock_engine.profile_fit.writing import write_fit
from mock_engine.profile_writing import write_folder
from mock_engine.step import PrefillChunk, StepLoad
from mock_engine.timing import TimingModel
from tests.helpers.observed_runs import benchmark, export

H100, A100 = "h100-sxm/llama-3.1-8b/vllm-tp1-bf16", "a100-sxm/llama-3.1-8b/vllm-tp1-bf16"
STEPS = "h100-sxm/llama-3.3-70b/vllm-tp4-fp8"  # whole passes, and no asynchronous scheduling
SGLANG, TRTLLM = (f"h100-sxm/llama-3.1-8b/{engine}-tp1-bf16" for engine in ("sglang", "trtllm"))  # other schedulers
LIMITS = Server(max_num_batched_tokens=8192, max_num_seqs=1024)  # of the H100 profile


@functools.cache
def parameters(name):
    return parameters_of(load_profile(name))


def request(isl=500, osl=100, ttft_s=0.05, itl_s=0.01, start_s=None, cached=0):
    return ObservedRequest(isl, osl, ttft_s, itl_s if osl > 1 else None, start_s, cached)


def off_by(profile, hidden, runs):
    """Errors of step times over the loads that the hidden profile's replays visit, each as often as it was visited."""
    loads = visited([replay(hidden, run) for run in runs])
    found, true = (step_times(TimingModel(each), list(loads)) for each in (profile, hidden))
    return np.repeat(np.abs(found / true - 1), list(loads.values()))


# Replays


@pytest.mark.parametrize("name", [H100, STEPS, SGLANG, TRTLLM])
@pytest.mark.parametrize(
    "load",
    [
        pytest.param({"concurrency": 1, "request_count": 12}, id="one at a time"),
        pytest.param({"concurrency": 6, "request_count": 40}, id="a closed loop"),
        pytest.param({"request_rate": 8.0, "request_count": 60}, id="an open loop"),
    ],
)
def test_a_run_of_a_profile_without_jitter_is_replayed_as_it_was(tmp_path, name, load):
    (tmp_path / "run").mkdir()
    path = export(tmp_path / "run" / "profile_export.jsonl", name, jitter=0.0, **load)
    run = read_run(path)
    replayed = replay(load_profile(name), run)
    assert len(run.requests) == load["request_count"]
    np.testing.assert_allclose(replayed.ttft_s, [each.ttft_s for each in run.requests], rtol=1e-4)
    np.testing.assert_allclose(replayed.itl_s, [each.itl_s for each in run.requests], rtol=1e-4)


def test_a_request_follows_the_one_of_its_slot_that_ended_last_after_the_recorded_pause():
    starts_and_latencies = [(0.0, 1.0), (0.0, 2.0), (1.5, 1.0), (2.0, 1.0), (9.0, 1.0)]
    run = make_run("run", [request(osl=2, ttft_s=t / 2, itl_s=t / 2, start_s=s) for s, t in starts_and_latencies])
    assert run.concurrency == 2
    (first, second) = plan_replay(run).slots
    assert first == [(0, 0.0), (2, 0.5)]
    assert second == [(1, 0.0), (3, 0.0), (4, 6.0)]


@given(
    starts_s=st.lists(st.floats(0, 50), min_size=1, max_size=40),
    latencies_s=st.lists(st.floats(0.01, 20), min_size=40, max_size=40),
)
@settings(max_examples=200)
def test_slots_hold_each_request_once_and_begin_where_the_run_did(starts_s, latencies_s):
    """Laid out again from its own ends, every request starts when it did."""
    requests = [
        request(osl=2, ttft_s=latency_s / 2, itl_s=latency_s / 2, start_s=start_s)
        for start_s, latency_s in zip(starts_s, latencies_s, strict=False)
    ]
    run = make_run("run", requests)
    plan = plan_replay(run)
    begins_s = {}
    for slot in plan.slots:
        now_s = 0.0
        for index, pause_s in slot:
            begins_s[index] = now_s + pause_s
            now_s = begins_s[index] + run.requests[index].latency_s
    assert sorted(begins_s) == list(range(len(requests)))
    origin_s = run.requests[0].start_s
    for index, begin_s in begins_s.items():
        assert begin_s == pytest.approx(run.requests[index].start_s - origin_s, abs=1e-4)
    assert len(plan.slots) <= max(run.concurrency, 1)


def test_requests_without_start_times_are_sent_as_the_concurrency_allows():
    run = ObservedRun("run", tuple(request(isl=400 + n, osl=20 + 3 * n) for n in range(12)), 3)
    replayed = replay(load_profile(H100), run)
    under_way = [
        int(((replayed.queued_s <= moment) & (moment < replayed.last_token_s)).sum()) for moment in replayed.queued_s
    ]
    assert max(under_way) == 3
    assert under_way[3:9] == [3] * 6


def test_of_a_run_that_is_cut_short_only_requests_under_full_load_are_compared():
    run = ObservedRun("run", tuple(request() for _ in range(50)), 4)
    plan = plan_replay(run, 20)
    assert plan.num_requests == 20
    assert plan.is_compared.tolist() == [True] * 16 + [False] * 4
    timed = make_run("run", [request(osl=2, ttft_s=0.5, itl_s=0.5, start_s=float(n)) for n in range(10)])
    assert plan_replay(timed, 5).is_compared.tolist() == [True, True, True, True, False]
    assert plan_replay(timed, 10).is_compared.all()


def test_time_before_the_queue_is_part_of_ttft_and_cached_tokens_are_not_computed():
    profile = load_profile(H100)
    alone = ObservedRun("run", (request(isl=4000),), 1)
    slow = replace(
        profile,
        overhead_request_s=profile.overhead_request_s + 0.004,
        overhead_per_prompt_token_s=profile.overhead_per_prompt_token_s + 1e-6,
    )
    (before_s,), (after_s,) = replay(profile, alone).ttft_s, replay(slow, alone).ttft_s
    assert after_s - before_s == pytest.approx(0.004 + 4000e-6)
    cached = replay(profile, ObservedRun("run", (request(isl=4000, cached=3900),), 1))
    assert cached.steps.loads[0].prefill_chunks == (PrefillChunk(100, 3900),)
    assert cached.ttft_s[0] < before_s / 2


def test_only_the_overhead_is_fitted_where_that_is_asked_for():
    """A server slower by a constant is found from its lowest load alone, and every table stays as it was."""
    start = load_profile(H100)
    hidden = replace(start, overhead_step_s=start.overhead_step_s + 2e-3, overhead_request_s=6e-3)
    facts = {"isl_tokens": 500, "osl_tokens": 100, "concurrency": 1, "num_requests": 8}
    seen = replay(hidden, run_of_means("one", **facts, ttft_s=0.1, itl_s=0.01))
    run = run_of_means("one", **facts, ttft_s=float(seen.ttft_s.mean()), itl_s=float(seen.itl_s.mean()))
    fit = fit_profile(start, [run], async_scheduling=True, only_overhead=True)
    for name, table in fit.profile.latency.items():
        assert np.array_equal(table.seconds, start.latency[name].seconds)
    assert fit.profile.overhead_step_s == pytest.approx(hidden.overhead_step_s, rel=0.05)
    assert fit.profile.overhead_request_s == pytest.approx(6e-3, rel=0.15)
    corrections = fit.sd[: fit.parameters.num_corrections]
    assert np.all(corrections == 0), "what is held is not said to be unsure"
    held = [row for row in parameter_rows(fit) if row.is_held]
    assert len(held) == fit.parameters.num_corrections
    assert not any(row.is_identified for row in held), "nor to be known"
    assert not_identified(parameter_rows(fit)) == []
    only_together(fit)
    large = StepLoad((), 64, 64 * 1000)
    expected = TimingModel(hidden).step_s(large)
    assert TimingModel(fit.profile).step_s(large) == pytest.approx(expected, rel=0.01)


def test_a_burst_of_more_requests_than_are_replayed_is_replayed_whole():
    """Of the first of them alone none would have ended before the last was sent, and nothing could be compared."""
    requests = [request(start_s=index * 1e-5, ttft_s=0.05 + index * 1e-3) for index in range(30)]
    run = make_run("burst", requests)
    plan = plan_replay(run, max_requests=8)
    assert plan.num_requests == 30
    assert plan.is_compared.all()
    fit = fit_profile(load_profile(H100), [run], async_scheduling=True, max_requests=8)
    assert fit.runs[0].num_compared == 30
    loop = run_of_means("loop", isl_tokens=9, osl_tokens=9, concurrency=10, num_requests=99, ttft_s=1.0, itl_s=0.1)
    assert plan_replay(loop, max_requests=8).is_compared.sum() == 10


def test_what_is_not_known_is_said_once_for_each_kind():
    def row(name, sd, is_factor=True):
        return ParameterRow(name, "", is_factor, 1.0, 1.0, sd, 0.3)

    rows = [row("matrices at 1 tokens", 0.3), row("matrices at 2 tokens", 0.1), row("matrices at 4,096 tokens", 0.3)]
    rows += [row("decode attention at 64 KV tokens", 0.3), row("overhead_step_s", 0.3, is_factor=False)]
    rows += [row("prefill attention at 32 tokens", 0.0)]  # held
    assert not_identified(rows) == ["matrices at 1, 4,096 tokens", "decode attention at 64 KV tokens"]


def test_a_run_is_replayed_with_the_flags_that_the_server_had_in_it():
    """One sequence at a time: the second of two equal requests waits for the whole first."""
    facts = {"isl_tokens": 500, "osl_tokens": 100, "concurrency": 2, "num_requests": 2, "ttft_s": 0.1, "itl_s": 0.01}
    profile = load_profile(H100)
    usual = replay(profile, run_of_means("both", **facts))
    single = replay(profile, run_of_means("one", **facts, engine=EngineSettings(max_num_seqs=1)))
    assert usual.ttft_s[1] == usual.ttft_s[0]
    assert single.ttft_s[1] == pytest.approx(single.last_token_s[0] + single.ttft_s[0], rel=1e-9)


def test_the_steps_of_a_replay_are_those_that_its_time_went_into():
    profile = load_profile(H100)
    replayed = replay(profile, ObservedRun("run", tuple(request(isl=100 * n) for n in range(1, 20)), 4))
    steps = replayed.steps
    lasted_s = steps.end_s - steps.start_s
    np.testing.assert_allclose(step_times(TimingModel(profile), steps.loads) * steps.counts, lasted_s, rtol=2e-3)
    num_tokens = sum(load.decode_batch_size * n for load, n in zip(steps.loads, steps.counts, strict=True))
    assert num_tokens == 19 * 99  # all but the first of each
    assert sum(chunk.new_tokens for load in steps.loads for chunk in load.prefill_chunks) == 100 * 190


def test_a_request_that_can_never_be_served_is_one_error():
    with pytest.raises(ConfigError, match=r"run: h100-sxm/llama-3.1-8b/vllm-tp1-bf16 can never serve a request"):
        replay(load_profile(H100), ObservedRun("run", (request(isl=10**6),), 1))


# Parameters and slopes


@pytest.mark.parametrize("name", [H100, "h100-sxm/llama-3.1-70b/vllm-tp4-bf16"])
@given(
    chunks=st.lists(st.tuples(st.integers(1, 4096), st.integers(0, 4096)), max_size=2),
    batch_size=st.integers(0, 128),
    context=st.integers(1, 8000),
)
@settings(max_examples=60)
def test_without_corrections_the_profile_is_the_start_profile(name, chunks, batch_size, context):
    """To the last bit, where parts of passes are measured."""
    if not chunks and not batch_size:
        return
    load = StepLoad(tuple(PrefillChunk(*chunk) for chunk in chunks), batch_size, batch_size * context)
    start, same = timings(name)
    assert same.step_s(load) == start.step_s(load)


@functools.cache
def timings(name):
    found = parameters(name)
    return TimingModel(load_profile(name)), TimingModel(found.apply(found.start))


@pytest.mark.parametrize("name", [STEPS, "a100-sxm/llama-2-70b/splitwise-tp8-fp16"])
def test_whole_passes_that_are_laid_out_evenly_are_nearly_the_same(name):
    """Between points, dips that `timing` has taken out of the measured ones no longer bend what is between them."""
    start, same = timings(name)
    latency = load_profile(name).latency
    measured = [StepLoad((PrefillChunk(int(tokens), 0),), 0, 0) for tokens in latency["prefill"].points[:, 0]]
    measured += [StepLoad((), int(size), int(size * context)) for size, context in latency["decode"].points]
    errors = np.abs(step_times(same, measured) / step_times(start, measured) - 1)
    assert np.percentile(errors, 90) < 0.015
    assert errors.max() < 0.12
    rng = np.random.default_rng(0)
    sizes, contexts, tokens = 2 ** rng.uniform([0, 0, 0], [7, 13, 12], (2000, 3)).T
    between = [
        StepLoad((PrefillChunk(int(new), 0),) if index % 2 else (), int(size), int(size) * int(context))
        for index, (size, context, new) in enumerate(zip(sizes, contexts, tokens, strict=True))
    ]
    errors = np.abs(step_times(same, between) / step_times(start, between) - 1)
    assert np.median(errors) < 0.001
    assert errors.max() < 0.12


def test_a_gpu_that_is_faster_everywhere_costs_less_than_one_that_is_faster_at_one_size():
    found = parameters(H100)

    def cost(shift):
        own = found.prior[: found.num_corrections]
        return shift @ np.linalg.solve(own @ own.T + 1e-9 * np.eye(len(own)), shift)

    everywhere = np.full(found.num_corrections, np.log(2))
    at_one = np.zeros(found.num_corrections)
    at_one[5] = np.log(2)
    assert cost(everywhere) < 2 < 20 < cost(at_one)


def test_whole_passes_have_no_overhead_of_their_own_to_fit():
    assert [overhead.key for overhead in parameters(H100).overheads] == [overhead.key for overhead in OVERHEADS]
    assert all(not overhead.is_in_steps for overhead in parameters(STEPS).overheads)


@pytest.mark.parametrize("name", [H100, STEPS])
def test_slopes_are_what_a_replay_does_when_a_parameter_moves(name):
    """
    One request at a time: nothing depends on who meets whom, so the slopes must be right. (Decode passes in a row
    count as their middle one, and attention has a correction at one place: 1 % of a time is not looked at.)
    """
    found = parameters(name)
    run = ObservedRun("run", tuple(request(isl=isl, osl=40) for isl in (100, 700, 1500, 3000)), 1)
    values = found.start + 0.02
    values[found.num_corrections :] += found.own_sd[found.num_corrections :]
    replayed = replay(found.apply(values), run)
    slopes = step_slopes(found, values, replayed.steps.loads)
    ttft, itl = request_slopes(replayed, found, slopes)
    for index in range(len(values)):
        step = 0.05 * (1.0 if index < found.num_corrections else found.own_sd[index])
        moved = [replay(found.apply(values + side * np.eye(len(values))[index]), run) for side in (-step, step)]
        for mine, (low, high) in ((ttft, (m.ttft_s for m in moved)), (itl, (m.itl_s for m in moved))):
            slope = (high - low) / (2 * step)
            negligible = 1e-2 * high.mean() if index < found.num_corrections else 1e-3 * np.abs(slope).max() + 1e-9
            np.testing.assert_allclose(mine[:, index], slope, rtol=0.02, atol=negligible)


def test_groups_are_of_like_requests_and_hold_each_once():
    run = ObservedRun("run", tuple(request(isl=100 + 37 * n % 900, osl=1 + n % 5) for n in range(64)), 8)
    groups = group_requests(run, np.arange(64) < 60)
    for metric, expected in (("ttft", range(60)), ("itl", [n for n in range(60) if n % 5])):
        own = [group for group in groups if group.metric == metric and not group.is_first_wave]
        if metric == "ttft":
            waves = [group for group in groups if group.is_first_wave]
            assert sorted(np.concatenate([group.requests for group in waves])) == list(range(8))
            spans = sorted(
                (min(isls), max(isls)) for isls in ([run.requests[n].new_tokens for n in g.requests] for g in own)
            )
            assert all(high <= low for (_, high), (low, _) in itertools.pairwise(spans))
            own += waves
        assert sorted(np.concatenate([group.requests for group in own])) == list(expected)


# Fits


@functools.cache
def recovered(folder):
    runs = benchmark(folder, H100, {1: 32, 12: 72}, seed=3)
    start = as_server(load_profile(A100), LIMITS)
    return runs, fit_profile(start, runs)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    return recovered(tmp_path_factory.mktemp("hidden"))


def test_a_hidden_profile_is_found_from_that_of_another_gpu(fitted):
    """The shipped jitter is on. Step times within 3 %, nearly everywhere that the runs went."""
    runs, fit = fitted
    hidden = load_profile(H100)
    before, after = off_by(fit.start, hidden, runs), off_by(fit.profile, hidden, runs)
    assert np.median(before) > 0.5
    assert np.median(after) < 0.01
    assert np.percentile(after, 95) < 0.03
    for run in fit.runs:
        assert abs(run.ttft_after) < 0.03 < abs(run.ttft_before)
        assert abs(run.itl_after) < 0.01 < abs(run.itl_before)


def test_the_error_that_a_fit_admits_to_is_the_error_that_it_has(fitted):
    runs, fit = fitted
    hidden = load_profile(H100)
    loads = list(visited([replay(hidden, run) for run in runs]))
    errors = step_times(TimingModel(fit.profile), loads) / step_times(TimingModel(hidden), loads) - 1
    shares = np.abs(errors) / fit.step_sd(loads)
    assert np.mean(shares < 2) > 0.8
    assert np.median(shares) > 0.05  # nor does it admit to ten times too much


def test_what_shows_only_as_a_sum_is_said(fitted):
    _, fit = fitted
    rows = {row.name: row for row in parameter_rows(fit)}
    assert not rows["overhead_step_s"].is_identified
    assert any(sentence.startswith("overhead_step_s and matrices") for sentence in only_together(fit))
    assert not rows["decode attention at 2,097,152 KV tokens"].is_identified
    assert rows["overhead_request_s"].is_identified
    batch_1 = next(row for row in step_rows(fit) if row.text == "decode, batch 1")
    assert batch_1.sd < 0.01  # of the sum


def test_the_way_of_scheduling_is_found_too(fitted):
    _, fit = fitted
    assert fit.profile.async_scheduling
    assert fit.other_badness - fit.badness > 10
    assert "Asynchronous scheduling explains the runs; the other way does not" in scheduling_note(fit)
    told = fit_profile(fit.start, fitted[0][:1], async_scheduling=False)
    assert scheduling_note(told) is None
    assert not told.profile.async_scheduling


def test_time_before_the_queue_is_told_from_prefill(tmp_path):
    """5 ms a request and 2 us a prompt token, on a server whose passes are the start profile's."""
    start = load_profile(H100)
    document = to_document(start)
    document["timing"] |= {"overhead_request_s": 5e-3, "overhead_per_prompt_token_s": 2e-6}
    write_folder(tmp_path / "hidden", document, start.latency)
    (tmp_path / "runs").mkdir()
    counts = {1: 48, 8: 96}
    runs = benchmark(tmp_path / "runs", str(tmp_path / "hidden"), counts, seed=1, turnaround_s=1e-3)
    fit = fit_profile(start, runs, async_scheduling=start.async_scheduling)
    assert np.percentile(off_by(fit.profile, load_profile(tmp_path / "hidden"), runs), 95) < 0.03
    at_600 = np.zeros(len(fit.values))
    at_600[-2:] = 1, 600
    sd_s = float(np.sqrt(at_600 @ fit.covariance @ at_600))
    assert at_600 @ fit.values == pytest.approx(5e-3 + 600 * 2e-6, abs=2 * sd_s)
    assert at_600 @ fit.values > sd_s > 0


def test_means_alone_are_fitted_too():
    """A published table: four rows of mean TTFT and ITL, made from a profile with other times."""
    hidden, start = load_profile(H100), as_server(load_profile(A100), LIMITS)
    rows = [(512, 128, 1), (512, 128, 16), (2048, 128, 1), (2048, 128, 16)]
    runs = []
    for isl, osl, concurrency in rows:
        lengths = {"isl_tokens": isl, "osl_tokens": osl, "concurrency": concurrency, "num_requests": 8 * concurrency}
        seen = replay(hidden, run_of_means("", **lengths, ttft_s=1.0, itl_s=1.0))
        name = f"{isl} {osl} {concurrency}"
        runs.append(run_of_means(name, **lengths, ttft_s=float(seen.ttft_s.mean()), itl_s=float(seen.itl_s.mean())))
    fit = fit_profile(start, runs, async_scheduling=True)
    for run in fit.runs:
        assert abs(run.itl_after) < 0.02 < run.itl_before
        assert abs(run.ttft_after) < 0.05 < run.ttft_before
    assert any("has only means" in note for note in warnings(fit))


def test_a_fit_of_one_concurrency_or_one_length_says_what_it_cannot_know(tmp_path):
    runs = benchmark(tmp_path, H100, {4: 16}, isl_stddev=0.0)
    fit = fit_profile(load_profile(H100), runs, async_scheduling=True)
    notes = " ".join(warnings(fit))
    assert "All runs have a concurrency of 4" in notes
    assert "All prompts have about 600 tokens" in notes
    assert "concurrency-4 has 16 requests; 20 and more" in notes


def test_a_written_fit_is_the_fit(fitted, tmp_path):
    _, fit = fitted
    profile = write_fit(fit, A100, tmp_path / "new", "mock-engine profiles fit ...")
    loads = list(fit.loads)
    written, fitted_s = (step_times(TimingModel(each), loads) for each in (profile, fit.profile))
    np.testing.assert_allclose(written, fitted_s, rtol=1e-4)
    assert profile.is_measured
    assert A100 in profile.how_measured
    assert profile.overhead_source.startswith("Fitted with the tables to 104 requests in 2 runs")
    assert profile.async_scheduling == fit.profile.async_scheduling
    assert not profile.expected_error


@pytest.mark.parametrize("name", [H100, STEPS, "h100-sxm/mixtral-8x7b/vllm-tp2-bf16"])
def test_a_profile_as_a_document_is_the_profile(name, tmp_path):
    profile = load_profile(name)
    again = write_folder(tmp_path / "new", to_document(profile), profile.latency)
    assert replace(again, latency={}) == replace(profile, latency={})


def test_step_times_that_take_over_what_is_laid_out_already_are_the_same():
    """Attention is taken over where its table is the same; where it is another, it is laid out anew."""
    found = parameters(H100)
    base = found.apply(found.start)
    loads = [StepLoad((PrefillChunk(900, 300),), 7, 7 * 700), StepLoad((), 40, 40 * 3000), StepLoad((), 4, 4 * 500)]
    for index in (3, 16, 21):  # of each curve one
        values = found.start.copy()
        values[index] += 0.2
        profile = found.apply(values, like=base)
        kept = [name for name, table in profile.latency.items() if table is base.latency[name]]
        assert len(kept) == (2 if index == 3 else 3)
        alone, like = TimingModel(profile), TimingModel(profile, like=TimingModel(base))
        assert step_times(alone, loads).tolist() == step_times(like, loads).tolist()
        assert step_times(alone, loads).tolist() != step_times(TimingModel(base), loads).tolist()


# Starts


def test_the_nearest_profile_is_the_hidden_one(tmp_path):
    hidden = "h100-sxm/llama-3.1-8b/trtllm-tp2-bf16"
    runs = benchmark(tmp_path, hidden, {1: 20, 8: 32})
    assert as_server(load_profile(H100), Server("//vllm-tp1-fp8_block")).dtype == "fp8_block"
    names = choose_names(model="llama-3.1-8b")
    assert len(names) == 12
    candidates = nearest_profiles(runs, names, Server())
    assert candidates[0].name == hidden
    assert candidates[0].scale == pytest.approx(1, abs=0.03)
    assert candidates[-1].distance > 3 * candidates[0].distance


def test_names_are_chosen_by_what_is_known():
    assert choose_names(gpu="a100-sxm", model="llama-2-70b", engine="vllm", tp=8) == [
        "a100-sxm/llama-2-70b/vllm-tp8-bf16"
    ]
    with pytest.raises(ConfigError, match="no shipped profile is of that --gpu, --model"):
        choose_names(gpu="abacus")


def test_a_server_has_names_and_limits_of_its_own():
    start = load_profile("h100-sxm/llama-3.1-70b/vllm-tp4-bf16")
    same = as_server(start, Server())
    assert same == start
    renamed = as_server(start, Server(name="a100-sxm//vllm-tp8-bf16", max_num_seqs=99, num_gpu_blocks_override=1234))
    assert renamed.name == "a100-sxm/llama-3.1-70b/vllm-tp8-bf16"
    assert renamed.datasheet == load_profile("a100-sxm/llama-3.1-70b/vllm-tp8-bf16").datasheet
    assert (renamed.max_num_seqs, renamed.max_num_batched_tokens) == (99, start.max_num_batched_tokens)
    assert renamed.total_kv_blocks() == 1234
    assert as_server(start, Server(name="my-gpu//")).datasheet == start.datasheet


@pytest.mark.parametrize("name", ["a/b/c/d", "//vllm", "//vllm-tp0-bf16", "//vllm-tp1-int3"])
def test_a_name_that_cannot_be_is_refused(name):
    with pytest.raises(ConfigError, match=r"it must be GPU/MODEL/ENGINE-tpN-DTYPE"):
        as_server(load_profile(H100), Server(name=name))


def test_one_gpu_does_not_become_several():
    with pytest.raises(ConfigError, match="no table of communication"):
        as_server(load_profile(H100), Server(name="//vllm-tp2-bf16"))
