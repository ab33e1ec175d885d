"""Prefill and decode workers on one loop whose time jumps: what is handed over, how long it takes, what is left."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conformance.bridge import BridgeStream
from conformance.context import RequestContext
from mock_engine.dynamo_release import HAS_DRAIN, InvalidArgument
from mock_engine.engine_settings import DEFAULT_PROFILE, load_profile
from mock_engine.handoff import BYPASS_ANNOTATION
from mock_engine.kv_transfer import DEFAULT_TIMEOUT_S, transfer_s
from mock_engine.llm_engine import MockLLMEngine
from tests.helpers.deployments import decode_s
from tests.helpers.jumping_loop import now_s, run
from tests.helpers.live_engine import NUM_BLOCKS, SMALL
from tests.helpers.memory_network import MemoryNetwork
from tests.helpers.workloads import check_blocks

pytestmark = pytest.mark.usefixtures("no_wall_clock")

PROMPT = list(range(100, 150))
REQUEST = {"token_ids": PROMPT, "stop_conditions": {"max_tokens": 5}}
PROFILE = load_profile(DEFAULT_PROFILE)


def bandwidth_for(seconds):
    """GB/s at which the KV cache of PROMPT takes so long."""
    return len(PROMPT) * PROFILE.kv_bytes_per_token / seconds / 1e9


class Cluster:
    """Prefill and decode workers, and what Dynamo's frontend does between them."""

    def __init__(self, network: MemoryNetwork) -> None:
        self.network = network
        self.prefills: list[MockLLMEngine] = []
        self.decodes: list[MockLLMEngine] = []
        self._num_requests = 0

    @property
    def engines(self):
        return [*self.prefills, *self.decodes]

    def open(self, engine, request):
        self._num_requests += 1
        return BridgeStream(engine, request, RequestContext(f"r{self._num_requests}"))

    async def prefill(self, request=REQUEST, number=0):
        """The last chunk of a prefill worker."""
        chunks = await self.open(self.prefills[number], request).read_all()
        assert sum(len(chunk["token_ids"]) for chunk in chunks) == 1
        return chunks[-1]

    def handed(self, request, terminal):
        """The request as the decode worker gets it: through JSON, as on the wire."""
        return {**request, "prefill_result": json.loads(json.dumps({"disaggregated_params": params_of(terminal)}))}

    async def answer(self, request=REQUEST, decode=0):
        """All chunks of a decode worker."""
        terminal = await self.prefill(request)
        return await self.open(self.decodes[decode], self.handed(request, terminal)).read_all()

    async def check_that_nothing_is_left(self):
        for engine in self.engines:
            assert set(engine.conformance_probe().in_use().values()) == {0}, engine.conformance_probe().in_use()
            assert await engine.is_quiescent() is True
            (drive,) = engine._drives
            check_blocks(drive.core)
            assert drive.core.scheduler.blocks.num_used == 0
            assert len(drive._kept) == drive.core.scheduler.num_kept_blocks == 0
            assert not drive.core.scheduler.reserved
            assert not drive._wanting


def params_of(terminal):
    return terminal["disaggregated_params"]


def token_ids(chunks):
    return [token_id for chunk in chunks for token_id in chunk["token_ids"]]


def kv_blocks(engine):
    return engine._drives[0].core.scheduler.blocks.num_used


@asynccontextmanager
async def cluster(num_prefill=1, num_decode=1, *flags, checks=True):
    """Small workers that have started; when the block is over, nothing of any request may be left in any of them."""
    network = MemoryNetwork()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mock_engine.worker_roles.TcpNetwork", lambda: network)
        made = Cluster(network)
        for role, number, engines in (("prefill", num_prefill, made.prefills), ("decode", num_decode, made.decodes)):
            for _ in range(number):
                engine, _ = await MockLLMEngine.from_args([*SMALL, "--disaggregation-mode", role, *flags])
                await engine.start(len(made.engines))
                engines.append(engine)
        try:
            async with asyncio.timeout(1000):  # of the loop's time
                yield made
                if checks:
                    await made.check_that_nothing_is_left()
        finally:
            for engine in made.engines:
                await engine.cleanup()
        await made.check_that_nothing_is_left()


async def whole_answer(request):
    """What one worker that does everything says."""
    engine, _ = await MockLLMEngine.from_args(SMALL)
    await engine.start(1)
    try:
        return await BridgeStream(engine, request, RequestContext("whole")).read_all()
    finally:
        await engine.cleanup()


# What is said.


