"""The real worker: what a Dynamo client sees of an engine, and what is left of it all."""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncGenerator, Iterator
from enum import IntEnum
from pathlib import Path
from typing import Any

import pytest

from conformance.worker_child import dynamo_module
from conformance.worker_driver import WorkerDriver, WorkerError, WorkerStream
from tests.helpers.processes import is_alive, session_members, wait_for

pytestmark = pytest.mark.e2e

SAMPLE = "dynamo.common.backend.sample_engine:SampleLLMEngine"
LIMIT_S = 20.0


class Do(IntEnum):
    """The first token of a request: what the engine does."""

    ENDLESS = 1
    BROKEN_CHUNK = 2
    RAISE = 3
    SHUT_DOWN = 4
    ONE_CHUNK = 5


class Scripted(dynamo_module("engine").LLMEngine):  # type: ignore[misc]
    """Does what the first token says. It knows no flags, and leaves etcd as discovery."""

    @classmethod
    async def from_args(cls, _argv: list[str] | None = None) -> tuple[Any, Any]:
        return cls(), dynamo_module("worker").WorkerConfig(namespace="elsewhere", model_name="not/a-folder")

    async def start(self, _worker_id: Any = None) -> Any:
        return dynamo_module("engine").EngineConfig(model="some-model")

    async def generate(self, request: Any, context: Any) -> AsyncGenerator[Any, None]:
        match request["token_ids"][0]:
            case Do.ENDLESS:
                while not context.is_stopped():
                    await asyncio.sleep(0.005)
                    yield {"token_ids": [7], "index": 0}
                print(f"told to stop: {context.id()}", flush=True)
            case Do.BROKEN_CHUNK:
                yield {"token_ids": [7], "index": 0}
                yield {"token_ids": "seven", "index": 0}
            case Do.RAISE:
                raise ValueError("no such thing")
            case Do.SHUT_DOWN:
                from dynamo.llm.exceptions import EngineShutdown

                raise EngineShutdown("I am off")
        yield {"token_ids": [], "index": 0, "finish_reason": "cancelled" if context.is_stopped() else "stop"}

    async def abort(self, context: Any) -> None:
        print(f"abort: {context.id()}", flush=True)

    async def drain(self) -> None:
        pass

    async def cleanup(self) -> None:
        pass


class FailsToStart(Scripted):
    async def start(self, _worker_id: Any = None) -> Any:
        raise RuntimeError("no GPU today")


class NeverStarts(Scripted):
    async def start(self, _worker_id: Any = None) -> Any:
        await asyncio.Event().wait()


class LeavesAChild(Scripted):
    async def start(self, worker_id: Any = None) -> Any:
        subprocess.Popen(["sleep", "1000"])  # noqa: ASYNC220  (it is not waited for)
        return await super().start(worker_id)

    async def cleanup(self) -> None:
        await asyncio.Event().wait()


def engine_name(engine: type) -> str:
    return f"{__name__}:{engine.__name__}"


def request(first_token: int = Do.ONE_CHUNK, max_tokens: int = 5) -> dict[str, Any]:
    options: dict[str, Any] = {"sampling_options": {}, "output_options": {}, "eos_token_ids": [], "annotations": []}
    return {"model": "", "token_ids": [first_token, 2, 3], "stop_conditions": {"max_tokens": max_tokens}, **options}


def kinds(stream: WorkerStream) -> list[str]:
    return [event.kind for event in stream.events]


@pytest.fixture(scope="module")
def scripted() -> Iterator[WorkerDriver]:
    """One worker for several tests, each of which has an event loop of its own."""
    driver = WorkerDriver(engine_name(Scripted))
    asyncio.run(driver.start())
    yield driver
    asyncio.run(driver.close())
    assert driver.pids == []


def test_a_whole_answer_comes_with_the_time_of_every_chunk(tmp_path: Path) -> None:
    async def scenario() -> None:
        driver = WorkerDriver(SAMPLE, ["--delay", "0.001"], log_path=tmp_path / "worker.log")
        async with driver:
            stream = driver.open(request(max_tokens=5))
            await stream.finish(LIMIT_S)
        assert kinds(stream) == ["chunk"] * 5 + ["end"]
        assert [chunk["token_ids"] for chunk in stream.chunks] == [[1], [2], [3], [4], [5]]
        assert stream.chunks[-1]["finish_reason"] == "length"
        times = [event.time_s for event in stream.events]
        assert times == sorted(times)
        assert times[-1] >= 5 * 0.001
        assert not driver.is_alive
        assert driver.exit_code == 0

    asyncio.run(scenario())
    assert (tmp_path / "worker.log").exists()


def test_a_stop_after_some_chunks_reaches_the_engine_and_ends_the_stream(scripted: WorkerDriver) -> None:
    """What the engine says to it does not reach the client: Dynamo's client reads only what was on its way."""

    async def scenario() -> None:
        stream = scripted.open(request(Do.ENDLESS), request_id="stop-me", stop_after=3)
        await stream.finish(LIMIT_S)
        assert kinds(stream).index("stop") == 3
        assert kinds(stream)[-1] == "end"
        assert not any(chunk["finish_reason"] for chunk in stream.chunks)

    asyncio.run(scenario())
    wait_for(lambda: "told to stop: stop-me" in scripted.log_tail(100), "the engine sees the stop")
    wait_for(lambda: "abort: stop-me" in scripted.log_tail(100), "the engine gets an abort")


