"""What the engine streams besides words, as Dynamo's bridge drives it, on a loop whose time jumps."""

from __future__ import annotations

import asyncio
import json
import math
import threading
from contextlib import asynccontextmanager

import pytest

from conformance.bridge import BridgeStream
from conformance.context import RequestContext
from mock_engine.dynamo_release import EngineShutdown, InvalidArgument
from mock_engine.llm_engine import MockLLMEngine
from tests.helpers.content import EOS, WRITER
from tests.helpers.jumping_loop import now_s, run

WIRE = {"token_ids": list(range(40)), "stop_conditions": {"max_tokens": 6}}


pytestmark = pytest.mark.usefixtures("no_wall_clock")


@asynccontextmanager
async def serving(*flags):
    """An engine that has started; nothing of it may be left in the end."""
    threads = set(threading.enumerate())
    engine, _ = await MockLLMEngine.from_args(["--jitter", "0", *flags])
    await engine.start(1)
    yield engine
    assert set(engine.conformance_probe().in_use().values()) == {0}
    await engine.cleanup()
    assert set(threading.enumerate()) <= threads


async def answer(engine, request, context=None):
    return await BridgeStream(engine, {**WIRE, **request}, context or RequestContext("r")).read_all()


def tokens_in(chunks):
    return [token_id for chunk in chunks for token_id in chunk["token_ids"]]


def test_json_comes_as_tokens_and_is_counted():
    async def main():
        async with serving() as engine:
            schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
            sampling = {"guided_decoding": {"json": schema}}
            return await answer(engine, {"sampling_options": sampling, "stop_conditions": {}})

    chunks = run(main())
    *tokens, last = tokens_in(chunks)
    assert isinstance(json.loads(WRITER.decode(tokens))["a"], int)
    assert last == EOS
    assert chunks[-1]["finish_reason"] == "eos"
    assert chunks[-1]["completion_usage"]["completion_tokens"] == len(tokens) + 1


def test_a_constraint_that_cannot_be_used_is_the_client_s_error():
    async def main():
        async with serving() as engine:
            with pytest.raises(InvalidArgument, match="Invalid type: foo"):
                await answer(engine, {"sampling_options": {"guided_decoding": {"json": {"type": "foo"}}}})

    run(main())


def test_an_answer_that_is_planned_while_the_engine_stops_is_left_to_another_worker():
    async def main():
        async with serving() as engine:
            is_planning, may_go_on = threading.Event(), threading.Event()
            plan = engine._role.plan

            def slow_plan(*args):
                is_planning.set()
                assert may_go_on.wait(10)
                return plan(*args)

            engine._role.plan = slow_plan
            sampling = {"guided_decoding": {"json": {"type": "object"}}}
            read = asyncio.create_task(answer(engine, {"sampling_options": sampling}))
            while not is_planning.is_set():  # noqa: ASYNC110  (another thread sets it)
                await asyncio.sleep(0)
            stop = asyncio.create_task(engine.cleanup())
            while not engine._is_stopped:  # noqa: ASYNC110
                await asyncio.sleep(0)
            may_go_on.set()
            with pytest.raises(EngineShutdown):
                await read
            await stop

    run(main())


def test_every_chunk_has_log_probabilities_of_its_tokens_and_the_last_those_of_the_prompt():
    async def main():
        async with serving() as engine:
            output = {"logprobs": 2, "prompt_logprobs": 0}
            return await answer(engine, {"output_options": output, "sampling_options": {"n": 2}})

    chunks = run(main())
    for chunk in chunks:
        assert len(chunk["log_probs"]) == len(chunk["top_logprobs"]) == len(chunk["token_ids"])
        for token_id, value, entries in zip(chunk["token_ids"], chunk["log_probs"], chunk["top_logprobs"], strict=True):
            assert {entry["token_id"]: entry["logprob"] for entry in entries}[token_id] == value
            assert math.isfinite(value)
    assert {chunk["index"] for chunk in chunks} == {0, 1}
    assert len(chunks[-1]["engine_data"]["prompt_logprobs"]) == 40
    assert not any("engine_data" in chunk for chunk in chunks[:-1])


