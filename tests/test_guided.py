"""Answers to constraints: JSON is valid for its schema, patterns match in full, choices are among those given."""

from __future__ import annotations

import json
import re

import jsonschema
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mock_engine.errors import RequestError
from mock_engine.grammar_writer import json_grammar, regex_grammar, text_grammar
from mock_engine.guided import demanded
from tests.helpers.content import EOS, TOKENIZER, WRITER, make_planner, plan, text_of

PLANNER = make_planner()
seeds = st.integers(0, 2**63 - 1)
names = st.sampled_from(["name", "a", "two words", "über", 'quo"ted', "n_1", "$ref2", ""])


def integers(minimum, maximum):
    return st.integers(minimum, maximum)


@st.composite
def bounds(draw, low, high, least, most):
    first, second = sorted((draw(integers(low, high)), draw(integers(low, high))))
    return draw(st.sampled_from([{}, {least: first}, {most: second}, {least: first, most: second}]))


@st.composite
def strings(draw):
    kind = draw(st.sampled_from(["plain", "lengths", "pattern", "format", "enum"]))
    schema = {"type": "string"}
    if kind == "lengths":
        schema |= draw(bounds(0, 20, "minLength", "maxLength"))
    elif kind == "pattern":
        schema["pattern"] = draw(
            st.sampled_from(["^[a-z]{2,5}$", r"^\d{3}-\d{4}$", "^(north|south)+$", "^[A-Z][a-z ]*$"])
        )
    elif kind == "format":
        schema["format"] = draw(st.sampled_from(["date", "date-time", "uuid", "ipv4", "time"]))
    elif kind == "enum":
        schema = {"enum": draw(st.lists(st.sampled_from(["x", "y", 1, None, True, "a b"]), min_size=1, unique_by=repr))}
    return schema


@st.composite
def numbers(draw):
    return {"type": draw(st.sampled_from(["integer", "number"])), **draw(bounds(-500, 500, "minimum", "maximum"))}


@st.composite
def objects(draw, inner):
    properties = draw(st.dictionaries(names, inner, max_size=4))
    schema = {"type": "object", "properties": properties}
    if required := draw(st.lists(st.sampled_from([*properties, "extra"]), unique=True)):
        schema["required"] = required
    if draw(st.booleans()) and "extra" not in required:
        schema["additionalProperties"] = draw(st.booleans())
    return schema


@st.composite
def arrays(draw, inner):
    return {"type": "array", "items": draw(inner), **draw(bounds(0, 4, "minItems", "maxItems"))}


simple = st.one_of(
    strings(), numbers(), st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"const": 3}, {}, True])
)
schemas = st.recursive(
    simple,
    lambda inner: st.one_of(
        objects(inner),
        arrays(inner),
        st.builds(lambda options: {"anyOf": options}, st.lists(inner, min_size=1, max_size=3)),
    ),
    max_leaves=8,
)


@given(schema=schemas, seed=seeds)
@settings(max_examples=200)
def test_json_is_valid_for_its_schema(schema, seed):
    (answer,) = plan(PLANNER, [seed % 1000], {"guided_decoding": {"json": schema}, "seed": seed})
    assert answer.finish_reason == "eos"
    assert answer.token_ids[-1] == EOS
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    jsonschema.Draft202012Validator(schema, format_checker=checker).validate(json.loads(text_of(answer)))


def test_schemas_that_are_combined_hold_all_at_once():
    """What one of them does not name, another asks for."""
    a = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    b = {"type": "object", "properties": {"b": {"type": "string"}}, "required": ["b"]}
    for schema in ({"allOf": [a, b]}, {**a, "allOf": [b]}):
        for seed in range(20):
            (answer,) = plan(PLANNER, sampling={"guided_decoding": {"json": schema}, "seed": seed})
            jsonschema.validate(json.loads(text_of(answer)), schema)


def test_a_schema_that_names_properties_gets_no_others():
    """Valid they would be, but no model makes names up. Without names any come."""
    named = {"type": "object", "properties": {"city": {"type": "string"}}}
    free = {"type": "object"}
    keys = {}
    for schema in (named, free):
        answers = [plan(PLANNER, sampling={"guided_decoding": {"json": schema}, "seed": i})[0] for i in range(50)]
        keys[str(schema)] = {key for answer in answers for key in json.loads(text_of(answer))}
    assert keys[str(named)] == {"city"}
    assert len(keys[str(free)]) > 10


def test_optional_properties_come_or_stay_away_by_the_seed():
    schema = {"type": "object", "properties": {name: {"type": "integer"} for name in "abc"}, "required": ["b"]}
    answers = [plan(PLANNER, sampling={"guided_decoding": {"json": schema}, "seed": i})[0] for i in range(50)]
    assert {tuple(json.loads(text_of(answer))) for answer in answers} >= {("b",), ("a", "b"), ("a", "b", "c")}


