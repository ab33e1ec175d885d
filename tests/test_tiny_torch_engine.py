"""The small real engine does its own arithmetic right, and gives back every block."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="the small real engine is written with torch")

from conformance.bridge import BridgeStream  # noqa: E402
from conformance.catalogue import load_catalogue  # noqa: E402
from conformance.context import RequestContext  # noqa: E402
from conformance.selftest.kill import verdicts_of  # noqa: E402
from conformance.settings import SuiteSettings  # noqa: E402
from conformance.verdict import Outcome  # noqa: E402
from tests.engines.tiny_torch import EngineShutdown, InvalidArgument, TinyTorchEngine, TinyTransformer  # noqa: E402
from tests.helpers.jumping_loop import run  # noqa: E402

torch.set_num_threads(1)  # more would wait for each other, in a process that shares its cores
NUM_BLOCKS = 64
PROMPTS = st.lists(st.integers(0, 511), min_size=1, max_size=40)
MODEL = TinyTransformer(NUM_BLOCKS, block_size=4)


def with_engine(use: Callable[[TinyTorchEngine], Awaitable[Any]], **sizes: int) -> Any:
    """What `use` returns for a started engine, of which no block and no thread is left."""

    async def main() -> Any:
        engine = TinyTorchEngine(**{"num_blocks": NUM_BLOCKS, "context_length": 256, **sizes})
        await engine.start(1)
        try:
            result = await use(engine)
            assert sorted(engine.free_blocks) == list(range(engine.num_blocks))
            assert await engine.is_quiescent()
            return result
        finally:
            await engine.cleanup()
            await engine.cleanup()
            assert engine._thread is None

    return run(main())


def stream_of(engine: TinyTorchEngine, prompt: list[int], osl_tokens: int | None = 12, **options: Any) -> BridgeStream:
    request = {
        "token_ids": prompt,
        "model": "",
        "sampling_options": {"temperature": 0.0, "seed": None, "n": None} | options,
        "stop_conditions": {"max_tokens": osl_tokens, "min_tokens": None, "ignore_eos": None, "stop_token_ids": None},
        "output_options": {"logprobs": None},
    }
    return BridgeStream(engine, request, RequestContext(f"r{id(request)}"))


async def answer(engine: TinyTorchEngine, prompt: list[int], **options: Any) -> list[int]:
    return [
        token_id for chunk in await stream_of(engine, prompt, **options).read_all() for token_id in chunk["token_ids"]
    ]


@given(prompt=PROMPTS, decoded=PROMPTS)
@settings(max_examples=25)
def test_decoding_over_the_cache_gives_what_computing_everything_anew_gives(prompt, decoded):
    """The blocks are out of order, and hold what an earlier sequence left in them."""
    blocks = list(reversed(range(20, 40)))
    MODEL.forward([prompt], [0], [blocks])
    for number, token_id in enumerate(decoded):
        logits = MODEL.forward([[token_id]], [len(prompt) + number], [blocks])
    anew = MODEL.forward([prompt + decoded], [0], [list(range(20))])
    assert torch.allclose(logits, anew, atol=1e-9)


@given(prompts=st.lists(PROMPTS, min_size=2, max_size=3))
@settings(max_examples=25)
def test_what_else_is_in_the_batch_does_not_change_the_logits(prompts):
    tables = [list(range(20 * row, 20 * row + 20)) for row in range(len(prompts))]
    for prompt, blocks in zip(prompts, tables, strict=True):
        MODEL.forward([prompt], [0], [blocks])
    together = MODEL.forward([[7]] * len(prompts), [len(prompt) for prompt in prompts], tables)
    for row, prompt in enumerate(prompts):
        alone = MODEL.forward([[*prompt, 7]], [0], [tables[row]])
        assert torch.allclose(together[row], alone[0], atol=1e-9)


def test_the_model_looks_at_the_whole_prompt():
    one, other = (MODEL.forward([[first, *range(30)]], [0], [list(range(8))]) for first in (1, 2))
    assert not torch.allclose(one, other, atol=1e-3)


def test_a_greedy_answer_is_what_computing_everything_anew_gives():
    async def use(engine: TinyTorchEngine) -> list[int]:
        return await answer(engine, [5, 6, 7])

    tokens = [5, 6, 7]
    for _ in range(12):
        tokens.append(int(MODEL.forward([tokens], [0], [list(range(8))]).argmax()))
    assert with_engine(use) == tokens[3:]


@pytest.mark.parametrize(
    ("max_num_seqs", "num_blocks"), [pytest.param(2, 8, id="two seats"), pytest.param(5, 4, id="blocks for two")]
)
def test_greedy_answers_are_the_same_alone_and_in_a_batch_that_does_not_fit(max_num_seqs, num_blocks):
    async def use(engine: TinyTorchEngine) -> None:
        batch_sizes = []
        forward = engine.model.forward

        def watched(token_ids: list[list[int]], *args: Any) -> Any:
            batch_sizes.append(len(token_ids))
            return forward(token_ids, *args)

        engine.model.forward = watched
        prompts = [[number, 3, 4] * 5 for number in range(12)]
        together = await asyncio.gather(*(answer(engine, prompt) for prompt in prompts))
        assert max(batch_sizes) == 2
        assert together == [await answer(engine, prompt) for prompt in prompts]
        assert len({tuple(tokens) for tokens in together}) == len(prompts)

    with_engine(use, max_num_seqs=max_num_seqs, num_blocks=num_blocks, context_length=64)


def test_a_seed_repeats_an_answer_and_another_seed_gives_another():
    async def use(engine: TinyTorchEngine) -> None:
        one, again, other = [await answer(engine, [1, 2], temperature=1.0, seed=seed) for seed in (-5, -5, 6)]
        assert one == again != other

    with_engine(use)


@pytest.mark.parametrize("way", ["abort", "stop", "drop", "cleanup"])
def test_all_blocks_come_back_however_a_stream_ends(way):
    """Two streams that would go on for long: one runs, the other waits for its blocks."""

    async def use(engine: TinyTorchEngine) -> None:
        running, waiting = stream_of(engine, [1, 2], None), stream_of(engine, [3, 4], None)
        await running.read()
        await running.read()
        first_of_waiting = asyncio.ensure_future(waiting.read())
        while len(engine._open) < 2:
            await asyncio.to_thread(int)
        if way == "cleanup":
            await engine.cleanup()
        else:
            await end(engine, waiting, "stop" if way == "drop" else way)
        assert (await first_of_waiting)["finish_reason"] == "cancelled"
        await waiting.drop()
        assert len(engine._open) == (way != "cleanup"), "the running one goes on"
        if way == "drop":
            await running.drop()
        elif way == "stop":
            await end(engine, running, way)
            last = await running.read()
            assert (last["token_ids"], last["finish_reason"]) == ([], "cancelled")
            assert last["completion_usage"] == {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4}
        else:
            await end(engine, running, way)
            *_, last = await running.read_all()
            assert last["finish_reason"] == "cancelled"

    with_engine(use, num_blocks=128, context_length=2048)


async def end(engine: TinyTorchEngine, stream: BridgeStream, way: str) -> None:
    if way == "stop":
        stream.context.stop_generating()
    elif way == "abort":
        await engine.abort(RequestContext(stream.context.id()))  # that one alone knows: nobody stopped the context


@pytest.mark.parametrize("way", ["stop", "drop", "cleanup"])
def test_a_request_that_ends_before_it_is_read_takes_no_blocks(way):
    async def use(engine: TinyTorchEngine) -> None:
        stream = stream_of(engine, [1, 2], None)
        if way == "drop":
            await stream.drop()
        elif way == "stop":
            stream.context.stop_generating()
            assert [chunk["finish_reason"] for chunk in await stream.read_all()] == ["cancelled"]
        else:
            await engine.cleanup()
            with pytest.raises(EngineShutdown):
                await stream.read_all()

    with_engine(use)


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        pytest.param([], {}, id="no prompt"),
        pytest.param([1] * 256, {}, id="a prompt as long as the context"),
        pytest.param([1], {"n": 2}, id="two answers"),
        pytest.param([-1], {}, id="a negative token"),
        pytest.param([1], {"temperature": float("nan")}, id="a temperature that is no number"),
    ],
)
def test_what_cannot_be_served_is_the_clients_error(prompt, options):
    async def use(engine: TinyTorchEngine) -> None:
        with pytest.raises(InvalidArgument):
            await stream_of(engine, prompt, **options).read_all()

    with_engine(use)


def test_a_wrong_flag_exits_with_status_2():
    with pytest.raises(SystemExit) as caught:
        asyncio.run(TinyTorchEngine.from_args(["--no-such-flag"]))
    assert caught.value.code == 2


def test_the_conformance_suite_finds_nothing():
    suite = SuiteSettings("tests.engines.tiny_torch:TinyTorchEngine", max_examples=3, seed=1)
    verdicts = list(verdicts_of(suite, load_catalogue().values()))
    assert {each.rule.id: each.finding.message for each in verdicts if each.finding is not None} == {}
    assert sum(each.outcome is Outcome.PASSED for each in verdicts) >= 70