@given(
    isl_tokens=st.integers(1, 100),
    max_tokens=st.none() | st.integers(1, 40),
    min_tokens=st.none() | st.integers(0, 40),
    n=st.none() | st.integers(1, 3),
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
)
@settings(max_examples=30)
def test_two_workers_say_what_one_says(isl_tokens, max_tokens, min_tokens, n, seed):
    request = {
        "token_ids": list(range(isl_tokens)),
        "stop_conditions": {"max_tokens": max_tokens, "min_tokens": min_tokens},
        "sampling_options": {"n": n, "seed": seed},
    }

    def by_choice(chunks):
        return {index: token_ids([c for c in chunks if c["index"] == index]) for index in {c["index"] for c in chunks}}

    async def main():
        async with cluster(1, 1, "--speedup-ratio", "0") as workers:
            chunks = await workers.answer(request)
            alone = await whole_answer(request)
            assert by_choice(chunks) == by_choice(alone)
            assert chunks[-1]["finish_reason"] == alone[-1]["finish_reason"]
            assert chunks[-1]["completion_usage"] == alone[-1]["completion_usage"]

    run(main())


def test_a_prefill_worker_says_what_it_had_cached_and_a_decode_worker_passes_it_on():
    async def main():
        async with cluster() as workers:
            cold, warm = await workers.answer(), await workers.answer()
        assert cold[-1]["completion_usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
        assert warm[-1]["completion_usage"]["prompt_tokens_details"] == {"cached_tokens": 48}  # whole blocks of 50

    run(main())


@pytest.mark.parametrize(
    ("prefill_result", "message"),
    [
        ("absent", "needs the disaggregated_params of a prefill worker"),
        (None, "prefill_result is None"),
        ({}, "prefill_result is {}"),
        ({"disaggregated_params": None}, "needs the disaggregated_params"),
        ({"disaggregated_params": {"kv_transfer_params": {"remote_engine_id": "x"}}}, "takes those of kind"),
        ({"disaggregated_params": {"kind": "mock-engine.kv", "version": 99}}, "version 1"),
        ({"disaggregated_params": {"kind": "mock-engine.kv", "version": 1}}, "have no worker_id"),
        ("handle", "have handle 'seven'"),
        ("num_tokens", "of a prompt of 7 tokens; this one has 50"),
    ],
)
def test_a_decode_worker_refuses_what_is_not_from_a_prefill_worker_of_ours_in_one_line(prefill_result, message):
    async def main():
        async with cluster() as workers:
            request = dict(REQUEST)
            if prefill_result in ("handle", "num_tokens"):
                terminal = await workers.prefill()
                wrong = {"handle": "seven", "num_tokens": 7}[prefill_result]
                request["prefill_result"] = {"disaggregated_params": {**params_of(terminal), prefill_result: wrong}}
                await asyncio.sleep(DEFAULT_TIMEOUT_S + 1)
            elif prefill_result != "absent":
                request["prefill_result"] = prefill_result
            with pytest.raises(InvalidArgument, match=message) as caught:
                await workers.open(workers.decodes[0], request).read_all()
            assert "\n" not in str(caught.value)
            assert len(await workers.answer()) == 5  # and goes on

    run(main())


@pytest.mark.parametrize("extra", [{"_HEALTH_CHECK": True}, {"annotations": [BYPASS_ANNOTATION]}])
def test_what_a_decode_worker_is_asked_to_do_alone_it_does_alone(extra):
    async def main():
        async with cluster(0, 1) as workers:
            chunks = await workers.open(workers.decodes[0], {**REQUEST, **extra}).read_all()
            assert token_ids(chunks) == token_ids(await whole_answer(REQUEST))

    run(main())


def test_a_health_check_of_a_prefill_worker_keeps_nothing():
    async def main():
        async with cluster(1, 0) as workers:
            chunks = await workers.open(workers.prefills[0], {**REQUEST, "_HEALTH_CHECK": True}).read_all()
            assert "disaggregated_params" not in chunks[-1]

    run(main())


# How long it takes.


async def first_token_s(workers, request, terminal, decode=0):
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    stream = workers.open(workers.decodes[decode], workers.handed(request, terminal))
    await stream.read()
    took_s = loop.time() - began_s
    while await stream.read() is not None:
        pass
    await stream.drop()
    return took_s


def test_a_transfer_takes_bytes_over_bandwidth_and_a_step_comes_after_it():
    async def main():
        took_s = {}
        for seconds in (1.0, 2.0):
            async with cluster(1, 1, "--kv-transfer-bandwidth", str(bandwidth_for(seconds))) as workers:
                took_s[seconds] = await first_token_s(workers, REQUEST, await workers.prefill())
        # One more token on top of the prompt's: it costs a decode step, whatever the prompt did.
        assert took_s == pytest.approx({seconds: seconds + decode_s(len(PROMPT)) for seconds in took_s})
        assert transfer_s(len(PROMPT), PROFILE, bandwidth_for(2.0)) == pytest.approx(2.0)

    run(main())


@pytest.mark.parametrize("speedup_ratio", [0.5, 4.0])
def test_a_transfer_is_as_fast_as_the_model(speedup_ratio):
    async def main():
        flags = ("--kv-transfer-bandwidth", str(bandwidth_for(1.0)), "--speedup-ratio", str(speedup_ratio))
        async with cluster(1, 1, *flags) as workers:
            took_s = await first_token_s(workers, REQUEST, await workers.prefill())
        assert took_s * speedup_ratio == pytest.approx(1.0, abs=0.02)

    run(main())


@pytest.mark.parametrize(
    ("num_prefill", "num_decode", "waits"),
    [(1, 1, [1, 2, 3]), (1, 3, [1, 2, 3]), (3, 1, [1, 2, 3]), (3, 3, [1, 1, 1])],
)
def test_links_carry_one_kv_cache_at_a_time_each_way(num_prefill, num_decode, waits):
    """The same as `test_deployment` has it in virtual time: whoever shares a link waits his turn."""

    async def main():
        flags = ("--kv-transfer-bandwidth", str(bandwidth_for(1.0)), "--num-gpu-blocks-override", "96")
        async with cluster(num_prefill, num_decode, *flags) as workers:
            requests = [{**REQUEST, "token_ids": [number, *PROMPT[1:]]} for number in range(3)]
            terminals = [await workers.prefill(each, number % num_prefill) for number, each in enumerate(requests)]
            took_s = await asyncio.gather(
                *(
                    first_token_s(workers, request, terminal, number % num_decode)
                    for number, (request, terminal) in enumerate(zip(requests, terminals, strict=True))
                )
            )
        assert took_s == pytest.approx(waits, abs=0.03)

    run(main())


def test_others_decode_while_a_kv_cache_is_on_its_way():
    async def main():
        async with cluster(1, 1, "--kv-transfer-bandwidth", str(bandwidth_for(1.0))) as workers:
            long = {**REQUEST, "stop_conditions": {"max_tokens": 60}}
            loop = asyncio.get_running_loop()
            stream = workers.open(workers.decodes[0], {**long, "annotations": [BYPASS_ANNOTATION]})
            await stream.read()
            terminal = await workers.prefill()
            fetching = asyncio.ensure_future(first_token_s(workers, REQUEST, terminal))
            began_s = loop.time()
            while await stream.read() is not None:
                pass
            assert loop.time() - began_s == pytest.approx(59 * 0.0065, rel=0.1)  # an ITL of that GPU, 59 times
            assert not fetching.done()
            await fetching
            await stream.drop()

    run(main())


def test_where_a_decode_worker_is_full_the_blocks_of_the_prefill_worker_stay_taken():
    async def main():
        async with cluster() as workers:
            (prefill,), (decode,) = workers.prefills, workers.decodes
            long = {"token_ids": list(range(1000, 1110)), "stop_conditions": {"max_tokens": 18}}  # 14 to 16 blocks
            holds = workers.open(decode, {**long, "annotations": [BYPASS_ANNOTATION]})
            await holds.read()
            request = {"token_ids": list(range(90)), "stop_conditions": {"max_tokens": 2}}  # 12 blocks
            terminal = await workers.prefill(request)
            waits = asyncio.ensure_future(first_token_s(workers, request, terminal))
            await asyncio.sleep(0.05)
            assert kv_blocks(prefill) == 12
            assert decode.conformance_probe().in_use()["waiting"] == 1
            while await holds.read() is not None:
                assert kv_blocks(prefill) == 12
            await holds.drop()
            await waits

    run(main())


def test_a_prefill_worker_full_of_kv_caches_goes_on_when_one_is_gone():
    """Those that wait meanwhile, and come meanwhile, have their tokens due from then on, and not before."""

    async def main():
        async with cluster(1, 0) as workers:
            (prefill,) = workers.prefills
            prompts = [{**REQUEST, "token_ids": list(range(first, first + 90))} for first in (0, 100, 200, 300)]
            for prompt in prompts[:2]:
                await workers.prefill(prompt)
            assert kv_blocks(prefill) == NUM_BLOCKS
            waiting = []
            for prompt in prompts[2:]:
                waiting.append(asyncio.ensure_future(workers.prefill(prompt)))
                await asyncio.sleep(0.1)
            await asyncio.sleep(DEFAULT_TIMEOUT_S - 0.3)
            assert not any(task.done() for task in waiting)
            await asyncio.gather(*waiting)
            assert prefill._drives[0].lateness.quantile_s(1.0) < 0.001
            await asyncio.sleep(DEFAULT_TIMEOUT_S + 0.1)

    run(main())


# What is left.


def test_a_kv_cache_that_nobody_asks_for_is_given_up():
    async def main():
        async with cluster(1, 1, "--kv-transfer-timeout", "3") as workers:
            (prefill,) = workers.prefills
            terminal = await workers.prefill()
            await asyncio.sleep(2.9)
            assert kv_blocks(prefill) == 7
            assert await prefill.is_quiescent() is False
            await asyncio.sleep(0.2)
            assert kv_blocks(prefill) == 0
            assert await prefill.is_quiescent() is True
            # Whoever comes too late computes the prompt himself.
            late = await workers.open(workers.decodes[0], workers.handed(REQUEST, terminal)).read_all()
            assert token_ids(late) == token_ids(await whole_answer(REQUEST))

    run(main())


def test_a_client_that_goes_away_as_its_prompt_is_computed_leaves_no_kv_cache():
    """Nobody can ask for what it was not told of, so nothing has to be waited for."""

    async def main():
        async with cluster(1, 0) as workers:
            (prefill,) = workers.prefills
            stream = workers.open(prefill, REQUEST)
            (drive,) = prefill._drives
            keep = drive.on_kept

            def keep_and_stop(*args):
                keep(*args)
                stream.context.stop_generating()

            drive.on_kept = keep_and_stop
            chunk = await stream.read()
            assert chunk["finish_reason"] == "cancelled"
            await stream.drop()
            assert kv_blocks(prefill) == 0

    run(main())


@pytest.mark.parametrize("moment_s", [0.0, 0.5, 0.9])
def test_a_decode_worker_that_dies_during_a_transfer_leaves_no_blocks_taken(moment_s):
    async def main():
        async with cluster(1, 1, "--kv-transfer-bandwidth", str(bandwidth_for(1.0)), checks=False) as workers:
            (prefill,), (decode,) = workers.prefills, workers.decodes
            stream = workers.open(decode, workers.handed(REQUEST, await workers.prefill()))
            read = asyncio.ensure_future(stream.read())
            await asyncio.sleep(moment_s + 0.01)
            assert kv_blocks(prefill) == kv_blocks(decode) == 7
            workers.network.cut()  # what the kernel does for a process that is killed
            await asyncio.sleep(0.001)
            assert kv_blocks(prefill) == 0
            assert await prefill.is_quiescent() is True
            read.cancel()
            await asyncio.gather(read, return_exceptions=True)
            await stream.drop()

    run(main())


def test_where_a_prefill_worker_dies_the_prompt_is_computed_again():
    async def main():
        async with cluster(1, 1, "--kv-transfer-bandwidth", str(bandwidth_for(1.0))) as workers:
            terminal = await workers.prefill()
            answer = asyncio.ensure_future(
                workers.open(workers.decodes[0], workers.handed(REQUEST, terminal)).read_all()
            )
            await asyncio.sleep(0.5)
            workers.network.cut()
            assert token_ids(await answer) == token_ids(await whole_answer(REQUEST))
            workers.network.is_down = True
            other = {**REQUEST, "token_ids": PROMPT[::-1]}  # the decode worker has nothing of it
            took_s = await first_token_s(workers, other, await workers.prefill(other))
            assert took_s > 2 * decode_s(len(PROMPT))  # in two steps of 32 tokens at most
            await asyncio.sleep(DEFAULT_TIMEOUT_S)

    run(main())


@pytest.mark.skipif(not HAS_DRAIN, reason="ai-dynamo 1.2 alone")
def test_drain_waits_for_what_is_to_be_fetched():
    async def main():
        async with cluster() as workers:
            await workers.prefill()
            began_s = now_s()
            await workers.prefills[0].drain()
            assert now_s() - began_s == pytest.approx(DEFAULT_TIMEOUT_S, abs=0.5)

    run(main())


@dataclass(frozen=True)
class Plan:
    """One request, and what becomes of it."""

    arrival_s: float
    isl_tokens: int
    osl_tokens: int
    n: int
    prefill: int
    decode: int
    fate: str
    moment_s: float  # after the request has come to the worker that is meant


FATES = (
    "whole",
    "prefill aborted",
    "prefill stopped",
    "prefill dropped",
    "never asked for",
    "asked for twice",
    "decode aborted",
    "decode stopped",
    "decode dropped",
    "stopped before it comes to decode",
)

plans = st.lists(
    st.builds(
        Plan,
        arrival_s=st.floats(0, 0.3),
        isl_tokens=st.integers(1, 100),
        osl_tokens=st.integers(1, 27),
        n=st.sampled_from([1, 1, 1, 2]),
        prefill=st.integers(0, 1),
        decode=st.integers(0, 1),
        fate=st.sampled_from([*FATES[:1] * 4, *FATES]),
        moment_s=st.sampled_from([0.0, 0.0001]) | st.floats(0, 0.5),
    ),
    min_size=1,
    max_size=10,
)


async def live(workers, plan):
    """The life of one request. Its tokens, if it was to get all of them."""
    await asyncio.sleep(plan.arrival_s)
    stops = {"max_tokens": plan.osl_tokens, "ignore_eos": True}
    request = {
        "token_ids": list(range(plan.isl_tokens)) if plan.n == 1 else [7] * plan.isl_tokens,
        "stop_conditions": stops,
        "sampling_options": {"n": plan.n},
    }
    first = workers.open(workers.prefills[plan.prefill % len(workers.prefills)], request)
    await ends(first, plan, "prefill")
    chunks = first.chunks
    if not chunks or "disaggregated_params" not in chunks[-1]:
        assert plan.fate.startswith("prefill")
        return
    if plan.fate == "never asked for":
        return
    handed = workers.handed(request, chunks[-1])
    engine = workers.decodes[plan.decode % len(workers.decodes)]
    second = workers.open(engine, handed)
    if plan.fate == "stopped before it comes to decode":
        second.context.stop_generating()
    others = [workers.open(engine, handed)] if plan.fate == "asked for twice" else []
    await asyncio.gather(*(ends(stream, plan, "decode") for stream in (second, *others)))
    if plan.fate in ("whole", "asked for twice"):
        for stream in (second, *others):
            assert stream.chunks[-1]["finish_reason"] == "length"
            assert len(token_ids(stream.chunks)) == plan.osl_tokens * plan.n
    return


async def ends(stream, plan, side):
    """Read a stream to the end that the plan has for it."""
    stream.chunks = []

    async def read():
        while (chunk := await stream.read()) is not None:
            stream.chunks.append(chunk)

    reading = asyncio.ensure_future(read())
    if plan.fate.startswith(side):
        await asyncio.sleep(plan.moment_s)
        if plan.fate.endswith("aborted"):
            await stream.abort()
        elif plan.fate.endswith("stopped"):
            stream.context.stop_generating()
        elif not reading.done():
            reading.cancel()  # what the bridge does to the step that is pending
    await asyncio.gather(reading, return_exceptions=True)
    if not reading.cancelled():
        reading.result()
    await stream.drop()


@given(
    plans=plans,
    num_prefill=st.integers(1, 2),
    num_decode=st.integers(1, 2),
    engine_type=st.sampled_from(["vllm", "sglang", "trtllm"]),
    bandwidth=st.sampled_from([64.0, bandwidth_for(0.1)]),
    speedup_ratio=st.sampled_from(["1", "1", "10", "0"]),
    cut_s=st.none() | st.floats(0, 0.5),
    is_down=st.booleans(),
)
@settings(max_examples=60)
def test_whatever_becomes_of_requests_every_block_comes_back_on_both_sides(
    plans: Sequence[Plan], num_prefill, num_decode, engine_type, bandwidth, speedup_ratio, cut_s, is_down
):
    """Cancelled at any moment on either side, asked for late, twice or never, with the connections cut in between."""

    async def main():
        flags = ["--kv-transfer-bandwidth", str(bandwidth), "--engine-type", engine_type]
        flags += ["--speedup-ratio", speedup_ratio]
        async with cluster(num_prefill, num_decode, *flags) as workers:
            workers.network.connect_s = 0.002

            async def cut():
                await asyncio.sleep(cut_s)
                workers.network.cut()
                workers.network.is_down = is_down

            lives = [live(workers, plan) for plan in plans]
            await asyncio.gather(*lives, *([cut()] if cut_s is not None else []))
            await asyncio.sleep(DEFAULT_TIMEOUT_S + 0.1)  # for what nobody asked for

    run(main())
