"""The engine as Dynamo's bridge drives it, on a loop whose time jumps."""

from __future__ import annotations

import asyncio
import shutil
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conformance.bridge import BridgeStream
from conformance.context import RequestContext
from mock_engine.dynamo_release import HAS_DRAIN, EngineShutdown, InvalidArgument
from mock_engine.engine_settings import DEFAULT_PROFILE, DEFAULT_TOKENIZER, load_profile
from mock_engine.llm_engine import MockLLMEngine
from mock_engine.output_tokens import OutputTokens
from mock_engine.recorder import read_requests, read_timeline
from tests.helpers.jumping_loop import run
from tests.helpers.live_engine import BLOCK_SIZE, MAX_MODEL_LEN, SMALL, check_nothing_left, serving
from tests.helpers.workloads import check_blocks

pytestmark = pytest.mark.usefixtures("no_wall_clock")

PROMPT = list(range(100, 140))
LONG = {"token_ids": PROMPT, "stop_conditions": {"max_tokens": 80}}
SHORT = {"token_ids": PROMPT, "stop_conditions": {"max_tokens": 3}}

# A request as the Rust side writes it: every key present, None where the client set nothing.
STOP_KEYS = ("max_tokens", "stop", "stop_token_ids", "stop_token_ids_hidden", "min_tokens", "ignore_eos")
SAMPLING_KEYS = ("n", "best_of", "temperature", "top_p", "top_k", "min_p", "seed", "use_beam_search")
OTHER_KEYS = ("model", "output_options", "eos_token_ids", "annotations", "extra_args", "multi_modal_data")

MOMENTS = ("before the first read", "between reads", "while a read is pending")


def num_working(engine):
    """Sequences the engine still computes or means to."""
    scheduler = engine._drives[0].core.scheduler
    return scheduler.num_running + len(scheduler.waiting) + len(engine._drives[0]._arrivals)


def check_shape(chunks, isl_tokens):
    """What Dynamo's adapter needs of every stream that ended by itself. Returns tokens by choice."""
    tokens: dict[int, list[int]] = {}
    for chunk in chunks:
        assert type(chunk["token_ids"]) is list
        assert all(type(token_id) is int and 0 <= token_id < 2**32 for token_id in chunk["token_ids"])
        assert type(chunk["index"]) is int
        tokens.setdefault(chunk["index"], []).extend(chunk["token_ids"])
    *others, last = chunks
    assert all(chunk.keys() == {"token_ids", "index"} and chunk["token_ids"] for chunk in others)
    assert last.keys() == {"token_ids", "index", "finish_reason", "completion_usage"}
    assert last["finish_reason"] in ("length", "stop", "eos", "cancelled")
    usage = last["completion_usage"]
    assert usage["prompt_tokens"] == isl_tokens
    assert usage["completion_tokens"] == sum(map(len, tokens.values()))
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    if "prompt_tokens_details" in usage:
        assert 0 <= usage["prompt_tokens_details"]["cached_tokens"] < isl_tokens
    else:
        assert last["finish_reason"] == "cancelled"
    return tokens


async def answer(engine, request, request_id="r"):
    return await BridgeStream(engine, request, RequestContext(request_id)).read_all()


async def tokens_of(engine, request):
    return check_shape(await answer(engine, request), len(PROMPT))


async def stream_at(engine, moment):
    """A stream with a long answer ahead, and the read that is pending, if one is."""
    stream = BridgeStream(engine, LONG, RequestContext("r"))
    if moment == "before the first read":
        return stream, None
    await stream.read()
    if moment == "between reads":
        await asyncio.sleep(0.1)
        assert num_working(engine) == 1
        return stream, None
    read = asyncio.create_task(stream.read())
    await asyncio.sleep(1e-6)
    assert not read.done()
    return stream, read


# What comes out.

prompts = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=MAX_MODEL_LEN - 1)
stops = st.fixed_dictionaries(
    {},
    optional={
        "max_tokens": st.none() | st.integers(1, 2 * MAX_MODEL_LEN),
        "min_tokens": st.none() | st.integers(0, MAX_MODEL_LEN),
        "ignore_eos": st.none() | st.booleans(),
        "stop_token_ids": st.none() | st.lists(st.integers(0, 20_000), max_size=3),
        "stop_token_ids_hidden": st.none() | st.lists(st.integers(0, 20_000), max_size=3),
    },
)
samplings = st.fixed_dictionaries(
    {},
    optional={
        "n": st.none() | st.integers(1, 5),
        "seed": st.none() | st.integers(-(2**63), 2**63 - 1),
        "temperature": st.none() | st.just(0.10000000149011612),
    },
)


