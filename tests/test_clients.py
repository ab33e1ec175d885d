"""Those who send: as many at once as they may, at the moments they should, and what they do with an answer."""

from __future__ import annotations

import math
from itertools import count, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mock_engine.clients import Clients, ClientSettings
from mock_engine.drive_virtual import VirtualClock
from mock_engine.session import Session, Turn
from mock_engine.simulation import SimulationSettings
from mock_engine.workload import Workload
from tests.helpers.deployments import aggregated, conversation, send, single, small_engine, watch

LATENCY_S = 0.25


class Service:
    """Answers each request `latency_s` after it was sent, however many there are; fails those of one token at once."""

    def __init__(self, sessions, settings=None, latency_s=LATENCY_S, seed=0):
        self.clock = VirtualClock()
        self.latency_s = latency_s
        self.jobs = []
        self.sent_s = []
        self.ended_s = {}
        self.under_way = []  # after each change: time, requests
        rng = np.random.default_rng(seed)
        settings = settings or ClientSettings()
        self.clients = Clients(self.clock, iter(sessions), self.submit, self.cancel, settings, rng)

    def run(self, until_s=None):
        self.clients.start()
        self.clock.run(until_s)
        return self

    def submit(self, job):
        assert job.sent_s == self.clock.now
        assert job.number == len(self.jobs)
        self.jobs.append(job)
        self.sent_s.append(self.clock.now)
        self.under_way.append((self.clock.now, self.clients.num_under_way))
        if job.osl_tokens == 1:
            job.failure = "too short"
            self.end(job)
        else:
            self.clock.call_at(self.clock.now + self.latency_s, lambda _: self.answer(job))

    def answer(self, job):
        if not job.is_cancelled:
            job.last_token_s = self.clock.now
            self.end(job)

    def cancel(self, job):
        if job.last_token_s is None and job.failure is None:
            job.is_cancelled = True
            self.end(job)

    def end(self, job):
        self.ended_s[job] = self.clock.now
        self.clients.job_ended(job)
        self.under_way.append((self.clock.now, self.clients.num_under_way))


def endless(arrival_s=None):
    """Sessions of one request each, without end."""
    return (single(8, 2, arrival_s) for _ in count())


def close_to(times_s):
    return pytest.approx(times_s, abs=1e-9)


@given(
    concurrency=st.integers(1, 8),
    num_turns=st.lists(st.integers(1, 3), min_size=1, max_size=30),
    turnaround_s=st.sampled_from([0.0, 0.1]),
)
@settings(max_examples=60)
def test_a_closed_loop_never_exceeds_its_concurrency_and_reaches_it(concurrency, num_turns, turnaround_s):
    sessions = [Session(None, (Turn(8, 2),) * number) for number in num_turns]
    client_settings = ClientSettings(max_concurrency=concurrency, turnaround_s=turnaround_s)
    service = Service(sessions, client_settings).run()
    most = max(number for _, number in service.under_way)
    assert most <= min(concurrency, len(sessions))
    if not turnaround_s:  # with one, the last client may come when the first has long been answered
        assert most == min(concurrency, len(sessions))
    assert service.clients.num_sent == sum(num_turns)
    assert service.clients.num_under_way == 0
    if not turnaround_s and set(num_turns) == {1}:  # always full, to the end
        rounds = math.ceil(len(sessions) / concurrency)
        assert service.clock.now == close_to(rounds * LATENCY_S)


@given(concurrency=st.integers(2, 40), ramp_s=st.floats(0.1, 10))
@settings(max_examples=30)
def test_concurrency_ramps_up_linearly(concurrency, ramp_s):
    """Of answers that never come; one at once, and one more each time that the ramp / concurrency has passed."""
    client_settings = ClientSettings(max_concurrency=concurrency, ramp_s=ramp_s)
    service = Service(endless(), client_settings, latency_s=1e6).run(until_s=2 * ramp_s)
    assert service.sent_s == close_to([number * ramp_s / concurrency for number in range(concurrency)])


def test_on_the_ramp_a_closed_loop_is_full_at_every_moment():
    service = Service(endless(), ClientSettings(max_concurrency=10, ramp_s=10.0)).run(until_s=20.0)
    for time_s, number in service.under_way:
        assert number <= min(10, 1 + math.floor(time_s + 1e-9))
    [before, after] = [[time_s for time_s in service.sent_s if low <= time_s < low + 2.5] for low in (5.0, 12.0)]
    assert len(after) == 10 * 10  # ten clients, a request each 0.25 s
    assert len(before) == 4 * 6 + 4 * 7 + 2 * 8


@given(gaps_s=st.lists(st.just(0.0) | st.floats(0, 2), min_size=1, max_size=30))
@settings(max_examples=60)
def test_an_open_loop_sends_at_exactly_the_given_times_whatever_is_answered(gaps_s):
    arrivals_s = np.cumsum(gaps_s).tolist()
    service = Service(single(8, 2, time_s) for time_s in arrivals_s).run()
    assert service.sent_s == arrivals_s


