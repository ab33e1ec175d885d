"""
A Dynamo cluster on this machine: real etcd, real NATS, and the parts that a test starts in it.

    with etcd_and_nats(folder) as services:
        cluster = Cluster(services, folder, ["--discovery-backend", "etcd", ...])
        frontend = cluster.start_frontend("frontend", "--migration-limit", "3")
        worker = cluster.start_worker("worker-0")
        cluster.wait_for_workers(frontend, 1)
        asyncio.run(...)                            `ask`, `Load`
        cluster.stop()
        services.etcd_keys()                             what is left in etcd

Everything listens on 127.0.0.1, or on addresses that only the network namespaces of a test reach.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from mock_engine.parent_death import die_with_parent
from mock_engine.processes import free_ports, http_json
from mock_engine.recorder import read_status
from tests.helpers.processes import wait_for

MISSING = [name for name in ("etcd", "nats-server") if shutil.which(name) is None]
ON_THIS_MACHINE = {"DYN_TCP_RPC_HOST": "127.0.0.1", "DYN_TCP_RESPONSE_STREAM_HOST": "lo"}


@dataclass(frozen=True)
class Services:
    """An etcd and a NATS that run."""

    etcd_url: str
    nats_url: str

    @property
    def environment(self) -> dict[str, str]:
        """What Dynamo's processes need to find them."""
        return {"ETCD_ENDPOINTS": self.etcd_url, "NATS_SERVER": self.nats_url}

    def etcd_keys(self) -> list[str]:
        """All keys in etcd, by its HTTP gateway (etcdctl is a package of its own)."""
        every_key = {"key": base64.b64encode(b"\0").decode(), "range_end": base64.b64encode(b"\0").decode()}
        found = http_json(f"{self.etcd_url}/v3/kv/range", every_key | {"keys_only": True})
        return [base64.b64decode(row["key"]).decode() for row in found.get("kvs", [])]


@contextmanager
def etcd_and_nats(folder: Path, host: str = "127.0.0.1") -> Iterator[Services]:
    """Start both on free ports of `host`, with their data in `folder`; stop them in the end."""
    folder.mkdir(parents=True, exist_ok=True)
    etcd_url = f"http://{host}:{free_ports(1)[0]}"
    etcd = ["etcd", "--data-dir", str(folder / "etcd"), "--log-level", "error"]
    etcd += ["--listen-client-urls", etcd_url, "--advertise-client-urls", etcd_url]
    nobody = f"http://{host}:0"  # a cluster of one has no peers
    etcd += ["--listen-peer-urls", nobody, "--initial-advertise-peer-urls", nobody]
    etcd += ["--initial-cluster", f"default={nobody}"]
    nats = ["nats-server", "-a", host, "-p", "-1", "--ports_file_dir", str(folder), "-js", "-sd", str(folder / "nats")]
    with _process(etcd, folder / "etcd.log"), _process(nats, folder / "nats.log"):
        wait_for(lambda: _answers(f"{etcd_url}/health"), "etcd has started")
        ports = wait_for(lambda: [file for file in folder.glob("*.ports") if file.stat().st_size], "NATS has started")
        yield Services(etcd_url, json.loads(ports[0].read_text(encoding="utf-8"))["nats"][0])


@dataclass
class Running:
    """One part of a cluster."""

    name: str
    process: subprocess.Popen[bytes]
    url: str  # where a frontend listens
    status_path: Path  # what a worker says of itself

    def num_output_tokens(self) -> int:
        """Tokens that the worker has made; 0 before it has started."""
        status = read_status(self.status_path)
        return status.num_output_tokens if status is not None else 0

    def num_running(self) -> int:
        """Requests that the worker answers now, by its latest word; 0 before it has started."""
        status = read_status(self.status_path)
        return status.num_running if status is not None else 0


@dataclass
class Cluster:
    """Frontends and workers that find each other by `planes`, Dynamo's three flags."""

    services: Services
    folder: Path
    planes: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=lambda: ON_THIS_MACHINE)
    running: list[Running] = field(default_factory=list)

    def start_frontend(self, name: str, *flags: str, host: str = "127.0.0.1", prefix: Sequence[str] = ()) -> Running:
        """`flags` are dynamo.frontend's; `prefix` is a command that runs the rest elsewhere."""
        (port,) = free_ports(1)
        where = ["--http-host", host, "--http-port", str(port)]
        arguments = ["-m", "mock_engine.frontend", *where, *self.planes, *flags]
        return self._start(name, arguments, {}, prefix, f"http://{host}:{port}")

    def start_worker(self, name: str, grace_s: float = 0.0, prefix: Sequence[str] = ()) -> Running:
        """`grace_s` is for how long it goes on serving once it has been told to stop."""
        arguments = ["-m", "mock_engine", "worker", "--status", str(self.folder / f"{name}.json"), *self.planes]
        grace = {"DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS": str(grace_s)}
        return self._start(name, arguments, grace, prefix, "")

    def _start(
        self, name: str, arguments: Sequence[str], more: Mapping[str, str], prefix: Sequence[str], url: str
    ) -> Running:
        quiet = {"DYN_LOG": "warn", "DYN_SELF_HOST_METADATA": "0", "DYN_SDK_DISABLE_ANSI_LOGGING": "1"}
        quiet["ETCD_LEASE_TTL"] = "5"  # seconds that the keys of a killed worker stay; Dynamo's default is 10
        environment = {**os.environ, **quiet, **self.environment, **self.services.environment, **more}
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [*prefix, sys.executable, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                preexec_fn=die_with_parent(),
            )
        self.running.append(Running(name, process, url, self.folder / f"{name}.json"))
        return self.running[-1]

    def wait_for_workers(self, frontend: Running, number: int) -> None:
        """Until the frontend lists the model, and as many workers as that."""
        url = frontend.url
        wait_for(
            lambda: num_workers(url) == number and _get(f"{url}/v1/models").get("data"),
            lambda: f"{number} workers at {frontend.name}, but {num_workers(url)}; logs: {self.folder}",
        )

    def num_output_tokens_when_idle(self) -> list[int]:
        """What each worker that runs has made, once all of them say that they have nothing to do."""
        now_s = time.time()
        workers = [part for part in self.running if part.num_output_tokens() and part.process.poll() is None]

        def all_say_it() -> bool:
            states = [read_status(worker.status_path) for worker in workers]
            return all(state and state.unix_s > now_s and not state.num_open_requests for state in states)

        wait_for(all_say_it, "all workers are idle")
        return [worker.num_output_tokens() for worker in workers]

    def model(self, frontend: Running) -> str:
        return str(_get(f"{frontend.url}/v1/models")["data"][0]["id"])

    def stop(self) -> None:
        """Workers first, as they were started last; by process id."""
        for part in reversed(self.running):
            if part.process.poll() is None:
                part.process.terminate()
        for part in reversed(self.running):
            try:
                part.process.wait(20)
            except subprocess.TimeoutExpired:
                part.process.kill()
                part.process.wait()