@given(prompt=prompts, stop=stops, sampling=samplings)
@settings(max_examples=60)
def test_only_the_last_chunk_says_why_it_ends_and_usage_adds_up(prompt, stop, sampling):
    async def main():
        async with serving("--speedup-ratio", "0") as engine:
            request = {"token_ids": prompt, "stop_conditions": stop, "sampling_options": sampling}
            chunks = await answer(engine, request)
            tokens = check_shape(chunks, len(prompt))
            assert chunks[-1]["finish_reason"] != "cancelled"
            assert sorted(tokens) == list(range(sampling.get("n") or 1))
            room = MAX_MODEL_LEN - len(prompt)
            assert all(1 <= len(ids) <= min(stop.get("max_tokens") or room, room) for ids in tokens.values())

    run(main())


@pytest.mark.parametrize(("max_tokens", "num_tokens"), [(1, 1), (7, 7), (88, 88), (89, 88), (100_000, 88)])
def test_max_tokens_is_met_exactly_and_cut_to_the_context_length(max_tokens, num_tokens):
    async def main():
        async with serving() as engine:
            chunks = await answer(engine, {"token_ids": PROMPT, "stop_conditions": {"max_tokens": max_tokens}})
            assert chunks[-1]["finish_reason"] == "length"
            assert chunks[-1]["completion_usage"]["completion_tokens"] == num_tokens
            assert len(chunks) == num_tokens  # this reader is never late, so one chunk a step

    run(main())


def test_an_answer_without_max_tokens_ends_in_eos_unless_the_client_ignores_it():
    async def main():
        async with serving() as engine:
            eos_token_id = OutputTokens.from_model_path(DEFAULT_TOKENIZER).eos_token_ids[0]
            chunks = await answer(engine, {"token_ids": PROMPT})
            assert chunks[-1]["finish_reason"] == "eos"
            assert chunks[-1]["token_ids"] == [eos_token_id]
            chunks = await answer(engine, {"token_ids": PROMPT, "stop_conditions": {"ignore_eos": True}})
            assert chunks[-1]["finish_reason"] == "length"
            assert chunks[-1]["completion_usage"]["total_tokens"] == MAX_MODEL_LEN
            assert all(eos_token_id not in chunk["token_ids"] for chunk in chunks)

    run(main())


@pytest.mark.parametrize("key", ["stop_token_ids", "stop_token_ids_hidden"])
def test_a_stop_token_ends_the_answer_and_is_its_last_token(key):
    async def main():
        async with serving() as engine:
            (whole,) = (await tokens_of(engine, LONG)).values()
            stop = {"max_tokens": 80, key: [whole[9]]}
            chunks = await answer(engine, {"token_ids": PROMPT, "stop_conditions": stop})
            assert chunks[-1]["finish_reason"] == "stop"
            assert check_shape(chunks, len(PROMPT))[0] == whole[: whole.index(whole[9]) + 1]

    run(main())


def test_all_choices_are_whole_before_the_one_terminal_chunk():
    async def main():
        async with serving() as engine:
            request = {"token_ids": PROMPT, "sampling_options": {"n": 6, "seed": 3}}  # more than run at once
            chunks = await answer(engine, request)
            tokens = check_shape(chunks, len(PROMPT))
            assert sorted(tokens) == list(range(6))
            eos_token_id = OutputTokens.from_model_path(DEFAULT_TOKENIZER).eos_token_ids[0]
            assert all(ids.index(eos_token_id) == len(ids) - 1 for ids in tokens.values())
            assert len({tuple(ids) for ids in tokens.values()}) == 6

    run(main())


@pytest.mark.parametrize("seed", [0, 7, -7, -(2**63), 2**63 - 1])
def test_the_seed_decides_the_tokens(seed):
    async def main():
        async with serving() as engine, serving() as another:
            request = {**LONG, "sampling_options": {"seed": seed}}
            tokens = await tokens_of(engine, request)
            assert await tokens_of(engine, request) == tokens
            assert await tokens_of(another, request) == tokens
            assert await tokens_of(engine, {**LONG, "sampling_options": {"seed": 12345}}) != tokens

    run(main())


