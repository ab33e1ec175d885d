"""Averages over time are areas divided by time, however time is cut into bins."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mock_engine import state_log
from mock_engine.state_log import MAX_BINS, StateLog

COUNTS = st.integers(0, 500)
STRETCHES = st.lists(
    st.tuples(st.integers(0, 3000), st.integers(0, 3000), COUNTS, COUNTS, COUNTS, COUNTS, COUNTS), max_size=12
)


@st.composite
def deployments(draw):
    """Rows of several workers: (start, end, running, waiting, blocks, blocks, tokens), idle in between."""
    tick_s = draw(st.sampled_from([1e-5, 2.0**-10, 0.003, 1.0, 777.7]))
    workers = draw(st.lists(STRETCHES, min_size=1, max_size=3))
    rows = []
    for stretches in workers:
        now = 0
        for idle, busy, *state in stretches:
            rows.append(((now + idle) * tick_s, (now + idle + busy) * tick_s, *state))
            now += idle + busy
    return len(workers), sorted(rows, key=lambda row: row[1])


def area(rows, low_s, high_s):
    """Sequence-seconds running and waiting, block-seconds and tokens from one time to another, a row at a time."""
    total = np.zeros(4)
    for start_s, end_s, running, waiting, start_blocks, end_blocks, tokens in rows:
        low, high = max(start_s, low_s), min(end_s, high_s)
        if low < high:
            growth = (end_blocks - start_blocks) / (end_s - start_s)
            blocks = start_blocks + growth * ((low + high) / 2 - start_s)
            share = (high - low) / (end_s - start_s)
            total += (running * (high - low), waiting * (high - low), blocks * (high - low), tokens * share)
        elif start_s == end_s and low_s <= start_s < high_s:
            total[3] += tokens
    return total


@given(deployments())
@settings(max_examples=80)
def test_averages_and_maxima_are_those_of_the_rows(deployment):
    num_workers, rows = deployment
    log = StateLog(num_workers)
    for row in rows:
        log.add(*row)
    usage = log.usage()
    first_s, last_s = min((row[0] for row in rows), default=0.0), max((row[1] for row in rows), default=0.0)
    if first_s == last_s:
        assert usage is None
        return
    running, waiting, blocks, _ = area(rows, first_s, last_s) / (last_s - first_s) / num_workers
    assert usage.avg_num_running == pytest.approx(running)
    assert usage.avg_num_waiting == pytest.approx(waiting)
    assert usage.avg_kv_usage == pytest.approx(blocks)
    assert usage.max_num_running == max(row[2] for row in rows)
    assert usage.max_num_waiting == max(row[3] for row in rows)
    assert usage.max_kv_usage == max(max(row[4:6]) for row in rows)


@given(deployments())
@settings(max_examples=40)
def test_each_bin_is_the_average_of_its_time(deployment):
    num_workers, rows = deployment
    log = StateLog(num_workers)
    for row in rows:
        log.add(*row)
    timeline = log.timeline()
    last_s = max((row[1] for row in rows), default=0.0)
    assert len(timeline.start_s) <= MAX_BINS
    if last_s > MAX_BINS * state_log._FIRST_BIN_S:
        assert len(timeline.start_s) >= MAX_BINS / 2
    for index in {0, len(timeline.start_s) // 3, len(timeline.start_s) - 1} & set(range(len(timeline.start_s))):
        low_s = timeline.start_s[index]
        high_s = min(low_s + timeline.bin_s, last_s)
        running, waiting, blocks, tokens = area(rows, low_s, high_s) / (high_s - low_s)
        assert timeline.num_running[index] == pytest.approx(running, abs=1e-9)
        assert timeline.num_waiting[index] == pytest.approx(waiting, abs=1e-9)
        assert timeline.kv_usage[index] == pytest.approx(blocks / num_workers, abs=1e-9)
        if high_s < last_s:  # else tokens of the very last moment may be in the bin that has no width
            assert timeline.output_tokens_per_s[index] == pytest.approx(tokens, abs=1e-6)


def test_no_token_is_lost_when_bins_widen():
    log = StateLog(1)
    for step in range(20_000):
        log.add(step * 0.013, (step + 1) * 0.013, 3, 0, 10, 11, 3)
    timeline = log.timeline()
    ends_s = np.append(timeline.start_s[1:], 20_000 * 0.013)
    assert (timeline.output_tokens_per_s * (ends_s - timeline.start_s)).sum() == pytest.approx(60_000)
    assert timeline.num_running == pytest.approx(3)
    assert timeline.bin_s == 0.5


@pytest.mark.parametrize("at_s", [0.25, MAX_BINS * state_log._FIRST_BIN_S])
def test_tokens_that_took_no_time_count_too(at_s):
    log = StateLog(1)
    log.add(at_s, at_s, 1, 0, 10, 10, 7)
    assert log.usage() is None
    log.add(at_s, 2.0, 1, 0, 10, 10, 0)
    timeline = log.timeline()
    assert timeline.output_tokens_per_s.sum() * timeline.bin_s == 7


def test_nothing_added_is_nothing_to_show():
    log = StateLog(1)
    assert log.usage() is None
    assert len(log.timeline().start_s) == 0


def test_memory_does_not_grow_with_time():
    tracemalloc.start()
    log = StateLog(8)
    for step in range(100_000):
        log.add(step * 0.01, step * 0.01 + 0.08, 3, 4, 10, 11, 3)
    log.usage()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4e6
