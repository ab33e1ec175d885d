"""Who is served first, and who is preempted, with --scheduling-policy priority."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from mock_engine.engine_settings import ENGINE_TYPES
from mock_engine.request import Request
from mock_engine.sequence import SequenceState
from mock_engine.speculation import Speculation
from mock_engine.waiting_queue import make_queue
from tests.helpers.virtual import drive, timed_requests
from tests.helpers.workloads import BLOCK_SIZE, MAX_MODEL_LEN, make_core, run, speculations, workloads

options = st.fixed_dictionaries(
    {
        "num_blocks": st.integers(MAX_MODEL_LEN // BLOCK_SIZE, 30),
        "max_num_seqs": st.integers(1, 4),
        "max_num_batched_tokens": st.integers(8, 32),
        "engine_type": st.sampled_from(list(ENGINE_TYPES)),
        "is_async": st.booleans(),
        "speculation": st.none() | speculations,
    }
)


@given(workload=timed_requests(), options=options)
@settings(max_examples=400)
def test_equally_important_requests_come_first_come_first_served(workload, options):
    """The same floats, whatever is preempted or cancelled."""
    equal = [replace(timed, request=with_priority(timed.request, 7)) for timed in workload]
    first, first_notes = drive(equal, False, 0.0, scheduling_policy="fcfs", **options)
    second, second_notes = drive(equal, False, 0.0, scheduling_policy="priority", **options)
    assert second.token_s == first.token_s
    assert second_notes.flights == first_notes.flights
    assert second.scheduler.num_preemptions == first.scheduler.num_preemptions


@given(workload=timed_requests(), options=options)
@settings(max_examples=150)
def test_with_fcfs_nobody_asks_for_importance(workload, options):
    plain = [replace(timed, request=with_priority(timed.request, 0)) for timed in workload]
    assert drive(workload, False, 0.0, **options)[0].token_s == drive(plain, False, 0.0, **options)[0].token_s


@given(workload=workloads(), options=options)
@settings(max_examples=500)
def test_nobody_is_admitted_before_a_more_important_one_that_waits(workload, options):
    """Of all that wait when a step begins, those admitted come before those that are not, by importance."""
    core = make_core(scheduling_policy="priority", **options)
    schedule = core.scheduler.schedule

    def checked():
        waiting = set(core.scheduler.waiting)
        scheduled = schedule()
        admitted = [sequence.request.priority for sequence in waiting - set(core.scheduler.waiting)]
        left = [sequence.request.priority for sequence in waiting & set(core.scheduler.waiting)]
        assert not admitted or not left or max(admitted) <= min(left)
        return scheduled

    core.scheduler.schedule = checked
    run(core, workload)


@given(workload=workloads(), options=options)
@settings(max_examples=500)
def test_vllm_preempts_nobody_that_is_more_important_than_one_who_stays(workload, options):
    core = make_core(scheduling_policy="priority", **{**options, "engine_type": "vllm"})
    schedule = core.scheduler.schedule

    def checked():
        running = {*core.scheduler.decoding, *core.scheduler.prefilling}
        scheduled = schedule()
        taken = [sequence.request.priority for sequence in core.scheduler.preempted]
        stay = [sequence.request.priority for sequence in running - set(core.scheduler.preempted)]
        assert not taken or not stay or min(taken) >= max(stay)
        return scheduled

    core.scheduler.schedule = checked
    run(core, workload)


def test_a_late_important_request_overtakes_those_that_wait_and_nobody_that_runs():
    core = make_core(max_num_seqs=1, max_num_batched_tokens=48, scheduling_policy="priority")
    finished = []
    now_s = 0.0
    arriving = [Request("running", 4, 3, priority=9), Request("waits", 4, 3), Request("important", 4, 3, priority=-1)]
    while True:
        if arriving:
            core.enqueue(core.prepare(arriving.pop(0)))
        if (step := core.begin_step()) is None:
            break
        now_s += 1
        finished += [
            token.sequence.request.request_id for token in core.end_step_with_tokens(step, now_s) if token.is_last
        ]
    assert finished == ["running", "important", "waits"]


def test_an_important_request_is_looked_at_though_the_one_that_was_first_found_too_few_blocks():
    """The large one waits for blocks; a small and more important one fits beside what runs."""
    core = make_core(num_blocks=12, max_num_batched_tokens=48, scheduling_policy="priority")
    core.enqueue(core.prepare(Request("running", 20, 20)))
    core.end_step(core.begin_step(), 1.0)
    core.enqueue(core.prepare(Request("large", 40, 1)))
    core.end_step(core.begin_step(), 2.0)
    assert core.scheduler._is_head_blocked
    small = core.prepare(Request("small", 4, 1, priority=-1))
    core.enqueue(small)
    core.end_step(core.begin_step(), 3.0)
    assert small.is_final


def test_who_waits_again_stands_where_it_stood():
    queue = make_queue("priority")
    first, second, third = (SequenceState(Request(name, 1, 1)) for name in ("first", "second", "third"))
    important = SequenceState(Request("important", 1, 1, priority=-5))
    for sequence in (first, second, third):
        queue.append(sequence)
    assert queue.popleft() is first
    assert queue.popleft() is second
    queue.append(important)
    queue.appendleft(second)
    queue.appendleft(first)
    assert list(queue) == [important, first, second, third]
    queue.append(queue.popleft())  # as if it came anew
    assert list(queue) == [important, first, second, third]


def with_priority(request, priority):
    return Request(request.request_id, request.isl_tokens, request.osl_tokens, request.block_hashes, priority=priority)


def test_what_a_step_would_have_computed_of_a_victim_is_not_offered_for_sharing():
    """Its second block would be full after the step that gives its third one, for draft tokens, to another prompt."""
    core = make_core(
        max_num_batched_tokens=10,
        num_blocks=MAX_MODEL_LEN // BLOCK_SIZE,
        scheduling_policy="priority",
        speculation=Speculation(1, acceptance_rate=0.0, draft_cost=0.1),
    )
    victim = core.prepare(Request("victim", 3, 20, [1, 2, 3, 4, 5], priority=1))
    core.enqueue(victim)
    core.end_step(core.begin_step(), 0.0)
    core.enqueue(core.prepare(Request("important", 44, 1)))
    now_s = 0.0
    while not victim.num_preemptions:
        num_computed = victim.num_computed_tokens
        step = core.begin_step()
        now_s += 1
        core.end_step(step, now_s)
    assert num_computed == 2 * BLOCK_SIZE - 1
    assert core.scheduler.blocks.num_prefix_blocks([1, 2]) == 1


def test_of_those_that_wait_who_has_blocks_goes_first():
    """However unimportant: a prompt whose KV cache comes from another worker keeps its blocks while it waits."""
    core = make_core(num_blocks=12, max_num_seqs=1, max_num_batched_tokens=48, scheduling_policy="priority")
    handed_over = core.prepare(Request("handed over", 40, 1, priority=9))
    assert core.reserve(handed_over)
    important = core.prepare(Request("important", 40, 1, priority=-9))
    core.enqueue(important)
    core.enqueue(handed_over)
    assert list(core.scheduler.waiting) == [handed_over, important]
    core.end_step(core.begin_step(), 1.0)
    assert handed_over.is_final
    core.end_step(core.begin_step(), 2.0)
    assert important.is_final