def test_thoughts_are_counted_as_far_as_they_were_sent():
    async def main():
        async with serving("--reasoning-ratio", "1", "--reasoning-osl", "5") as engine:
            return [
                (await answer(engine, {"stop_conditions": {"max_tokens": num}}))[-1]["completion_usage"]
                for num in (3, 200)
            ]

    short, long = run(main())
    assert short["completion_tokens_details"] == {"reasoning_tokens": 3}
    assert 3 < long["completion_tokens_details"]["reasoning_tokens"] < 100


async def seconds_for(engine, model, request_id="r"):
    """The loop's seconds that an answer takes."""
    start_s = now_s()
    await answer(engine, {"model": model}, RequestContext(request_id))
    return now_s() - start_s


def test_the_first_request_for_an_adapter_waits_until_it_is_loaded():
    async def main():
        async with serving("--lora-modules", "ada=3", "bob=3", "--max-loras", "1") as engine:
            base_s = await seconds_for(engine, "base")
            both = await asyncio.gather(*(seconds_for(engine, "ada", f"{i}") for i in range(2)))
            again_s = await seconds_for(engine, "ada")
            return base_s, both, again_s, await seconds_for(engine, "bob"), await seconds_for(engine, "ada")

    base_s, both, again_s, bob_s, ada_s = run(main())
    assert base_s < 0.2
    assert again_s < 0.2
    for seconds in (*both, bob_s, ada_s):
        assert 3 <= seconds < 3.3


def test_an_adapter_waits_for_those_that_run():
    async def main():
        async with serving("--lora-modules", "ada=1", "bob=1", "--max-loras", "1") as engine:
            long = {"model": "ada", "stop_conditions": {"max_tokens": 1000, "ignore_eos": True}}
            running = BridgeStream(engine, {**WIRE, **long}, RequestContext("long"))
            await running.read()
            bob = asyncio.create_task(seconds_for(engine, "bob", "bob"))
            await running.read_all()
            ended_s = now_s()
            await bob
            return now_s() - ended_s

    assert 1 <= run(main()) < 1.3


def test_a_client_that_goes_while_its_adapter_is_loaded_leaves_nothing():
    async def main():
        async with serving("--lora-modules", "ada=100") as engine:
            context = RequestContext("r")
            read = asyncio.create_task(answer(engine, {"model": "ada"}, context))
            await asyncio.sleep(1)
            context.stop_generating()
            chunks = await read
            assert now_s() < 2
            return chunks

    assert run(main())[-1]["finish_reason"] == "cancelled"


def test_an_adapter_that_nobody_has_is_the_client_s_error():
    async def main():
        async with serving("--lora-modules", "ada") as engine:
            with pytest.raises(InvalidArgument, match="there is no adapter 'eve'; those of this engine are: ada"):
                await answer(engine, {"routing": {"lora_name": "eve"}})

    run(main())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dyn-tool-call-parser", "morse"], "--dyn-tool-call-parser is 'morse'"),
        (["--dyn-reasoning-parser", "morse"], "--dyn-reasoning-parser is 'morse'"),
        (["--tool-call-ratio", "2"], "--tool-call-ratio is 2; it is a share of answers, from 0 to 1"),
        (["--lora-modules", "a", "--disaggregation-mode", "decode"], "--lora-modules goes with workers that do all"),
        (["--max-loras", "0"], "--max-loras is 0; it must be at least 1"),
        (["--lora-modules", "a", "b=x"], "--lora-modules has 'b=x'; it must be NAME, or NAME=SECONDS to load it"),
    ],
)
def test_wrong_flags_are_one_line(flags, message, capsys):
    with pytest.raises(SystemExit) as ended:
        run(MockLLMEngine.from_args(flags))
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_parsers_go_to_dynamo():
    async def main(*flags):
        _, config = await MockLLMEngine.from_args(list(flags))
        return config

    config = run(main())
    assert (config.tool_call_parser, config.reasoning_parser) == ("hermes", None)
    config = run(main("--reasoning-ratio", "0.5", "--dyn-tool-call-parser", "none"))
    assert (config.tool_call_parser, config.reasoning_parser) == (None, "qwen3")
    config = run(main("--dyn-reasoning-parser", "basic", "--dyn-tool-call-parser", "qwen3_coder"))
    assert (config.tool_call_parser, config.reasoning_parser) == ("qwen3_coder", "basic")
