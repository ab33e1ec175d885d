"""What a wire request becomes: how many tokens, which ones, and why they end."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from mock_engine.content import Content
from mock_engine.engine_settings import DEFAULT_TOKENIZER
from mock_engine.errors import RequestError
from mock_engine.grammar_writer import GrammarWriter
from mock_engine.output_tokens import OutputTokens, load_tokenizer
from mock_engine.prompt import Planner

MAX_MODEL_LEN = 64
BLOCK_SIZE = 4
EOS = 1000
WORD_IDS = range(20)  # so few that every stop token comes up


TOKENIZER = load_tokenizer(DEFAULT_TOKENIZER / "tokenizer.json")


def make_planner(default_osl=10, seed=0, eos_token_ids=(EOS,), max_model_len=MAX_MODEL_LEN, settings=None):
    words = OutputTokens(WORD_IDS, eos_token_ids)
    content = Content(GrammarWriter(TOKENIZER, words.word_ids, words.eos_token_ids), words, settings)
    return Planner(words, max_model_len, BLOCK_SIZE, default_osl, seed, list, content)


def plan(prompt, sampling=None, planner=None, eos_token_ids=None, **stop):
    wire = {"token_ids": prompt, "stop_conditions": stop, "sampling_options": sampling, "eos_token_ids": eos_token_ids}
    return (planner or make_planner()).plan("r", wire)


def plan_one(prompt, sampling=None, planner=None, **others):
    (answer,) = plan(prompt, sampling, planner, **others)
    return answer


prompts = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=MAX_MODEL_LEN - 1)
seeds = st.none() | st.integers(-(2**63), 2**63 - 1)
max_tokens_ = st.none() | st.integers(1, 2 * MAX_MODEL_LEN)
min_tokens_ = st.none() | st.integers(0, 2 * MAX_MODEL_LEN)
stop_ids = st.none() | st.lists(st.sampled_from([*WORD_IDS, EOS]), max_size=2)


@given(
    prompt=prompts,
    seed=seeds,
    n=st.integers(1, 3),
    max_tokens=max_tokens_,
    min_tokens=min_tokens_,
    ignore_eos=st.none() | st.booleans(),
    visible=stop_ids,
    hidden=stop_ids,
    ends=stop_ids,
)
@settings(max_examples=300)
def test_every_answer_keeps_to_what_the_client_asked_for(
    prompt, seed, n, max_tokens, min_tokens, ignore_eos, visible, hidden, ends
):
    answers = plan(
        prompt,
        {"seed": seed, "n": n},
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        ignore_eos=ignore_eos,
        stop_token_ids=visible,
        stop_token_ids_hidden=hidden,
        eos_token_ids=ends,
    )
    room = MAX_MODEL_LEN - len(prompt)
    most = min(max_tokens or room, room)
    fewest = max(min(min_tokens or 1, most), 1)
    stops = {*(visible or ()), *(() if ignore_eos else [*(hidden or ()), *(ends or ())])}
    assert [answer.request.choice for answer in answers] == list(range(n))
    for answer in answers:
        ids = answer.token_ids
        assert fewest <= len(ids) <= most
        assert answer.request.isl_tokens == len(prompt)
        assert answer.request.osl_tokens == len(ids)
        assert len(answer.request.block_hashes) == (len(prompt) + len(ids)) // BLOCK_SIZE
        assert not stops.intersection(ids[fewest - 1 : -1])  # none is passed over
        if answer.finish_reason == "stop":
            assert ids[-1] in stops
        elif answer.finish_reason == "eos":
            assert ids[-1] == EOS
            assert not ignore_eos
            assert max_tokens is None
        else:
            assert answer.finish_reason == "length"
            assert len(ids) == most
        assert EOS not in ids[:-1]


@given(prompt=prompts, seed=seeds, max_tokens=st.integers(1, 30), cut=st.integers(0, 29), least=st.integers(0, 30))
def test_a_stop_token_cuts_the_same_answer_at_its_first_allowed_place(prompt, seed, max_tokens, cut, least):
    whole = plan_one(prompt, {"seed": seed}, max_tokens=max_tokens).token_ids
    stop_id = whole[cut % len(whole)]
    cut_short = plan_one(prompt, {"seed": seed}, max_tokens=max_tokens, stop_token_ids=[stop_id], min_tokens=least)
    places = [place for place, id_ in enumerate(whole, start=1) if id_ == stop_id and place >= least]
    assert cut_short.token_ids == whole[: places[0] if places else len(whole)]


@given(prompt=prompts, seed=seeds)
def test_without_max_tokens_ignoring_eos_fills_the_context(prompt, seed):
    answer = plan_one(prompt, {"seed": seed}, ignore_eos=True)
    assert len(prompt) + len(answer.token_ids) == MAX_MODEL_LEN
    assert answer.finish_reason == "length"


def test_answers_without_max_tokens_are_as_long_as_asked_on_average():
    planner = make_planner(default_osl=200, max_model_len=100_000)
    lengths = [plan_one([1, 2], {"seed": seed}, planner).request.osl_tokens for seed in range(4000)]
    mean = sum(lengths) / len(lengths)
    assert mean == pytest.approx(200, rel=0.03)  # the standard error is 0.8 %
    spread = (sum((length - mean) ** 2 for length in lengths) / len(lengths)) ** 0.5 / mean
    assert spread == pytest.approx(0.5, rel=0.1)


def test_a_tokenizer_without_eos_still_ends_its_answers():
    answer = plan_one([1], planner=make_planner(eos_token_ids=()))
    assert answer.finish_reason == "eos"
    assert set(answer.token_ids) <= set(WORD_IDS)


@given(prompt=prompts, seed=seeds)
def test_the_same_request_gives_the_same_answers(prompt, seed):
    sampling = {"seed": seed, "n": 2}
    first, again = plan(prompt, sampling, max_tokens=30), plan(prompt, sampling, max_tokens=30)
    assert [answer.token_ids for answer in first] == [answer.token_ids for answer in again]
    assert [answer.request.block_hashes for answer in first] == [answer.request.block_hashes for answer in again]


@given(prompt=st.lists(st.integers(0, 99), min_size=1, max_size=20), seed=seeds, other=seeds)
@example(prompt=[1], seed=-1, other=-2)
@example(prompt=[1], seed=3, other=2**63 - 1)
def test_the_request_s_seed_the_engine_s_seed_the_prompt_and_the_choice_all_matter(prompt, seed, other):
    assume(seed != other)

    def tokens(prompt=prompt, seed=seed, planner=None, choice=0):
        return plan(prompt, {"seed": seed, "n": 2}, planner, max_tokens=40)[choice].token_ids

    assert tokens() != tokens(seed=other)
    assert tokens() != tokens(planner=make_planner(seed=1))
    assert tokens() != tokens(prompt=[*prompt, 7])
    assert tokens() != tokens(choice=1)


def test_another_process_gives_the_same_answers():
    """Workers of one fleet, and one worker after a restart, say the same, seed or no seed."""
    script = (
        "from tests.test_prompt import plan_one\n"
        "for sampling in ({}, {'seed': -5}):\n"
        "    print(plan_one([1, 2, 3], sampling, max_tokens=9).token_ids)"
    )
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    here = [plan_one([1, 2, 3], sampling, max_tokens=9).token_ids for sampling in ({}, {"seed": -5})]
    assert output.splitlines() == [str(token_ids) for token_ids in here]


@given(prompt=prompts, shared=st.integers(0, MAX_MODEL_LEN), seed=seeds)
def test_prompts_share_the_hashes_of_exactly_the_full_blocks_they_share(prompt, shared, seed):
    shared = min(shared, len(prompt))
    other = [*prompt[:shared], *(token_id + 1 for token_id in prompt[shared:])]
    hashes = [plan_one(ids, {"seed": seed}, max_tokens=1).request.block_hashes for ids in (prompt, other)]
    num_blocks = len(prompt) // BLOCK_SIZE
    same = [mine == theirs for mine, theirs in zip(hashes[0][:num_blocks], hashes[1][:num_blocks], strict=True)]
    assert same == [block < shared // BLOCK_SIZE for block in range(num_blocks)]


def test_the_answer_s_blocks_are_hashed_too_so_a_next_turn_finds_them():
    answer = plan_one([1, 2, 3, 4, 5], max_tokens=20)
    next_turn = plan_one([1, 2, 3, 4, 5, *answer.token_ids, 6, 7], max_tokens=3)
    num_full = 25 // BLOCK_SIZE
    assert next_turn.request.block_hashes[:num_full] == answer.request.block_hashes[:num_full]


@pytest.mark.parametrize("isl_tokens", [MAX_MODEL_LEN, MAX_MODEL_LEN + 5])
def test_a_prompt_that_leaves_no_room_says_what_would(isl_tokens):
    with pytest.raises(
        RequestError, match=f"has {isl_tokens} tokens.* is 64.*Shorten the prompt to 63 tokens or fewer"
    ):
        plan([1] * isl_tokens)
    assert len(plan_one([1] * 63).token_ids) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0; it must be an integer of at least 1"),
        ({"max_tokens": 2.0}, r"max_tokens is 2\.0"),
        ({"min_tokens": -1}, "min_tokens is -1; it must be an integer of at least 0"),
        ({"sampling": {"n": 0}}, "n is 0; it must be an integer of at least 1"),
        ({"sampling": {"n": "2"}}, "n is '2'"),
        ({"sampling": {"seed": 0.5}}, r"seed is 0\.5"),
    ],
    ids=str,
)
def test_an_option_out_of_range_is_named_with_what_is_allowed(options, message):
    with pytest.raises(RequestError, match=message):
        plan([1, 2], **options)


def test_groups_that_are_missing_are_the_same_as_empty_ones():
    planner = make_planner()
    (bare,) = planner.plan("r", {"token_ids": [1, 2]})
    (none,) = planner.plan("r", {"token_ids": [1, 2], "stop_conditions": None, "sampling_options": None})
    assert bare.token_ids == none.token_ids == plan_one([1, 2]).token_ids


@pytest.mark.parametrize(
    ("routing", "expected"),
    [
        (None, 0),
        ({}, 0),
        ({"priority": None}, 0),
        ({"priority_jump": 5.0, "strict_priority": 2, "priority": 5}, -5),
        ({"priority": -7}, 7),
    ],
)
def test_dynamo_s_priority_is_turned_to_vllm_s_sign(routing, expected):
    """As ai-dynamo's frontend writes `nvext.agent_hints.priority`, where the higher is the more important."""
    answers = make_planner().plan("r", {"token_ids": [1], "routing": routing, "sampling_options": {"n": 2}})
    assert [answer.request.priority for answer in answers] == [expected] * 2
