"""Log probabilities: of every token, consistent, the same every time, and nothing where nobody asked."""

from __future__ import annotations

import json
import logging
import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mock_engine.logprobs import Alternatives, OutputLogprobs, parse_count, prompt_logprobs
from tests.helpers.content import WRITER, make_planner, plan

IDS = list(range(100, 130))
SOURCE = Alternatives(IDS, WRITER.decode)
token_lists = st.lists(st.integers(0, 200), min_size=1, max_size=30)
seeds = st.integers(0, 2**64 - 1)


def check_position(entries, token_id, num_top):
    """Ranks rise, probabilities fall and add up to 1 at most; the token that was chosen is there."""
    ranks = [entry["rank"] for entry in entries]
    values = [entry["logprob"] for entry in entries]
    assert ranks == sorted(set(ranks))
    assert values == sorted(values, reverse=True)
    assert all(math.isfinite(value) and value <= 0 for value in values)
    assert sum(map(math.exp, values)) <= 1 + 1e-12
    assert len({entry["token_id"] for entry in entries}) == len(entries)
    assert token_id in [entry["token_id"] for entry in entries]
    assert max(num_top, 1) <= len(entries) <= num_top + 1
    assert ranks[:num_top] == list(range(1, num_top + 1))


@given(token_ids=token_lists, num_top=st.integers(0, 10), seed=seeds, is_greedy=st.booleans())
@settings(max_examples=200)
def test_alternatives_are_ranked_and_include_the_token_that_was_chosen(token_ids, num_top, seed, is_greedy):
    found = OutputLogprobs(SOURCE, num_top, seed, token_ids, is_greedy).of(0, len(token_ids))
    assert len(found["log_probs"]) == len(found["top_logprobs"]) == len(token_ids)
    for token_id, value, entries in zip(token_ids, found["log_probs"], found["top_logprobs"], strict=True):
        check_position(entries, token_id, num_top)
        (own,) = [entry for entry in entries if entry["token_id"] == token_id]
        assert own["logprob"] == value
        assert own["token"] == WRITER.decode([token_id])
        assert own["rank"] == 1 or not is_greedy


@given(token_ids=token_lists, seed=seeds, cuts=st.lists(st.integers(0, 30), max_size=5))
@settings(max_examples=100)
def test_values_do_not_depend_on_how_the_answer_is_cut_into_chunks(token_ids, seed, cuts):
    whole = OutputLogprobs(SOURCE, 2, seed, token_ids, False).of(0, len(token_ids))
    ends = sorted({0, len(token_ids), *(cut for cut in cuts if cut < len(token_ids))})
    chunked = OutputLogprobs(SOURCE, 2, seed, token_ids, False)
    parts = [chunked.of(start, end) for start, end in pairwise(ends)]
    for name, values in whole.items():
        assert [value for part in parts for value in part[name]] == values


def test_the_distribution_is_the_one_that_is_stated():
    """Of rank r with probability p (1 - p)^(r - 1), where p is uniform between 0.3 and 0.99: the chosen ones, too."""
    found = OutputLogprobs(SOURCE, 1, 7, [100] * 50_000, False).of(0, 50_000)
    ranks = [next(e["rank"] for e in entries if e["token_id"] == 100) for entries in found["top_logprobs"]]
    best = [math.exp(entries[0]["logprob"]) for entries in found["top_logprobs"]]
    assert 0.3 <= min(best) < max(best) <= 0.99
    assert sum(best) / len(best) == pytest.approx(0.645, abs=0.005)
    assert ranks.count(1) / len(ranks) == pytest.approx(0.645, abs=0.01)
    mean_of_two = 0.645 - (0.99**3 - 0.3**3) / 3 / 0.69  # of p (1 - p)
    assert ranks.count(2) / len(ranks) == pytest.approx(mean_of_two, abs=0.01)


def test_more_alternatives_than_there_are_words_give_them_all():
    (entries,) = OutputLogprobs(SOURCE, 10**9, 0, [100], False).of(0, 1)["top_logprobs"]
    assert {entry["token_id"] for entry in entries} == set(IDS)


@given(token_ids=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=30), num_top=st.integers(0, 5), seed=seeds)
@settings(max_examples=100)
def test_prompt_logprobs_are_what_dynamo_reads(token_ids, num_top, seed):
    found = prompt_logprobs(SOURCE, num_top, seed, token_ids)
    assert len(found) == len(token_ids)
    assert found[0] is None
    for token_id, position in zip(token_ids[1:], found[1:], strict=True):
        entries = [{"token_id": int(key), **entry} for key, entry in position.items()]
        check_position(entries, token_id, num_top)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


@pytest.mark.parametrize(
    ("value", "count"),
    [(None, None), ("", None), (0, 0), (5, 5), ("3", 3), (True, 1), (2.0, 2)],
)
def test_counts_are_read_as_dynamo_reads_them(value, count, caplog):
    assert parse_count({"logprobs": value}, "logprobs") == count
    assert not caplog.records


@pytest.mark.parametrize("value", [-1, "x", [1], {}, float("inf"), float("nan")])
def test_a_wrong_count_is_ignored_with_one_warning(value, caplog):
    with caplog.at_level(logging.WARNING):
        (answer,) = plan(make_planner(), output={"logprobs": value, "prompt_logprobs": None}, max_tokens=3)
    assert answer.logprobs is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "logprobs is" in caplog.text


def test_nobody_pays_who_does_not_ask():
    (answer,) = plan(make_planner(), max_tokens=3)
    assert answer.logprobs is None
    assert answer.engine_data is None


def test_choices_have_values_of_their_own_and_one_prompt_the_same():
    planner = make_planner()
    first, second = plan(planner, sampling={"n": 2}, output={"logprobs": 1, "prompt_logprobs": 1}, max_tokens=5)
    assert first.logprobs.of(0, 5) != second.logprobs.of(0, 5)
    assert first.engine_data == second.engine_data
    assert [list(position) for position in first.engine_data["prompt_logprobs"][1:]] != [[], []]


def test_temperature_zero_chooses_the_likeliest():
    (answer,) = plan(make_planner(), sampling={"temperature": 0.0}, output={"logprobs": 1}, max_tokens=50)
    assert {entries[0]["rank"] for entries in answer.logprobs.of(0, 50)["top_logprobs"]} == {1}
    assert {len(entries) for entries in answer.logprobs.of(0, 50)["top_logprobs"]} == {1}
