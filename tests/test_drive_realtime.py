"""Pacing and cancelling in real time, on a loop whose time jumps."""

from __future__ import annotations

import asyncio
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mock_engine.core import Core
from mock_engine.drive_realtime import RealTimeDrive
from mock_engine.request import Request
from tests.helpers.drives import consume, send_all
from tests.helpers.jumping_loop import LoopClock, now_s, run
from tests.helpers.workloads import Arrival, check_blocks, make_core, workloads

STEP_S = 0.006


def make_drive(core: Core | None = None, speedup_ratio: float = 1.0) -> RealTimeDrive:
    """A drive whose every step takes 6 ms, unless `core` says otherwise."""
    if core is None:
        core = make_core()
        core._times.step_s = lambda _: STEP_S
    return RealTimeDrive(core, LoopClock(), speedup_ratio)


def test_tokens_come_out_exactly_when_they_are_due():
    async def main():
        drive = make_drive()
        drive.start()
        stream = drive.submit([Request("r", 4, 5)])
        times = await consume(drive, stream)
        await drive.stop()
        assert times == pytest.approx([STEP_S * n for n in range(1, 6)])
        assert stream.due_s[0] == pytest.approx(times)
        assert stream.sent_s[0] == pytest.approx(times)

    run(main())


def test_a_slow_consumer_does_not_push_back_later_tokens():
    """2 ms of client work a token must not stretch a 6 ms ITL to 8 ms."""

    async def main():
        drive = make_drive()
        drive.start()
        times = await consume(drive, drive.submit([Request("r", 4, 40)]), seconds_per_token=0.002)
        await drive.stop()
        assert times == pytest.approx([STEP_S * n for n in range(1, 41)])

    run(main())


def test_a_consumer_that_falls_behind_finds_several_tokens_and_due_times_stay():
    async def main():
        drive = make_drive()
        drive.start()
        stream = drive.submit([Request("r", 4, 9)])
        await asyncio.sleep(STEP_S * 4.5)
        tokens = await stream.next_tokens()
        drive.note_sent(stream, tokens)
        assert [token.output_index for token in tokens] == [0, 1, 2, 3]
        assert stream.due_s[0] == pytest.approx([STEP_S * n for n in range(1, 5)])
        assert drive.lateness.quantile_s(1.0) == pytest.approx(STEP_S * 3.5, rel=0.13)
        await consume(drive, stream)
        await drive.stop()

    run(main())


@pytest.mark.parametrize("speedup_ratio", [0.5, 1.0, 8.0])
def test_speedup_divides_real_time_and_leaves_model_time_alone(speedup_ratio):
    async def main():
        drive = make_drive(speedup_ratio=speedup_ratio)
        drive.start()
        stream = drive.submit([Request("r", 4, 5)])
        times = await consume(drive, stream)
        await drive.stop()
        assert times == pytest.approx([STEP_S * n / speedup_ratio for n in range(1, 6)])
        assert stream.due_s[0] == pytest.approx([STEP_S * n for n in range(1, 6)])

    run(main())


def test_speedup_zero_takes_no_time_but_keeps_the_model_s():
    async def main():
        drive = make_drive(speedup_ratio=0)
        drive.start()
        stream = drive.submit([Request("r", 4, 5)])
        await consume(drive, stream)
        assert now_s() == 0
        await drive.stop()
        assert stream.due_s[0] == pytest.approx([STEP_S * n for n in range(1, 6)])

    run(main())


def test_an_arrival_during_a_step_waits_for_the_next_one():
    async def main():
        drive = make_drive()
        drive.start()
        first = asyncio.create_task(consume(drive, drive.submit([Request("a", 4, 8)])))
        await asyncio.sleep(STEP_S * 2.5)
        times = await consume(drive, drive.submit([Request("b", 4, 1)]))
        assert times == pytest.approx([STEP_S * 4])  # step 3 is under way; it joins step 4
        await first
        await drive.stop()

    run(main())


