"""Controls and updates as Dynamo's worker calls them, on a loop whose time jumps."""

from __future__ import annotations

import asyncio
import gzip
import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conformance.context import RequestContext
from mock_engine.controls import CONTROLS, HOST_BYTES_PER_S, STORAGE_BYTES_PER_S, UPDATES
from mock_engine.llm_engine import MockLLMEngine
from tests.helpers.jumping_loop import now_s, run
from tests.helpers.live_engine import NUM_BLOCKS, PROMPT, SMALL, answer_of, serving
from tests.helpers.workloads import check_blocks

pytestmark = pytest.mark.usefixtures("no_wall_clock")


async def ok(engine, name, **body):
    """Carry it out; it must work, and its answer must be JSON."""
    call = engine.engine_control if name in CONTROLS else engine.engine_update
    answer = json.loads(json.dumps(await call(name, body)))
    assert answer["status"] == "ok", answer
    return answer


def test_paused_requests_wait_and_go_on_and_repeating_it_does_no_harm():
    async def main():
        async with serving() as engine:
            running = asyncio.create_task(answer_of(engine, 8))
            await asyncio.sleep(0.03)
            for _ in range(2):
                assert (await ok(engine, "pause_generation"))["is_paused"]
            waiting = asyncio.create_task(answer_of(engine, 3, request_id="w"))
            await asyncio.sleep(100)
            assert not running.done()
            assert not waiting.done()
            for _ in range(2):
                assert not (await ok(engine, "resume_generation"))["is_paused"]
            for answer, num_tokens in ((await running, 8), (await waiting, 3)):
                assert (answer.finish_reason, len(answer.tokens)) == ("length", num_tokens)
            assert 100 < now_s() < 101
            assert engine._drives[0].lateness.quantile_s(1.0) < 0.001

    run(main())


def test_pausing_can_end_what_runs_and_forget_the_cache():
    async def main():
        async with serving() as engine:
            await answer_of(engine)
            running = asyncio.create_task(answer_of(engine, 60))
            await asyncio.sleep(0.05)
            state = await ok(engine, "pause_generation", mode="abort", clear_cache=True)
            assert (state["kv_used_blocks"], state["kv_cached_blocks"], state["num_running"]) == (0, 0, 0)
            assert (await running).finish_reason == "cancelled"
            await ok(engine, "resume_generation")

    run(main())


@pytest.mark.parametrize("level", [1, 2])
def test_a_sleeping_engine_holds_nothing_and_wakes_up_as_fast_as_weights_are_read(level):
    async def main():
        async with serving("--speedup-ratio", "2") as engine:
            await answer_of(engine)
            running = asyncio.create_task(answer_of(engine, 60))
            await asyncio.sleep(0.05)
            for _ in range(2):
                state = await ok(engine, "sleep", level=level)
                assert state["is_sleeping"]
                assert state["kv_used_blocks"] == state["kv_cached_blocks"] == 0
            assert (await running).finish_reason == "cancelled"
            assert (await engine.engine_control("resume_generation", {}))["status"] == "error"
            waiting = asyncio.create_task(answer_of(engine))
            await asyncio.sleep(50)
            assert not waiting.done()
            before_s = now_s()
            answer = await ok(engine, "wake_up")
            weights = engine._engine.profile.weights_bytes
            assert answer["load_s"] == pytest.approx(
                weights / (HOST_BYTES_PER_S, STORAGE_BYTES_PER_S)[level - 1], abs=1e-6
            )
            assert now_s() - before_s == pytest.approx(answer["load_s"] / 2, abs=1e-6)
            assert not answer["is_sleeping"]
            assert (await ok(engine, "wake_up"))["load_s"] == 0
            assert (await waiting).finish_reason == "length"
            assert (await waiting).usage["prompt_tokens_details"]["cached_tokens"] == 0

    run(main())


