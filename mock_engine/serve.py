"""
`mock-engine serve`: a fleet, what there is to know about it, and its state while it runs.
"""

from __future__ import annotations

import json
import os
import shlex
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from mock_engine.fleet import Fleet, FleetSettings
from mock_engine.json_file import write_json
from mock_engine.live_view import FleetView
from mock_engine.recorder import TimelineRow

_REFRESH_S = 0.25
_LINE_EVERY_S = 10.0


def serve(settings: FleetSettings, json_path: Path | None, console: Console) -> None:
    """
    Serve until Ctrl-C or SIGTERM, or until a part dies (`ProcessError`).

    `json_path` gets `describe` once the model answers, and is there as long as it does. KeyboardInterrupt
    goes through before that.
    """
    if json_path is not None:
        json_path.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="mock-engine-") as folder, Fleet(settings, Path(folder)) as fleet:
        print_welcome(fleet, console)
        try:
            if json_path is not None:
                _write_whole(json_path, describe(fleet))
            if console.is_terminal:
                _watch_live(fleet, console)
            else:
                _watch_in_lines(fleet, console)
        except KeyboardInterrupt:
            pass
        finally:
            if json_path is not None:
                json_path.unlink(missing_ok=True)
    print_plain(console, "stopped")


def _write_whole(path: Path, content: object) -> None:
    """As `write_json`, but there all at once: scripts read the file as soon as it exists."""
    fresh = path.with_name(f"{path.name}.new")
    write_json(fresh, content)
    fresh.replace(path)


def describe(fleet: Fleet) -> dict[str, Any]:
    """The fleet for machines: where it is, what it serves, how much fits."""
    engine = fleet.engine
    return {
        "url": fleet.url,
        "base_url": f"{fleet.url}/v1",
        "model": fleet.model,
        "profile": engine.profile.name,
        "tokenizer": str(fleet.settings.worker.model_path),
        "num_workers": len(fleet.settings.roles),
        "roles": dict(fleet.settings.groups),
        "data_parallel_size": fleet.settings.worker.data_parallel_size,
        "router_mode": fleet.settings.router.router_mode,
        "total_kv_blocks": engine.num_blocks,
        "block_size": engine.block_size,
        "max_model_len": engine.scheduler.max_model_len,
        "max_num_seqs": engine.scheduler.max_num_seqs,
        "max_num_batched_tokens": engine.scheduler.max_num_batched_tokens,
        "speedup_ratio": fleet.settings.worker.engine.speedup_ratio,
        "planes": asdict(fleet.settings.planes),
        "namespace": fleet.namespace,
        "metrics_urls": fleet.metrics_urls,
        "dcgm_urls": fleet.dcgm_urls,
        "pids": {"serve": os.getpid(), **{part.name: part.process.pid for part in fleet.parts}},
    }


def curl_command(fleet: Fleet) -> str:
    """A request to try."""
    body = {"model": fleet.model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 16, "stream": True}
    data = shlex.quote(json.dumps(body))
    return f"curl -N {fleet.url}/v1/chat/completions -H 'Content-Type: application/json' -d {data}"


def aiperf_command(fleet: Fleet) -> str:
    """A small benchmark to try."""
    return (
        f"aiperf profile --model {fleet.model} --url {fleet.url} --endpoint-type chat --streaming "
        f"--tokenizer {shlex.quote(str(fleet.settings.worker.model_path))} --isl 512 --osl 128 --concurrency 8 "
        f"--request-count 64 --extra-inputs ignore_eos:true --extra-inputs min_tokens:128"
    )


def print_welcome(fleet: Fleet, console: Console) -> None:
    """URL, model, profile, capacity, and two commands to copy."""
    facts = describe(fleet)
    num_workers, num_ranks = facts["num_workers"], facts["data_parallel_size"]
    workers = "1 worker" if num_workers == 1 else f"{num_workers} workers"
    if "agg" not in facts["roles"]:
        workers += f" ({', '.join(f'{number} {role}' for role, number in facts['roles'].items())})"
    if num_ranks > 1:
        workers += f" of {num_ranks} ranks"
    workers += " with" if num_workers * num_ranks == 1 else ", each with"
    rows = {
        "URL": f"{fleet.url}/v1",
        "model": fleet.model,
        "profile": f"{facts['profile']} ({'measured' if fleet.engine.profile.is_measured else 'not measured'})",
        "capacity": (
            f"{workers} {facts['total_kv_blocks']:,} KV blocks of {facts['block_size']} tokens, context "
            f"{facts['max_model_len']:,}, {facts['max_num_seqs']:,} sequences, "
            f"{facts['max_num_batched_tokens']:,} tokens a step"
        ),
        "tokenizer": facts["tokenizer"],
        "metrics": ", ".join(fleet.metrics_urls.values()),
        "GPU metrics": ", ".join(fleet.dcgm_urls.values()),
    }
    if facts["speedup_ratio"] != 1:
        rows["speedup"] = "as fast as it can" if facts["speedup_ratio"] == 0 else f"{facts['speedup_ratio']:g} times"
    if fleet.settings.planes.is_shared:
        rows["namespace"] = fleet.namespace
    for name, value in rows.items():
        print_plain(console, f"{name:<12}{value}")
    print_plain(console, f"\ntry         {curl_command(fleet)}")
    print_plain(console, f"\nbenchmark   {aiperf_command(fleet)}\n")


def print_plain(console: Console, text: str) -> None:
    """Print as it is: what is there to be copied must not be wrapped, coloured or read as markup."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _watch_live(fleet: Fleet, console: Console) -> None:
    view = FleetView(fleet.settings.worker_names)
    told: set[str] = set()
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while True:
            fleet.check()
            _tell_of_deaths(fleet, told, console)
            live.update(Group(view.table(_states(fleet)), Text("Ctrl-C stops everything", style="dim")), refresh=True)
            time.sleep(_REFRESH_S)


def _watch_in_lines(fleet: Fleet, console: Console) -> None:
    """A line now and then, when it says something new."""
    view = FleetView(fleet.settings.worker_names)
    last = ""
    told: set[str] = set()
    next_line_s = time.monotonic()
    while True:
        fleet.check()
        _tell_of_deaths(fleet, told, console)
        line = view.line(_states(fleet))
        if line != last and time.monotonic() >= next_line_s:
            print_plain(console, line)
            last, next_line_s = line, time.monotonic() + _LINE_EVERY_S
        time.sleep(_REFRESH_S)


def _tell_of_deaths(fleet: Fleet, told: set[str], console: Console) -> None:
    for name in fleet.ended_by_fault():
        if name not in told:
            told.add(name)
            print_plain(console, f"{name} was ended by a fault; the others go on")


def _states(fleet: Fleet) -> list[TimelineRow | None]:
    return [fleet.status(worker) for worker in range(len(fleet.settings.roles))]