def num_workers(url: str, namespace: str = "dynamo") -> int:
    """Workers in a namespace that a frontend knows of; it lists all there are, and uses those of its own."""
    instances = _get(f"{url}/health").get("instances", [])
    return sum((instance["namespace"], instance["endpoint"]) == (namespace, "generate") for instance in instances)


def num_migrated(url: str) -> int:
    """Requests that a frontend has moved from one worker to another while they were answered."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=5) as response:
        text = response.read().decode()
    pattern = r'^\w*model_migration_total\{[^}]*migration_type="ongoing_request"[^}]*\} (\d+)'
    return sum(int(number) for number in re.findall(pattern, text, re.MULTILINE))


@dataclass(frozen=True)
class Answer:
    """What a client saw of one streamed answer."""

    num_tokens: int
    finish_reason: str | None
    error: str | None


async def ask(session: aiohttp.ClientSession, url: str, model: str, osl_tokens: int) -> Answer:
    """One chat completion of exactly that length."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "hello " * 20}],
        "max_tokens": osl_tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    num_tokens, finish_reason, error = 0, None, None
    async with session.post(f"{url}/v1/chat/completions", json=body) as response:
        async for line in response.content:
            if response.status != 200:
                error = f"{response.status} {line.decode()}"
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line.removeprefix(b"data: "))
            error = error or (str(chunk["error"]) if "error" in chunk else None)
            for choice in chunk.get("choices", []):
                finish_reason = choice["finish_reason"] or finish_reason
            num_tokens = (chunk.get("usage") or {}).get("completion_tokens", num_tokens)
    return Answer(num_tokens, finish_reason, error)


class Load:
    """Clients that ask again and again as long as the block lasts; `answers` has what they got."""

    def __init__(self, url: str, model: str, osl_tokens: int, concurrency: int) -> None:
        self.answers: list[Answer] = []
        self._one = (url, model, osl_tokens)
        self._concurrency = concurrency
        self._goes_on = True

    async def __aenter__(self) -> Load:
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(60))
        self._clients = [asyncio.create_task(self._client()) for _ in range(self._concurrency)]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._goes_on = False
        await asyncio.gather(*self._clients)
        await self._session.close()

    async def _client(self) -> None:
        while self._goes_on:
            self.answers.append(await ask(self._session, *self._one))


async def until(condition: Any, what: str) -> None:
    """`wait_for` while the loop runs on."""
    await asyncio.get_running_loop().run_in_executor(None, wait_for, condition, what)


@contextmanager
def hosts(number: int) -> Iterator[tuple[str, list[tuple[str, list[str]]]]]:
    """
    Network namespaces on one bridge, as hosts of their own; removed in the end. Needs root and iproute2.

    Yields this machine's address, and for each host its address and the command that runs another there.
    Raises OSError or CalledProcessError where that is not allowed.
    """
    tag = f"me{os.getpid() % 100_000}"
    net = f"10.{64 + os.getpid() % 64}.{os.getpid() // 64 % 256}"
    made = []

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        ip("link", "add", tag, "type", "bridge")
        made.append(("link", "del", tag))
        ip("address", "add", f"{net}.1/24", "dev", tag)
        ip("link", "set", tag, "up")
        found = []
        for index in range(number):
            host, address = f"{tag}n{index}", f"{net}.{index + 2}"
            ip("netns", "add", host)
            made.append(("netns", "del", host))
            ip("link", "add", f"{tag}v{index}", "master", tag, "type", "veth", "peer", "name", "eth0", "netns", host)
            ip("link", "set", f"{tag}v{index}", "up")
            ip("-n", host, "address", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", host, "link", "set", device, "up")
            found.append((address, ["ip", "netns", "exec", host]))
        yield f"{net}.1", found
    finally:
        for words in reversed(made):
            subprocess.run(["ip", *words], check=False, capture_output=True)


@contextmanager
def _process(command: Sequence[str], log_path: Path) -> Iterator[None]:
    with log_path.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, preexec_fn=die_with_parent())
    try:
        yield
    finally:
        process.terminate()
        process.wait(20)


def _answers(url: str) -> bool:
    with suppress(OSError, ValueError):
        http_json(url)
        return True
    return False


def _get(url: str) -> dict[str, Any]:
    """The JSON there; empty as long as nobody listens."""
    with suppress(OSError, ValueError):
        return dict(http_json(url))
    return {}
