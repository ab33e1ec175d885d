"""`mock-engine serve` with Dynamo's real frontend and workers: what a user sees, and that nothing is left running."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import sys
import time

import aiohttp
import pytest

from mock_engine.recorder import read_status
from tests.helpers.processes import Command, is_alive, serving, wait_for

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]


def is_an_error_of_the_engine(line):
    """Whether a line of a worker's log is an error of the engine.

    Dynamo's network layer logs errors of its own, for any engine, when a client leaves before it has noticed: which
    ones depends on whether it was sending a token, the frame that says that the answer is complete, or nothing.
    """
    is_about_the_connection = "dynamo_runtime::pipeline::network::" in line and "Failed to generate" not in line
    return "ERROR" in line and not is_about_the_connection


async def chat(session, facts, content="hello", **options):
    """POST a chat completion; the response, not read yet."""
    body = {"model": facts["model"], "messages": [{"role": "user", "content": content}], **options}
    return await session.post(f"{facts['url']}/v1/chat/completions", json=body)


def ask(facts, **options):
    """One answer, read whole: (status, JSON)."""

    async def main():
        async with aiohttp.ClientSession() as session, await chat(session, facts, **options) as response:
            return response.status, await response.json()

    return asyncio.run(main())


def wait_for_statuses(folder):
    """Each worker's state, once both have made tokens."""
    paths = sorted(folder.glob("mock-engine-*/worker-*.status.json"))

    def read_all():
        statuses = [read_status(path) for path in paths]
        return statuses if all(status.num_output_tokens for status in statuses) else None

    return wait_for(read_all, "both workers have made tokens")


def test_serve_answers_says_all_there_is_to_know_and_leaves_nothing_behind(tmp_path):
    with serving(tmp_path, "--workers", "2") as (command, facts):
        status, answer = ask(facts, max_tokens=7)
        assert status == 200
        assert answer["usage"]["completion_tokens"] == 7
        assert len(answer["choices"][0]["message"]["content"].split()) == 7
        # The next one goes to the other worker (round robin), and the same question has the same answer.
        assert ask(facts, max_tokens=7)[1]["choices"] == answer["choices"]
        assert len(wait_for_statuses(tmp_path)) == 2
        assert set(facts["pids"]) == {"serve", "frontend", "worker-0", "worker-1"}
        assert facts["pids"]["serve"] == command.process.pid
        for line in ("http://127.0.0.1:", facts["profile"], "28,198 KV blocks of 16", "curl -N ", "aiperf profile "):
            assert line in command.output
        command.interrupt()
        assert command.process.wait(25) == 0  # a part that has to be killed takes 30 s
    assert "stopped" in command.output
    assert not (tmp_path / "ready.json").exists()
    assert not any(map(is_alive, facts["pids"].values()))
    assert not list(tmp_path.glob("mock-engine-*"))


def test_a_long_identical_prompt_is_found_in_the_prefix_cache(tmp_path):
    with serving(tmp_path) as (_, facts):
        prompt = "other world " * 200
        cached = [
            ask(facts, content=prompt, max_tokens=2)[1]["usage"]["prompt_tokens_details"]["cached_tokens"]
            for _ in range(2)
        ]
    assert cached == [0, 400]  # 25 full blocks of 16; the rest of the 402 tokens fills none


def test_a_prompt_longer_than_the_context_is_the_client_s_error(tmp_path):
    with serving(tmp_path, "--max-model-len", "64") as (command, facts):
        status, answer = ask(facts, content="hello " * 100, max_tokens=2)
        assert 400 <= status < 500, answer
        assert "context" in json.dumps(answer)
        assert ask(facts, max_tokens=2)[0] == 200  # and the worker is still there
        assert "Traceback" not in command.output


