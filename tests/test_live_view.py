"""What `serve` shows while it runs."""

from __future__ import annotations

import io
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from mock_engine.live_view import FleetView
from tests.test_bench_results import make_timeline


def render(table):
    console = Console(file=io.StringIO(), width=120)
    console.print(table)
    return console.file.getvalue()


def test_a_worker_that_has_not_started_has_an_empty_row():
    text = render(FleetView().table([None, make_timeline()[0]]))
    assert len(text.splitlines()) == 3


def test_tokens_a_second_are_those_of_the_last_second():
    """Twenty tokens every quarter of a second, whatever came before."""
    view = FleetView()
    quiet = [replace(row, num_output_tokens=0) for row in make_timeline(20)]
    busy = [replace(row, unix_s=row.unix_s + 5) for row in make_timeline(20)]
    lines = [view.line([row]) for row in quiet + busy]
    assert ", 0 tokens/s" in lines[19]
    assert ", 80 tokens/s" in lines[-1]


@given(st.integers(0, 1000), st.integers(0, 1000), st.integers(0, 1000))
def test_the_kv_bar_always_has_the_same_width_and_the_blocks_add_up(used, cached, free):
    total = max(1, used + cached + free)
    state = replace(make_timeline()[0], kv_used_blocks=used, kv_cached_blocks=cached, kv_total_blocks=total)
    text = render(FleetView().table([state]))
    bar = [character for character in text if character in "█▒·"]
    assert len(bar) == 12
    assert bar == sorted(bar, key="█▒·".index)
    assert f"{used:,}, {cached:,}, {total - used - cached:,}" in text


def test_a_line_adds_the_workers_up_and_shows_the_worst_lateness():
    state = make_timeline()[2]
    late = replace(state, lateness_p99_s=0.0123)
    line = FleetView().line([state, None, late])
    assert line == "running 4, waiting 2, KV blocks 40/200 used, 0 tokens/s, lateness p99 12.3 ms"
