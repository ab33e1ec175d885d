"""
The same workers on real etcd and NATS, as in production: they come, go and die under load, and leave nothing behind.

The tests of this module share a cluster, in order; each leaves the two workers that it found.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys

import aiohttp
import pytest

from tests.helpers.cluster import (
    MISSING,
    Answer,
    Cluster,
    Load,
    ask,
    etcd_and_nats,
    hosts,
    num_migrated,
    num_workers,
    until,
)
from tests.helpers.processes import PATIENCE_S, serving, wait_for

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(sys.platform != "linux", reason="ends children with their parent"),
    pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)} (Debian: etcd-server, nats-server)"),
]

PLANES = ["--discovery-backend", "etcd", "--request-plane", "nats", "--event-plane", "nats"]
SHORT, LONG = 40, 600  # output tokens: 0.3 s and 4.2 s
GRACE_S = 3.0


@pytest.fixture(scope="module")
def services(tmp_path_factory):
    with etcd_and_nats(tmp_path_factory.mktemp("services")) as services:
        yield services


@pytest.fixture(scope="module")
def cluster(services, tmp_path_factory):
    cluster = Cluster(services, tmp_path_factory.mktemp("cluster"), PLANES)
    try:
        frontend = cluster.start_frontend("frontend", "--migration-limit", "3")
        for name in ("worker-0", "worker-1"):
            cluster.start_worker(name)
        cluster.wait_for_workers(frontend, 2)
        yield cluster
    finally:
        cluster.stop()


def whole(osl_tokens):
    return Answer(osl_tokens, "length", None)


async def ask_and_then(frontend, model, workers, do):
    """Six long answers, and what is done once each of three workers, the last of which is new, is at work on two."""
    async with Load(frontend.url, model, SHORT, concurrency=3):
        await until(workers[-1].num_output_tokens, "the frontend sends requests to the new worker")
    async with aiohttp.ClientSession() as session:
        asked = [asyncio.create_task(ask(session, frontend.url, model, LONG)) for _ in range(6)]
        await until(lambda: [worker.num_running() for worker in workers] == [2, 2, 2], "they have begun to answer")
        do()
        return await asyncio.gather(*asked)


def test_a_worker_that_joins_and_leaves_under_load_costs_no_request(cluster):
    """It takes requests as soon as it is there, and answers those it has within the grace period."""
    frontend = cluster.running[0]
    model = cluster.model(frontend)

    async def main():
        async with Load(frontend.url, model, SHORT, concurrency=8) as load:
            worker = cluster.start_worker("worker-that-leaves", grace_s=GRACE_S)
            await until(worker.num_output_tokens, "the new worker has made tokens")
            worker.process.terminate()
            await until(lambda: worker.process.poll() is not None, "it has left")
        return worker, load.answers

    worker, answers = asyncio.run(main())
    assert worker.process.returncode == 0
    assert set(answers) == {whole(SHORT)}
    assert num_migrated(frontend.url) == 0
    assert num_workers(frontend.url) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["stopped", "killed"])
def test_what_a_worker_cannot_finish_another_does(cluster, number):
    """Answers that last longer than the grace period, or a worker that dies: moved, and not a token lost."""
    frontend = cluster.running[0]
    model = cluster.model(frontend)
    worker = cluster.start_worker(f"worker-{number.name}")
    cluster.wait_for_workers(frontend, 3)
    before = num_migrated(frontend.url)
    workers = [*cluster.running[1:3], worker]
    answers = asyncio.run(ask_and_then(frontend, model, workers, lambda: worker.process.send_signal(number)))
    assert answers == 6 * [whole(LONG)]
    assert worker.process.wait(PATIENCE_S) == (0 if number == signal.SIGTERM else -signal.SIGKILL)
    assert num_migrated(frontend.url) - before == 2  # a third of them; round robin
    cluster.wait_for_workers(frontend, 2)


def test_without_migration_what_a_worker_cannot_finish_fails_and_is_not_cut_short(cluster):
    """An answer of half the length would look like a whole one."""
    frontend = cluster.start_frontend("frontend-without-migration", "--migration-limit", "0")
    worker = cluster.start_worker("worker-that-is-stopped")
    cluster.wait_for_workers(frontend, 3)
    workers = [*cluster.running[1:3], worker]
    answers = asyncio.run(ask_and_then(frontend, cluster.model(frontend), workers, worker.process.terminate))
    assert answers.count(whole(LONG)) == 4
    failed = [answer for answer in answers if answer != whole(LONG)]
    assert all(answer.error and answer.finish_reason is None for answer in failed), failed
    assert worker.process.wait(PATIENCE_S) == 0


@pytest.fixture
def four_hosts():
    """This machine's address, and three hosts: each an address and the command that runs another there."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and iproute2 for network namespaces")
    with contextlib.ExitStack() as stack:
        try:
            found = stack.enter_context(hosts(3))
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no network namespaces here: {error}")
        yield found