def test_a_stop_may_come_at_any_time(scripted: WorkerDriver) -> None:
    async def scenario() -> None:
        stream = scripted.open(request(Do.ENDLESS))
        assert await stream.wait_chunks(2, LIMIT_S)
        stream.stop()
        await stream.finish(LIMIT_S)
        assert "stop" in kinds(stream)
        assert kinds(stream)[-1] == "end"
        assert not await stream.wait_chunks(10_000, LIMIT_S), "it is over"

    asyncio.run(scenario())


@pytest.mark.parametrize("is_planned", [True, False], ids=["after some chunks", "at any time"])
def test_a_dropped_stream_says_nothing_more_and_the_engine_is_told(scripted: WorkerDriver, is_planned: bool) -> None:
    async def scenario() -> None:
        stream = scripted.open(
            request(Do.ENDLESS), request_id=f"drop-{is_planned}", drop_after=2 if is_planned else None
        )
        assert await stream.wait_chunks(2, LIMIT_S)
        await stream.drop()
        assert kinds(stream)[2:].count("drop") == 1
        assert kinds(stream)[-1] == "drop"

    asyncio.run(scenario())
    wait_for(lambda: f"told to stop: drop-{is_planned}" in scripted.log_tail(100), "the engine is told")


def test_what_does_not_end_runs_into_the_time_limit(scripted: WorkerDriver) -> None:
    async def scenario() -> None:
        stream = scripted.open(request(Do.ENDLESS))
        assert await stream.wait_chunks(1, LIMIT_S)
        with pytest.raises(TimeoutError, match=r"is not over after 0\.05 s"):
            await stream.finish(within_s=0.05)
        await stream.drop()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("first_token", "num_chunks", "text"),
    [
        pytest.param(Do.BROKEN_CHUNK, 1, "invalid chunk shape", id="a chunk of the wrong shape"),
        pytest.param(Do.RAISE, 0, "no such thing", id="an exception"),
    ],
)
def test_an_error_shows_with_dynamo_s_name_for_it(
    scripted: WorkerDriver, first_token: int, num_chunks: int, text: str
) -> None:
    async def scenario() -> None:
        stream = scripted.open(request(first_token))
        await stream.finish(LIMIT_S)
        assert kinds(stream) == ["chunk"] * num_chunks + ["error"]
        assert stream.error is not None
        assert text in str(stream.error)
        assert stream.error.dynamo_type in ("BackendInvalidArgument", "InvalidRequest")
        assert (await scripted.observe_worker(request())).is_routed_to

    asyncio.run(scenario())


def test_a_router_gives_up_a_worker_that_says_it_shuts_down_and_a_new_client_does_not(scripted: WorkerDriver) -> None:
    async def scenario() -> None:
        stream = scripted.open(request(Do.SHUT_DOWN))
        await stream.finish(LIMIT_S)
        assert kinds(stream) == ["error"]
        health = await scripted.observe_worker(request())
        assert health.is_alive
        assert not health.is_routed_to
        await scripted.renew_client()
        assert (await scripted.observe_worker(request())).is_routed_to

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("engine", "limit_s", "message"),
    [
        pytest.param(FailsToStart, LIMIT_S, r"(?s)worker ended with exit code 1\..*no GPU today", id="it raises"),
        pytest.param(NeverStarts, 1.0, r"within 1 s\..*log", id="it hangs"),
    ],
)
def test_an_engine_that_does_not_start_is_an_error_that_quotes_its_log(
    engine: type, limit_s: float, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    driver = WorkerDriver(engine_name(engine))
    with pytest.raises(WorkerError, match=message):
        asyncio.run(driver.start(limit_s))
    assert driver.pids == []
    assert list(tmp_path.iterdir()) == []
    assert asyncio.run(driver.close()) == driver.exit_code
    assert engine is NeverStarts or "no GPU today" in driver.log_tail(), "still there for whoever asks later"


def test_a_killed_worker_is_noticed_and_can_be_started_again() -> None:
    async def scenario() -> None:
        async with WorkerDriver(engine_name(Scripted)) as driver:
            stream = driver.open(request(Do.ENDLESS))
            assert await stream.wait_chunks(1, LIMIT_S)
            os.kill(driver.pids[0], signal.SIGKILL)
            await stream.finish(LIMIT_S)
            assert kinds(stream)[-1] == "error"
            health = await driver.observe_worker(request())
            assert (health.is_alive, health.exit_code, health.is_routed_to) == (False, -signal.SIGKILL, False)
            assert await driver.restart() == -signal.SIGKILL
            assert (await driver.observe_worker(request())).is_routed_to

    asyncio.run(scenario())


def test_close_leaves_no_process_and_no_folder_whatever_the_engine_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    async def scenario() -> None:
        async with WorkerDriver(engine_name(LeavesAChild)) as driver:
            sessions = driver.pids
            assert len(sessions) == 2
            assert len(session_members(sessions[0])) == 2, "the worker and the child that it left"
            assert await driver.close(within_s=0.5) == -signal.SIGKILL
            for session in sessions:
                wait_for(lambda session=session: not session_members(session), "all are gone")
            assert await driver.close() == -signal.SIGKILL, "once more does nothing"

    asyncio.run(scenario())
    assert list(tmp_path.iterdir()) == []


def test_both_processes_end_when_the_one_that_started_them_is_killed() -> None:
    program = f"""
import asyncio, os, signal
from conformance.worker_driver import WorkerDriver
driver = WorkerDriver({SAMPLE!r})
asyncio.run(driver.start())
print(*driver.pids, driver._folder, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    *pids, folder = result.stdout.split()
    assert len(pids) == 2, result.stderr
    wait_for(lambda: not any(is_alive(int(pid)) for pid in pids), "both have ended")
    wait_for(lambda: not Path(folder).exists(), "their folder is gone")