def test_who_is_kept_while_the_engine_sleeps_computes_again_what_it_lost():
    async def main():
        async with serving() as engine:
            alone = await answer_of(engine, 30)
            running = asyncio.create_task(answer_of(engine, 30))
            await asyncio.sleep(0.05)
            state = await ok(engine, "sleep", mode="keep")
            assert (state["num_running"], state["num_waiting"], state["kv_used_blocks"]) == (0, 1, 0)
            await ok(engine, "wake_up", seconds=0)
            answer = await running
            assert answer.tokens == alone.tokens
            assert engine._drives[0].core.scheduler.num_preemptions == 1
            assert engine._drives[0].lateness.quantile_s(1.0) < 0.001

    run(main())


def test_weights_and_cache_can_be_woken_one_by_one():
    async def main():
        async with serving() as engine:
            await ok(engine, "sleep")
            assert (await ok(engine, "wake_up", tags=["weights"], seconds=4))["is_sleeping"]
            assert now_s() == pytest.approx(4)
            assert not (await ok(engine, "wake_up", tags=["kv_cache"]))["is_sleeping"]
            assert now_s() == pytest.approx(4)

    run(main())


def test_a_reset_cache_has_nothing_of_what_was_in_it():
    async def main():
        async with serving() as engine:
            await answer_of(engine)
            assert (await answer_of(engine)).usage["prompt_tokens_details"]["cached_tokens"] > 0
            answer = await ok(engine, "reset_prefix_cache")
            assert answer["num_dropped_blocks"] > 0
            assert answer["kv_cached_blocks"] == 0
            assert (await ok(engine, "flush_cache"))["num_dropped_blocks"] == 0
            assert (await answer_of(engine)).usage["prompt_tokens_details"]["cached_tokens"] == 0

    run(main())


def test_a_profile_has_a_span_for_each_step_between_start_and_stop(tmp_path):
    async def main():
        async with serving() as engine:
            await answer_of(engine)
            started = [
                await ok(engine, "start_profile", output_dir=str(tmp_path / "new"), profile_prefix="a/b") for _ in "ab"
            ]
            assert started[0]["path"] == started[1]["path"]
            answer = await answer_of(engine, 6)
            stopped = await ok(engine, "stop_profile")
            assert "path" not in await ok(engine, "stop_profile")
            await answer_of(engine)
            return stopped, answer

    stopped, answer = run(main())
    (path,) = (tmp_path / "new").iterdir()
    assert str(path) == stopped["path"]
    assert path.name.startswith("b-")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert len(spans) == stopped["num_steps"] == 6
    assert [span["name"] for span in spans] == ["prefill"] + ["decode"] * 5
    ends = [span["ts"] + span["dur"] for span in spans]
    assert all(end == later["ts"] for end, later in zip(ends, spans[1:], strict=False))
    assert ends == pytest.approx([1e6 * time_s for time_s in answer.times_s], abs=1)


def test_a_profile_that_is_not_stopped_is_whole_after_cleanup(tmp_path):
    async def main():
        async with serving() as engine:
            await ok(engine, "start_profile", output_dir=str(tmp_path))
            await answer_of(engine)

    run(main())
    (path,) = tmp_path.iterdir()
    assert len(json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]) > 3


def test_prefill_and_decode_take_their_scale_and_the_pace_its_ratio():
    async def main():
        async with serving("--no-enable-prefix-caching") as engine:

            async def spans() -> tuple[float, float]:
                before_s = now_s()
                times_s = (await answer_of(engine, 4)).times_s
                return times_s[0] - before_s, times_s[-1] - times_s[0]

            ttft_s, decode_s = await spans()
            await ok(engine, "timing", prefill_scale=3, decode_scale=5)
            scaled_ttft_s, scaled_decode_s = await spans()
            assert scaled_decode_s == pytest.approx(5 * decode_s)
            assert scaled_ttft_s == pytest.approx(3 * ttft_s)
            assert (await ok(engine, "timing", speedup_ratio=10, scale=1))["speedup_ratio"] == 10
            assert await spans() == pytest.approx((ttft_s / 10, decode_s / 10))
            await ok(engine, "timing", jitter=0.5)
            gaps = {round(later - earlier, 9) for earlier, later in pairwise((await answer_of(engine, 9)).times_s)}
            assert len(gaps) > 5

    run(main())


