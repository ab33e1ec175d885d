"""
The tokenizer folder we ship: any slice of a tokenized text, decoded and
tokenized again, is that slice; the folder is what its build command makes.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

import mock_engine
from mock_engine.tokenizer_build import BOS, EOS, MARKS, PIECES, SPECIAL_TOKENS, build_files
from mock_engine.tokenizer_words import COMMON_WORDS, WORDS

FOLDER = Path(mock_engine.__file__).parent / "tokenizer"
TOKENIZER = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
ENGLISH = sorted({*COMMON_WORDS, *WORDS, "unfathomable", "zzyzx", "Kubernetes", "HAMLET", "McAdam", "xJSONParser"})


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False).ids


def decode(ids: list[int]) -> str:
    return TOKENIZER.decode(ids, skip_special_tokens=False)


@st.composite
def prose(draw: st.DrawFn) -> str:
    """Words in three shapes, made-up words, numbers, and marks."""
    word = st.one_of(
        st.sampled_from(ENGLISH),
        st.sampled_from(ENGLISH).map(str.capitalize),
        st.sampled_from(ENGLISH).map(str.upper),
        st.text("abcdefghijklmnopqrstuvwxyz", min_size=1, max_size=12),
        st.text("ABCDabcd", min_size=1, max_size=8),
        st.integers(0, 10**6).map(str),
    )
    gap = st.sampled_from([" ", " ", " ", ", ", "\n", "  ", ". ", "\n\n    ", "_", "(", "'s "])
    return "".join(draw(st.lists(st.one_of(word, gap), min_size=1, max_size=60)))


@st.composite
def slices(draw: st.DrawFn) -> list[int]:
    ids = encode(draw(prose()))
    start = draw(st.integers(0, len(ids) - 1))
    return ids[start : draw(st.integers(start + 1, len(ids)))]


def test_the_shipped_folder_is_what_the_build_command_makes() -> None:
    shipped = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.iterdir() if path.is_file()}
    assert shipped == build_files()


def test_the_folder_stays_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 300_000


@given(ids=slices())
@settings(max_examples=500)
def test_any_slice_of_a_tokenized_text_comes_back_as_the_same_ids(ids: list[int]) -> None:
    """AIPerf's synthetic prompts: a slice, decoded, sent as text, tokenized by the server."""
    assert encode(decode(ids)) == ids


@given(blocks=st.lists(slices(), min_size=1, max_size=6))
@settings(max_examples=300)
def test_slices_joined_by_bos_come_back_as_the_same_ids(blocks: list[list[int]]) -> None:
    """AIPerf's mooncake prompts: one slice a hash id, each begun with bos."""
    [bos] = encode(BOS)
    ids = [id_ for block in blocks for id_ in (bos, *block)]
    assert encode(decode(ids)) == ids


@given(parts=st.lists(st.tuples(st.sampled_from(ENGLISH), prose(), st.integers(1, 100)), min_size=2, max_size=6))
@settings(max_examples=300)
def test_slices_that_begin_at_a_word_join_to_the_same_ids(parts: list[tuple[str, str, int]]) -> None:
    """A space and a letter begin a token, whatever is before them; only a run of three spaces would take the fourth."""
    blocks = [encode(re.sub(" +", " ", f" {word}{text}"))[:end] for word, text, end in parts]
    ids = [id_ for block in blocks for id_ in block]
    assert encode(decode(ids)) == ids


@given(first=prose(), last=st.sampled_from("aexzIO"), word=st.sampled_from(ENGLISH), second=prose())
@settings(max_examples=300)
def test_a_word_without_a_space_before_its_capital_still_begins_a_token(
    first: str, last: str, word: str, second: str
) -> None:
    """AIPerf tokenizes its corpus in chunks of 10,000 characters and joins them with no space: "IThat"."""
    before, after = first + last, f"Z{word.lower()}{second}"
    assert encode(before + after) == encode(before) + encode(after)


@given(text=st.text())
@settings(max_examples=500)
def test_every_text_decodes_exactly(text: str) -> None:
    assume(not any(token in text for token in SPECIAL_TOKENS))
    ids = encode(text)
    assert decode(ids) == text
    assert not {TOKENIZER.token_to_id(token) for token in SPECIAL_TOKENS} & set(ids)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("漢字かな 한국어 العربية", id="other scripts"),
        pytest.param("😀👩‍👩‍👧 café — “quoted” €5 …", id="emoji and typography"),
        pytest.param('def f(x):\n    return {"a": [1, 22, 333, 4444]}  # ok\n\t\r\n', id="code"),
        pytest.param("a" * 1000 + "B" * 1000 + " " * 1000 + "7" * 1000, id="long runs"),
        pytest.param("\x00\x7f\u2028\ufeff\ufffd", id="control characters"),
    ],
)
def test_text_that_is_not_english_decodes_exactly(text: str) -> None:
    assert decode(encode(text)) == text


def test_english_takes_about_four_characters_a_token() -> None:
    text = (
        "The engine keeps a list of requests that wait and a list of those that run. In each step it first serves the "
        "running ones, one token each, and then fills what is left of the budget with parts of new prompts. When the "
        "memory is full, the youngest request gives its blocks back and starts again later."
    )
    assert len(text) / len(encode(text)) > 4


