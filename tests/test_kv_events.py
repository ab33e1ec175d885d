"""What a router is told of a KV cache: random workloads through the real schedulers, and a model of its tree."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mock_engine import kv_events
from mock_engine.engine_settings import ENGINE_TYPES
from mock_engine.kv_events import KvEventLog, Removed, Stored
from mock_engine.request import Request, hash_blocks
from tests.helpers.kv_listener import KvListener, RouterTree
from tests.helpers.workloads import BLOCK_SIZE, MAX_MODEL_LEN, Arrival, make_core, run, workloads

TOO_FEW_BLOCKS = MAX_MODEL_LEN // BLOCK_SIZE  # of one sequence: blocks are evicted, and sequences preempted


def with_tokens(arrival: Arrival, family: int, num_shared: int) -> Arrival:
    """The same arrival with token ids, of which the first `num_shared` are those of its family."""
    old = arrival.request
    length = old.isl_tokens + old.osl_tokens
    shared = [family * 1000 + i for i in range(min(num_shared, length))]
    own = [hash((old.request_id[1:], i)) % 1000 + 10_000 for i in range(length - len(shared))]
    token_ids = [*shared, *own]
    hashes = hash_blocks(token_ids, BLOCK_SIZE)
    request = Request(old.request_id, old.isl_tokens, old.osl_tokens, hashes, token_ids=token_ids)
    return dataclasses.replace(arrival, request=request)


@st.composite
def told_workloads(draw):
    """Requests that share beginnings of any length, answers included."""
    return [
        with_tokens(arrival, draw(st.integers(0, 1)), draw(st.integers(0, MAX_MODEL_LEN)))
        for arrival in draw(workloads())
    ]


def num_told(log):
    """Blocks that the router knows."""
    return sum(block.is_told for block in log._blocks.values())


@given(
    workload=told_workloads(),
    num_blocks=st.integers(TOO_FEW_BLOCKS, 3 * TOO_FEW_BLOCKS),
    max_num_seqs=st.integers(1, 8),
    engine_type=st.sampled_from(sorted(ENGINE_TYPES)),
)
@settings(max_examples=300)
def test_a_router_knows_at_every_moment_exactly_what_can_be_found_in_the_cache(
    workload, num_blocks, max_num_seqs, engine_type
):
    core = make_core(num_blocks=num_blocks, max_num_seqs=max_num_seqs, engine_type=engine_type)
    blocks = core.scheduler.blocks
    listener = blocks.observer = KvListener(BLOCK_SIZE)
    requests = [arrival.request for arrival in workload]

    def check(_=None):
        found = {}
        for request in requests:
            num_found = blocks.num_prefix_blocks(request.block_hashes)
            for index, block_hash in enumerate(request.block_hashes[:num_found]):
                found[block_hash] = request.token_ids[: (index + 1) * BLOCK_SIZE]
        assert listener.tree.tokens == found  # with their tokens, and so with their parents
        assert num_told(listener.log) == len(found) <= num_blocks

    run(core, workload, on_step=check)
    check()
    listener.clear()
    assert not listener.tree.tokens
    assert num_told(listener.log) == 0
    assert not listener.log._blocks
    assert not listener.log._children


@given(workload=told_workloads(), num_blocks=st.integers(TOO_FEW_BLOCKS, 3 * TOO_FEW_BLOCKS))
@settings(max_examples=100)
def test_whoever_listens_changes_nothing(workload, num_blocks):
    outcomes = []
    for observer in (None, KvListener(BLOCK_SIZE)):
        core = make_core(num_blocks=num_blocks)
        core.scheduler.blocks.observer = observer
        states, tokens = run(core, workload)
        blocks = core.scheduler.blocks
        outcomes.append(
            (
                [[(token.output_index, token.due_s) for token in each] for each in tokens.values()],
                [state.num_cached_tokens for state in states.values()],
                (blocks.num_free, blocks.num_cached, core.scheduler.num_preemptions),
            )
        )
    assert outcomes[0] == outcomes[1]


def test_without_prefix_caching_nothing_is_told():
    core = make_core(enable_prefix_caching=False)
    core.scheduler.blocks.observer = listener = KvListener(BLOCK_SIZE)
    arrival = Arrival(Request("r", 20, 4, range(6), token_ids=range(24)), 0, None, False)
    run(core, [arrival])
    assert not listener.events


def request(*token_ids: int) -> Request:
    return Request("r", len(token_ids) - 1, 1, hash_blocks(token_ids, 2), token_ids=token_ids)


LONG = request(1, 2, 3, 4, 5, 6, 7, 8)
FORK = request(1, 2, 3, 4, 9, 9)


def test_a_chain_is_one_event_and_a_fork_another_under_its_parent():
    log = KvEventLog(2)
    a, b, c, d = LONG.block_hashes
    assert log.stored(LONG, [a, b, c]) == [Stored(None, [a, b, c], [1, 2, 3, 4, 5, 6])]
    assert log.stored(FORK, FORK.block_hashes[2:]) == [Stored(b, [FORK.block_hashes[2]], [9, 9])]
    assert log.stored(LONG, [d]) == [Stored(c, [d], [7, 8])]


def test_a_block_without_its_parent_counts_as_removed_until_the_parent_is_back():
    log = KvEventLog(2)
    a, b, c, d = LONG.block_hashes
    log.stored(LONG, [a, b, c])
    assert log.removed([b]) == [Removed([c, b])]
    assert log.stored(LONG, [d]) == []  # a child of `c`, which nobody finds
    assert log.removed([c]) == []  # and so it was not known
    assert log.stored(LONG, [b]) == [Stored(a, [b], [3, 4])]
    assert log.stored(LONG, [c]) == [Stored(b, [c, d], [5, 6, 7, 8])]
    assert log.clear() == [Removed([d, c, b, a])]


def test_what_came_before_the_log_did_is_neither_told_nor_taken_back():
    log = KvEventLog(2)
    a, b, *_ = LONG.block_hashes
    assert log.stored(LONG, [b]) == []
    assert log.removed([a, b]) == []
    assert log.stored(dataclasses.replace(LONG, token_ids=()), [a]) == []  # nor is a request without its tokens


@pytest.mark.parametrize("what", ["stored", "removed"])
def test_long_events_are_cut(what, monkeypatch):
    monkeypatch.setattr(kv_events, "MAX_EVENT_BLOCKS", 3)
    log, tree = KvEventLog(2), RouterTree(2)
    stored = log.stored(LONG, LONG.block_hashes)
    events = stored if what == "stored" else log.clear()
    assert [len(event.block_hashes) for event in events] == [3, 1]
    for event in stored:
        tree.apply(event)
    assert len(tree.tokens) == 4
