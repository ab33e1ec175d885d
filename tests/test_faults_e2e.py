"""Faults and controls of real workers behind Dynamo's frontend, called over each worker's system port."""

from __future__ import annotations

import json
import signal
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from mock_engine.dynamo_release import LLMEngine
from mock_engine.processes import http_json
from tests.helpers.processes import Command, is_alive, serving, wait_for

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not hasattr(LLMEngine, "supported_controls"), reason="ai-dynamo 1.2 has no controls"),
]


class Served:
    """A frontend with migration and two workers, and where each worker is controlled."""

    def __init__(self, command, facts):
        self.command = command
        self.facts = facts

    def call(self, worker: int, what: str, **body) -> dict:
        answer = http_json(
            f"{self.facts['metrics_urls'][f'worker-{worker}'].removesuffix('/metrics')}/engine/{what}",
            body,
            timeout_s=30,
        )
        assert answer["status"] == "ok", answer
        return answer

    def call_both(self, what: str, **body) -> list[dict]:
        return [self.call(worker, what, **body) for worker in (0, 1)]

    def chat(self, max_tokens: int) -> tuple[int, int]:
        """The HTTP status, and how many tokens a stream of that length has in the end."""
        body = {
            "model": self.facts["model"],
            "messages": [{"role": "user", "content": "hello"}],
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        request = urllib.request.Request(
            f"{self.facts['url']}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                lines = [line.removeprefix(b"data: ") for line in response if line.startswith(b"data: {")]
        except urllib.error.HTTPError as error:
            return error.code, 0
        chunks = [json.loads(line) for line in lines]
        failed = any("error" in chunk for chunk in chunks)
        usage = next((chunk["usage"] for chunk in chunks if chunk.get("usage")), {"completion_tokens": 0})
        return 500 if failed else 200, usage["completion_tokens"]

    def num_instances(self) -> int:
        instances = http_json(f"{self.facts['url']}/health")["instances"]
        return sum(instance["endpoint"] == "generate" for instance in instances)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    fault = "slow:factor=2,worker=1,for=0.001"
    with serving(folder, "--workers", "2", "--migration-limit", "3", "--fault", fault) as (command, facts):
        Command.started.remove(command)  # it serves all tests of this module
        try:
            yield Served(command, facts)
        finally:
            command.interrupt(signal.SIGTERM)
            command.exit_status()


def test_a_request_to_paused_workers_waits_and_is_answered_when_they_go_on(served):
    assert [answer["is_paused"] for answer in served.call_both("control/pause_generation")] == [True, True]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(served.chat, 5)
        wait_for(
            lambda: waiting.done() or any(served.call(n, "update/faults")["num_waiting"] for n in (0, 1)), "it waits"
        )
        assert not waiting.done(), waiting.result()
        served.call_both("control/resume_generation")
        assert waiting.result(30) == (200, 5)


def test_each_worker_has_its_own_faults_and_requests_fail_as_long_as_they_are_there(served):
    assert [[fault["kind"] for fault in served.call(worker, "update/faults")["faults"]] for worker in (0, 1)] == [
        [],
        ["slow"],
    ]
    served.call_both("update/faults", faults=["error:type=InvalidArgument,tokens=2"])
    assert [served.chat(5)[0] for _ in range(2)] == [500, 500]
    served.call_both("update/faults", faults=[])
    assert [served.chat(5) for _ in range(2)] == [(200, 5), (200, 5)]


def test_a_worker_that_sleeps_is_out_of_discovery_until_it_wakes_up(served):
    served.call(0, "control/sleep", level=1)
    wait_for(lambda: served.num_instances() == 1, "one worker is left")
    sent = []

    def is_answered():
        """Whether one more is, or waits in the worker that sleeps, of which the frontend's router may hear late."""
        num_stuck = sum(not each.done() for each in sent)
        sent.append(pool.submit(served.chat, 3))
        wait_for(
            lambda: sent[-1].done() or served.call(0, "update/faults")["num_waiting"] > num_stuck, "it is somewhere"
        )
        return sent[-1].done()

    with ThreadPoolExecutor(8) as pool:
        try:
            wait_for(lambda: is_answered() and is_answered(), "the frontend sends requests to the other alone")
        finally:
            served.call(0, "control/wake_up", seconds=0)
        assert {each.result() for each in sent} == {(200, 3)}
    wait_for(lambda: served.num_instances() == 2, "both are back")


def test_a_stream_goes_on_elsewhere_when_its_worker_dies(served):
    """The last of this module: there is one worker afterwards."""
    served.call(1, "update/faults", faults=["die:after_tokens=40"])
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(served.chat, [60] * 4)) == [(200, 60)] * 4
    wait_for(lambda: not is_alive(served.facts["pids"]["worker-1"]), "the worker is dead")
    wait_for(lambda: "worker-1 was ended by a fault" in served.command.output, "serve says so")
    assert served.chat(5) == (200, 5)
    assert served.command.process.poll() is None