def test_recursion_ends():
    schema = {
        "$ref": "#/$defs/tree",
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {
                    "children": {"type": "array", "items": {"$ref": "#/$defs/tree"}},
                    "v": {"type": "string"},
                },
                "required": ["children", "v"],
            }
        },
    }
    lengths = []
    for seed in range(50):
        (answer,) = plan(PLANNER, sampling={"guided_decoding": {"json": schema}, "seed": seed})
        assert answer.finish_reason == "eos"
        jsonschema.validate(json.loads(text_of(answer)), schema)
        lengths.append(len(answer.token_ids))
    assert max(lengths) < 1000


def test_even_what_grows_faster_than_it_ends_ends():
    """Four children, each a leaf or the like again: from some length on, leaves only."""
    child = {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}
    node = {"type": "object", "properties": dict.fromkeys("abcd", child), "required": list("abcd")}
    schema = {"$ref": "#/$defs/node", "$defs": {"node": node}}
    for seed in range(20):
        (answer,) = plan(PLANNER, sampling={"guided_decoding": {"json": schema}, "seed": seed})
        assert answer.finish_reason == "eos"
        jsonschema.validate(json.loads(text_of(answer)), schema)


def test_free_strings_are_words_and_numbers_are_small():
    schema = {
        "type": "object",
        "properties": {"s": {"type": "string"}, "x": {"type": "number"}},
        "required": ["s", "x"],
    }
    for seed in range(200):
        (answer,) = plan(PLANNER, sampling={"guided_decoding": {"json": schema}, "seed": seed})
        found = json.loads(text_of(answer))
        assert re.fullmatch("[a-z]+( [a-z]+){0,4}", found["s"]), found
        assert re.search('"x":-?[0-9.]+}', text_of(answer)), found
        assert abs(found["x"]) < 1e15, found


@st.composite
def patterns(draw):
    """Regular expressions that both Python and the library know, and of which no part waits for one that follows."""
    counted = st.builds(
        str.__add__,
        st.sampled_from(["a", "foo", "[a-z]", "[A-F0-9]", r"\d", "[^x]", "é", "(?:yes|no|maybe)", "(?:ab?c|d{1,3})"]),
        st.sampled_from(["", "", "?", "{2}", "{1,3}"]),
    )
    uncounted = st.builds(
        str.__add__,
        st.sampled_from(["[a-z]", "[A-Z0-9]", r"\d", "(?:yes|no|maybe)", "[a-z ]"]),
        st.sampled_from(["*-", "+-", r"{2,}\.", r"*\."]),  # with a mark that ends it
    )
    return "".join(draw(st.lists(st.one_of(counted, uncounted), min_size=1, max_size=6)))


@given(pattern=patterns(), seed=seeds)
@example(pattern="[a-z]+é", seed=0)  # letters without end, and then one of another kind
@settings(max_examples=150)
def test_a_pattern_matches_the_whole_answer(pattern, seed):
    (answer,) = plan(PLANNER, sampling={"guided_decoding": {"regex": pattern}, "seed": seed}, max_tokens=1000)
    assert answer.finish_reason == "eos"
    assert re.fullmatch(pattern, text_of(answer), re.DOTALL | re.ASCII), (pattern, text_of(answer))


@given(choices=st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=5), seed=seeds)
@settings(max_examples=200)
def test_a_choice_is_one_of_those_given(choices, seed):
    (answer,) = plan(PLANNER, sampling={"guided_decoding": {"choice": choices}, "seed": seed})
    assert text_of(answer) in choices
    assert answer.finish_reason == "eos"


def test_every_choice_comes_up():
    options = {"choice": ["red", "green", "blue"]}
    found = {text_of(plan(PLANNER, sampling={"guided_decoding": options, "seed": i})[0]) for i in range(50)}
    assert found == set(options["choice"])


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        pytest.param('root ::= "yes" | "no" [0-9]+', "yes|no[0-9]+", id="GBNF"),
        pytest.param('start: "a" (" b" | "c")* "."', "a( b|c)*[.]", id="Lark"),
    ],
)
def test_a_grammar_is_kept_to(grammar, pattern):
    for seed in range(30):
        (answer,) = plan(PLANNER, sampling={"guided_decoding": {"grammar": grammar}, "seed": seed})
        assert re.fullmatch(pattern, text_of(answer))


@given(schema=schemas, seed=seeds, max_tokens=st.integers(1, 40))
@settings(max_examples=200)
def test_max_tokens_cuts_an_answer_and_changes_nothing_before(schema, seed, max_tokens):
    sampling = {"guided_decoding": {"json": schema}, "seed": seed}
    (whole,) = plan(PLANNER, sampling=sampling)
    (cut,) = plan(PLANNER, sampling=sampling, max_tokens=max_tokens)
    if len(whole.token_ids) <= max_tokens:
        assert cut.token_ids == whole.token_ids
        assert cut.finish_reason == "eos"
    else:
        assert cut.finish_reason == "length"
        assert len(cut.token_ids) == max_tokens
        assert text_of(whole).startswith(text_of(cut).rstrip("\ufffd"))
    assert cut.request.osl_tokens == len(cut.token_ids)


