"""What a client of OpenAI's API gets from Dynamo's real frontend and our engine, with OpenAI's own library."""

from __future__ import annotations

import json
import re
import sys
import time

import jsonschema
import openai
import pytest

from mock_engine.recorder import read_status
from tests.helpers.processes import Command, serving, wait_for

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}},
]
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}, "n": {"type": "integer"}}, "required": ["a", "n"]}


class Asked:
    """The server, and short ways to ask it."""

    def __init__(self, folder, facts):
        self.folder = folder
        self.model = facts["model"]
        self.api = openai.OpenAI(base_url=f"{facts['url']}/v1", api_key="none", max_retries=0)

    def chat(self, content="hello", **options):
        messages = options.pop("messages", [{"role": "user", "content": content}])
        return self.api.chat.completions.create(**{"model": self.model, "messages": messages, **options})

    def say(self, content="hello", **options):
        return self.chat(content, **options).choices[0]

    def status(self):
        (path,) = self.folder.glob("mock-engine-*/worker-0.status.json")
        return read_status(path)

    def wait_until_idle(self):
        def is_idle():
            state = self.status()
            return state.num_open_requests == state.kv_used_blocks == state.num_running == state.num_waiting == 0

        wait_for(is_idle, lambda: f"every block comes back: {self.status()}")


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("openai")
    flags = ["--speedup-ratio", "4", "--reasoning-ratio", "0.5", "--reasoning-osl", "6", "--lora-modules", "ada=1"]
    with serving(folder, *flags) as (command, facts):
        Command.started.remove(command)  # conftest stops what a test has started; this one serves them all
        yield Asked(folder, facts)
        Command.started.append(command)


def plain(**options):
    """Options of an answer without thoughts."""
    return {
        **options,
        "extra_body": {**options.get("extra_body", {}), "chat_template_kwargs": {"enable_thinking": False}},
    }


def test_an_answer_comes_whole_and_in_pieces(asked):
    whole = asked.chat(**plain(max_tokens=9))
    assert (whole.usage.completion_tokens, whole.choices[0].finish_reason) == (9, "length")
    chunks = list(asked.chat(**plain(max_tokens=9, stream=True, stream_options={"include_usage": True})))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert len([piece for piece in pieces if piece]) > 1
    assert "".join(pieces) == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == 9
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["length"]


def test_completions_have_the_same_life(asked):
    answer = asked.api.completions.create(model=asked.model, prompt="once upon", max_tokens=4, logprobs=2)
    (choice,) = answer.choices
    assert answer.usage.completion_tokens == len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs) == 4
    assert "".join(choice.logprobs.tokens) == choice.text
    pieces = asked.api.completions.create(model=asked.model, prompt="once upon", max_tokens=4, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces if piece.choices) == choice.text


def test_an_answer_without_max_tokens_stops_by_itself(asked):
    assert asked.say(**plain()).finish_reason == "stop"


def test_the_seed_decides(asked):
    texts = [asked.say(**plain(max_tokens=8, **seed)).message.content for seed in ({}, {}, {"seed": 1}, {"seed": 1})]
    other = asked.say(**plain(max_tokens=8, seed=2)).message.content
    assert texts[0] == texts[1]
    assert texts[2] == texts[3]
    assert len({texts[0], texts[2], other}) == 3


def test_logprobs_are_of_the_tokens_that_came(asked):
    choice = asked.say(**plain(max_tokens=5, logprobs=True, top_logprobs=3))
    assert "".join(entry.token for entry in choice.logprobs.content) == choice.message.content
    for entry in choice.logprobs.content:
        assert entry.logprob <= 0
        assert 3 <= len(entry.top_logprobs) <= 4
        assert entry.token in [other.token for other in entry.top_logprobs]
    bare = asked.say(**plain(max_tokens=5, logprobs=True))
    assert [entry.logprob for entry in bare.logprobs.content] == [entry.logprob for entry in choice.logprobs.content]
    assert asked.say(**plain(max_tokens=5)).logprobs is None


def test_logprobs_of_the_prompt_come_where_the_client_asks_for_engine_data(asked):
    options = {"prompt_logprobs": 1, "nvext": {"extra_fields": ["engine_data"]}}
    answer = asked.api.completions.create(
        model=asked.model, prompt="once upon a time", max_tokens=1, extra_body=options
    )
    found = answer.nvext["engine_data"]["prompt_logprobs"]
    assert len(found) == answer.usage.prompt_tokens
    assert found[0] is None
    assert all(entry["logprob"] <= 0 for position in found[1:] for entry in position.values())


def test_json_is_valid_for_the_schema(asked):
    form = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True}}
    for seed in range(3):
        choice = asked.say(response_format=form, seed=seed)
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content), SCHEMA)
    assert isinstance(json.loads(asked.say(response_format={"type": "json_object"}).message.content), dict)
    assert asked.say(**plain(response_format=form, max_tokens=3)).finish_reason == "length"


def test_patterns_choices_and_grammars_are_kept_to(asked):
    for name, constraint, pattern in (
        ("guided_regex", "[A-Z]{3}-[0-9]{4}", "[A-Z]{3}-[0-9]{4}"),
        ("guided_choice", ["red", "green"], "red|green"),
        ("guided_grammar", 'root ::= "yes" | "no"', "yes|no"),
        ("guided_json", {"enum": [1, 2]}, "1|2"),
    ):
        choice = asked.say(extra_body={name: constraint})
        assert re.fullmatch(pattern, choice.message.content), name
        assert choice.finish_reason == "stop"


