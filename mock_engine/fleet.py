"""
Dynamo's frontend and N mock workers as child processes of this one.

    with Fleet(settings, folder) as fleet:     returns when the model has answered
        fleet.url, fleet.status(worker=0)
        fleet.check()                          raises `ProcessError` if a part has died

Without etcd and NATS the parts find each other by files in `folder`; with them (`FleetSettings.planes`)
in a Dynamo namespace of their own. They talk on 127.0.0.1, and write their logs to `folder`. Leaving the
`with` block, by whatever way, stops every part and waits until it is gone.
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys
import time
import urllib.error
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from pathlib import Path
from typing import Any, Self

from mock_engine.engine_settings import Engine, build_engine
from mock_engine.errors import ConfigError, ProcessError
from mock_engine.fault_injector import FaultInjector
from mock_engine.faults import FailedStart
from mock_engine.planes import Planes
from mock_engine.processes import Part, Parts, free_port, free_ports, http_json, last_words
from mock_engine.recorder import TimelineRow, read_status
from mock_engine.roles import check_migration_limit, check_num_workers, num_workers_by_role
from mock_engine.router_settings import RouterSettings
from mock_engine.worker_settings import WorkerSettings

START_TIMEOUT_S = 120.0
_ANSWER_TIMEOUT_S = 60.0
# On a busy machine Dynamo's frontend lists a model and its workers a moment before it sends requests there.
_NOT_YET = (HTTPStatus.NOT_FOUND, HTTPStatus.SERVICE_UNAVAILABLE)
_POLL_S, _POLL_SHARE = 0.01, 0.03

# The parts talk to each other on this machine only, stop at once, and log what is worth reading.
_CHILD_ENVIRONMENT = {
    "DYN_TCP_RPC_HOST": "127.0.0.1",
    "DYN_TCP_RESPONSE_STREAM_HOST": "lo" if sys.platform == "linux" else "lo0",  # it takes no address
    "DYN_SELF_HOST_METADATA": "0",
    "DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS": "0",
    "DYN_SDK_DISABLE_ANSI_LOGGING": "1",
    "PYTHONUNBUFFERED": "1",
}


@dataclass(frozen=True, slots=True)
class FleetSettings:
    """What to start. `port` 0 takes any free one. Raises `ConfigError` for values out of range."""

    worker: WorkerSettings
    groups: tuple[tuple[str, int], ...] = (("agg", 1),)  # roles, and how many workers there are of each
    router: RouterSettings = field(default_factory=RouterSettings)
    host: str = "127.0.0.1"
    port: int = 8000
    planes: Planes = field(default_factory=Planes)
    migration_limit: int | None = (
        None  # how often a request of a lost worker is sent to another; DYN_MIGRATION_LIMIT, or 0
    )

    def __post_init__(self) -> None:
        check_num_workers(self.groups)
        if not 0 <= self.port <= 65_535:
            raise ConfigError(f"--port is {self.port}; it must be 1 to 65535, or 0 for any free one")
        check_migration_limit(self.migration_limit or 0)
        for role, _ in self.groups:
            replace(self.worker, disaggregation_mode=role)  # finds what does not go together
        for fault in self.worker.faults:
            if fault.worker is not None and fault.worker >= len(self.roles):
                raise ConfigError(
                    f"--fault {fault.to_text()} is of worker {fault.worker}, but the workers are 0 to "
                    f"{len(self.roles) - 1}. Raise --workers, or name another."
                )

    @property
    def roles(self) -> tuple[str, ...]:
        """Of each worker; they count from 0 through all groups."""
        return tuple(role for role, number in self.groups for _ in range(number))

    @property
    def worker_names(self) -> tuple[str, ...]:
        """worker-0 and so on; with roles prefill-0, decode-0, decode-1, ..."""
        return tuple(
            f"{'worker' if role == 'agg' else role}-{number}" for role, count in self.groups for number in range(count)
        )

    @property
    def has_kv_events(self) -> bool:
        """Whether the workers tell the router what is in their KV caches."""
        worker, is_routed_by_kv = self.worker, self.router.router_mode == "kv"
        return all(is_routed_by_kv if on is None else on for on in (worker.enable_kv_events, worker.enable_kv_routing))

    def worker_settings(self, role: str, model_name: str, record: Path | None, status: Path) -> WorkerSettings:
        """
        Of one worker. What it publishes, unless the user says so, follows from the router: Dynamo's ZMQ event plane
        (1.3.1 to 1.6.1) listens on all interfaces, so it is not used for nothing.
        """
        worker, is_routed_by_kv = self.worker, self.router.router_mode == "kv"
        return replace(
            worker,
            model_name=model_name,
            disaggregation_mode=role,
            enable_kv_events=self.has_kv_events,
            enable_kv_routing=is_routed_by_kv if worker.enable_kv_routing is None else worker.enable_kv_routing,
            record=record,
            status=status,
        )

    @classmethod
    def from_flags(cls, flags: argparse.Namespace) -> FleetSettings:
        """The settings in what a parser with `flags.add_serving_flags` has parsed."""
        return cls(
            worker=replace(WorkerSettings.from_flags(flags), model_path=flags.model_path.resolve()),
            groups=tuple(num_workers_by_role(flags.workers, flags.prefill_workers, flags.decode_workers)),
            router=RouterSettings.from_flags(flags),
            host=flags.host,
            port=flags.port,
            planes=Planes.from_flags(flags),
            migration_limit=flags.migration_limit,
        )


class Fleet:
    """See the module. `folder` gets the logs; with `is_recorded`, each worker's recording too."""

    def __init__(self, settings: FleetSettings, folder: Path, is_recorded: bool = False) -> None:
        self.settings = settings
        self.folder = folder
        self.engine: Engine = build_engine(settings.worker.engine)  # finds wrong settings; nothing runs in it
        self.model = settings.worker.model_name or self.engine.profile.model
        settings.planes.check(os.environ)
        self.port = free_port(settings.host, settings.port)
        self.namespace = f"mock-engine-{secrets.token_hex(4)}"  # Dynamo's; nobody else has it
        if not settings.planes.is_shared:
            self.namespace = os.environ.get("DYN_NAMESPACE") or "dynamo"
        ports = free_ports(2 * len(settings.roles))
        self._system_ports, self._dcgm_ports = ports[::2], ports[1::2]
        self._parts = Parts(folder)
        self._is_recorded = is_recorded
        self._faults = [settings.worker.of_worker(worker).faults for worker in range(len(settings.roles))]
        self._failed = [
            name
            for name, faults in zip(settings.worker_names, self._faults, strict=True)
            if any(isinstance(fault, FailedStart) for fault in faults)
        ]
        if len(self._failed) == len(settings.roles):
            self._failed = []  # there is nothing to go on with

    @property
    def url(self) -> str:
        """Where clients connect."""
        host = "127.0.0.1" if self.settings.host in ("0.0.0.0", "::") else self.settings.host
        return f"http://{host}:{self.port}"

    @property
    def metrics_urls(self) -> dict[str, str]:
        """Where Prometheus finds what each part has to say, by its name."""
        workers = zip(self.settings.worker_names, self._system_ports, strict=True)
        return {"frontend": f"{self.url}/metrics", **{name: _metrics_url(port) for name, port in workers}}

    @property
    def dcgm_urls(self) -> dict[str, str]:
        """Where it finds the GPUs of each worker, as dcgm-exporter shows them."""
        return {
            name: _metrics_url(port) for name, port in zip(self.settings.worker_names, self._dcgm_ports, strict=True)
        }

    def record_folder(self, worker: int) -> Path:
        """Where that worker records."""
        return self.folder / self.settings.worker_names[worker]

    def status(self, worker: int) -> TimelineRow | None:
        """The latest state of a worker; None before it has started."""
        return read_status(self._status_path(worker))

    def __enter__(self) -> Self:
        try:
            self._start()
            self._wait_until_it_answers()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def check(self) -> None:
        """Raise `ProcessError`, saying which part died and its last words, if one did."""
        self._parts.check(may_end=self._failed)

    def ended_by_fault(self) -> list[str]:
        """Names of the workers that a fault has ended. The others go on."""
        return self._parts.ended_by_fault()

    def stop(self) -> None:
        """Stop all parts, workers first, and wait until they are gone. Safe twice; not cut short by signals."""
        self._parts.stop()

    @property
    def parts(self) -> list[Part]:
        """The processes, the frontend first."""
        return self._parts.all

    def _start(self) -> None:
        environment = self._environment()
        self._parts.spawn("frontend", self._frontend_arguments(), environment)
        for worker, name in enumerate(self.settings.worker_names):
            system = {"DYN_SYSTEM_HOST": "127.0.0.1", "DYN_SYSTEM_PORT": str(self._system_ports[worker])}
            self._parts.spawn(name, self._worker_arguments(worker), environment | system)

    def _environment(self) -> dict[str, str]:
        return {
            "DYN_LOG": os.environ.get("DYN_LOG", "warn"),
            **_CHILD_ENVIRONMENT,
            "DYN_FILE_KV": str(self.folder / "discovery"),
            "DYN_NAMESPACE": self.namespace,
            "DYN_NAMESPACE_PREFIX": self.namespace,  # what the frontend goes by, if the user has set one
        }

    def _frontend_arguments(self) -> list[str]:
        where = ["--http-host", self.settings.host, "--http-port", str(self.port)]
        router = self.settings.router.to_argv()
        if self.settings.router.router_mode == "kv" and not self.settings.has_kv_events:
            router.append("--no-router-kv-events")  # it goes by where it has sent prompts
        if self.settings.migration_limit is not None:
            router += ["--migration-limit", str(self.settings.migration_limit)]
        return ["-m", "mock_engine.frontend", *where, *self.settings.planes.to_argv(), *router]

    def _worker_arguments(self, worker: int) -> list[str]:
        # All with the same seed: an answer does not depend on the worker that gives it.
        record = self.record_folder(worker) if self._is_recorded else None
        role = self.settings.roles[worker]
        settings = self.settings.worker_settings(role, self.model, record, self._status_path(worker)).of_worker(worker)
        settings = replace(settings, dcgm_port=self._dcgm_ports[worker])
        return ["-m", "mock_engine", "worker", *settings.to_argv(), *self.settings.planes.to_argv()]

    def _wait_until_it_answers(self) -> None:
        timeout_s = START_TIMEOUT_S + max(FaultInjector(faults).start_delay_s for faults in self._faults)
        begin_s = time.monotonic()
        while not (self._is_registered() and self._answers()):
            self.check()
            if time.monotonic() > begin_s + timeout_s:
                logs = "".join(f"\n{part.name}:{last_words(part.log_path)}" for part in self.parts)
                raise ProcessError(f"the model did not answer within {timeout_s:g} s.{logs}")
            # Often, as it may take half a second; seldom where it takes long because the processors are busy.
            time.sleep(max(_POLL_S, _POLL_SHARE * (time.monotonic() - begin_s)))

    def _answers(self) -> bool:
        """
        Whether a request comes through to a worker. Raises `ProcessError` if it fails for good.

        Where there are faults, which are not to hit it nor to count it, it is one that the worker refuses.
        """
        message = {"role": "user", "content": "hello"}
        body: dict[str, Any] = {"model": self.model, "messages": [message], "max_tokens": 1}
        if self.settings.worker.faults:
            body["nvext"] = {"token_data": []}
        try:
            http_json(f"{self.url}/v1/chat/completions", body, _ANSWER_TIMEOUT_S)
        except (OSError, ValueError) as error:
            if isinstance(error, urllib.error.HTTPError):
                error.close()
                if error.code in _NOT_YET:
                    return False
                if error.code == HTTPStatus.BAD_REQUEST and self.settings.worker.faults:
                    return True
            self.check()  # a part that has died says more
            raise ProcessError(f"the model is registered but does not answer: {error}") from error
        return True

    def _is_registered(self) -> bool:
        """Whether the frontend can send requests to all workers, and lists the model."""
        try:
            instances = http_json(f"{self.url}/health").get("instances", [])
            # It lists those of other namespaces too, to which the frontend sends nothing.
            own = [each for each in instances if each["namespace"].startswith(self.namespace)]
            if sum(each["endpoint"] == "generate" for each in own) < len(self.settings.roles) - len(self._failed):
                return False
            return self.model in [model["id"] for model in http_json(f"{self.url}/v1/models")["data"]]
        except (OSError, ValueError):
            return False

    def _status_path(self, worker: int) -> Path:
        return self.folder / f"{self.settings.worker_names[worker]}.status.json"


def _metrics_url(port: int) -> str:
    return f"http://127.0.0.1:{port}/metrics"