def test_fewer_sequences_run_at_once_when_the_limit_is_lowered():
    async def main():
        async with serving() as engine:
            await ok(engine, "scheduler", max_num_seqs=1, max_num_batched_tokens=16)
            answers = [asyncio.create_task(answer_of(engine, 4, request_id=f"r{n}")) for n in range(3)]
            most = 0
            while not all(answer.done() for answer in answers):
                most = max(most, engine._drives[0].core.scheduler.num_running)
                await asyncio.sleep(0.001)
            assert most == 1
            wrong = await engine.engine_update("scheduler", {"max_num_batched_tokens": 0})
            assert wrong["status"] == "error"
            assert engine._drives[0].core.scheduler.config.max_num_batched_tokens == 16

    run(main())


def test_faults_are_set_added_and_cleared_while_it_runs():
    async def main():
        async with serving("--fault", "slow:factor=2") as engine:
            await asyncio.sleep(100)
            answer = await ok(engine, "faults", faults=[{"kind": "error", "at": 5}, "kv:share=0.5"])
            assert [fault["kind"] for fault in answer["faults"]] == ["error", "kv"]
            await asyncio.sleep(1)
            assert (await answer_of(engine)).error is None
            assert (await ok(engine, "faults"))["kv_held_blocks"] == NUM_BLOCKS // 2
            await asyncio.sleep(5)
            assert (await answer_of(engine)).error is not None
            answer = await ok(engine, "faults", clear=["error"], add=["stall:seconds=3"])
            assert [fault["kind"] for fault in answer["faults"]] == ["kv", "stall"]
            assert (await answer_of(engine)).error is None
            await ok(engine, "faults", faults=[])
            await asyncio.sleep(0.1)
            state = await ok(engine, "faults")
            assert state["faults"] == []
            assert state["kv_held_blocks"] == state["kv_used_blocks"] == 0

    run(main())


_WRONG = [
    ("pause_generation", {"mode": "wait"}),
    ("sleep", {"level": 3}),
    ("sleep", {"level": True}),
    ("sleep", {"level": "1"}),
    ("sleep", {"tags": ["gpu"]}),
    ("sleep", {"tags": [[]]}),
    ("start_profile", {"output_dir": 3}),
    ("start_profile", {"output_dir": "/dev/null/x"}),
    ("timing", {"speedup_ratio": -1}),
    ("timing", {"speedup": 2}),
    ("timing", {"jitter": 2}),
    ("timing", {"scale": 0}),
    ("timing", {"speedup_ratio": float("nan")}),
    ("scheduler", {"max_num_seqs": 0}),
    ("scheduler", {"max_num_seqs": 1.5}),
    ("scheduler", {"max_num_batched_tokens": 1}),
    ("faults", {"faults": "kv"}),
    ("faults", {"faults": [3]}),
    ("faults", {"faults": [{"kind": "kv"}]}),
    ("faults", {"faults": ["slow:worker=1"]}),
    ("faults", {"clear": ["flood"]}),
    ("faults", {"clear": [[]]}),
    ("nothing", {}),
]


@pytest.mark.parametrize(("name", "body"), _WRONG)
def test_what_is_wrong_with_a_call_is_said_and_changes_nothing(name, body):
    async def main():
        async with serving("--fault", "slow") as engine:
            call = engine.engine_update if name in UPDATES else engine.engine_control
            before = (await engine.engine_update("faults", {}))["faults"]
            answer = await call(name, body)
            assert answer["status"] == "error"
            assert answer["message"]
            state = await engine.engine_update("faults", {})
            assert not any(state[name] for name in ("is_paused", "is_sleeping", "is_profiling"))
            assert state["faults"] == before
            assert (await answer_of(engine)).finish_reason == "length"

    run(main())