@given(isl_tokens=st.integers(1, MAX_MODEL_LEN - 3), num_shared=st.integers(0, MAX_MODEL_LEN))
@settings(max_examples=25)
def test_full_blocks_of_a_repeated_prompt_come_out_of_the_cache(isl_tokens, num_shared):
    """Whole blocks only, and never the last prompt token: that one must be computed."""

    async def main():
        async with serving("--speedup-ratio", "0") as engine:
            first = list(range(isl_tokens))
            second = [token_id if token_id < num_shared else token_id + 1000 for token_id in first]
            stop = {"max_tokens": 2, "ignore_eos": True}
            cold = await answer(engine, {"token_ids": first, "stop_conditions": stop})
            warm = await answer(engine, {"token_ids": second, "stop_conditions": stop})
            assert cold[-1]["completion_usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
            num_cached = min(num_shared, isl_tokens - 1) // BLOCK_SIZE * BLOCK_SIZE
            assert warm[-1]["completion_usage"]["prompt_tokens_details"] == {"cached_tokens": num_cached}

    run(main())


def test_a_slow_reader_finds_the_tokens_of_several_steps_in_one_chunk():
    async def main():
        async with serving() as engine:
            stream = BridgeStream(engine, LONG, RequestContext("r"))
            first = await stream.read()
            await asyncio.sleep(1.0)
            last = await stream.read()
            assert len(first["token_ids"]) == 1
            assert len(last["token_ids"]) == 79
            check_shape([first, last], len(PROMPT))
            await stream.drop()

    run(main())


# What goes in.

SET = {"max_tokens": 9, "min_tokens": 2, "seed": -4}


@pytest.mark.parametrize(
    ("request_", "same_as"),
    [
        pytest.param(
            {"token_ids": PROMPT, "stop_conditions": None, "sampling_options": None}, {}, id="groups are None"
        ),
        pytest.param({"token_ids": PROMPT, "stop_conditions": {}, "sampling_options": {}}, {}, id="groups are empty"),
        pytest.param({"token_ids": tuple(PROMPT)}, {}, id="a tuple"),
        pytest.param({"token_ids": struct.pack(f"<{len(PROMPT)}i", *PROMPT)}, {}, id="packed int32"),
        pytest.param(
            {
                "token_ids": PROMPT,
                "stop_conditions": dict.fromkeys(STOP_KEYS),
                "sampling_options": dict.fromkeys(SAMPLING_KEYS),
                **dict.fromkeys(OTHER_KEYS),
            },
            {},
            id="wire form, nothing set",
        ),
        pytest.param(
            {
                "token_ids": PROMPT,
                "stop_conditions": {**dict.fromkeys(STOP_KEYS), "max_tokens": 9, "min_tokens": 2},
                "sampling_options": {**dict.fromkeys(SAMPLING_KEYS), "seed": -4, "temperature": 0.10000000149011612},
                **dict.fromkeys(OTHER_KEYS),
            },
            {"stop_conditions": {"max_tokens": 9, "min_tokens": 2}, "sampling_options": {"seed": -4}},
            id="wire form",
        ),
    ],
)
def test_absent_and_none_mean_the_same(request_, same_as):
    async def main():
        async with serving("--no-enable-prefix-caching") as engine:
            assert await answer(engine, request_) == await answer(engine, {"token_ids": PROMPT, **same_as})

    run(main())


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({}, "token_ids"),
        ({"token_ids": None}, "token_ids"),
        ({"token_ids": 7}, "token_ids"),
        ({"token_ids": "seven"}, "token_ids"),
        ({"token_ids": [1, 2.5]}, "token_ids"),
        ({"token_ids": [1, None]}, "token_ids"),
        ({"token_ids": b"\x01\x02\x03"}, "token_ids"),
        ({"token_ids": []}, "the prompt is empty"),
        ({"token_ids": b""}, "the prompt is empty"),
        ({**SHORT, "stop_conditions": {"max_tokens": 0}}, "max_tokens is 0; it must be an integer of at least 1"),
        ({**SHORT, "stop_conditions": {"max_tokens": "9"}}, "max_tokens is '9'"),
        ({**SHORT, "stop_conditions": {"min_tokens": -1}}, "min_tokens is -1"),
        ({**SHORT, "sampling_options": {"n": 0}}, "n is 0"),
    ],
    ids=str,
)
def test_a_request_that_makes_no_sense_is_the_client_s_error(request_, message):
    async def main():
        async with serving() as engine:
            with pytest.raises(InvalidArgument, match=message):
                await answer(engine, request_)
            check_shape(await answer(engine, SHORT), len(PROMPT))

    run(main())