@given(schema=schemas, seed=seeds)
@settings(max_examples=100)
def test_a_whole_answer_has_the_tokens_of_its_text(schema, seed):
    """Clients count by tokenizing."""
    (answer,) = plan(PLANNER, sampling={"guided_decoding": {"json": schema}, "seed": seed})
    assert TOKENIZER.encode(text_of(answer), add_special_tokens=False).ids == answer.token_ids[:-1]


@pytest.mark.parametrize("pattern", ["[a-z]{9}", "[0-9]{7}", "[A-Za-z]{12}"])
def test_letters_and_digits_chosen_one_by_one_are_tokenized_as_the_text_is(pattern):
    for seed in range(50):
        token_ids, is_whole = WRITER.write(regex_grammar(pattern), seed, 100)
        assert is_whole
        assert token_ids == WRITER.encode(WRITER.decode(token_ids))


def test_an_answer_depends_on_the_seed_and_on_nothing_else():
    sampling = {"guided_decoding": {"json": {"type": "string"}}}
    texts = [text_of(plan(PLANNER, sampling={**sampling, "seed": seed})[0]) for seed in (1, 2, 3, 1)]
    assert texts[0] == texts[3]
    assert len(set(texts)) == 3
    first, second = plan(PLANNER, sampling={**sampling, "n": 2})
    assert text_of(first) != text_of(second)


def test_what_is_demanded_ends_whatever_ignore_eos_and_min_tokens_say():
    sampling = {"guided_decoding": {"choice": ["red"]}}
    (answer,) = plan(PLANNER, sampling=sampling, ignore_eos=True, min_tokens=50, max_tokens=100)
    assert text_of(answer) == "red"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"json": {"type": "foo"}}, "Invalid type: foo", id="no such type"),
        pytest.param({"json": {"not": {"type": "string"}}}, 'Unimplemented keys: ["not"]', id="keyword"),
        pytest.param({"json": "{"}, "the JSON schema cannot be used", id="no JSON"),
        pytest.param({"regex": "([a"}, "unclosed character class", id="pattern"),
        pytest.param({"regex": 3}, "regex is 3; it must be a text", id="no text"),
        pytest.param({"regex": r"(?=a)b"}, "look-around", id="look-ahead"),
        pytest.param({"grammar": "start: foo"}, 'unknown name: "foo"', id="grammar"),
        pytest.param({"choice": []}, "choice is []; it must be a list of texts, and not empty", id="no choice"),
        pytest.param({"regex": "a", "json": {}}, "json and regex; one constraint at a time", id="two"),
        pytest.param({"structural_tag": {"type": "structural_tag", "format": {"type": "x"}}}, "'x'", id="tag"),
        pytest.param({"structural_tag": "x"}, "the structural tag cannot be read", id="no tag"),
        pytest.param([1], "guided_decoding must be an object", id="no object"),
    ],
)
def test_what_cannot_be_used_is_the_client_s_error_in_one_line(options, message):
    with pytest.raises(RequestError) as caught:
        plan(PLANNER, sampling={"guided_decoding": options})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_option_set_is_no_constraint():
    """As Dynamo writes it: every option is there, None where unset."""
    assert demanded({"guided_decoding": dict.fromkeys(("json", "regex", "choice", "grammar", "backend"))}) is None
    assert demanded({"guided_decoding": None}) is None
    assert demanded({}) is None


def test_a_text_whose_end_no_choice_can_see_ends_with_a_word_of_its_pattern():
    """The library says what may come next, not how far the end is."""
    written = WRITER.write(regex_grammar(".*foo"), seed=0, max_tokens=1000)
    assert written.is_whole
    assert WRITER.decode(written.token_ids).endswith("foo")
    assert not WRITER.write(regex_grammar(".*foo[0-9]bar"), seed=0, max_tokens=1000).is_whole  # two words away


def test_white_space_may_be_forbidden_but_in_one_shape():
    grammar = json_grammar({"type": "array", "items": {"type": "integer"}, "minItems": 2}, whitespace_pattern=" ")
    for seed in range(10):
        assert len(json.loads(WRITER.decode(WRITER.write(grammar, seed, 100).token_ids))) >= 2


def test_grammars_are_compiled_once():
    grammar = text_grammar('root ::= "once"')
    before = WRITER._matcher.cache_info()
    for seed in range(3):
        WRITER.write(grammar, seed, 10)
    after = WRITER._matcher.cache_info()
    assert (after.misses - before.misses, after.hits - before.hits) == (1, 2)
