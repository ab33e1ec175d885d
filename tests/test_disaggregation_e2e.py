"""A prefill worker and two decode workers under Dynamo's real frontend: answers, cancelled clients, a killed worker."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import sys

import aiohttp
import pytest

from mock_engine.fleet import Fleet, FleetSettings
from mock_engine.planes import MAX_WATCHES
from mock_engine.worker_settings import WorkerSettings
from tests.helpers.processes import num_inotify_instances, wait_for

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]

PROMPT = "other world " * 200
MIGRATION_LIMIT = 3


def is_quiet(fleet):
    """No request is open in any worker that is up, and no KV block taken."""
    states = [fleet.status(worker) for worker in range(3) if fleet.parts[1 + worker].process.poll() is None]
    return all(state.num_open_requests == state.kv_used_blocks == 0 for state in states)


def test_a_prefill_and_two_decode_workers_serve_lose_nothing_and_keep_nothing(tmp_path):
    settings = FleetSettings(WorkerSettings(), (("prefill", 1), ("decode", 2)), port=0, migration_limit=MIGRATION_LIMIT)
    draw = random.Random(0)

    async def main(fleet):
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

            async def ask(content, **options):
                body = {"model": fleet.model, "messages": [{"role": "user", "content": content}], **options}
                async with session.post(f"{fleet.url}/v1/chat/completions", json=body) as response:
                    assert response.status == 200, await response.text()
                    return await response.json()

            answers = [await ask(PROMPT, max_tokens=6) for _ in range(3)]  # each decode worker has one at least
            details = [each["usage"]["prompt_tokens_details"]["cached_tokens"] for each in answers]
            assert details == [0, 400, 400]  # 25 full blocks of 402 tokens, found by the prefill worker
            assert {each["choices"][0]["message"]["content"] for each in answers} == {
                answers[0]["choices"][0]["message"]["content"]
            }
            assert all(each["usage"]["completion_tokens"] == 6 for each in answers)
            await asyncio.to_thread(
                wait_for,
                lambda: [fleet.status(worker).num_output_tokens > 3 for worker in (1, 2)] == [True, True],
                "both decode workers have made tokens",
            )

            async def give_up(number):
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(draw.choice([0.01, 0.05, 0.2]) * draw.uniform(0.3, 1.5)):
                        await ask(f"{number} {PROMPT}", max_tokens=400, ignore_eos=True)

            await asyncio.gather(*map(give_up, range(60)))
            await asyncio.to_thread(
                wait_for, lambda: is_quiet(fleet), lambda: f"{[fleet.status(worker) for worker in range(3)]}"
            )

            long = [asyncio.ensure_future(ask(f"{n} {PROMPT}", max_tokens=600, ignore_eos=True)) for n in range(12)]
            await asyncio.to_thread(wait_for, lambda: fleet.status(1).num_running > 2, "the decode worker is busy")
            os.kill(fleet.parts[2].process.pid, signal.SIGKILL)
            for answer in await asyncio.gather(*long):
                assert answer["usage"]["completion_tokens"] == 600
            await asyncio.to_thread(
                wait_for, lambda: is_quiet(fleet), lambda: f"{[fleet.status(worker) for worker in range(3)]}"
            )

    with Fleet(settings, tmp_path) as fleet:
        assert [part.name for part in fleet.parts] == ["frontend", "prefill-0", "decode-0", "decode-1"]
        assert 0 < num_inotify_instances(fleet.parts[0].process.pid) <= MAX_WATCHES
        asyncio.run(main(fleet))
        for part in fleet.parts[1:]:
            assert "Traceback" not in part.log_path.read_text(encoding="utf-8")
