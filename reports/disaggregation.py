"""
A prefill worker and two decode workers under Dynamo's frontend and AIPerf: times, cancelled requests, a killed worker.

    python reports/disaggregation.py --out reports/disaggregation.md

First a benchmark, with AIPerf's figures beside the model's and the simulator's. Then clients that go away at random
moments, after which no KV block may be taken on either side. Then a decode worker is killed while it streams.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from mock_engine.bench_results import find_commit
from mock_engine.fleet import Fleet, FleetSettings
from mock_engine.worker_settings import WorkerSettings

_GROUPS = (("prefill", 1), ("decode", 2))
_BENCH = shlex.split(
    "--prefill-workers 1 --decode-workers 2 --isl 2048 --isl-stddev 256 --osl 128 --request-rate 4 --request-count 240"
)
_METRICS = (("time_to_first_token", "TTFT"), ("inter_token_latency", "ITL"), ("request_latency", "Request latency"))
_NUM_CANCELLED, _NUM_AT_ONCE = 500, 64
_NUM_STREAMS, _OSL = 40, 300
_MIGRATION_LIMIT = 3
_PATIENCE_S = 60.0


@dataclass
class Answer:
    """What a client got."""

    error: str | None = None
    num_tokens: int = 0
    times_s: list[float] = field(default_factory=list)  # of chunks

    def gap_after(self, moment_s: float) -> float:
        """How long its longest silence was that ended after that."""
        pairs = zip(self.times_s, self.times_s[1:], strict=False)
        return max((after - before for before, after in pairs if after > moment_s), default=0.0)


async def ask(session: aiohttp.ClientSession, fleet: Fleet, number: int, osl: int) -> Answer:
    """Stream an answer of `osl` tokens to a prompt of its own, of about 200."""
    answer = Answer()
    body: dict[str, Any] = {
        "model": fleet.model,
        "messages": [{"role": "user", "content": f"{number} " + "other world " * 100}],
        "max_tokens": osl,
        "stream": True,
        "ignore_eos": True,
        "stream_options": {"include_usage": True},
    }
    async with session.post(f"{fleet.url}/v1/chat/completions", json=body) as response:
        if response.status != 200:
            answer.error = f"{response.status} {await response.text()}"
            return answer
        async for line in response.content:
            text = line.decode().strip()
            if not text.startswith("data: {"):
                if text.startswith(("event: error", ": ")):
                    answer.error = text
                continue
            chunk = json.loads(text.removeprefix("data: "))
            if chunk.get("usage"):
                answer.num_tokens = chunk["usage"]["completion_tokens"]
            if any(choice["delta"].get("content") for choice in chunk.get("choices", [])):
                answer.times_s.append(time.monotonic())
    return answer


def workers_of(fleet: Fleet) -> list[int]:
    """Those that are up."""
    return [number for number, part in enumerate(fleet.parts[1:]) if part.process.poll() is None]


async def quiet(fleet: Fleet) -> float:
    """Seconds until no request is open and no KV block taken in any worker that is up."""
    began_s, began_unix_s = time.monotonic(), time.time()
    while time.monotonic() - began_s < _PATIENCE_S:
        states = [state for worker in workers_of(fleet) if (state := fleet.status(worker)) is not None]
        is_known = all(state.unix_s > began_unix_s for state in states)
        if is_known and all(state.num_open_requests == state.kv_used_blocks == 0 for state in states):
            return time.monotonic() - began_s
        await asyncio.sleep(0.1)
    raise SystemExit(f"KV blocks are still taken after {_PATIENCE_S:g} s: {states}")


async def cancel_many(fleet: Fleet) -> list[str]:
    """Clients that go away; what the page says of them."""
    draw = random.Random(0)
    slots = asyncio.Semaphore(_NUM_AT_ONCE)
    num_late = 0

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def give_up(number: int) -> None:
            nonlocal num_late
            patience_s = draw.choice([0.005, 0.03, 0.1, 0.3, 1.0]) * draw.uniform(0.3, 1.5)
            async with slots:
                try:
                    async with asyncio.timeout(patience_s):
                        await ask(session, fleet, number, _OSL)
                        num_late += 1
                except TimeoutError:
                    pass

        await asyncio.gather(*map(give_up, range(_NUM_CANCELLED)))
        seconds = await quiet(fleet)
        after = await ask(session, fleet, 0, 5)
    names = fleet.settings.worker_names
    states = {names[worker]: fleet.status(worker) for worker in workers_of(fleet)}
    rows = [
        f"| {name} | {state.num_output_tokens:,} | {state.kv_used_blocks} | {state.num_open_requests} |"
        for name, state in states.items()
        if state is not None
    ]
    return [
        f"{_NUM_CANCELLED} requests of {_OSL} tokens, {_NUM_AT_ONCE} at once; each client goes away after 2 ms "
        f"to 1.5 s; {num_late} were too late. {seconds:.1f} s after the last (states are written every 0.25 s):",
        "",
        "| worker | tokens made | KV blocks taken | requests open |",
        "|---|--:|--:|--:|",
        *rows,
        "",
        f"The next request got {after.num_tokens} of 5 tokens.",
    ]


async def kill_one(fleet: Fleet) -> list[str]:
    """A decode worker dies while it streams; what the page says of it."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        streams = [asyncio.ensure_future(ask(session, fleet, number, _OSL)) for number in range(_NUM_STREAMS)]
        await asyncio.sleep(1.0)
        victim = fleet.settings.worker_names.index("decode-0")
        state = fleet.status(victim)
        killed_s = time.monotonic()
        os.kill(fleet.parts[1 + victim].process.pid, signal.SIGKILL)
        answers = await asyncio.gather(*streams)
        await quiet(fleet)
        async with session.get(f"{fleet.url}/metrics") as response:
            metrics = await response.text()
    migrations = re.findall(r"^dynamo_frontend_model_migration_total\{(.*?)\} (\d+)", metrics, re.MULTILINE)
    gaps_s = sorted((answer.gap_after(killed_s) for answer in answers), reverse=True)
    num_open = state.num_open_requests if state is not None else 0
    num_failed = sum(answer.error is not None for answer in answers)
    num_short = sum(answer.num_tokens != _OSL for answer in answers)
    found = "; ".join(f"`{labels}`: {number}" for labels, number in migrations) or "none"
    return [
        f"{_NUM_STREAMS} streams of {_OSL} tokens; `decode-0` is killed after 1 s, with {num_open} requests open on "
        f"it, under `--migration-limit {_MIGRATION_LIMIT}`.",
        "",
        "| | |",
        "|---|--:|",
        f"| requests that failed | {num_failed} |",
        f"| answers with fewer or more than {_OSL} tokens | {num_short} |",
        f"| longest silence of a stream (ms) | {gaps_s[0] * 1e3:.0f} |",
        f"| the same, median of the {num_open} that were on it (ms) | {gaps_s[max(num_open // 2, 0)] * 1e3:.0f} |",
        "",
        f"Migrations as the frontend counts them (`dynamo_frontend_model_migration_total`): {found}.",
    ]


