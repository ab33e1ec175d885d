"""
The same workers in a cluster of etcd and NATS: is a benchmark there another one, and what do drains and deaths cost?

    etcd & nats-server & python reports/cluster.py          writes reports/cluster.md

etcd and NATS are those that ETCD_ENDPOINTS and NATS_SERVER name, Dynamo's own defaults without them. Run it on a
machine that does nothing else meanwhile; it takes some ten minutes.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mock_engine.aiperf_process import run_aiperf
from mock_engine.bench_results import AIPERF_EXPORT, AIPERF_RECORDS, find_commit
from mock_engine.errors import MockEngineError
from mock_engine.fleet import Fleet, FleetSettings
from mock_engine.load import Load, aiperf_environment
from mock_engine.planes import Planes
from mock_engine.processes import Part, http_json
from mock_engine.worker_settings import WorkerSettings

EMBEDDED = Planes()
SETUPS = (EMBEDDED, Planes("etcd", "tcp", "zmq"), Planes("etcd", "nats", "nats"))
BENCH_LOAD = "--isl 512 --osl 256 --osl-stddev 64 --concurrency 8 --request-count 48 --workers 2"

OSL_TOKENS = 512  # 3.6 s: shorter than Dynamo's grace period of 5 s
CONCURRENCY, REQUEST_COUNT = 12, 60
_THIRD = 2  # counted from 0
_SETTLE_S = 1.0  # from the first token of the worker that comes and goes until it is told to go
_LEASE_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Departure:
    """How the third worker goes, and whether the frontend may move its requests."""

    text: str
    number: signal.Signals
    grace_s: float
    migration_limit: int


DEPARTURES = (
    Departure("stopped, 5 s of grace", signal.SIGTERM, 5.0, 0),
    Departure("stopped, no grace", signal.SIGTERM, 0.0, 0),
    Departure("stopped, no grace", signal.SIGTERM, 0.0, 3),
    Departure("killed", signal.SIGKILL, 5.0, 0),
    Departure("killed", signal.SIGKILL, 5.0, 3),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What clients, frontend and etcd saw of it."""

    num_whole: int  # answered with as many tokens as were asked for
    num_broken_off: int  # begun, and ended by an error
    num_refused: int  # ended by an error at once
    num_interrupted: int  # by the frontend's count, whether it could move them or not
    num_tokens_of_third: int
    exit_status: int
    num_keys_left: int  # in etcd, when all have stopped
    empty_after_s: float


class ClusterFleet(Fleet):
    """A fleet to which one more worker can be added."""

    def add_worker(self, grace_s: float) -> Part:
        """Start the third worker; it is up when its status says so."""
        first, third = (str(self._status_path(worker)) for worker in (0, _THIRD))
        arguments = [third if word == first else word for word in self._worker_arguments(0)]
        arguments += ["--dcgm-port", "0"]  # not the first one's
        grace = {"DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS": str(grace_s)}
        return self._parts.spawn("the-third", arguments, self._environment() | grace)

    def num_output_tokens(self, worker: int) -> int:
        """Tokens that a worker has made; 0 before it is up."""
        status = self.status(worker)
        return status.num_output_tokens if status is not None else 0

    def _status_path(self, worker: int) -> Path:
        return self.folder / f"{worker}.status.json"


