"""Tool calls in the shape of structural tags as Dynamo 1.4.2 sends them, thoughts, and stop strings."""

from __future__ import annotations

import json
import re

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mock_engine.content import ContentSettings
from mock_engine.errors import ConfigError, RequestError
from tests.helpers.content import EOS, TOKENIZER, WRITER, make_planner, plan, text_of

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city"],
}
ADD = {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}, "required": ["a", "b"]}
SCHEMAS = {"get_weather": WEATHER, "add": ADD}
THINK, END_THINK = (TOKENIZER.token_to_id(mark) for mark in ("<think>", "</think>"))
seeds = st.integers(0, 2**63 - 1)


def hermes_tag(at_least_one=False, stop_after_first=False, schemas=SCHEMAS):
    """What Dynamo 1.4.2 makes of `tools` for its hermes parser."""
    tags = [
        {
            "type": "tag",
            "begin": f'<tool_call>\n{{"name": "{name}", "arguments": ',
            "content": {"type": "json_schema", "json_schema": schema, "style": "json"},
            "end": "}\n</tool_call>",
        }
        for name, schema in schemas.items()
    ]
    form = {"type": "triggered_tags", "triggers": ["<tool_call>"], "tags": tags}
    form |= {"at_least_one": at_least_one, "stop_after_first": stop_after_first}
    return {"type": "structural_tag", "format": form}


def answer_to(tag, seed=0, planner=None, **stop):
    sampling = {"guided_decoding": {"structural_tag": tag}, "seed": seed}
    return plan(planner or make_planner(), sampling=sampling, **stop)[0]


def calls_in(text):
    """Names and arguments; fails for a text that is anything else."""
    calls = re.findall(r"<tool_call>\n(.*?)\n</tool_call>", text, re.DOTALL)
    assert re.sub(r"<tool_call>\n.*?\n</tool_call>", "", text, flags=re.DOTALL).strip() == "", text
    return [(call["name"], call["arguments"]) for call in map(json.loads, calls)]


@given(seed=seeds, as_text=st.booleans())
@settings(max_examples=100)
def test_calls_that_must_be_made_have_valid_arguments(seed, as_text):
    tag = hermes_tag(at_least_one=True)
    answer = answer_to(json.dumps(tag) if as_text else tag, seed)
    assert answer.finish_reason == "eos"
    calls = calls_in(text_of(answer))
    assert calls
    for name, arguments in calls:
        jsonschema.validate(arguments, SCHEMAS[name])


def test_the_share_of_answers_that_call_is_the_one_asked_for():
    for ratio in (0.0, 0.3, 1.0):
        planner = make_planner(tool_call_ratio=ratio)
        texts = [text_of(answer_to(hermes_tag(), seed, planner, max_tokens=100)) for seed in range(300)]
        assert sum("<tool_call>" in text for text in texts) / 300 == pytest.approx(ratio, abs=0.08)


def test_an_answer_that_calls_no_tool_is_like_any_other():
    planner = make_planner(tool_call_ratio=0)
    (plain,) = plan(planner, sampling={"seed": 1}, max_tokens=9, ignore_eos=True)
    assert answer_to(hermes_tag(), 1, planner, max_tokens=9, ignore_eos=True).token_ids == plain.token_ids
    ban = {"type": "tag", "begin": "", "content": {"type": "any_tokens", "exclude_tokens": ["<tool_call>"]}, "end": ""}
    banned = answer_to({"type": "structural_tag", "format": ban}, 1, max_tokens=9, ignore_eos=True)
    assert banned.token_ids == plain.token_ids


def test_every_tool_is_called_and_sometimes_two():
    calls = [calls_in(text_of(answer_to(hermes_tag(at_least_one=True), seed))) for seed in range(60)]
    assert {name for some in calls for name, _ in some} == set(SCHEMAS)
    assert {len(some) for some in calls} >= {1, 2}


def test_no_second_call_where_only_one_is_allowed():
    tag = hermes_tag(at_least_one=True, stop_after_first=True)
    assert {len(calls_in(text_of(answer_to(tag, seed)))) for seed in range(60)} == {1}