def bench() -> dict[str, Any]:
    """What `mock-engine bench` found."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:  # AIPerf's sockets need a short path
        argv = ["mock_engine", "bench", *_BENCH, "--output-dir", "bench", "--json", "bench.json"]
        subprocess.run([sys.executable, "-m", *argv], cwd=name, check=True, stdout=sys.stderr)
        found: dict[str, Any] = json.loads((Path(name) / "bench.json").read_text(encoding="utf-8"))
    return found


def comparison(found: dict[str, Any]) -> list[str]:
    """A row a statistic: AIPerf, the model, the simulator."""
    rows = []
    for metric, title in _METRICS:
        for statistic in ("p50", "p95"):
            measured, model, predicted = (
                source[metric][statistic] for source in (found, found["model"], found["prediction"])
            )
            rows.append(
                f"| {title} {statistic} (ms) | {measured:,.2f} | {model:,.2f} | {measured / model - 1:+.1%} "
                f"| {predicted:,.2f} | {model / predicted - 1:+.1%} |"
            )
    return rows


def main() -> None:
    """Run all three and write the page."""
    parser = argparse.ArgumentParser(description="Disaggregated serving, measured.")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the page to write")
    flags = parser.parse_args()
    commit = find_commit()
    found = bench()
    settings = FleetSettings(WorkerSettings(), _GROUPS, port=0, migration_limit=_MIGRATION_LIMIT)
    with tempfile.TemporaryDirectory() as folder, Fleet(settings, Path(folder)) as fleet:
        cancelled = asyncio.run(cancel_many(fleet))
        killed = asyncio.run(kill_one(fleet))
    flags.out.write_text(page(found, commit, cancelled, killed), encoding="utf-8")


def page(found: dict[str, Any], commit: str | None, cancelled: list[str], killed: list[str]) -> str:
    """The page."""
    facts = found["facts"]
    errors = found.get("error_request_count") or {"avg": 0}
    return "\n".join(
        [
            "# Disaggregated serving",
            "",
            "```",
            "python reports/disaggregation.py --out reports/disaggregation.md",
            "```",
            "",
            f"mock-engine {facts['mock-engine']}, commit {commit}; ai-dynamo {facts['ai-dynamo']}; "
            f"aiperf {facts['aiperf']}; {facts['started']}; {facts['profile']}.",
            "",
            "## AIPerf, the model, the simulator",
            "",
            f"`mock-engine bench {shlex.join(_BENCH)}`: {found['request_count']['avg']:.0f} requests, "
            f"{errors['avg']:.0f} errors; p99 lateness {found['lateness_s']['p99'] * 1e3:.1f} ms.",
            "",
            "| | AIPerf | model | AIPerf is | simulate | the model is |",
            "|---|--:|--:|--:|--:|--:|",
            *comparison(found),
            "",
            "The model's TTFT is that of the prefill worker and that of the decode worker together, each from a "
            "request's arrival there to when its token is due: the way from one to the other by the frontend is in "
            "AIPerf's. A transfer has five messages between processes, and the time of the host for them is in both.",
            "",
            "## Clients that go away",
            "",
            *cancelled,
            "",
            "## A decode worker is killed",
            "",
            *killed,
            "",
        ]
    )


if __name__ == "__main__":
    main()