def bench(planes: Planes, folder: Path) -> dict[str, Any]:
    """bench.json of one `mock-engine bench`."""
    command = [
        sys.executable,
        "-m",
        "mock_engine",
        "bench",
        *BENCH_LOAD.split(),
        *planes.to_argv(),
        "--output-dir",
        str(folder),
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    results: dict[str, Any] = json.loads((folder / "bench.json").read_text(encoding="utf-8"))
    return results


def depart(departure: Departure, folder: Path) -> Outcome:
    """Two workers under load; a third joins, takes its share, and goes."""
    limit = departure.migration_limit
    settings = FleetSettings(WorkerSettings(), (("agg", 2),), port=0, planes=SETUPS[-1], migration_limit=limit)
    load = Load(isl=128, osl=OSL_TOKENS, concurrency=CONCURRENCY, request_count=REQUEST_COUNT)
    load = replace(load, aiperf_flags=("--no-server-metrics",))
    with ClusterFleet(settings, folder / "engine") as fleet:
        command = load.aiperf_command(fleet.model, fleet.url, folder / "aiperf")
        environment = aiperf_environment(settings.worker.model_path, folder / "cache")
        steps = come_and_go(fleet, departure)
        run_aiperf(command, environment, lambda: next(steps, None), folder / "aiperf.log")
        num_interrupted = count_interrupted(fleet.url)
        third = fleet.parts[-1]
        exit_status = third.process.wait(30)
        num_tokens_of_third = fleet.num_output_tokens(_THIRD)
    stopped_s = time.monotonic()
    num_keys_left = len(keys_of(fleet.namespace))
    while keys_of(fleet.namespace):
        if time.monotonic() > stopped_s + _LEASE_TIMEOUT_S:
            raise MockEngineError(f"still in etcd: {keys_of(fleet.namespace)}")
        time.sleep(0.1)
    empty_after_s = time.monotonic() - stopped_s
    export = json.loads((folder / "aiperf" / AIPERF_EXPORT).read_text(encoding="utf-8"))
    # To AIPerf an answer is complete however it ends, if there is a token of it.
    num_whole = count_whole(folder / "aiperf" / AIPERF_RECORDS)
    return Outcome(
        num_whole=num_whole,
        num_broken_off=int(export["request_count"]["avg"]) - num_whole,
        num_refused=sum(int(error["count"]) for error in export.get("error_summary") or []),
        num_interrupted=num_interrupted,
        num_tokens_of_third=num_tokens_of_third,
        exit_status=exit_status,
        num_keys_left=num_keys_left,
        empty_after_s=empty_after_s,
    )


def come_and_go(fleet: ClusterFleet, departure: Departure) -> Iterator[None]:
    """One step at a time, while AIPerf runs."""
    while not (fleet.num_output_tokens(0) and fleet.num_output_tokens(1)):
        yield
    third = fleet.add_worker(departure.grace_s)
    while not fleet.num_output_tokens(_THIRD):
        yield
    go_s = time.monotonic() + _SETTLE_S
    while time.monotonic() < go_s:
        yield
    third.process.send_signal(departure.number)


def count_whole(records_path: Path) -> int:
    """Answers with all the tokens that were asked for."""
    rows = records_path.read_text(encoding="utf-8").splitlines()
    lengths = [json.loads(row)["metrics"].get("output_sequence_length", {}).get("value") for row in rows]
    return lengths.count(OSL_TOKENS)


def count_interrupted(url: str) -> int:
    """Answers under way that the frontend found interrupted, whether `--migration-limit` let it move them or not."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=5) as response:
        text = response.read().decode()
    pattern = r'^\w*model_migration_total\{[^}]*migration_type="ongoing_request"[^}]*\} (\d+)'
    return sum(int(number) for number in re.findall(pattern, text, re.MULTILINE))


def keys_of(namespace: str) -> list[str]:
    """Keys in etcd that name a Dynamo namespace, by etcd's HTTP gateway."""
    every = base64.b64encode(b"\0").decode()
    url = os.environ.get("ETCD_ENDPOINTS", "http://localhost:2379").split(",")[0]
    found = http_json(f"{url}/v3/kv/range", {"key": every, "range_end": every, "keys_only": True})
    keys = [base64.b64decode(row["key"]).decode() for row in found.get("kvs", [])]
    return [key for key in keys if namespace in key]


def page(command: str, benches: dict[Planes, list[dict[str, Any]]], outcomes: Sequence[Outcome]) -> str:
    """The Markdown page."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("mock-engine", "ai-dynamo", "aiperf"))
    facts = benches[EMBEDDED][0]["facts"]
    lines = ["# In a cluster of etcd and NATS", "", f"    {command}", ""]
    lines += [
        f"Commit {find_commit() or 'unknown'}; {packages}, {programs()}, Python {platform.python_version()}; "
        f"{os.cpu_count()} cores, which everything shares.",
        "",
        "## The same benchmark",
        "",
        f"`mock-engine bench {BENCH_LOAD}`, `{facts['profile']}`; runs of each, in turn: "
        f"{len(benches[EMBEDDED])}. The best figure of them, as what else a host does only makes them worse, and its "
        "ratio to the first line's, which is what `bench` does by itself.",
        "",
        "| discovery, requests, events | TTFT p50 ms | | TTFT p99 ms | | ITL p50 ms | | tokens/s | | failed |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    base = figures(benches[EMBEDDED])
    for planes, runs in benches.items():
        cells = [f"{value:,.1f} | {value / first:.2f}" for value, first in zip(figures(runs), base, strict=True)]
        failed = sum(int(error["count"]) for run in runs for error in run.get("error_summary") or [])
        names = ", ".join((planes.discovery_backend, planes.request_plane, planes.event_plane))
        lines.append(f"| {names} | {' | '.join(cells)} | {failed} |")
    lines += [
        "",
        "## A worker joins and goes under load",
        "",
        f"etcd, NATS for requests and events. Two workers answer {CONCURRENCY} clients with {OSL_TOKENS} tokens each, "
        f"3.6 s and more; a third joins, gets its share of {REQUEST_COUNT} requests, and goes {_SETTLE_S:g} s after "
        "its first token.",
        "",
        "| the third is | `--migration-limit` | whole answers | broken off | refused | interrupted "
        "| tokens of the third | its exit status | keys left in etcd | gone after s |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for departure, outcome in zip(DEPARTURES, outcomes, strict=True):
        cells = [f"{value:,}" for value in (departure.migration_limit, *astuple(outcome)[:-1])]
        lines.append(f"| {departure.text} | {' | '.join(cells)} | {outcome.empty_after_s:.1f} |")
    lines += [
        "",
        "Broken off: tokens came, and then an error event; AIPerf 0.13 counts such an answer as completed. Refused: an "
        "error at once. Interrupted: by the frontend's own count (`model_migration_total`), whether it could move the "
        "request or not. Keys left: of this deployment, when all of it had stopped, which was later than the lease of "
        "a killed worker (ETCD_LEASE_TTL, 10 s). [docs/cluster.md](../docs/cluster.md) says what it means.",
        "",
    ]
    return "\n".join(lines)


def figures(runs: Sequence[dict[str, Any]]) -> list[float]:
    """The best of the runs, in the order of the table."""
    columns = ("time_to_first_token", "p50"), ("time_to_first_token", "p99"), ("inter_token_latency", "p50")
    best = [min(run[name][quantile] for run in runs) for name, quantile in columns]
    return [*best, max(run["output_token_throughput"]["avg"] for run in runs)]


def programs() -> str:
    """Versions of etcd and NATS, as far as they are installed here."""
    found = []
    for command in (["etcd", "--version"], ["nats-server", "--version"]):
        try:
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError):
            continue
        found.append(f"{command[0]} {re.findall(r'[0-9.]+', output)[0]}")
    return ", ".join(found)


def main() -> int:
    """Run all, print the page and write it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().splitlines()[0])
    parser.add_argument("--runs", type=int, default=4, help="benchmarks of each kind (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("reports/cluster.md"))
    flags = parser.parse_args()
    benches: dict[Planes, list[dict[str, Any]]] = {planes: [] for planes in SETUPS}
    outcomes = []
    try:
        SETUPS[-1].check(os.environ)
        with tempfile.TemporaryDirectory(prefix="cluster-", ignore_cleanup_errors=True) as folder:
            for number, departure in enumerate(DEPARTURES):
                outcomes.append(depart(departure, Path(folder) / f"departure-{number}"))
                print(departure, outcomes[-1], file=sys.stderr)
            for run in range(flags.runs):
                for number, planes in enumerate(SETUPS):
                    benches[planes].append(bench(planes, Path(folder) / f"bench-{run}-{number}"))
                    print(planes, figures(benches[planes][-1:]), file=sys.stderr)
    except MockEngineError as error:
        parser.error(str(error))
    text = page(shlex.join(["python", "reports/cluster.py", *sys.argv[1:]]), benches, outcomes)
    flags.out.write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