def test_before_start_and_after_cleanup_every_call_is_refused():
    async def main():
        engine, _ = await MockLLMEngine.from_args(SMALL)
        assert (await engine.engine_control("sleep", {}))["status"] == "error"
        await engine.start(1)
        await engine.cleanup()
        assert (await engine.engine_control("sleep", {}))["status"] == "error"
        assert (await engine.engine_update("faults", {}))["status"] == "error"

    run(main())


_CALLS = st.one_of(
    st.sampled_from([(name, {}) for name in CONTROLS if not name.endswith("profile")]),
    st.sampled_from(
        [
            ("pause_generation", {"mode": "abort"}),
            ("pause_generation", {"clear_cache": True}),
            ("sleep", {"mode": "keep", "level": 2}),
            ("sleep", {"tags": ["kv_cache"]}),
            ("wake_up", {"tags": ["weights"]}),
            ("timing", {"speedup_ratio": 0}),
            ("timing", {"speedup_ratio": 20}),
            ("timing", {"scale": 3}),
            ("scheduler", {"max_num_seqs": 1}),
            ("scheduler", {"max_num_seqs": 4, "max_num_batched_tokens": 8}),
            ("faults", {"faults": []}),
            ("faults", {"add": [{"kind": "kv", "share": 1, "for": 0.5}]}),
            ("faults", {"add": [{"kind": "kv", "share": 0.6}]}),
            ("faults", {"add": ["stall:seconds=2,rate=0.2", "slow:factor=3"]}),
            ("faults", {"add": ["error:tokens=2,rate=0.3", "hang:rate=0.3,tokens=1"]}),
            ("faults", {"add": ["slow-ttft:rate=0.5"]}),
        ]
    ),
)
_EVENTS = st.one_of(
    st.tuples(st.just("request"), st.integers(1, 40), st.integers(0, 2)),
    st.tuples(st.just("cancel"), st.integers(0, 20)),
    st.tuples(st.just("wait"), st.integers(0, 300)),
    _CALLS,
)


@given(
    events=st.lists(_EVENTS, max_size=25),
    engine_type=st.sampled_from(["vllm", "sglang", "trtllm"]),
    more=st.sampled_from([(), ("--num-speculative-tokens", "2")]),
)
@settings(max_examples=120)
def test_whatever_is_done_in_whatever_order_every_request_ends_and_every_block_comes_back(events, engine_type, more):
    async def main():
        async with serving("--engine-type", engine_type, *more) as engine:
            core = engine._drives[0].core
            open_: list[tuple[RequestContext, asyncio.Task]] = []
            last_s = 0.0
            for kind, *values in events:
                if kind == "request":
                    num_tokens, family = values
                    context = RequestContext(f"r{len(open_)}")
                    prompt = tuple(token + family for token in PROMPT)
                    task = asyncio.create_task(answer_of(engine, num_tokens, prompt, context))
                    open_.append((context, task))
                    await asyncio.sleep(0)
                elif kind == "cancel":
                    for context, _ in open_[values[0] : values[0] + 1]:
                        context.stop_generating()
                elif kind == "wait":
                    await asyncio.sleep(values[0] / 1000)
                else:
                    call = engine.engine_control if kind in CONTROLS else engine.engine_update
                    answer = await call(kind, *values)
                    assert answer["status"] == "ok" or "wake_up first" in answer["message"] or kind == "scheduler"
                    assert answer["time_s"] >= last_s - 1e-6
                    last_s = answer["time_s"]
                check_blocks(core)
            for name, body in (("faults", {"faults": []}), ("wake_up", {}), ("resume_generation", {})):
                await ok(engine, name, **body)
            await asyncio.sleep(30)
            hanging = [context for context, task in open_ if not task.done()]
            for context in hanging:
                context.stop_generating()
            for context, task in open_:
                answer = await asyncio.wait_for(task, 5)
                assert answer.error is not None or answer.finish_reason in ("length", "cancelled")
                assert context not in hanging or answer.finish_reason == "cancelled"
            await asyncio.sleep(0.1)

    run(main())
