"""The core as a whole: what must hold for any workload, whatever is cancelled or preempted on the way."""

from __future__ import annotations

import re
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mock_engine.engine_settings import DEFAULT_PROFILE, ENGINE_TYPES, EngineSettings, build_engine
from mock_engine.errors import ConfigError, RequestError
from mock_engine.profile import PROFILES_DIR
from mock_engine.request import Request, hash_blocks
from mock_engine.scheduler_config import SchedulerConfig
from mock_engine.sequence import Status
from mock_engine.step import StepLoad
from mock_engine.waiting_queue import SCHEDULING_POLICIES
from tests.helpers.workloads import BLOCK_SIZE, MAX_MODEL_LEN, make_core, run, speculations, step_s, workloads

core_options = st.fixed_dictionaries(
    {
        "num_blocks": st.integers(MAX_MODEL_LEN // BLOCK_SIZE, 40),
        "max_num_seqs": st.integers(1, 8),
        "max_num_batched_tokens": st.integers(8, 64),
        "enable_prefix_caching": st.booleans(),
        "engine_type": st.sampled_from(list(ENGINE_TYPES)),
        "speculation": st.none() | speculations,
        "scheduling_policy": st.sampled_from(SCHEDULING_POLICIES),
    }
)


@given(workload=workloads(), options=core_options)
@settings(max_examples=900)
def test_every_request_gets_its_osl_or_is_cancelled_and_all_kv_blocks_come_back(workload, options):
    """Nothing is lost, repeated, reordered or leaked; `run` checks the block invariant after every move."""
    core = make_core(**options)
    states, tokens = run(core, workload)
    for arrival in workload:
        request = arrival.request
        made = tokens[request.request_id]
        assert [token.output_index for token in made] == list(range(len(made)))
        due_s = [token.due_s for token in made]
        assert due_s == sorted(due_s)
        most = 1 if options["speculation"] is None else 1 + options["speculation"].num_tokens
        assert all(due_s.count(each_s) <= most for each_s in due_s)
        if states[request.request_id].status is Status.FINISHED:
            assert len(made) == request.osl_tokens
            assert [token.is_last for token in made] == [False] * (len(made) - 1) + [True]
        else:
            assert states[request.request_id].status is Status.CANCELLED
            assert arrival.cancel_at_step is not None
            assert len(made) < request.osl_tokens
            assert not any(token.is_last for token in made)
    assert core.scheduler.blocks.num_used == 0
    if not options["enable_prefix_caching"]:
        assert core.scheduler.blocks.num_free == options["num_blocks"]


@given(workload=workloads(), options=core_options)
@settings(max_examples=400)
def test_no_step_exceeds_the_limits_and_every_step_does_something(workload, options):
    core = make_core(**options)

    def check(_: int) -> None:
        schedule = core._current.schedule
        assert 1 <= schedule.load.num_tokens <= options["max_num_batched_tokens"]
        num_sequences = len(schedule.prefills) + (len(core.scheduler.decoding) if schedule.has_decodes else 0)
        assert num_sequences <= core.scheduler.num_running <= options["max_num_seqs"]
        assert num_sequences == len(schedule.load.prefill_chunks) + schedule.load.decode_batch_size

    run(core, workload, on_step=check)


@given(workload=workloads(with_cancels=False), options=core_options)
@settings(max_examples=400)
def test_without_preemption_first_tokens_come_in_order_of_arrival(workload, options):
    core = make_core(**{**options, "scheduling_policy": "fcfs"})
    _, tokens = run(core, workload)
    if core.scheduler.num_preemptions == 0:
        first_s = [tokens[arrival.request.request_id][0].due_s for arrival in workload]
        assert first_s == sorted(first_s)


@given(workload=workloads(with_cancels=False))
@settings(max_examples=150)
def test_the_same_workload_gives_the_same_times_twice(workload):
    first, second = (
        [[(token.output_index, token.due_s) for token in made] for made in run(core, workload)[1].values()]
        for core in (make_core(num_blocks=16), make_core(num_blocks=16))
    )
    assert first == second


def test_one_request_alone_takes_one_prefill_and_osl_minus_one_decodes():
    """Formula: the first token comes with the prefill, each later one with a decode step."""
    core = make_core(max_num_batched_tokens=64)
    seconds = []
    core_request = Request("r", isl_tokens=10, osl_tokens=5)
    core.enqueue(core.prepare(core_request))
    while (step := core.begin_step()) is not None:
        load = step.schedule.load
        seconds.append((sum(chunk.new_tokens for chunk in load.prefill_chunks), load.context_tokens))
        core.end_step(step, float(len(seconds)))
    assert seconds == [(10, 0), (0, 11), (0, 12), (0, 13), (0, 14)]


def test_a_long_prompt_is_computed_in_chunks_beside_running_decodes():
    core = make_core(max_num_batched_tokens=8)
    core.enqueue(core.prepare(Request("short", 3, 20)))
    core.end_step(core.begin_step(), 0.0)
    core.enqueue(core.prepare(Request("long", 20, 2)))
    chunks = []
    for now_s in range(1, 4):
        step = core.begin_step()
        chunks.append((step.schedule.load.prefill_chunks, step.schedule.load.decode_batch_size))
        core.end_step(step, float(now_s))
    assert chunks == [(((7, 0),), 1), (((7, 7),), 1), (((6, 14),), 1)]


def test_a_second_identical_prompt_skips_its_full_blocks_but_never_the_last_token():
    core = make_core()
    prompt = list(range(2 * BLOCK_SIZE))
    hashes = hash_blocks(prompt, BLOCK_SIZE)
    for expected_cached in (0, BLOCK_SIZE):  # of two full blocks, one: the last token must be computed
        sequence = core.prepare(Request("r", len(prompt), 1, hashes))
        core.enqueue(sequence)
        core.end_step(core.begin_step(), float(expected_cached))
        assert sequence.num_cached_tokens == expected_cached
        assert sequence.status is Status.FINISHED


def test_output_blocks_are_found_by_the_next_turn_of_a_conversation():
    core = make_core(max_num_batched_tokens=40)
    conversation = list(range(5 * BLOCK_SIZE))
    first = core.prepare(Request("turn 1", 2 * BLOCK_SIZE, 2 * BLOCK_SIZE + 1, hash_blocks(conversation, BLOCK_SIZE)))
    core.enqueue(first)
    now_s = 0.0
    while (step := core.begin_step()) is not None:
        now_s += 1
        core.end_step(step, now_s)
    second = core.prepare(Request("turn 2", 5 * BLOCK_SIZE, 1, hash_blocks(conversation, BLOCK_SIZE)))
    core.enqueue(second)
    core.begin_step()
    assert second.num_cached_tokens == 4 * BLOCK_SIZE


def test_the_newest_running_sequence_is_preempted_and_finishes_later():
    core = make_core(num_blocks=12, max_num_batched_tokens=48, enable_prefix_caching=False)
    old, new = core.prepare(Request("old", 20, 28)), core.prepare(Request("new", 20, 28))
    core.enqueue(old)
    core.enqueue(new)
    finished = []
    now_s = 0.0
    while (step := core.begin_step()) is not None:
        now_s += 1
        finished += [token.sequence for token in core.end_step_with_tokens(step, now_s) if token.is_last]
    assert finished == [old, new]
    assert (old.num_preemptions, new.num_preemptions) == (0, 1)


@pytest.mark.parametrize(
    ("isl", "osl", "message"),
    [
        (0, 1, "the prompt has 0 tokens; at least 1 is needed"),
        (1, 0, "0 output tokens were asked for; at least 1 is needed"),
        (40, 9, "49 in all; the context length is 48. Shorten the prompt or lower max_tokens."),
    ],
)
def test_a_request_that_can_never_be_served_is_refused_with_a_reason(isl, osl, message):
    with pytest.raises(RequestError, match=message):
        make_core().prepare(Request("r", isl, osl))


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_num_seqs": 0}, "--max-num-seqs is 0; it must be at least 1"),
        ({"max_num_batched_tokens": 4}, "--max-num-batched-tokens is 4, less than --max-num-seqs 8"),
        ({"enable_chunked_prefill": False}, r"without chunked prefill --max-num-batched-tokens \(16\)"),
    ],
)
def test_limits_that_do_not_go_together_are_refused(limits, message):
    with pytest.raises(ConfigError, match=message):
        SchedulerConfig(**{"max_num_seqs": 8, "max_num_batched_tokens": 16, "max_model_len": 48, **limits})


