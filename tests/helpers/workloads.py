"""Random workloads for the core, and a loop that runs them without a clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from mock_engine.core import Core, Token
from mock_engine.engine_settings import ENGINE_TYPES
from mock_engine.kv_blocks import KvBlocks
from mock_engine.request import Request
from mock_engine.scheduler_config import SchedulerConfig
from mock_engine.sequence import SequenceState, Status
from mock_engine.speculation import Speculation
from mock_engine.step import StepLoad
from mock_engine.step_times import StepTimes
from mock_engine.timing import StepJitter

BLOCK_SIZE = 4
MAX_MODEL_LEN = 48


@dataclass(frozen=True)
class Arrival:
    """A request, the step before which it arrives, and when its client goes away."""

    request: Request
    at_step: int
    cancel_at_step: int | None  # before this step's begin (or in the middle of it)
    cancel_in_step: bool  # between begin_step and end_step rather than before


def step_s(load: StepLoad) -> float:
    """A made-up but sane step time: grows with everything."""
    prefill = sum(1e-4 * chunk.new_tokens + 1e-6 * chunk.past_tokens for chunk in load.prefill_chunks)
    return 5e-3 + prefill + 1e-5 * (load.decode_batch_size + load.num_draft_tokens) + 1e-7 * load.context_tokens


TICK_S = 2.0**-8


def ticking_step_s(load: StepLoad) -> float:
    """Step times on a grid, so that much happens at exactly the same moment."""
    return TICK_S * (1 + len(load.prefill_chunks))


class MadeUpTiming:
    """A function in place of a profile."""

    def __init__(self, function: Callable[[StepLoad], float] = step_s) -> None:
        self.step_s = function

    def decode_run_s(self, batch_size: int, context_tokens: int, num_steps: int) -> np.ndarray:
        loads = [StepLoad((), batch_size, context_tokens + batch_size * i) for i in range(num_steps)]
        return np.array([self.step_s(load) for load in loads])

    def is_measured_at(self, _: StepLoad) -> bool:
        return True


speculations = st.builds(
    Speculation,
    num_tokens=st.integers(1, 6),
    acceptance_rate=st.sampled_from([0.0, 0.3, 0.7, 0.95, 1.0]),
    draft_cost=st.sampled_from([0.0, 0.1]),
    seed=st.integers(0, 3),
)


@st.composite
def workloads(draw: st.DrawFn, max_requests: int = 14, with_cancels: bool = True) -> list[Arrival]:
    """Arrivals with shared prefixes, sorted by step."""
    arrivals = []
    for number in range(draw(st.integers(1, max_requests))):
        isl = draw(st.integers(1, MAX_MODEL_LEN - 1))
        osl = draw(st.integers(1, MAX_MODEL_LEN - isl))
        family = draw(st.integers(0, 2))  # requests of a family share their prefix
        shared = draw(st.integers(0, isl // BLOCK_SIZE))
        num_full = (isl + osl) // BLOCK_SIZE
        hashes = [hash((family, i)) if i < shared else hash((number, "own", i).__repr__()) for i in range(num_full)]
        at_step = draw(st.integers(0, 12))
        cancels = with_cancels and draw(st.booleans())
        arrivals.append(
            Arrival(
                Request(f"r{number}", isl, osl, hashes, priority=draw(st.integers(-1, 1))),
                at_step,
                at_step + draw(st.integers(0, 30)) if cancels else None,
                draw(st.booleans()),
            )
        )
    return sorted(arrivals, key=lambda arrival: arrival.at_step)


def make_core(
    num_blocks: int = 64,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 16,
    enable_prefix_caching: bool = True,
    enable_chunked_prefill: bool = True,
    jitter: float = 0.0,
    timing: Callable[[StepLoad], float] = step_s,
    is_async: bool = False,
    engine_type: str = "vllm",
    speculation: Speculation | None = None,
    scheduling_policy: str = "fcfs",
) -> Core:
    """A small core; `num_blocks` must hold one sequence of MAX_MODEL_LEN. Draft tokens may lower `max_num_seqs`."""
    if speculation is not None:
        max_num_seqs = min(max_num_seqs, max_num_batched_tokens // (1 + speculation.num_tokens))
    config = SchedulerConfig(
        max_num_seqs, max_num_batched_tokens, MAX_MODEL_LEN, enable_chunked_prefill, speculation, scheduling_policy
    )
    times = StepTimes(MadeUpTiming(timing), StepJitter(jitter, seed=1))
    blocks = KvBlocks(num_blocks, BLOCK_SIZE, enable_prefix_caching)
    return Core(ENGINE_TYPES[engine_type](config, blocks), times, is_async)


def check_blocks(core: Core) -> None:
    """used + cached + free = total, and every used block is held by somebody who runs, or kept from all."""
    blocks = core.scheduler.blocks
    assert blocks.num_used + blocks.num_cached + blocks.num_free == blocks.num_blocks
    assert min(blocks.num_used, blocks.num_cached, blocks.num_free) >= 0
    held = set()
    num_private = core.scheduler.num_held_blocks
    for sequence in (*core.scheduler.decoding, *core.scheduler.prefilling):
        held.update(sequence.table.hashes)
        if sequence in core.scheduler.decoding:
            core.scheduler._settle_table(sequence)
        num_private += sequence.table.num_private
    assert blocks.num_used == len(held) + num_private
    for sequence in core.scheduler.waiting:
        assert sequence.table.num_blocks == 0


def run(
    core: Core,
    workload: list[Arrival],
    on_step: Callable[[int], None] = lambda _: None,
) -> tuple[dict[str, SequenceState], dict[str, list[Token]]]:
    """Run until nothing is left; check the block invariant after every move. Returns states and tokens by request."""
    states: dict[str, SequenceState] = {}
    tokens: dict[str, list[Token]] = {arrival.request.request_id: [] for arrival in workload}
    pending = list(workload)
    now_s = 0.0
    number = 0
    while pending or core.has_work:
        while pending and pending[0].at_step <= number:
            request = pending.pop(0).request
            states[request.request_id] = core.prepare(request)
            core.enqueue(states[request.request_id])
        _cancel(core, workload, states, number, in_step=False)
        check_blocks(core)
        step = core.begin_step()
        check_blocks(core)
        if step is not None:
            on_step(number)
            assert step.seconds > 0
            now_s += step.seconds
            _cancel(core, workload, states, number, in_step=True)
            check_blocks(core)
            for token in core.end_step_with_tokens(step, now_s):
                assert token.sequence.status is not Status.CANCELLED
                tokens[token.sequence.request.request_id].append(token)
            check_blocks(core)
        number += 1
        assert number < 20_000, "the core does not finish"
    return states, tokens


def _cancel(core: Core, workload: list[Arrival], states: dict[str, SequenceState], number: int, in_step: bool) -> None:
    for arrival in workload:
        sequence = states.get(arrival.request.request_id)
        if sequence is not None and arrival.cancel_at_step == number and arrival.cancel_in_step == in_step:
            core.cancel(sequence)
            core.cancel(sequence)
