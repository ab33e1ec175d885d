"""Dynamo's TokenSpeed engine runs over the stand-in, which keeps to what the native part does."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from itertools import count
from typing import Any

import pytest

pytest.importorskip("dynamo.tokenspeed", reason="the installed ai-dynamo ships no TokenSpeed engine")

from conformance.bridge import BridgeStream
from conformance.context import RequestContext
from tests.engines.tokenspeed_stub import STEP_S, TokenSpeedEngine
from tests.helpers.jumping_loop import now_s, run

request_numbers = count()


def with_engine(use: Callable[[Any], Awaitable[Any]], *flags: str) -> None:
    async def main() -> None:
        engine, config = await TokenSpeedEngine.from_args(list(flags))
        started = await engine.start(1)
        assert started.model == config.model_name
        try:
            await use(engine)
        finally:
            await engine.cleanup()

    run(main())


def stream_of(
    engine: Any, prompt: list[int], osl_tokens: int | None = 6, temperature: float = 0.0, **stop: Any
) -> BridgeStream:
    request = {
        "token_ids": prompt,
        "model": "",
        "sampling_options": {"temperature": temperature, "seed": None, "n": None},
        "stop_conditions": {"max_tokens": osl_tokens, "min_tokens": None, "ignore_eos": True} | stop,
        "output_options": {"logprobs": None},
    }
    return BridgeStream(engine, request, RequestContext(f"r{next(request_numbers)}"))


async def answer(engine: Any, *args: Any, **kwargs: Any) -> tuple[list[int], str]:
    *others, last = await stream_of(engine, *args, **kwargs).read_all()
    return [token_id for chunk in [*others, last] for token_id in chunk["token_ids"]], last["finish_reason"]


def test_an_answer_is_deltas_without_the_echoed_prompt_and_then_its_usage():
    async def use(engine: Any) -> None:
        chunks = await stream_of(engine, [1, 2, 3]).read_all()
        assert [len(chunk["token_ids"]) for chunk in chunks] == [1] * 6
        assert chunks[-1]["finish_reason"] == "length"
        assert chunks[-1]["completion_usage"] == {"prompt_tokens": 3, "completion_tokens": 6, "total_tokens": 9}
        assert now_s() == pytest.approx(6 * STEP_S)

    with_engine(use)


def test_what_a_slow_reader_missed_comes_as_one_chunk():
    async def use(engine: Any) -> None:
        stream = stream_of(engine, [1, 2, 3])
        first = await stream.read()
        await asyncio.sleep(10 * STEP_S)
        last = await stream.read()
        assert [len(chunk["token_ids"]) for chunk in (first, last)] == [1, 5]
        assert ([*first["token_ids"], *last["token_ids"]], "length") == await answer(engine, [1, 2, 3])
        await stream.drop()

    with_engine(use)


def test_stop_tokens_end_an_answer_unless_told_otherwise():
    async def use(engine: Any) -> None:
        tokens, _ = await answer(engine, [5], 40)
        third = tokens.index(tokens[2])
        stop = {"stop_token_ids": [tokens[2]]}
        assert await answer(engine, [5], 40, ignore_eos=False, **stop) == (tokens[: third + 1], "stop")
        assert await answer(engine, [5], 40, ignore_eos=True, **stop) == (tokens, "length")

    with_engine(use)


def test_greedy_answers_do_not_depend_on_how_many_wait_for_a_seat():
    async def use(engine: Any) -> None:
        prompts = [[number] for number in range(7)]
        together = await asyncio.gather(*(answer(engine, prompt) for prompt in prompts))
        assert together == [await answer(engine, prompt) for prompt in prompts]

    with_engine(use, "--max-num-seqs", "2")


def test_an_aborted_request_is_forgotten_and_nobody_wakes_its_reader():
    """So it is with the native part: Dynamo's engine would have to end the stream itself."""

    async def use(engine: Any) -> None:
        stream = stream_of(engine, [1], None)
        await stream.read()
        await stream.abort()
        assert not engine.engine.tokenizer_manager.rid_to_state
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(stream.read(), 100)
        await stream.drop()

    with_engine(use)


def test_a_dropped_request_is_forgotten_when_the_loop_has_closed_what_was_inside():
    async def use(engine: Any) -> None:
        stream = stream_of(engine, [1], None)
        await stream.read()
        await stream.drop()
        await asyncio.sleep(STEP_S)
        assert not engine.engine.tokenizer_manager.rid_to_state
        assert not engine._active_rids_by_context

    with_engine(use)


@pytest.mark.parametrize(
    ("prompt", "error"),
    [pytest.param([], IndexError, id="empty"), pytest.param([1] * 512, ValueError, id="as long as the context")],
)
def test_a_prompt_that_the_native_part_refuses(prompt, error):
    async def use(engine: Any) -> None:
        with pytest.raises(error):
            await stream_of(engine, prompt).read_all()
        assert not engine._active_rids_by_context

    with_engine(use)


def test_a_wrong_flag_exits_with_status_2():
    with pytest.raises(SystemExit) as caught:
        asyncio.run(TokenSpeedEngine.from_args(["--no-such-flag"]))
    assert caught.value.code == 2