@pytest.mark.parametrize("isl_tokens", [MAX_MODEL_LEN, MAX_MODEL_LEN + 1, 10_000])
def test_a_prompt_that_fills_the_context_is_refused_with_what_to_do(isl_tokens):
    async def main():
        async with serving() as engine:
            with pytest.raises(
                InvalidArgument,
                match=f"has {isl_tokens} tokens and the context length is 128.*Shorten the prompt to 127 tokens",
            ):
                await answer(engine, {"token_ids": [1] * isl_tokens})
            chunks = await answer(engine, {"token_ids": [1] * (MAX_MODEL_LEN - 1)})
            assert chunks[-1]["completion_usage"]["completion_tokens"] == 1

    run(main())


# Letting go.


@pytest.mark.parametrize("moment", MOMENTS[1:])
def test_abort_gives_everything_back_before_it_returns_and_the_stream_ends(moment):
    async def main():
        async with serving() as engine:
            stream, read = await stream_at(engine, moment)
            assert engine._drives[0].core.scheduler.blocks.num_used > 0
            await engine.abort(stream.context.fresh())  # the context itself is not told
            assert num_working(engine) == 0
            assert engine._drives[0].core.scheduler.blocks.num_used == 0
            last = await (read or stream.read())
            assert last["token_ids"] == []
            assert last["finish_reason"] == "cancelled"
            assert last["completion_usage"]["completion_tokens"] == 1
            await stream.drop()
            await engine.abort(stream.context.fresh())  # too late, and harmless

    run(main())


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_stopped_context_ends_the_stream_within_20_ms_without_an_abort(moment):
    async def main():
        async with serving("--speedup-ratio", "1e-3") as engine:  # seconds to the next token
            stream, read = await stream_at(engine, moment)
            loop = asyncio.get_running_loop()
            stopped_at_s = loop.time()
            stream.context.stop_generating()
            last = await (read or stream.read())
            assert loop.time() - stopped_at_s <= 0.021
            assert last["finish_reason"] == "cancelled"
            assert num_working(engine) == 0
            check_shape([{"token_ids": [1], "index": 0}] * (moment != MOMENTS[0]) + [last], len(PROMPT))
            await stream.drop()

    run(main())


def test_tokens_that_wait_for_a_client_that_stops_are_not_sent():
    async def main():
        async with serving() as engine:
            stream, _ = await stream_at(engine, "between reads")
            stream.context.stop_generating()
            last = await stream.read()
            assert last["token_ids"] == []
            assert last["finish_reason"] == "cancelled"
            assert last["completion_usage"]["completion_tokens"] == 1
            assert num_working(engine) == 0
            await stream.drop()

    run(main())


def test_a_client_that_stops_and_never_reads_again_holds_no_blocks():
    async def main():
        async with serving() as engine:
            stream, _ = await stream_at(engine, "between reads")
            stream.context.stop_generating()
            await asyncio.sleep(0.021)
            assert engine._drives[0].core.scheduler.blocks.num_used == 0
            await stream.drop()

    run(main())


@pytest.mark.parametrize("moment", MOMENTS)
def test_dropping_a_stream_on_a_thread_without_a_loop_gives_everything_back(moment):
    async def main():
        async with serving() as engine:
            stream, read = await stream_at(engine, moment)
            await stream.drop()
            if read is not None:  # the read holds the stream until it has its chunk
                assert (await read)["token_ids"]
                del read
            check_nothing_left(engine)

    run(main())


@pytest.mark.parametrize("n", [1, 3])
def test_a_read_that_is_cancelled_gives_everything_back(n):
    async def main():
        async with serving() as engine:
            stream = BridgeStream(engine, {**LONG, "sampling_options": {"n": n}}, RequestContext("r"))
            for _ in range(n):
                await stream.read()
            read = asyncio.create_task(stream.read())
            await asyncio.sleep(1e-6)
            read.cancel()
            with pytest.raises(asyncio.CancelledError):
                await read
            check_nothing_left(engine)
            await stream.drop()

    run(main())


@pytest.mark.parametrize("num_read", [0, 1, 5])
def test_aclose_gives_everything_back_before_it_returns(num_read):
    async def main():
        async with serving() as engine:
            stream = engine.generate(LONG, RequestContext("r"))
            for _ in range(num_read):
                await anext(stream)
            await stream.aclose()
            check_nothing_left(engine)

    run(main())