def test_a_constraint_that_cannot_be_used_is_the_client_s_error(asked):
    with pytest.raises(openai.BadRequestError, match="Invalid type: foo"):
        asked.chat(extra_body={"guided_json": {"type": "foo"}})


def check_calls(calls):
    assert calls
    for call in calls:
        schema = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}[call.function.name]
        jsonschema.validate(json.loads(call.function.arguments), schema)
        assert call.id


def test_tools_are_called_as_tool_choice_says(asked):
    for tool_choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
        choice = asked.say(tools=TOOLS, tool_choice=tool_choice)
        assert choice.finish_reason == "tool_calls"
        check_calls(choice.message.tool_calls)
    assert {call.function.name for call in choice.message.tool_calls} == {"get_weather"}
    choices = [asked.say(tools=TOOLS, seed=seed, **plain(max_tokens=150)) for seed in range(12)]
    reasons = [choice.finish_reason for choice in choices]
    assert {"tool_calls", "length"} <= set(reasons)
    for choice in choices:
        if choice.finish_reason == "tool_calls":
            check_calls(choice.message.tool_calls)
    assert not asked.say(tools=TOOLS, tool_choice="none", max_tokens=20).message.tool_calls


def test_tool_calls_are_streamed_and_answered(asked):
    chunks = list(asked.chat(tools=TOOLS, tool_choice="required", stream=True))
    calls = [call for chunk in chunks if chunk.choices for call in chunk.choices[0].delta.tool_calls or []]
    check_calls(calls)
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    message = asked.say(tools=TOOLS, tool_choice="required").message
    results = [{"role": "tool", "tool_call_id": call.id, "content": "42"} for call in message.tool_calls]
    history = [{"role": "user", "content": "hello"}, message.model_dump(exclude_none=True), *results]
    assert asked.say(messages=history, tools=TOOLS, tool_choice="none", max_tokens=20).message.content


def test_thoughts_are_kept_apart(asked):
    answers = [asked.chat(max_tokens=60, seed=seed) for seed in range(12)]
    with_thoughts = [answer for answer in answers if answer.choices[0].message.reasoning_content]
    assert 0 < len(with_thoughts) < 12
    for answer in answers:
        message, details = answer.choices[0].message, answer.usage.completion_tokens_details
        assert "think>" not in message.content + (message.reasoning_content or "")
        num_words = len((message.content + " " + (message.reasoning_content or "")).split())
        num_marks = 2 if message.reasoning_content else 0
        assert answer.usage.completion_tokens == num_words + num_marks == 60
        if message.reasoning_content:
            assert details.reasoning_tokens == len(message.reasoning_content.split()) + 2
    seed = answers.index(with_thoughts[0])
    deltas = [chunk.choices[0].delta for chunk in asked.chat(max_tokens=60, seed=seed, stream=True) if chunk.choices]
    thoughts = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
    assert thoughts == with_thoughts[0].choices[0].message.reasoning_content


def test_n_answers_come_and_the_last_to_end_says_why(asked):
    answer = asked.chat(**plain(max_tokens=6, n=3))
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) == 3
    assert answer.usage.completion_tokens == 18
    # Dynamo reads no further than the first reason, so the engine gives one, with the last token of all.
    assert [choice.finish_reason for choice in answer.choices].count("length") == 1


def test_a_stop_string_ends_the_answer_and_the_blocks_come_back(asked):
    words = asked.say(**plain(max_tokens=300)).message.content
    stop = words[40:52]
    choice = asked.say(**plain(max_tokens=300, stop=[stop]))
    assert choice.finish_reason == "stop"
    # Dynamo holds nothing back: of a stop string of several tokens, all but the last have been sent.
    assert words[: words.index(stop)] <= choice.message.content < words[: words.index(stop) + len(stop)]
    assert words.startswith(choice.message.content)
    word = words.split()[7]
    choice = asked.say(**plain(max_tokens=300, stop=[word]))
    assert choice.message.content == words[: words.index(word)]
    asked.wait_until_idle()


def test_a_client_that_goes_away_gives_its_blocks_back(asked):
    before = asked.status().num_output_tokens
    stream = asked.chat("word " * 2000, max_tokens=100_000, stream=True)
    for _, _chunk in zip(range(3), stream, strict=False):
        pass
    assert asked.status().kv_total_blocks
    wait_for(lambda: asked.status().kv_used_blocks >= 125, "it has blocks")
    stream.close()
    asked.wait_until_idle()
    assert asked.status().num_output_tokens > before


def test_an_adapter_is_a_model_of_its_own_and_its_first_request_waits(asked):
    wait_for(lambda: "ada" in [model.id for model in asked.api.models.list()], "the adapter is listed")
    took_s = []
    for _ in range(2):
        start_s = time.monotonic()
        choice = asked.say(model="ada", tools=TOOLS, tool_choice="required")
        took_s.append(time.monotonic() - start_s)
        check_calls(choice.message.tool_calls)
    assert took_s[0] > 0.25  # a second of the model's time, at four times its speed
    with pytest.raises(openai.NotFoundError):
        asked.say(model="bob")
