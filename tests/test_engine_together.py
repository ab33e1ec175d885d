"""What parts of the live engine do to each other: controls to metrics, faults to GPUs, a failed start to cleanup."""

from __future__ import annotations

import asyncio

import pytest

from conformance.context import RequestContext
from mock_engine.bench_prediction import predict
from mock_engine.dynamo_release import EngineShutdown
from mock_engine.engine_settings import EngineSettings
from mock_engine.errors import ConfigError
from mock_engine.faults import parse_fault
from mock_engine.fleet import FleetSettings
from mock_engine.llm_engine import MockLLMEngine
from mock_engine.load import Load
from mock_engine.processes import free_ports
from mock_engine.recorder import Recorder
from mock_engine.worker_settings import WorkerSettings
from tests.helpers.jumping_loop import now_s, run
from tests.helpers.live_engine import SMALL, answer_of, serving

pytestmark = pytest.mark.usefixtures("no_wall_clock")


@pytest.mark.parametrize("starts", [False, True])
def test_cleanup_says_nothing_about_settings_with_which_nothing_could_start(starts):
    async def main():
        engine = MockLLMEngine(WorkerSettings(engine=EngineSettings(profile="nowhere")))
        if starts:
            with pytest.raises(EngineShutdown):
                await engine.start(1)
        assert await engine.is_quiescent()
        await engine.cleanup()

    run(main())


def test_a_start_that_fails_on_a_taken_port_leaves_a_recording_that_can_be_closed(tmp_path, monkeypatch):
    closed = []
    close = Recorder.close
    monkeypatch.setattr(Recorder, "close", lambda self: (closed.append(self), close(self)))

    async def main():
        (port,) = free_ports(1)
        async with serving("--dcgm-port", str(port)):
            engine, _ = await MockLLMEngine.from_args([*SMALL, "--dcgm-port", str(port), "--record", str(tmp_path)])
            closed.clear()
            with pytest.raises(EngineShutdown):
                await engine.start(1)
            await engine.cleanup()

    run(main())
    assert len(closed) == 1


def test_seconds_of_metrics_are_real_ones_also_after_the_pace_has_changed():
    async def main():
        async with serving() as engine:
            await engine.engine_update("timing", {"speedup_ratio": 100})
            before_s = now_s()
            await answer_of(engine, 40)
            real_s = now_s() - before_s
            engine._metrics.stats.fold([])
            assert engine._metrics.stats.ranks[0].histograms["e2e_s"].sum == pytest.approx(real_s, rel=0.05)

    run(main())


def test_a_gpu_is_busy_for_as_long_as_its_steps_take_also_when_a_fault_slows_them():
    def busy_s(*flags):
        async def main():
            async with serving(*flags) as engine:
                await answer_of(engine, 20)
                return engine._metrics.stats.ranks[0].steps.busy_s

        return run(main())

    assert busy_s("--fault", "slow:factor=5") == pytest.approx(5 * busy_s())


@pytest.mark.parametrize("control", ["sleep", "pause_generation"])
def test_whoever_ends_all_requests_ends_those_that_hang_too(control):
    async def main():
        async with serving("--fault", "hang:tokens=2") as engine:
            hanging = asyncio.create_task(answer_of(engine, 3, context=RequestContext("h")))
            await asyncio.sleep(5)  # all its tokens are made, and two went out
            await engine.engine_control(control, {"mode": "abort"})
            await asyncio.wait([hanging], timeout=1)
            assert hanging.done()
            assert hanging.result().finish_reason == "cancelled"

    run(main())


def test_limits_that_one_rank_cannot_have_are_given_to_none():
    async def main():
        async with serving("--data-parallel-size", "2") as engine:
            requests = [
                asyncio.create_task(answer_of(engine, 60, context=RequestContext(f"r{number}"))) for number in range(3)
            ]
            await asyncio.sleep(0.05)
            assert sorted(drive.num_running for drive in engine._drives) == [1, 2]
            body = {"max_num_seqs": 1, "max_num_batched_tokens": 1}
            assert (await engine.engine_update("scheduler", body))["status"] == "error"
            assert {drive.core.scheduler.config.max_num_batched_tokens for drive in engine._drives} == {32}
            await asyncio.gather(*requests)

    run(main())


def test_a_prediction_knows_no_faults_and_says_so():
    worker = WorkerSettings(faults=(parse_fault("slow:factor=5"),))
    assert predict(FleetSettings(worker, port=0), Load(request_count=1)).reason == "a prediction knows no faults"


def test_what_a_role_cannot_have_is_found_before_anything_starts():
    with pytest.raises(ConfigError, match="--lora-modules goes with workers that do all of a request"):
        FleetSettings(WorkerSettings(lora_modules=("ada",)), (("prefill", 1), ("decode", 1)), port=0)