@pytest.mark.parametrize("way", ["abort", "cancel the read", "cleanup"])
def test_a_request_can_be_let_go_before_its_first_step_while_another_s_step_runs(way):
    async def main():
        async with serving() as engine:
            busy = BridgeStream(engine, LONG, RequestContext("busy"))
            await busy.read()
            stream = BridgeStream(engine, LONG, RequestContext("r"))
            read = asyncio.create_task(stream.read())
            await asyncio.sleep(1e-6)
            assert len(engine._drives[0]._arrivals) == 1
            if way == "abort":
                await engine.abort(RequestContext("r"))
            elif way == "cleanup":
                await engine.cleanup()
            else:
                read.cancel()
            await asyncio.wait([read])
            assert not engine._drives[0]._arrivals
            if way == "cleanup":
                assert isinstance(read.exception(), EngineShutdown)
                with pytest.raises(EngineShutdown):
                    await busy.read_all()
            else:
                assert read.cancelled() or read.result()["finish_reason"] == "cancelled"
                assert (await busy.read_all())[-1]["finish_reason"] == "length"
            await stream.drop()

    run(main())


def test_abort_of_an_id_that_nobody_has_changes_nothing():
    async def main():
        async with serving() as engine:
            await engine.abort(RequestContext("nobody"))
            stream = BridgeStream(engine, SHORT, RequestContext("r"))
            await stream.read()
            await engine.abort(RequestContext("nobody"))
            assert num_working(engine) == 1
            rest = await stream.read_all()
            assert rest[-1]["finish_reason"] == "length"

    run(main())


def test_abort_lets_go_of_every_stream_with_the_id_and_of_no_other():
    async def main():
        async with serving() as engine:
            streams = [BridgeStream(engine, LONG, RequestContext(request_id)) for request_id in ("a", "a", "b", "a")]
            for stream in streams:
                await stream.read()
            await streams[0].drop()
            await engine.abort(RequestContext("a"))
            assert num_working(engine) == 1
            assert [(await stream.read_all())[-1]["finish_reason"] for stream in streams[1:]] == [
                "cancelled",
                "length",
                "cancelled",
            ]

    run(main())


PROMPT_SIZES = st.integers(1, 60)
moves = st.lists(
    st.tuples(
        st.sampled_from(
            ["start", "start", "read", "read", "begin_read", "cancel_read", "abort", "stop", "drop", "aclose", "wait"]
        ),
        st.integers(0, 11),
    ),
    min_size=4,
    max_size=40,
)


class Client:
    """One request, and what its client has done to it so far."""

    def __init__(self, engine, number):
        num_choices = 1 + (number % 4 == 3)
        self.num_tokens = num_choices * (1 + number * 5)
        request = {
            "token_ids": range(10 + number * 3),  # all prompts share their beginning
            "stop_conditions": {"max_tokens": 1 + number * 5},
            "sampling_options": {"n": num_choices},
        }
        self.isl_tokens = len(request["token_ids"])
        self.stream = BridgeStream(engine, request, RequestContext(f"r{number % 5}"))
        self.chunks = []
        self.pending = None
        self.has_left = False  # it, or somebody with the same id, stopped the request

    async def read(self):
        self.begin_read()
        read, self.pending = self.pending, None
        chunk = await read
        if chunk is not None:
            self.chunks.append(chunk)
        return chunk

    def begin_read(self):
        self.pending = self.pending or asyncio.create_task(self.stream.read())

    async def cancel_read(self):
        if self.pending is None or self.pending.done():
            return False
        self.pending.cancel()
        await asyncio.wait([self.pending])
        is_cancelled = self.pending.cancelled()
        self.pending = None
        return is_cancelled


@given(moves=moves, speedup_ratio=st.sampled_from(["0", "1", "50"]))
@settings(max_examples=150)
def test_whatever_the_clients_do_everything_comes_back_and_who_stays_is_served(moves, speedup_ratio):
    async def main():
        async with serving("--speedup-ratio", speedup_ratio) as engine:
            clients: list[Client] = []
            for move, number in moves:
                client = clients[number % len(clients)] if clients else None
                if move == "start":
                    clients.append(Client(engine, number))
                elif move == "wait":
                    await asyncio.sleep(1e-6 + number * 0.002)  # from "threads get their turn" to several steps
                elif client is None:
                    continue
                elif move == "read":
                    await client.read()
                elif move == "begin_read":
                    client.begin_read()
                elif move == "cancel_read":
                    client.has_left |= await client.cancel_read()
                elif move == "abort":
                    for other in clients:
                        other.has_left |= other.stream.context.id() == client.stream.context.id()
                    await client.stream.abort()
                elif move == "stop":
                    client.has_left = True
                    client.stream.context.stop_generating()
                elif move == "drop":
                    clients.remove(client)
                    await client.stream.drop()
                    if client.pending is not None and number % 2:
                        client.pending.cancel()
                    if client.pending is not None:
                        await asyncio.wait([client.pending])
                        await client.stream.drop()  # a read that had not begun then has made a stream since
                elif move == "aclose" and client.pending is None:
                    clients.remove(client)
                    for held in client.stream._held:  # nothing before the first read
                        await held.aclose()
                    await client.stream.drop()
                check_blocks(engine._drives[0].core)
            for client in clients:
                while await client.read() is not None:
                    pass
                await client.stream.drop()
                if not client.has_left:
                    tokens = check_shape(client.chunks, client.isl_tokens)
                    assert sum(map(len, tokens.values())) == client.num_tokens
                    assert client.chunks[-1]["finish_reason"] == "length"

    run(main())