def test_a_kv_cache_too_small_for_one_request_is_refused():
    with pytest.raises(ConfigError, match=r"holds 44 tokens .* Use --max-model-len 44 or less"):
        make_core(num_blocks=11)


def test_time_never_runs_back():
    core = make_core()
    core.enqueue(core.prepare(Request("r", 1, 2)))
    core.end_step(core.begin_step(), 2.0)
    with pytest.raises(AssertionError, match="time never runs back"):
        core.end_step(core.begin_step(), 1.0)


@given(st.lists(st.integers(0, 2**32 - 1), max_size=64), st.integers(1, 16), st.integers(0, 64))
def test_block_hashes_agree_exactly_as_far_as_the_tokens_do(tokens, block_size, position):
    """Equal prefixes hash alike; a changed token changes its block and every block after it."""
    hashes = hash_blocks(tokens, block_size)
    assert len(hashes) == len(tokens) // block_size
    assert all(-(2**63) <= block_hash < 2**63 for block_hash in hashes)
    if position < len(tokens):
        changed = list(tokens)
        changed[position] += 1
        same = position // block_size
        other = hash_blocks(changed, block_size)
        assert other[:same] == hashes[:same]
        assert not set(other[same:]) & set(hashes[same:])


def test_the_made_up_step_time_is_what_the_core_reports():
    core = make_core()
    core.enqueue(core.prepare(Request("r", 7, 1)))
    step = core.begin_step()
    assert step.seconds == step_s(step.schedule.load)