@given(workload=workloads(max_requests=8), speedup_ratio=st.sampled_from([0, 1.0, 30.0]))
@settings(max_examples=60)
def test_whatever_is_cancelled_everything_comes_back(workload: list[Arrival], speedup_ratio):
    async def main():
        core = make_core(num_blocks=16)
        drive = make_drive(core, speedup_ratio)
        drive.start()

        await send_all(drive, workload)
        await asyncio.sleep(0.1)  # the timers of late cancels
        check_blocks(core)
        assert core.scheduler.blocks.num_used == 0
        assert not drive.streams
        await drive.stop()

    run(main())


def test_cancel_works_on_a_thread_without_a_loop_and_wakes_the_consumer():
    async def main():
        drive = make_drive()
        drive.start()
        stream = drive.submit([Request("r", 4, 40)])
        await stream.next_tokens()
        await asyncio.get_running_loop().run_in_executor(None, drive.cancel, stream)
        assert drive.core.scheduler.blocks.num_used == 0
        assert await stream.next_tokens() == []
        await drive.stop()

    run(main())


def test_a_cancel_that_finds_the_core_busy_is_carried_out_by_whoever_is_busy():
    """A finalizer can run in the middle of a step, on the thread that computes it; it must not wait for itself."""

    async def main():
        drive = make_drive()
        stream = drive.submit([Request("victim", 4, 40)])
        step_s = drive.core._times.step_s

        def cancel_from_inside(load):
            drive.cancel(stream)
            thread = threading.Thread(target=drive.cancel, args=(stream,))
            thread.start()
            thread.join()
            return step_s(load)

        drive.core._times.step_s = cancel_from_inside
        drive.start()
        assert await stream.next_tokens() == []
        assert drive.core.scheduler.blocks.num_used == 0
        await drive.stop()

    run(main())


def test_a_client_that_is_gone_is_noticed_within_20_ms_without_an_abort():
    async def main():
        drive = make_drive()
        drive.core._times.step_s = lambda _: 10.0
        drive.start()
        gone = []
        stream = drive.submit([Request("r", 4, 4)], is_stopped=lambda: bool(gone))
        await asyncio.sleep(1.0)
        gone.append(True)
        assert await stream.next_tokens() == []
        assert now_s() <= 1.0 + 0.021
        assert drive.core.scheduler.blocks.num_used == 0
        await drive.stop()

    run(main())


def test_of_tokens_due_together_first_ones_go_out_first():
    async def main():
        drive = make_drive()
        drive.start()
        order = []

        async def client(name):
            stream = drive.submit([Request(name, 4, 3)])
            while tokens := await stream.next_tokens():
                order.extend((name, token.output_index) for token in tokens)
                if tokens[-1].is_last:
                    break

        old = asyncio.create_task(client("old"))
        await asyncio.sleep(STEP_S * 1.5)
        await asyncio.gather(old, client("new"))
        await drive.stop()
        assert order == [("old", 0), ("old", 1), ("new", 0), ("old", 2), ("new", 1), ("new", 2)]

    run(main())


def test_choices_of_one_prompt_are_one_stream():
    async def main():
        drive = make_drive()
        drive.start()
        stream = drive.submit([Request("r", 4, 3, choice=choice) for choice in range(3)])
        made = []
        while len(made) < 9:
            made += await stream.next_tokens()
        assert sorted((token.sequence.request.choice, token.output_index) for token in made) == [
            (choice, index) for choice in range(3) for index in range(3)
        ]
        await drive.stop()
        assert not drive.streams

    run(main())


def test_stop_ends_open_streams_and_a_second_stop_does_nothing():
    async def main():
        drive = make_drive()
        drive.start()
        stream = drive.submit([Request("r", 4, 40)])
        await stream.next_tokens()
        waiting = asyncio.create_task(stream.next_tokens())
        await asyncio.sleep(0)
        await drive.stop()
        await drive.stop()
        assert await waiting == []
        assert drive.core.scheduler.blocks.num_used == 0

    run(main())


def test_a_failure_of_the_engine_reaches_every_consumer(caplog):
    async def main():
        drive = make_drive()
        drive.core._times.step_s = lambda _: 1 / 0
        drive.start()
        stream = drive.submit([Request("r", 4, 4)])
        with pytest.raises(RuntimeError, match="internal error"):
            await stream.next_tokens()
        with pytest.raises(RuntimeError, match="internal error"):
            drive.submit([Request("r", 4, 4)])
        await drive.stop()

    run(main())
    assert "the engine stopped" in caplog.text