# Data-parallel ranks.


async def cached_tokens(engine, rank):
    request = {**SHORT, "routing": {"dp_rank": rank}}
    return (await answer(engine, request))[-1]["completion_usage"]["prompt_tokens_details"]["cached_tokens"]


def test_each_rank_has_a_cache_of_its_own_and_the_router_chooses_among_them():
    async def main():
        async with serving("--data-parallel-size", "3") as engine:
            found = [await cached_tokens(engine, rank) for rank in (1, 1, 2, 1, 2, 0, 3, None)]
            whole = len(PROMPT) // BLOCK_SIZE * BLOCK_SIZE - BLOCK_SIZE  # never the last token
            assert found == [0, whole, 0, whole, whole, 0, whole, whole]
            assert engine.component_metrics_dp_ranks() == [0, 1, 2]

    run(main())


def test_where_the_router_does_not_choose_requests_go_to_the_rank_that_has_the_fewest():
    async def main():
        async with serving("--data-parallel-size", "3") as engine:
            streams = [BridgeStream(engine, LONG, RequestContext(f"r{i}")) for i in range(6)]
            for stream in streams:
                await stream.read()
            assert [drive.num_running for drive in engine._drives] == [2, 2, 2]
            for stream in streams:
                await engine.abort(stream.context.fresh())
                await stream.drop()

    run(main())


# Starting and ending.


@pytest.mark.parametrize("moment", MOMENTS)
def test_cleanup_ends_open_streams_and_a_second_one_does_nothing(moment):
    """With an error upon which Dynamo's frontend moves the request: a terminal chunk would be a shorter answer."""

    async def main():
        async with serving() as engine:
            stream, read = await stream_at(engine, moment)
            await engine.cleanup()
            assert num_working(engine) == 0
            assert engine._drives[0].core.scheduler.blocks.num_used == 0
            await engine.cleanup()
            with pytest.raises(EngineShutdown):
                await (read or stream.read())
            await stream.drop()

    run(main())


def test_cleanup_returns_when_all_readers_have_heard_of_it():
    """Dynamo's process dies of SIGABRT if it ends while a thread of its own still reads."""

    async def main():
        async with serving() as engine:
            streams = [BridgeStream(engine, LONG, RequestContext(f"{number}")) for number in range(3)]
            await asyncio.gather(*[stream.read() for stream in streams])
            reads = [asyncio.create_task(stream.read()) for stream in streams]
            await asyncio.sleep(1e-6)
            await engine.cleanup()
            assert [type(read.exception()) for read in reads if read.done()] == 3 * [EngineShutdown]
            assert not engine._open
            for stream in streams:
                await stream.drop()

    run(main())


def test_a_client_that_has_gone_by_cleanup_is_cancelled_and_not_moved():
    async def main():
        async with serving() as engine:
            context = RequestContext("r")
            stream = BridgeStream(engine, LONG, context)
            await stream.read()
            context.stop_generating()
            await engine.cleanup()
            assert (await stream.read())["finish_reason"] == "cancelled"
            await stream.drop()

    run(main())


def test_streams_can_be_dropped_and_aborted_after_cleanup():
    async def main():
        async with serving() as engine:
            streams = [BridgeStream(engine, LONG, RequestContext("r")) for _ in range(3)]
            for stream in streams:
                await stream.read()
            await engine.cleanup()
            await streams[0].drop()
            await streams[1].abort()
            await streams[1].drop()
            await streams[2].drop()

    run(main())


def test_nobody_is_served_before_start_or_after_cleanup():
    async def main():
        engine, _ = await MockLLMEngine.from_args(SMALL)
        with pytest.raises(EngineShutdown):
            await answer(engine, SHORT)
        await engine.start(1)
        await answer(engine, SHORT)
        await engine.cleanup()
        with pytest.raises(EngineShutdown):
            await answer(engine, SHORT)
        await engine.abort(RequestContext("r"))

    run(main())


def test_cleanup_works_before_start_and_twice():
    async def main():
        engine, _ = await MockLLMEngine.from_args(SMALL)
        await engine.cleanup()
        await engine.cleanup()
        await engine.abort(RequestContext("r"))
        assert await engine.is_quiescent()

    run(main())