@pytest.mark.parametrize("victim", ["worker-1", "frontend"])
def test_a_part_that_dies_is_named_and_takes_the_rest_with_it(tmp_path, victim):
    with serving(tmp_path, "--workers", "2") as (command, facts):
        os.kill(facts["pids"][victim], signal.SIGKILL)
        assert command.exit_status() == 1
    assert f"mock-engine: error: {victim} was killed by SIGKILL." in command.output
    assert "Traceback" not in command.output
    assert not any(map(is_alive, facts["pids"].values()))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_during_start_stops_what_has_started(tmp_path, number):
    command = Command(["serve", "--port", "0"], tmp_path)
    pids = wait_for(lambda: command.children() if "worker-0" in command.children() else None, "the parts have started")
    command.interrupt(number)
    assert command.exit_status() == 130
    assert command.output == "mock-engine: stopped\n"
    assert not any(map(is_alive, pids.values()))


def test_impatience_does_not_cut_stopping_short(tmp_path):
    with serving(tmp_path) as (command, facts):
        while command.process.poll() is None:
            command.interrupt()
            time.sleep(0.002)  # as fast as a finger, and then some
        assert command.exit_status() == 0
    assert command.output.endswith("\nstopped\n")
    assert not any(map(is_alive, facts["pids"].values()))
    assert not list(tmp_path.glob("mock-engine-*"))


def test_not_even_a_killed_serve_leaves_parts_behind(tmp_path):
    with serving(tmp_path) as (command, facts):
        command.interrupt(signal.SIGKILL)
        command.exit_status()
        wait_for(lambda: not any(map(is_alive, facts["pids"].values())), "the parts are gone")


def test_a_port_that_is_taken_is_one_line_and_exit_status_2(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = Command(["serve", "--port", str(port)], tmp_path)
        assert command.exit_status() == 2
    assert command.output == (
        f"mock-engine: error: cannot listen on 127.0.0.1:{port}: Address already in use. "
        f"Choose another --port; 0 takes any free one.\n"
    )


def test_a_thousand_cancels_through_the_frontend_leave_nothing_behind(tmp_path):
    """Clients go away before, during and after their first token; blocks, tasks, threads and logs are as before."""
    num_requests, num_at_once = 1000, 64
    draw = random.Random(0)

    async def cancel_one(session, facts, number):
        async with await chat(
            session, facts, content=f"{number} " * draw.randint(1, 400), max_tokens=500, stream=True, ignore_eos=True
        ) as response:
            assert response.status == 200
            for _ in range(draw.randint(0, 12)):
                await response.content.readline()
            response.close()

    async def give_up_early(session, facts, number):
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(cancel_one(session, facts, number), timeout=draw.uniform(0.001, 0.3))

    async def main(facts):
        connector = aiohttp.TCPConnector(limit=num_at_once, force_close=True)
        async with aiohttp.ClientSession(connector=connector) as session:
            slots = asyncio.Semaphore(num_at_once)

            async def client(number):
                async with slots:
                    await (give_up_early if number % 3 else cancel_one)(session, facts, number)

            await asyncio.gather(*map(client, range(num_requests)))

    with serving(tmp_path) as (command, facts):
        (status_path,) = tmp_path.glob("mock-engine-*/worker-0.status.json")
        before = read_status(status_path)
        asyncio.run(main(facts))

        def is_quiet():
            state = read_status(status_path)
            is_idle = state.num_open_requests == state.kv_used_blocks == state.num_running == state.num_waiting == 0
            return is_idle and state.num_tasks <= before.num_tasks and state.num_threads <= before.num_threads

        wait_for(is_quiet, lambda: f"every request is let go of: {read_status(status_path)}")
        after = read_status(status_path)
        assert after.num_output_tokens > 100  # it did work meanwhile
        assert after.kv_cached_blocks > 0
        assert ask(facts, max_tokens=3)[0] == 200
        log = (status_path.parent / "worker-0.log").read_text(encoding="utf-8")
        assert "Traceback" not in log
        assert [line for line in log.splitlines() if is_an_error_of_the_engine(line)] == []
        assert command.process.poll() is None
