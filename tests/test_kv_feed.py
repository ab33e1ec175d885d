"""What goes out to a router, in which order, and that nothing goes out when it should not."""

from __future__ import annotations

import queue
import threading

import pytest

from mock_engine import kv_feed
from mock_engine.kv_feed import KvFeed
from mock_engine.request import Request, hash_blocks
from tests.helpers.kv_listener import RouterTree
from tests.helpers.workloads import BLOCK_SIZE, MAX_MODEL_LEN, make_core

PATIENCE_S = 10
TOKENS = list(range(MAX_MODEL_LEN))
REQUEST = Request("r", 40, 8, hash_blocks(TOKENS, BLOCK_SIZE), token_ids=TOKENS)


class Publisher:
    """Takes what Dynamo's `KvEventPublisher` takes, and applies it to a tree."""

    def __init__(self):
        self.tree = RouterTree(BLOCK_SIZE)
        self.num_calls = 0
        self.threads = set()

    def publish_stored(self, token_ids, num_block_tokens, block_hashes, parent_hash=None):
        self._called()
        assert num_block_tokens == [BLOCK_SIZE] * len(block_hashes)
        self.tree.store(parent_hash, block_hashes, token_ids)

    def publish_removed(self, block_hashes):
        self._called()
        self.tree.remove(block_hashes)

    def _called(self):
        self.num_calls += 1
        self.threads.add(threading.current_thread())


def settle(feed):
    """Wait until the feed's thread has done all that it was told until now."""
    done = threading.Event()
    feed._put(done.set)
    assert done.wait(PATIENCE_S)


@pytest.fixture
def cores():
    return [make_core(), make_core()]


@pytest.fixture
def feed(cores):
    before = set(threading.enumerate())
    feed = KvFeed(BLOCK_SIZE, [core.scheduler for core in cores])
    yield feed
    feed.close()
    assert set(threading.enumerate()) <= before


def run(core, request=REQUEST):
    core.enqueue(core.prepare(request))
    now_s = max(0.0, core._now_s)
    while step := core.begin_step():
        now_s += step.seconds
        core.end_step(step, now_s)


def test_each_rank_tells_its_own_publisher_and_closing_takes_everything_back(feed, cores):
    publishers = [Publisher(), Publisher()]
    for rank, publisher in enumerate(publishers):
        feed.attach_kv(rank, publisher)
    run(cores[1])
    settle(feed)
    assert len(publishers[1].tree.tokens) == 11  # all full blocks of which each token was computed
    assert not publishers[0].num_calls
    assert publishers[1].threads.isdisjoint({threading.current_thread()})
    run(cores[0])  # may not be out yet
    feed.close()
    assert [publisher.tree.tokens for publisher in publishers] == [{}, {}]
    num_calls = publishers[0].num_calls
    assert num_calls
    cores[0].scheduler.blocks._evict(5)
    run(cores[0])
    feed.attach_kv(1, publishers[1])
    feed.close()
    assert publishers[0].num_calls == num_calls
    assert feed._work.empty()  # nor is it kept for nobody


def test_where_nobody_listens_no_thread_runs_and_nothing_is_kept(feed, cores):
    num_threads = threading.active_count()
    run(cores[0])
    feed.note_load(0)
    assert cores[0].scheduler.blocks.observer is None
    assert threading.active_count() == num_threads
    assert feed._work.empty()


def test_a_listener_that_comes_late_is_told_nothing_that_hangs_in_the_air(feed, cores):
    run(cores[0], Request("early", 20, 4, REQUEST.block_hashes[:6], token_ids=TOKENS[:24]))
    publisher = Publisher()
    feed.attach_kv(0, publisher)
    run(cores[0])  # continues what was there before
    other = [1000 + token for token in TOKENS]
    run(cores[0], Request("other", 40, 8, hash_blocks(other, BLOCK_SIZE), token_ids=other))
    settle(feed)
    assert len(publisher.tree.tokens) == 11
    assert all(tokens == other[: len(tokens)] for tokens in publisher.tree.tokens.values())


def test_a_publisher_that_fails_costs_one_event_and_no_more(feed, cores, caplog):
    publisher = Publisher()
    feed.attach_kv(0, publisher)
    publisher.publish_stored = lambda *_: 1 / 0
    run(cores[0])
    settle(feed)
    assert "a KV event of rank 0 was lost" in caplog.text
    del publisher.publish_stored
    other = [1000 + token for token in TOKENS]
    run(cores[0], Request("other", 40, 8, hash_blocks(other, BLOCK_SIZE), token_ids=other))
    settle(feed)
    assert len(publisher.tree.tokens) == 11


def test_loads_are_published_when_they_have_changed_and_the_last_one_always(feed, cores):
    published = queue.SimpleQueue()
    feed.attach_loads(lambda rank, load: published.put((rank, load.num_used_blocks, load.hit_rate)))
    assert [published.get(timeout=PATIENCE_S) for _ in range(2)] == [(0, 0, None), (1, 0, None)]  # as they are
    core = cores[1]
    core.enqueue(core.prepare(REQUEST))
    core.begin_step()
    feed.note_load(1)
    assert published.get(timeout=PATIENCE_S) == (1, 4, 0.0)  # a chunk of the prompt
    feed.note_load(1)  # the same as before
    core.cancel(next(iter(core.scheduler.prefilling)))
    feed.note_load(1)
    assert published.get(timeout=PATIENCE_S) == (1, 0, 0.0)
    feed.close()
    assert published.empty()


def test_loads_are_published_no_more_often_than_the_interval_says(feed, cores, monkeypatch):
    monkeypatch.setattr(kv_feed, "_LOAD_INTERVAL_S", 1000.0)
    published = queue.SimpleQueue()
    feed.attach_loads(lambda *load: published.put(load))
    for _ in cores:
        published.get(timeout=PATIENCE_S)
    feed.attach_kv(0, Publisher())
    for number in range(20):  # there is always something else to do
        tokens = [number * 100 + token for token in TOKENS]
        run(cores[0], Request("r", 40, 8, hash_blocks(tokens, BLOCK_SIZE), token_ids=tokens))
        feed.note_load(0)
    settle(feed)
    assert published.empty()