def test_cleanup_works_after_a_start_that_failed(tmp_path):
    """The folder was there when the flags were read, and is a file when the engine starts."""
    record = tmp_path / "record"

    async def main():
        engine, _ = await MockLLMEngine.from_args([*SMALL, "--record", str(record)])
        shutil.rmtree(record)
        record.write_text("")
        with pytest.raises(EngineShutdown, match="cannot record to"):
            await engine.start(1)
        with pytest.raises(EngineShutdown):
            await answer(engine, SHORT)
        await engine.cleanup()
        await engine.cleanup()

    run(main())


def test_a_bug_in_the_engine_reaches_readers_as_engine_shutdown_and_cleanup_still_works(caplog):
    async def main():
        async with serving() as engine:
            stream = BridgeStream(engine, LONG, RequestContext("r"))
            await stream.read()
            engine._drives[0].core.end_step_with_tokens = lambda *_: (
                1 / 0
            )  # the read that waits for this step must hear of it
            with pytest.raises(EngineShutdown, match="internal error"):
                await stream.read_all()
            with pytest.raises(EngineShutdown, match="internal error"):
                await answer(engine, SHORT)

    run(main())
    assert "the engine stopped" in caplog.text


def test_the_engine_is_quiescent_and_drained_once_the_last_request_has_ended():
    async def main():
        async with serving() as engine:
            assert await engine.is_quiescent()
            stream = BridgeStream(engine, LONG, RequestContext("r"))
            await stream.read()
            assert not await engine.is_quiescent()
            drained = asyncio.create_task(engine.drain()) if HAS_DRAIN else None
            await asyncio.sleep(0.5)
            assert drained is None or not drained.done()
            await stream.drop()
            if drained is not None:
                await drained
            assert await engine.is_quiescent()

    run(main())


def test_a_load_that_was_not_measured_is_said_once(caplog):
    async def main():
        async with serving("--profile", "a100-sxm/llama-2-70b/splitwise-tp8-fp16", "--max-num-seqs", "32") as engine:
            await asyncio.gather(*[answer(engine, SHORT, f"r{number}") for number in range(30)])

    run(main())
    assert caplog.text.count("was not measured at this load") == 1


# Settings.


def test_worker_config_says_where_the_worker_is_and_what_it_serves():
    async def main():
        places = ["namespace", "component", "endpoint", "endpoint_types", "discovery_backend"]
        planes = {"request_plane": "tcp", "event_plane": "zmq"}
        argv = [f"--{name.replace('_', '-')}=a-{name}" for name in places]
        argv += [f"--{name.replace('_', '-')}={value}" for name, value in planes.items()]
        _, config = await MockLLMEngine.from_args([*argv, "--discovery-backend", "file", "--endpoint-types", "chat"])
        expected = {name: f"a-{name}" for name in places} | planes
        expected |= {"discovery_backend": "file", "endpoint_types": "chat"}
        assert {name: getattr(config, name) for name in expected} == expected
        assert config.model_name == str(DEFAULT_TOKENIZER)
        assert config.served_model_name == "llama-3.1-8b"
        _, config = await MockLLMEngine.from_args(["--model-name", "my-model"])
        assert config.served_model_name == "my-model"

    run(main())


def test_workers_of_a_rolling_update_have_a_namespace_of_their_own(monkeypatch):
    """Dynamo's operator sets the suffix, and its frontend looks for namespaces that begin with the rest."""
    monkeypatch.setenv("DYN_NAMESPACE", "graph")
    monkeypatch.setenv("DYN_NAMESPACE_WORKER_SUFFIX", "4f2a")
    _, config = run(MockLLMEngine.from_args([]))
    assert config.namespace == "graph-4f2a"


def test_start_registers_the_profile_s_numbers_or_those_of_the_flags():
    async def main():
        profile = load_profile(DEFAULT_PROFILE)
        registered = await registration()
        assert registered == (
            profile.max_model_len,
            profile.block_size,
            profile.total_kv_blocks(0.9),
            profile.max_num_seqs,
            profile.max_num_batched_tokens,
        )
        assert await registration(*SMALL) == (MAX_MODEL_LEN, BLOCK_SIZE, 24, 4, 32)

    async def registration(*flags):
        engine, _ = await MockLLMEngine.from_args([*flags, "--model-name", "my-model"])
        config = await engine.start(1)
        await engine.cleanup()
        assert config.model == str(DEFAULT_TOKENIZER)
        assert config.served_model_name == "my-model"
        numbers = getattr(config, "llm", None) or config  # 1.2 has them flat
        return (
            numbers.context_length,
            numbers.kv_cache_block_size,
            numbers.total_kv_blocks,
            numbers.max_num_seqs,
            numbers.max_num_batched_tokens,
        )

    run(main())


