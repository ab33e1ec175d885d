"""A drive that is paused, changed and disturbed, on a loop whose time jumps."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mock_engine.core import Core
from mock_engine.drive_realtime import RealTimeDrive
from mock_engine.engine_settings import ENGINE_TYPES
from mock_engine.fault_injector import FaultInjector
from mock_engine.faults import parse_fault
from mock_engine.request import Request
from tests.helpers.drives import consume, send_all
from tests.helpers.jumping_loop import LoopClock, now_s, run
from tests.helpers.workloads import Arrival, check_blocks, make_core, workloads

STEP_S = 0.008
POLL_S = 0.02


def make_drive(*faults: str, core: Core | None = None, speedup_ratio: float = 1.0, die=lambda _: None) -> RealTimeDrive:
    """A drive whose every step takes 8 ms, unless `core` says otherwise."""
    core = core or make_core(timing=lambda _: STEP_S)
    injector = FaultInjector([parse_fault(text) for text in faults], seed=0, die=die)
    return RealTimeDrive(core, LoopClock(), speedup_ratio, faults=injector)


def times_with(*faults: str, num_tokens: int = 8, speedup_ratio: float = 1.0) -> list[float]:
    async def main():
        drive = make_drive(*faults, speedup_ratio=speedup_ratio)
        drive.start()
        async with asyncio.timeout(100):
            times = await consume(drive, drive.submit([Request("r", 4, num_tokens)]))
        assert drive.core.scheduler.blocks.num_used == drive.core.scheduler.num_held_blocks
        await drive.stop()
        return times

    return run(main())


def test_a_stalled_step_is_that_much_longer_and_those_after_it_keep_their_distance():
    normal = [STEP_S * n for n in range(1, 9)]
    assert times_with() == pytest.approx(normal)
    assert times_with("stall:seconds=2,at=0.02") == pytest.approx(normal[:3] + [2 + each for each in normal[3:]])


def test_slow_steps_take_their_factor_in_their_window_and_model_seconds_go_with_the_speedup():
    expected = [0.008, 0.016, 0.040, 0.064, 0.072, 0.080, 0.088, 0.096]
    assert times_with("slow:factor=3,at=0.016,for=0.03") == pytest.approx(expected)
    faster = times_with("slow:factor=3,at=0.016,for=0.03", speedup_ratio=4)
    assert faster == pytest.approx([each / 4 for each in expected])


def test_a_request_waits_while_all_kv_blocks_are_taken_and_no_longer():
    times = times_with("kv:share=1,for=5")
    assert 5 + STEP_S <= times[0] <= 5 + POLL_S + STEP_S
    assert [later - earlier for earlier, later in pairwise(times)] == pytest.approx([STEP_S] * 7)


def test_with_no_pace_blocks_that_are_taken_come_back_all_the_same():
    assert len(times_with("kv:share=1,for=0.5", speedup_ratio=0)) == 8


def test_running_sequences_are_preempted_when_blocks_are_taken_and_come_to_their_end():
    """Two of 40 tokens each need 20 of 24 blocks; 14 are left. Both end, and one was computed again."""

    async def main():
        drive = make_drive("kv:blocks=10,at=0.05", core=make_core(num_blocks=24, timing=lambda _: STEP_S))
        drive.start()
        streams = [drive.submit([Request(name, 4, 36)]) for name in "ab"]
        async with asyncio.timeout(100):
            times = await asyncio.gather(*(consume(drive, stream) for stream in streams))
        assert [len(each) for each in times] == [36, 36]
        assert drive.core.scheduler.num_preemptions > 0
        assert drive.core.scheduler.num_held_blocks == 10
        check_blocks(drive.core)
        await drive.stop()

    run(main())


def test_who_is_next_goes_on_at_once_when_the_first_that_waits_for_blocks_goes_away():
    async def main():
        drive = make_drive(
            "kv:blocks=14", core=make_core(num_blocks=16, max_num_batched_tokens=32, timing=lambda _: STEP_S)
        )
        drive.start()
        large = drive.submit([Request("large", 30, 3)])
        small = drive.submit([Request("small", 4, 3)])
        await asyncio.sleep(1.001)
        drive.cancel(large)
        async with asyncio.timeout(10):
            assert await consume(drive, small) == pytest.approx([1.001 + STEP_S * n for n in (1, 2, 3)])
        await drive.stop()

    run(main())


@pytest.mark.parametrize("engine_type", ENGINE_TYPES)
@given(
    workload=workloads(max_requests=8),
    kv=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 20), st.integers(1, 16)), max_size=4),
    speedup_ratio=st.sampled_from([0, 1.0, 30.0]),
    is_async=st.booleans(),
)
@settings(max_examples=40)
def test_whatever_is_taken_away_and_cancelled_every_block_comes_back(
    engine_type, workload: list[Arrival], kv, speedup_ratio, is_async
):
    faults = [f"kv:blocks={blocks},at={at / 100},for={for_ / 100}" for at, for_, blocks in kv]

    async def main():
        core = make_core(num_blocks=16, engine_type=engine_type, is_async=is_async)
        drive = make_drive(*faults, core=core, speedup_ratio=speedup_ratio)
        drive.profiler = lambda *_: check_blocks(core)
        drive.start()

        async with asyncio.timeout(1000):
            await send_all(drive, workload)
        drive._faults.set([], drive.now_s())
        await asyncio.sleep(0.2)  # the timers of late cancels, and a look at the faults
        check_blocks(core)
        assert core.scheduler.blocks.num_used == 0
        assert core.scheduler.num_kept_blocks == 0
        assert not drive.streams
        await drive.stop()

    run(main())


def test_a_delayed_request_is_queued_that_much_later_and_delays_nobody_else():
    async def main():
        drive = make_drive()
        drive.start()
        late = drive.submit([Request("late", 4, 3)], delay_s=1.0)
        gone = drive.submit([Request("gone", 4, 3)], delay_s=1.0)
        await asyncio.sleep(0.5)
        assert await consume(drive, drive.submit([Request("now", 4, 2)])) == pytest.approx(
            [0.5 + STEP_S, 0.5 + 2 * STEP_S]
        )
        drive.cancel(gone)
        times = await consume(drive, late)
        assert times == pytest.approx([1.0 + STEP_S * n for n in (1, 2, 3)])
        assert late.arrival_s == 0
        assert not gone.due_s[0]
        assert drive.core.scheduler.blocks.num_used == 0
        await drive.stop()

    run(main())


@pytest.mark.parametrize("at_s", [0.0, 0.0301])
def test_death_at_a_time_comes_within_a_poll_whether_the_engine_works_or_not(at_s):
    async def main():
        deaths = []
        drive = make_drive("die:at=3", die=lambda text: deaths.append((text, now_s())))
        drive.start()
        stream = drive.submit([Request("r", 4, 40)])
        await asyncio.sleep(3 - POLL_S - at_s)
        assert not deaths
        await asyncio.sleep(10)
        ((text, time_s),) = deaths
        assert text == "die:at=3.0"
        assert 3 <= time_s <= 3 + POLL_S + 1e-9
        drive.cancel(stream)
        await drive.stop()

    run(main())


def test_death_after_so_many_tokens_comes_with_that_token():
    async def main():
        deaths = []
        drive = make_drive("die:after_tokens=5", die=lambda _: deaths.append(now_s()))
        drive.start()
        await consume(drive, drive.submit([Request("r", 4, 9)]))
        assert deaths == pytest.approx([5 * STEP_S])
        await drive.stop()

    run(main())


@pytest.mark.parametrize("is_async", [False, True])
def test_while_paused_no_step_begins_and_nothing_is_late_afterwards(is_async):
    async def main():
        drive = make_drive(core=make_core(timing=lambda _: STEP_S, is_async=is_async))
        drive.start()
        running = asyncio.create_task(consume(drive, drive.submit([Request("a", 4, 6)])))
        await asyncio.sleep(STEP_S * 2.5)
        await drive.set_paused(True)
        assert now_s() == pytest.approx(STEP_S * 3), "the step under way ends first"
        await asyncio.sleep(1.0)
        waiting = asyncio.create_task(consume(drive, drive.submit([Request("b", 4, 1)])))
        await asyncio.sleep(1.0)
        assert drive.is_paused
        assert drive.now_s() == pytest.approx(now_s())
        await drive.set_paused(True)
        await drive.set_paused(False)
        await drive.set_paused(False)
        resumed_s = STEP_S * 3 + 2
        assert await waiting == pytest.approx([resumed_s + STEP_S])
        assert await running == pytest.approx(
            [STEP_S, STEP_S * 2, STEP_S * 3, *(resumed_s + STEP_S * n for n in (1, 2, 3))]
        )
        assert drive.lateness.quantile_s(1.0) < 0.001
        await drive.stop()

    run(main())


def test_who_is_cancelled_while_paused_gives_its_blocks_back_at_once():
    async def main():
        drive = make_drive()
        drive.start()
        stream = drive.submit([Request("a", 4, 40)])
        await stream.next_tokens()
        await drive.set_paused(True)
        drive.cancel(stream)
        assert drive.core.scheduler.blocks.num_used == 0
        await drive.stop()

    run(main())


@given(
    changes=st.lists(st.tuples(st.integers(0, 30), st.sampled_from([0.0, 0.25, 1.0, 7.0, 100.0])), max_size=8),
    first=st.sampled_from([0.0, 1.0, 3.0]),
)
@settings(max_examples=80)
def test_another_pace_neither_moves_model_time_nor_what_is_due(changes, first):
    async def main():
        drive = make_drive(speedup_ratio=first)
        drive.start()
        stream = drive.submit([Request("r", 4, 40)])
        reader = asyncio.create_task(consume(drive, stream))
        seen = [0.0]
        for pause, ratio in changes:
            await asyncio.sleep(pause / 1000)
            await drive.set_speedup_ratio(ratio)
            assert drive.speedup_ratio == ratio
            seen.append(drive.now_s())
            await asyncio.sleep(0)
            seen.append(drive.now_s())
        await reader
        seen.append(drive.now_s())
        assert seen == sorted(seen)
        assert stream.due_s[0] == pytest.approx([STEP_S * n for n in range(1, 41)])
        assert drive.lateness.num_tokens == 0 or drive.lateness.quantile_s(1.0) < 0.002
        await drive.stop()

    run(main())


def test_a_new_pace_is_that_many_model_seconds_a_second():
    async def main():
        drive = make_drive()
        drive.start()
        await asyncio.sleep(10)
        await drive.set_speedup_ratio(50)
        assert drive.now_s() == pytest.approx(10)
        await asyncio.sleep(2)
        assert drive.now_s() == pytest.approx(110)
        times = await consume(drive, drive.submit([Request("r", 4, 3)]))
        assert times == pytest.approx([12 + STEP_S * n / 50 for n in (1, 2, 3)])
        await drive.stop()

    run(main())


def test_a_call_between_steps_gets_its_result_its_error_and_an_end():
    async def main():
        drive = make_drive()
        with pytest.raises(RuntimeError, match="not running"):
            await drive.between_steps(lambda: 1)
        drive.start()
        assert await drive.between_steps(lambda: 1) == 1
        with pytest.raises(ZeroDivisionError):
            await drive.between_steps(lambda: 1 / 0)
        drive.core._times.step_s = lambda _: 1e6
        drive.submit([Request("r", 4, 3)])
        await asyncio.sleep(0)
        call = asyncio.create_task(drive.between_steps(lambda: 1))
        await asyncio.sleep(1)
        await drive.stop()
        with pytest.raises(RuntimeError, match="has been stopped"):
            await call

    run(main())


def test_a_call_to_an_engine_that_fails_is_refused(caplog):
    async def main():
        drive = make_drive()
        drive.start()
        stream = drive.submit([Request("r", 4, 30)])
        await stream.next_tokens()
        drive.core._times.step_s = lambda _: 1 / 0
        await asyncio.sleep(1)
        with pytest.raises(RuntimeError, match="internal error"):
            await drive.between_steps(lambda: 1)
        await drive.stop()

    run(main())
    assert "the engine stopped" in caplog.text