def test_a_trace_with_a_fixed_schedule_is_sent_at_its_own_times(tmp_path):
    trace = tmp_path / "trace.jsonl"
    times_ms = [0, 0, 30, 31, 500]
    trace.write_text("".join(f'{{"timestamp": {each}, "input_length": 8, "output_length": 4}}\n' for each in times_ms))
    workload = Workload(input_file=trace, custom_dataset_type="mooncake_trace", fixed_schedule=True)
    watched = watch(SimulationSettings(aggregated(), workload))
    assert [job.sent_s for job in watched.jobs] == [each / 1000 for each in times_ms]


@given(gaps_s=st.lists(st.floats(0, 0.3), min_size=1, max_size=30), limit=st.integers(1, 4))
@settings(max_examples=60)
def test_an_open_loop_with_a_limit_sends_as_soon_as_both_allow_it_in_order(gaps_s, limit):
    arrivals_s = np.cumsum(gaps_s).tolist()
    sessions = [single(8, 2, time_s) for time_s in arrivals_s]
    service = Service(sessions, ClientSettings(max_concurrency=limit)).run()
    expected_s = []
    for number, arrival_s in enumerate(arrivals_s):
        free_s = expected_s[number - limit] + LATENCY_S if number >= limit else 0.0
        expected_s.append(max(arrival_s, free_s))
    assert service.sent_s == close_to(expected_s)
    assert [job.client.session for job in service.jobs] == sessions
    assert max(number for _, number in service.under_way) <= limit


@given(thinks_s=st.lists(st.just(0.0) | st.floats(0, 5), max_size=6), arrival_s=st.none() | st.floats(0, 1))
@settings(max_examples=60)
def test_the_next_turn_of_a_session_is_sent_a_think_time_after_the_answer(thinks_s, arrival_s):
    turns = (Turn(8, 2), *(Turn(8, 2, (), think_s) for think_s in thinks_s))
    service = Service([Session(arrival_s, turns)], ClientSettings(max_concurrency=1)).run()
    assert service.sent_s[0] == (arrival_s or 0.0)
    waits_s = [following - sent_s - LATENCY_S for sent_s, following in pairwise(service.sent_s)]
    assert waits_s == close_to(thinks_s)


def test_a_session_that_thinks_still_counts_as_under_way():
    """A limit of one: the second session begins when the first has had its last answer."""
    sessions = [Session(None, (Turn(8, 2), Turn(8, 2, (), 1.0))), single(8, 2, None)]
    service = Service(sessions, ClientSettings(max_concurrency=1)).run()
    assert service.sent_s == close_to([0.0, LATENCY_S + 1.0, 2 * LATENCY_S + 1.0])


def test_clients_take_their_time_between_an_answer_and_the_next_request():
    """Exponential, with the mean that was asked for; the seed decides."""
    client_settings = ClientSettings(max_concurrency=1, turnaround_s=0.5)
    runs = [Service((single(8, 2, None) for _ in range(4001)), client_settings, seed=seed).run() for seed in (1, 1, 2)]
    assert runs[0].sent_s == runs[1].sent_s != runs[2].sent_s
    waits_s = np.diff(runs[0].sent_s) - LATENCY_S
    assert waits_s.mean() == pytest.approx(0.5, rel=4 / math.sqrt(4000))
    assert waits_s.std() == pytest.approx(0.5, rel=0.1)
    assert np.median(waits_s) == pytest.approx(0.5 * math.log(2), rel=0.1)


def test_clients_that_take_their_time_do_not_all_come_at_one_moment_either():
    client_settings = ClientSettings(max_concurrency=2000, turnaround_s=0.5)
    service = Service(endless(), client_settings, latency_s=1e6).run(until_s=100)
    first_s = np.asarray(service.sent_s)
    assert len(first_s) == 2000
    assert first_s.mean() == pytest.approx(0.5, rel=4 / math.sqrt(2000))
    assert first_s.std() == pytest.approx(0.5, rel=0.15)


@pytest.mark.parametrize("kind", ["closed loop", "open loop", "turns"])
def test_nothing_is_sent_at_the_end_or_later(kind):
    """What is under way then is still answered."""
    sessions, limit = {
        "closed loop": (endless(), 2),
        "open loop": ((single(8, 2, number / 4) for number in range(40)), None),
        "turns": ([Session(0.0, (Turn(8, 2),) * 50)], None),
    }[kind]
    service = Service(sessions, ClientSettings(max_concurrency=limit, end_s=2.0)).run()
    assert max(service.sent_s) == close_to(1.75)
    assert len(service.sent_s) == 8 * (limit or 1)
    assert len(service.ended_s) == len(service.jobs)
    assert max(service.ended_s.values()) == close_to(2.0)


