"""The scheduler against the same policy written out plainly, and runs of decode steps against single steps."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mock_engine.engine_settings import ENGINE_TYPES
from mock_engine.kv_blocks import KvBlocks
from mock_engine.scheduler_config import SchedulerConfig
from mock_engine.sequence import SequenceState, Status
from mock_engine.waiting_queue import SCHEDULING_POLICIES
from tests.helpers.plain_scheduler import PlainScheduler, PlainSequence, PlainSglangScheduler, PlainTrtllmScheduler
from tests.helpers.workloads import BLOCK_SIZE, MAX_MODEL_LEN, speculations, workloads

PLAIN = {"vllm": PlainScheduler, "sglang": PlainSglangScheduler, "trtllm": PlainTrtllmScheduler}

options = st.fixed_dictionaries(
    {
        "num_blocks": st.integers(MAX_MODEL_LEN // BLOCK_SIZE, 40),
        "max_num_seqs": st.integers(1, 8),
        "max_num_batched_tokens": st.integers(8, 64),
        "enable_prefix_caching": st.booleans(),
        "enable_chunked_prefill": st.booleans(),
        "speculation": st.none() | speculations,
        "scheduling_policy": st.sampled_from(SCHEDULING_POLICIES),
    }
)


def make(
    kind,
    num_blocks,
    max_num_seqs,
    max_num_batched_tokens,
    enable_prefix_caching,
    enable_chunked_prefill,
    speculation,
    scheduling_policy,
):
    tokens_per_sequence = 1 if speculation is None else 1 + speculation.num_tokens
    config = SchedulerConfig(
        min(max_num_seqs, max_num_batched_tokens // tokens_per_sequence),
        max_num_batched_tokens if enable_chunked_prefill else MAX_MODEL_LEN + max_num_batched_tokens,
        MAX_MODEL_LEN,
        enable_chunked_prefill,
        speculation,
        scheduling_policy,
    )
    return kind(config, KvBlocks(num_blocks, BLOCK_SIZE, enable_prefix_caching))


@pytest.mark.parametrize("engine_type", ENGINE_TYPES)
@given(workload=workloads(), options=options)
@settings(max_examples=600)
def test_every_step_is_the_one_that_the_policy_written_out_plainly_gives(engine_type, workload, options):
    """Same load, same tokens, same blocks in use and cached, in every step; whatever is cancelled or preempted."""
    scheduler, plain = make(ENGINE_TYPES[engine_type], **options), make(PLAIN[engine_type], **options)
    pairs: dict[str, tuple[SequenceState, PlainSequence]] = {}
    pending = list(workload)
    number = 0

    def cancel(in_step: bool) -> None:
        for arrival in workload:
            pair = pairs.get(arrival.request.request_id)
            if pair and arrival.cancel_at_step == number and arrival.cancel_in_step == in_step:
                scheduler.cancel(pair[0])
                plain.cancel(pair[1])

    while pending or scheduler.num_running or scheduler.waiting:
        while pending and pending[0].at_step <= number:
            request = pending.pop(0).request
            pair = SequenceState(request), PlainSequence(request)
            pairs[request.request_id] = pair
            scheduler.add(pair[0])
            plain.add(pair[1])
        cancel(in_step=False)
        schedule = scheduler.schedule()
        assert schedule.load == plain.schedule()
        assert scheduler.blocks.num_free == plain.blocks.num_free
        cancel(in_step=True)
        decoding = [sequence.request for sequence in scheduler.decoding if schedule.has_decodes]
        progress = scheduler.complete(schedule)
        emitted = plain.complete()
        assert decoding + [sequence.request for sequence in progress.prefilled] == [
            sequence.request for sequence in emitted
        ]
        assert scheduler.blocks.num_free == plain.blocks.num_free
        assert scheduler.blocks._holders == plain.blocks._holders
        for sequence, other in pairs.values():
            if sequence.status is not Status.CANCELLED:
                assert (sequence.num_output_tokens, sequence.num_computed_tokens) == (
                    other.num_output,
                    other.num_computed,
                )
        number += 1