def test_workers_and_frontend_on_hosts_of_their_own_find_each_other(four_hosts, tmp_path):
    """Each in a network namespace: nothing goes over the loopback, and the request plane is TCP."""
    address, [(host, prefix), *others] = four_hosts
    planes = ["--discovery-backend", "etcd", "--request-plane", "tcp", "--event-plane", "nats"]
    with etcd_and_nats(tmp_path / "services", address) as services:
        cluster = Cluster(services, tmp_path, planes, environment={})
        try:
            frontend = cluster.start_frontend("frontend", host=host, prefix=prefix)
            workers = [cluster.start_worker(f"worker-{n}", prefix=prefix) for n, (_, prefix) in enumerate(others)]
            cluster.wait_for_workers(frontend, 2)

            async def main():
                async with Load(frontend.url, cluster.model(frontend), SHORT, concurrency=4) as load:
                    for worker in workers:
                        await until(worker.num_output_tokens, "both hosts answer")
                return load.answers

            assert set(asyncio.run(main())) == {whole(SHORT)}
        finally:
            cluster.stop()


def test_serve_uses_a_cluster_that_is_there_in_a_namespace_of_its_own_and_cleans_up(cluster, tmp_path, monkeypatch):
    """The others in it serve the same model, and get nothing of it."""
    services = cluster.services
    for name, value in services.environment.items():
        monkeypatch.setenv(name, value)
    before = services.etcd_keys()
    made_before = cluster.num_output_tokens_when_idle()
    with serving(tmp_path, "--workers", "2", *PLANES) as (command, facts):
        own = [key for key in services.etcd_keys() if facts["namespace"] in key.split("/")]
        assert len({key for key in own if key.startswith("v1/instances/")}) == 2
        assert num_workers(facts["url"], facts["namespace"]) == 2

        async def main():
            async with Load(facts["url"], facts["model"], SHORT, concurrency=8) as load:
                await until(lambda: len(load.answers) >= 24, "three rounds are answered")
            return load.answers

        assert set(asyncio.run(main())) == {whole(SHORT)}
        assert cluster.num_output_tokens_when_idle() == made_before
        assert facts["namespace"] in command.output
        command.interrupt()
        assert command.process.wait(25) == 0  # a part that has to be killed takes 30 s
    wait_for(lambda: sorted(services.etcd_keys()) == sorted(before), "all that it wrote to etcd is gone")


def test_when_all_have_stopped_nothing_is_left_in_etcd(cluster):
    """The keys of those that were killed go with their lease."""
    assert cluster.services.etcd_keys()
    cluster.stop()
    wait_for(lambda: not cluster.services.etcd_keys(), lambda: f"etcd is empty: {cluster.services.etcd_keys()}")
    killed = f"worker-{signal.SIGKILL.name}"
    assert all(part.process.returncode == 0 for part in cluster.running if part.name != killed)