def test_max_tokens_cuts_a_call():
    whole = answer_to(hermes_tag(at_least_one=True))
    cut = answer_to(hermes_tag(at_least_one=True), max_tokens=12)
    assert cut.finish_reason == "length"
    assert cut.token_ids == whole.token_ids[:12]


@pytest.mark.parametrize(
    ("style", "pattern"),
    [
        pytest.param(
            "qwen_xml", r"<parameter=city>\n[a-z ]+\n</parameter>(\n<parameter=days>\n[1-9]\n</parameter>)?", id="qwen"
        ),
        pytest.param(
            "deepseek_xml",
            r'<｜DSML｜parameter name="city" string="true">[a-z ]+</｜DSML｜parameter>\n'
            r'(<｜DSML｜parameter name="days" string="false">[1-9]</｜DSML｜parameter>\n)?',
            id="deepseek",
        ),
    ],
)
def test_arguments_are_written_as_the_parser_wants_them(style, pattern):
    tag = {"type": "tag", "begin": "<f>", "content": {"type": "json_schema", "json_schema": WEATHER, "style": style}}
    form = {"type": "structural_tag", "format": {**tag, "end": "</f>"}}
    texts = [text_of(answer_to(form, seed)) for seed in range(20)]
    assert all(re.fullmatch(f"<f>{pattern}</f>", text) for text in texts), texts
    assert len(set(texts)) > 10


def test_all_kinds_of_tags_are_written():
    text = {"type": "const_string", "value": "a"}
    form = {
        "type": "sequence",
        "elements": [
            text,
            {"type": "or", "elements": [{"type": "const_string", "value": "b"}, {"type": "regex", "pattern": "c{2}"}]},
            {"type": "optional", "content": {"type": "const_string", "value": "d"}},
            {"type": "tag", "begin": "<", "content": {"type": "any_text"}, "end": [">", "!"]},
            {"type": "grammar", "grammar": 'root ::= "e"'},
            {
                "type": "tags_with_separator",
                "tags": [{"type": "tag", "begin": "f", "content": text, "end": "g"}],
                "separator": ",",
                "at_least_one": True,
            },
        ],
    }
    texts = [text_of(answer_to({"type": "structural_tag", "format": form}, seed)) for seed in range(60)]
    assert all(re.fullmatch("a(b|cc)d?<( [a-z]+)+>efag(,fag)*", text) for text in texts), texts
    for part in ("ab", "acc", "d<", "b<", "fag,fag"):
        assert any(part in text for text in texts), part


def test_the_form_that_vllm_had_first_is_read_too():
    old = {
        "structures": [{"begin": "<f>", "schema": ADD, "end": "</f>"}],
        "triggers": ["<f>"],
    }
    text = text_of(answer_to(old, planner=make_planner(tool_call_ratio=1)))
    jsonschema.validate(json.loads(text.split("<f>")[1].split("</f>")[0]), ADD)


@pytest.mark.parametrize(
    "form",
    [
        pytest.param({"type": "sequence"}, id="no elements"),
        pytest.param({"type": "or", "elements": []}, id="nothing to choose"),
        pytest.param({"type": "json_schema", "json_schema": ADD, "style": "morse"}, id="style"),
        pytest.param({"type": "json_schema", "json_schema": {"type": "foo"}}, id="schema"),
        pytest.param(3, id="no object"),
    ],
)
def test_a_tag_that_cannot_be_read_is_the_client_s_error(form):
    with pytest.raises(RequestError):
        answer_to({"type": "structural_tag", "format": form})


# Thoughts


def thinking(reasoning_ratio=1.0, reasoning_osl=8, **others):
    return make_planner(reasoning_ratio=reasoning_ratio, reasoning_osl=reasoning_osl, **others)


@given(seed=seeds, max_tokens=st.integers(1, 200), ignore_eos=st.booleans())
@settings(max_examples=100)
def test_thoughts_count_and_leave_the_length_as_it_was_asked_for(seed, max_tokens, ignore_eos):
    (answer,) = plan(thinking(), sampling={"seed": seed}, max_tokens=max_tokens, ignore_eos=ignore_eos)
    assert len(answer.token_ids) == max_tokens
    assert answer.token_ids[0] == THINK
    num = answer.num_reasoning_tokens
    assert END_THINK not in answer.token_ids[: num - 1]
    if num < max_tokens:
        assert answer.token_ids[num - 1] == END_THINK
        assert not {THINK, END_THINK} & set(answer.token_ids[num:])


