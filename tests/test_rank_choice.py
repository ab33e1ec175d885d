"""Which data-parallel rank takes a request."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mock_engine.rank_choice import choose_rank


@dataclass
class Rank:
    num_running: int
    num_waiting: int


ranks = st.lists(st.builds(Rank, st.integers(0, 9), st.integers(0, 3)), min_size=1, max_size=5)


@given(ranks=ranks, wanted=st.integers(0, 4))
def test_the_router_s_rank_is_taken_and_nobody_else_s_load_matters(ranks, wanted):
    if wanted < len(ranks):
        assert choose_rank({"routing": {"dp_rank": wanted}}, ranks) == wanted


@given(ranks=ranks, wanted=st.none() | st.integers(max_value=-1) | st.integers(min_value=5) | st.text())
def test_without_a_rank_that_is_there_the_least_loaded_takes_it(ranks, wanted):
    chosen = choose_rank({"routing": {"dp_rank": wanted}}, ranks)
    loads = [4 * rank.num_waiting + rank.num_running for rank in ranks]
    assert chosen == loads.index(min(loads))


@pytest.mark.parametrize("wire", [{}, {"routing": None}, {"routing": {}}, {"routing": {"dp_rank": None}}])
def test_a_request_need_not_say_anything_about_routing(wire, caplog):
    assert choose_rank(wire, [Rank(1, 0), Rank(0, 0)]) == 1
    assert not caplog.records


def test_a_rank_that_is_not_there_is_said_in_one_line(caplog):
    assert choose_rank({"routing": {"dp_rank": 2}}, [Rank(0, 0), Rank(0, 0)]) == 0
    assert [record.getMessage() for record in caplog.records] == [
        "a request wants dp_rank 2; there are 0 to 1. The least loaded takes it."
    ]