def test_nothing_is_sent_after_a_stop():
    service = Service(endless(), ClientSettings(max_concurrency=3))
    service.clock.call_at(1.1, lambda _: service.clients.stop())
    service.run()
    assert max(service.sent_s) == close_to(1.0)
    assert service.clients.num_under_way == 0


@pytest.mark.parametrize("delay_s", [0.0, 0.1])
def test_a_share_of_clients_goes_away_after_a_delay(delay_s):
    sessions = [single(8, 2, number / 100) for number in range(4000)]
    client_settings = ClientSettings(cancelled_share=0.3, cancel_after_s=delay_s)
    runs = [Service(sessions, client_settings, seed=seed).run() for seed in (1, 1, 2)]
    cancelled = [[job.number for job in service.jobs if job.is_cancelled] for service in runs]
    assert cancelled[0] == cancelled[1] != cancelled[2]
    assert len(cancelled[0]) / 4000 == pytest.approx(0.3, abs=4 * math.sqrt(0.3 * 0.7 / 4000))
    for job in runs[0].jobs:
        expected_s = delay_s if job.is_cancelled else LATENCY_S
        assert runs[0].ended_s[job] - job.sent_s == close_to(expected_s)


def test_clients_that_would_go_away_after_the_answer_stay_for_the_next_turn():
    turns = (Turn(8, 2),) * 3
    service = Service([Session(0.0, turns)], ClientSettings(cancelled_share=1.0, cancel_after_s=0.3)).run()
    assert len(service.jobs) == 3
    assert not any(job.is_cancelled for job in service.jobs)


@pytest.mark.parametrize("how", ["cancelled", "failed"])
def test_a_session_ends_with_a_turn_that_is_cancelled_or_fails_and_makes_room_for_the_next(how):
    turns = (Turn(8, 2), Turn(8, 1 if how == "failed" else 2), Turn(8, 2))
    sessions = [Session(None, turns), Session(None, turns[:1])]
    share = 1.0 if how == "cancelled" else 0.0
    service = Service(sessions, ClientSettings(max_concurrency=1, cancelled_share=share, cancel_after_s=0.1)).run()
    if how == "cancelled":
        assert service.sent_s == close_to([0.0, 0.1])
    else:
        assert service.sent_s == close_to([0.0, LATENCY_S, LATENCY_S])
    assert [job.client.session for job in service.jobs][-1] is sessions[1]


def test_any_number_of_sessions_may_fail_at_once():
    """Not one inside the other: ten thousand would be too deep."""
    sessions = [*(single(8, 1, None) for _ in range(10_000)), single(8, 2, None)]
    service = Service(sessions, ClientSettings(max_concurrency=2)).run()
    assert service.clients.num_sent == 10_001
    assert service.clock.now == LATENCY_S


@pytest.mark.parametrize("kind", ["closed loop", "open loop"])
def test_a_million_sessions_are_taken_as_they_are_needed(kind):
    """After 2 s with one request each 0.25 s, eight or nine; in an open loop one more, whose time is known."""
    num_taken = 0

    def sessions():
        nonlocal num_taken
        for number in range(1_000_000):
            num_taken += 1
            yield single(8, 2, None if kind == "closed loop" else number * LATENCY_S)

    service = Service(sessions(), ClientSettings(max_concurrency=1)).run(until_s=2.1)
    assert service.clients.num_sent == 9
    assert num_taken == (9 if kind == "closed loop" else 10)


def test_clients_without_sessions_send_nothing():
    service = Service([]).run()
    assert (service.clients.num_sent, service.clients.request_seconds) == (0, 0.0)


@given(gaps_s=st.lists(st.floats(0, 0.5), min_size=1, max_size=20), until_s=st.floats(0.01, 5))
@settings(max_examples=60)
def test_request_seconds_are_the_latencies_so_far(gaps_s, until_s):
    """Also in the middle of a run, of those that are still under way."""
    service = Service(single(8, 2, time_s) for time_s in np.cumsum(gaps_s).tolist()).run(until_s)
    latencies_s = [min(until_s, service.ended_s.get(job, until_s)) - job.sent_s for job in service.jobs]
    assert service.clients.request_seconds == close_to(sum(latencies_s))


def test_turns_of_a_session_find_the_kv_blocks_of_those_before():
    """Prompts of 10, 24, 38 and 52 tokens; all but the last token of what was there before, in full blocks of 4."""
    engine = small_engine(max_model_len=96)
    lengths = [(10, 4, 0.0)] + [(10, 4, 0.5)] * 3
    watched = send(aggregated(1, engine), [conversation(*lengths)])
    assert [job.isl_tokens for job in watched.jobs] == [10, 24, 38, 52]
    assert [job.num_cached_tokens for job in watched.jobs] == [0, 12, 24, 40]  # of 13, 27 and 41 that were computed
    without = send(aggregated(1, small_engine(enable_prefix_caching=False)), [conversation(*lengths)])
    assert [job.num_cached_tokens for job in without.jobs] == [0] * 4