def corrupt_profile(folder: Path):
    (folder / "profile.toml").write_text("gpu = 3")
    return folder


def corrupt_tokenizer(folder: Path):
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--profile", "h100-sxm/llama-3.1-9b/vllm-tp1-bf16"], "Did you mean h100-sxm/llama-3.1-8b/vllm-tp1-bf16"),
        (["--profile", corrupt_profile], "profile.toml"),
        (["--profile", lambda folder: folder], "is a folder without profile.toml"),
        (["--model-path", lambda folder: folder], "tokenizer.json does not exist"),
        (["--model-path", corrupt_tokenizer], "no tokenizer the tokenizers library can load"),
        (["--max-num-seqs", "0"], "--max-num-seqs is 0; it must be at least 1"),
        (["--max-num-seqs", "many"], "invalid int value: 'many'"),
        (["--speedup-ratio", "-1"], "--speedup-ratio is -1"),
        (["--speedup-ratio", "nan"], "--speedup-ratio is nan"),
        (["--gpu-memory-utilization", "1.5"], "--gpu-memory-utilization is 1.5"),
        (["--gpu-memory-utilization", "0.1"], "Use --gpu-memory-utilization 0.2"),
        (["--jitter", "2"], "--jitter is 2"),
        (["--default-osl", "0"], "--default-osl is 0"),
        (["--num-gpu-blocks-override", "10", "--max-model-len", "161"], "Use --max-model-len 160 or less"),
        (["--max-num-batched-tokens", "8", "--max-num-seqs", "9"], "Raise the first or lower the second"),
        (["--no-enable-chunked-prefill", "--max-num-batched-tokens", "9"], "or enable chunked prefill"),
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(getattr(one, "__name__", one) for one in value),
)
def test_a_wrong_flag_is_one_line_on_stderr_and_status_2(argv, message, tmp_path, capsys):
    argv = [str(word(tmp_path)) if callable(word) else word for word in argv]
    with pytest.raises(SystemExit) as exit_:
        run(MockLLMEngine.from_args(argv))
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("mock-engine worker: error: ")
    assert err.count("\n") == 1
    assert message in err


# Recording.


def test_finished_and_cancelled_requests_are_recorded(tmp_path):
    async def main():
        async with serving("--record", str(tmp_path)) as engine:
            await answer(engine, SHORT, "whole")
            await answer(engine, {**SHORT, "sampling_options": {"n": 2}}, "two choices")
            aborted = BridgeStream(engine, LONG, RequestContext("aborted"))
            await aborted.read()
            await aborted.abort()
            await aborted.read_all()
            dropped = BridgeStream(engine, LONG, RequestContext("dropped"))
            await dropped.read()
            await asyncio.sleep(0.3)  # a row of the timeline falls into it
            await dropped.drop()
            half = BridgeStream(engine, {"token_ids": PROMPT, "sampling_options": {"n": 2}}, RequestContext("half"))
            while (await half.read())["token_ids"][-1] != eos_token_id:
                pass
            await half.drop()
            await asyncio.sleep(1.0)

    eos_token_id = OutputTokens.from_model_path(DEFAULT_TOKENIZER).eos_token_ids[0]
    run(main())
    rows = list(read_requests(tmp_path))
    assert sorted(row.finish_reason for row in rows[-2:]) == ["cancelled", "eos"]  # a choice that was whole stays so
    assert [(row.request_id, row.choice, row.finish_reason, len(row.sent_s)) for row in rows[:-2]] == [
        ("whole", 0, "length", 3),
        ("two choices", 0, "length", 3),
        ("two choices", 1, "length", 3),
        ("aborted", 0, "cancelled", 1),
        ("dropped", 0, "cancelled", 1),
    ]
    for row in rows:
        assert row.isl_tokens == len(PROMPT)
        assert row.arrival_s < row.due_s[0]
        assert row.due_s == sorted(row.due_s)
        assert row.sent_s == pytest.approx(row.due_s)
    timeline = list(read_timeline(tmp_path))
    assert len(timeline) >= 4
    assert timeline[-1].num_output_tokens == sum(len(row.sent_s) for row in rows)
    assert timeline[-1].kv_used_blocks == 0
    assert max(row.num_open_requests for row in timeline) == 1
    assert timeline[-1].num_open_requests == 0