def test_nothing_but_a_special_token_is_special() -> None:
    added = TOKENIZER.get_added_tokens_decoder()
    assert [token.content for _, token in sorted(added.items())] == [*SPECIAL_TOKENS, *MARKS]
    assert {token.content for token in added.values() if token.special} == set(SPECIAL_TOKENS)
    assert set(added) == set(range(min(added), TOKENIZER.get_vocab_size())), "added ids are the last ones"


@given(before=prose(), mark=st.sampled_from(MARKS), after=prose())
@settings(max_examples=100)
def test_a_mark_is_one_token_wherever_it_stands_and_is_shown_as_text(before: str, mark: str, after: str) -> None:
    """Dynamo's reasoning parsers want a mark in one piece; clients that skip special tokens must see it."""
    ids = encode(before + mark + after)
    assert ids == [*encode(before), TOKENIZER.token_to_id(mark), *encode(after)]
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == before + mark + after


def test_config_and_tokenizer_agree() -> None:
    config = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
    generation = json.loads((FOLDER / "generation_config.json").read_text(encoding="utf-8"))
    assert config["vocab_size"] == TOKENIZER.get_vocab_size()
    assert config["eos_token_id"] == generation["eos_token_id"] == TOKENIZER.token_to_id(EOS)
    assert config["bos_token_id"] == generation["bos_token_id"] == TOKENIZER.token_to_id(BOS)


def test_every_capital_with_a_small_letter_after_it_is_an_entry() -> None:
    """The one look ahead in the pattern is harmless only because of this (see `PIECES`)."""
    assert "(?![a-z])" in PIECES
    for pair in (
        f"{space}{chr(first)}{chr(second)}"
        for space in ("", " ")
        for first in range(65, 91)
        for second in range(97, 123)
    ):
        assert len(encode(pair)) == 1, pair


@pytest.fixture(scope="module")
def transformers_tokenizer() -> Any:
    transformers = pytest.importorskip("transformers", reason="transformers comes with aiperf (the bench extra)")
    offline = os.environ.pop("HF_HUB_OFFLINE", None)
    try:
        return transformers.AutoTokenizer.from_pretrained(str(FOLDER))
    finally:
        if offline is not None:
            os.environ["HF_HUB_OFFLINE"] = offline


def render(tokenizer: Any, messages: list[dict[str, Any]], tools: list[Any] | None = None) -> str:
    text: str = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
    return text


@given(text=prose())
@settings(max_examples=100)
def test_the_chat_template_adds_one_token_to_a_user_message(transformers_tokenizer: Any, text: str) -> None:
    """AIPerf counts without the template and warns above 10 %: silent from ISL 10 on."""
    templated = render(transformers_tokenizer, [{"role": "user", "content": text}])
    assert encode(templated) == [*encode(text), TOKENIZER.token_to_id("<|assistant|>")]


def test_the_chat_template_knows_roles_and_parts(transformers_tokenizer: Any) -> None:
    parts = [{"type": "text", "text": " Hello"}, {"type": "text", "text": "world "}]
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None},
        {"role": "tool", "content": "42"},
        {"role": "user", "content": "go on"},
    ]
    assert render(transformers_tokenizer, messages) == (
        "<|system|>Be brief.<|user|> Hello\nworld <|assistant|><|tool|>42<|user|>go on<|assistant|>"
    )
    assert render(transformers_tokenizer, [{"role": "user", "content": parts}]) == " Hello\nworld <|assistant|>"


def test_the_chat_template_knows_tools_and_calls_of_them(transformers_tokenizer: Any) -> None:
    tools = [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in "fg"]
    calls = [
        {"type": "function", "id": "1", "function": {"name": "f", "arguments": {"x": 1}}},
        {"type": "function", "id": "2", "function": {"name": "g", "arguments": '{"y": 2}'}},
    ]
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "Go"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": "42"},
    ]
    text = render(transformers_tokenizer, messages, tools)
    before, after = text.split("<|user|>")
    assert before.startswith("<|system|>")
    assert [json.loads(line) for line in before.removeprefix("<|system|>").splitlines()] == tools
    assert after == (
        'Go<|assistant|><tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
        '<tool_call>\n{"name": "g", "arguments": {"y": 2}}\n</tool_call><|tool|>42<|assistant|>'
    )


def test_the_next_turn_begins_with_the_ids_of_the_last_one(transformers_tokenizer: Any) -> None:
    """So the prefix cache holds a conversation's past, answers included."""
    first = [{"role": "user", "content": "Where are we?"}]
    answer = " here and there again"
    second = [*first, {"role": "assistant", "content": answer}, {"role": "user", "content": "And now?"}]
    past = [*encode(render(transformers_tokenizer, first)), *encode(answer)]
    assert encode(render(transformers_tokenizer, second))[: len(past)] == past


@given(text=st.one_of(prose(), st.text()))
@settings(max_examples=200)
def test_transformers_reads_the_folder_as_the_tokenizers_library_does(transformers_tokenizer: Any, text: str) -> None:
    ids = transformers_tokenizer.encode(text, add_special_tokens=False)
    assert ids == encode(text)
    assert transformers_tokenizer.decode(ids, skip_special_tokens=False) == text
