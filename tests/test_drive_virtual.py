"""The engine in virtual time: jumps over decode steps give what single steps give, to the last bit."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mock_engine.drive_virtual import VirtualClock, VirtualDrive
from mock_engine.engine_settings import ENGINE_TYPES
from mock_engine.request import Request
from tests.helpers.virtual import Notes, drive, timed_requests
from tests.helpers.workloads import BLOCK_SIZE, MAX_MODEL_LEN, TICK_S, make_core, step_s, ticking_step_s

options = st.fixed_dictionaries(
    {
        "num_blocks": st.integers(MAX_MODEL_LEN // BLOCK_SIZE, 40),
        "max_num_seqs": st.integers(1, 8),
        "max_num_batched_tokens": st.integers(8, 64),
        "enable_prefix_caching": st.booleans(),
        "timing": st.sampled_from([step_s, ticking_step_s]),
        "is_async": st.booleans(),
        "engine_type": st.sampled_from(list(ENGINE_TYPES)),
        "scheduling_policy": st.sampled_from(["fcfs", "priority"]),
    }
)


@given(workload=timed_requests(), options=options, jitter=st.sampled_from([0.0, 0.05]))
@settings(max_examples=2500)
def test_jumping_over_decode_steps_gives_every_token_the_time_that_single_steps_give(workload, options, jitter):
    """Chunked prefill, prefix hits, preemption, cancels and arrivals at any moment; equal means equal floats."""
    single, single_notes = drive(workload, True, jitter, **options)
    jumping, jumping_notes = drive(workload, False, jitter, **options)
    assert jumping.token_s == single.token_s
    assert jumping_notes.flights == single_notes.flights
    assert jumping_notes.gaps == single_notes.gaps
    assert sorted(single_notes.gaps) == sorted(
        later_s - earlier_s for token_s in single.token_s.values() for earlier_s, later_s in pairwise(token_s)
    )
    assert single_notes.num_tokens == jumping_notes.num_tokens == sum(map(len, single.token_s.values()))
    assert single.num_run_steps == 0
    for request_id, _, first_s, second_s, last_s, *_ in jumping_notes.flights:
        token_s = jumping.token_s[request_id]
        assert (first_s, second_s, last_s) == (token_s[0], token_s[1] if len(token_s) > 1 else None, token_s[-1])
    for name in ("num_steps", "num_preemptions", "num_prefix_hits_tokens"):
        assert getattr(jumping.scheduler, name) == getattr(single.scheduler, name)
    for core in (single, jumping):
        assert core.scheduler.blocks.num_used == 0
    assert jumping.scheduler.blocks._holders == single.scheduler.blocks._holders


@given(workload=timed_requests(), options=options)
@settings(max_examples=300)
def test_who_arrives_while_an_asynchronous_engine_is_busy_misses_the_next_step(workload, options):
    """Nobody is computed in a step that began less than a whole step after they had arrived, unless it was idle."""
    clock = VirtualClock()
    core = make_core(**{**options, "is_async": True})
    begins_s: list[float] = []
    first_step = {}
    begin_step = core.begin_step

    def noting_begin_step():
        step = begin_step()
        if step is not None:
            is_idle = not core.scheduler.decoding and all(one in fresh for one in core.scheduler.prefilling)
            for sequence, _ in step.schedule.prefills:
                first_step.setdefault(sequence, (clock.now, None if is_idle else begins_s[-1]))
            fresh.clear()
            begins_s.append(clock.now)
        return step

    fresh = set()
    core.begin_step = noting_begin_step
    enqueue = core.enqueue
    core.enqueue = lambda sequence: (fresh.add(sequence), enqueue(sequence))
    virtual = VirtualDrive(clock, core, Notes(), is_single_stepping=True)
    flights = []
    for timed in sorted(workload, key=lambda timed: timed.arrival_s):
        clock.call_at(timed.arrival_s, lambda _, timed=timed: flights.append(virtual.submit(timed.request)))
    clock.run()
    for flight in flights:
        _, before_s = first_step[flight.sequence]
        assert before_s is None or flight.arrival_s <= before_s


@pytest.mark.parametrize(("is_async", "waits_for_steps"), [(False, 0.5), (True, 1.5)])
@pytest.mark.parametrize("is_single_stepping", [True, False])
def test_a_request_that_comes_in_the_middle_of_a_step_waits_one_more_where_scheduling_is_asynchronous(
    is_single_stepping, is_async, waits_for_steps
):
    """
    Then its own prefill. Real vLLM (16 runs of the load stages, H100) takes 1.2 to 1.8 steps longer to the first
    token than an engine that admits at the next step.
    """
    clock = VirtualClock()
    core = make_core(timing=ticking_step_s, is_async=is_async)
    drive = VirtualDrive(clock, core, Notes(), is_single_stepping=is_single_stepping)
    drive.submit(Request("long", 4, 30))
    late = []
    clock.call_at(10.5 * TICK_S, lambda _: late.append(drive.submit(Request("late", 4, 1))))
    clock.run()
    prefill_ticks = 2
    assert late[0].first_token_s == (10.5 + waits_for_steps + prefill_ticks) * TICK_S


@pytest.mark.parametrize("is_answered_first", [True, False])
def test_what_one_engine_s_last_token_sets_off_is_in_time_for_the_step_another_begins_then(is_answered_first):
    """Both steps end at one moment, in either order; the request that the first answer leads to joins the next step."""
    clock = VirtualClock()
    cores = [make_core(timing=ticking_step_s) for _ in range(2)]
    flights = []

    class Chain(Notes):
        def finished(self, _):
            flights.append(drives[1].submit(Request("next", 4, 1)))

    drives = [VirtualDrive(clock, cores[0], Chain()), VirtualDrive(clock, cores[1], Notes())]
    for index in (0, 1) if is_answered_first else (1, 0):
        drives[index].submit(Request("first" if index == 0 else "long", 4, 1 if index == 0 else 3))
    clock.run()
    (flight,) = flights
    assert flight.arrival_s == 2 * TICK_S  # a prefill takes two ticks
    assert flight.first_token_s == 4 * TICK_S


@pytest.mark.parametrize("is_single_stepping", [True, False])
def test_who_is_cancelled_at_the_very_moment_of_the_last_token_does_not_get_it(is_single_stepping):
    """The outside comes first, also when it made up its mind long after the run of steps was planned."""
    clock, notes = VirtualClock(), Notes()
    drive = VirtualDrive(clock, make_core(timing=ticking_step_s), notes, is_single_stepping=is_single_stepping)
    flight = drive.submit(Request("r", 4, 10))
    last_s = 11 * TICK_S  # two ticks of prefill, nine of decode
    clock.call_at(5.5 * TICK_S, lambda _: clock.call_at(last_s, lambda _: drive.cancel(flight)))
    clock.run()
    assert clock.now >= last_s
    assert notes.flights == []
    assert flight.sequence.num_output_tokens == 9


@pytest.mark.parametrize("is_single_stepping", [True, False])
def test_the_gap_of_a_sequence_retracted_after_another_s_prefill_begins_at_its_last_token(is_single_stepping):
    """A prefill of `old`, one of `new`, and no blocks for the decode step that follows: `old` has the longer prompt."""
    clock, notes = VirtualClock(), Notes()
    core = make_core(num_blocks=12, timing=ticking_step_s, engine_type="sglang")
    drive = VirtualDrive(clock, core, notes, is_single_stepping=is_single_stepping)
    old = drive.submit(Request("old", 2 * BLOCK_SIZE, 4))
    clock.call_at(1 * TICK_S, lambda _: drive.submit(Request("new", BLOCK_SIZE, 3)))
    clock.call_at(3 * TICK_S, lambda _: core.scheduler.blocks.take(core.scheduler.blocks.num_available))
    clock.run()
    assert old.sequence.num_preemptions == 1
    # Two prefills of two ticks, two decode steps until `new` is answered, and the prefill of `old` once more.
    assert (old.first_token_s, old.second_token_s) == (2 * TICK_S, 8 * TICK_S)
    assert sorted(gap_s / TICK_S for gap_s in notes.gaps) == [1, 1, 1, 1, 6]