def test_the_share_of_answers_with_thoughts_and_their_length_are_those_asked_for():
    answers = [plan(thinking(0.4, 20), sampling={"seed": seed}, max_tokens=500)[0] for seed in range(500)]
    lengths = [answer.num_reasoning_tokens - 2 for answer in answers if answer.num_reasoning_tokens]
    assert len(lengths) / 500 == pytest.approx(0.4, abs=0.06)
    assert sum(lengths) / len(lengths) == pytest.approx(20, rel=0.1)


def test_an_answer_of_its_own_length_is_as_long_after_thoughts():
    (plain,) = plan(make_planner(), sampling={"seed": 3})
    (thought,) = plan(thinking(), sampling={"seed": 3})
    assert thought.token_ids[thought.num_reasoning_tokens :] == plain.token_ids
    assert thought.finish_reason == plain.finish_reason == "eos"


def test_thoughts_come_before_what_is_demanded():
    sampling = {"guided_decoding": {"choice": ["red"]}}
    (answer,) = plan(thinking(), sampling=sampling)
    assert WRITER.decode(answer.token_ids[answer.num_reasoning_tokens :]) == "red<|eos|>"
    assert answer.token_ids[-1] == EOS


def test_no_thoughts_where_the_client_has_turned_them_off():
    planner = thinking()
    for template, has_thoughts in (({"enable_thinking": False}, False), ({"thinking": False}, False), ({}, True)):
        wire = {
            "token_ids": [1],
            "stop_conditions": {"max_tokens": 50},
            "extra_args": {"reasoning_parser_kwargs": {"chat_template_kwargs": template}},
        }
        (answer,) = planner.plan("r", wire)
        assert (answer.num_reasoning_tokens > 0) == has_thoughts


def test_max_thinking_tokens_is_kept():
    (answer,) = plan(thinking(reasoning_osl=100), max_tokens=200, max_thinking_tokens=3)
    assert answer.num_reasoning_tokens == 5  # with both marks


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"tool_call_ratio": 1.5}, "--tool-call-ratio is 1.5; it is a share of answers, from 0 to 1"),
        ({"reasoning_ratio": -0.1}, "--reasoning-ratio is -0.1; it is a share of answers, from 0 to 1"),
        ({"reasoning_osl": 0}, "--reasoning-osl is 0; it must be at least 1"),
    ],
)
def test_wrong_shares_are_said_in_one_line(settings_, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        ContentSettings(**settings_)


# Stop strings


@given(seed=seeds, length=st.integers(1, 12), start=st.integers(0, 300), min_tokens=st.integers(0, 30))
@settings(max_examples=150)
def test_an_answer_ends_with_the_token_that_completes_a_stop_string(seed, length, start, min_tokens):
    planner = make_planner()
    (whole,) = plan(planner, sampling={"seed": seed}, max_tokens=60)
    text = text_of(whole)
    stop = text[start % len(text) :][:length]
    stops = {"stop": ["NEVER", stop], "min_tokens": min_tokens}
    (answer,) = plan(planner, sampling={"seed": seed}, max_tokens=60, **stops)
    ends = [len(WRITER.decode(whole.token_ids[:num])) for num in range(61)]
    found = (match.end() for match in re.finditer(f"(?={re.escape(stop)})", text))
    positions = (next(num for num in range(61) if ends[num] >= end + len(stop)) for end in found)
    expected = min((num for num in positions if num >= min_tokens), default=None)
    assert len(answer.token_ids) == (expected or 60)
    assert answer.token_ids == whole.token_ids[: expected or 60]
    assert answer.finish_reason == ("length" if expected in (None, 60) else "stop")


def test_an_empty_stop_string_stops_nothing_and_one_alone_may_be_a_text():
    (answer,) = plan(make_planner(), max_tokens=20, stop=[""])
    assert len(answer.token_ids) == 20
    word = text_of(answer).split()[3]
    (stopped,) = plan(make_planner(), max_tokens=20, stop=word)
    assert len(stopped.token_ids) <= 4
