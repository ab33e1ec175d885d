"""The engine in virtual time: jumps over decode steps give what single steps give, to the last bit."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.virtual import drive, timed_requests
from tests.helpers.workloads import BLOCK_SIZE, MAX_MODEL_LEN, step_s, ticking_step_s

options = st.fixed_dictionaries(
    {
        "num_blocks": st.integers(MAX_MODEL_LEN // BLOCK_SIZE, 40),
        "max_num_seqs": st.integers(1, 8),
        "max_num_batched_tokens": st.integers(8, 64),
        "enable_prefix_caching": st.booleans(),
        "timing": st.sampled_from([step_s, ticking_step_s]),
    }
)


@given(workload=timed_requests(), options=options, jitter=st.sampled_from([0.0, 0.05]))
@settings(max_examples=1500, deadline=None)
def test_jumping_over_decode_steps_gives_every_token_the_time_that_single_steps_give(workload, options, jitter):
    """Chunked prefill, prefix hits, preemption, cancels and arrivals at any moment; equal means equal floats."""
    single, single_notes = drive(workload, True, jitter, **options)
    jumping, jumping_notes = drive(workload, False, jitter, **options)
    assert jumping.token_s == single.token_s
    assert jumping_notes.flights == single_notes.flights
    assert jumping_notes.gaps == single_notes.gaps
    assert single.num_run_steps == 0
    for name in ("num_steps", "num_preemptions", "num_prefix_hits_tokens"):
        assert getattr(jumping.scheduler, name) == getattr(single.scheduler, name)
    for core in (single, jumping):
        assert core.scheduler.blocks.num_used == 0
    assert jumping.scheduler.blocks._holders == single.scheduler.blocks._holders