def test_who_arrives_while_all_wait_for_kept_blocks_is_not_too_late_for_a_step_that_is_not_under_way():
    """Asynchronous: the limit is of a busy engine; one that found nothing to run decides anew when blocks are back."""
    core = make_core(num_blocks=MAX_MODEL_LEN // BLOCK_SIZE, is_async=True)
    kept = core.prepare(Request("kept", MAX_MODEL_LEN - BLOCK_SIZE, 1, keeps_blocks=True))
    core.enqueue(kept)
    now_s = 0.0
    while (step := core.begin_step()) is not None:
        now_s += step.seconds
        core.end_step(step, now_s)
    assert core.admission_limit_s == float("inf"), "nothing to do"
    core.enqueue(core.prepare(Request("waits", MAX_MODEL_LEN - BLOCK_SIZE, 1)))
    assert core.begin_step() is None
    assert core.has_work
    assert core.admission_limit_s == float("inf")
    core.scheduler.give_back(kept)
    step = core.begin_step()
    assert step is not None
    assert core.admission_limit_s < float("inf")


def test_an_engine_is_what_its_profile_s_files_say_now(tmp_path):
    """They are kept from one simulation to the next, and read again once they have changed."""
    folder = tmp_path / "profile"
    shutil.copytree(PROFILES_DIR / DEFAULT_PROFILE, folder)
    chosen = EngineSettings(profile=str(folder), jitter=0.0)
    load = StepLoad((), 1, 100)
    before_s = build_engine(chosen).core._times.step_s(load)
    assert build_engine(chosen).core._times.step_s(load) == before_s
    text = (folder / "profile.toml").read_text()
    (folder / "profile.toml").write_text(re.sub("overhead_step_s = .*", "overhead_step_s = 0.5", text))
    assert 0.49 < build_engine(chosen).core._times.step_s(load) - before_s < 0.5
