"""
`mock-engine bench`: a fleet, AIPerf against it, and a report of both.

    <output folder>/report.md      the page to read, with latency.png and timeline.png
    <output folder>/bench.json     AIPerf's own export, and beside it what the profile says
    <output folder>/aiperf/        all that AIPerf wrote
    <output folder>/engine/        what the workers recorded, and every part's log
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

from rich.console import Console

from mock_engine.bench_prediction import predict
from mock_engine.bench_report import print_table, write_report
from mock_engine.bench_results import AIPERF_EXPORT, read_results
from mock_engine.errors import ConfigError, ProcessError
from mock_engine.fleet import Fleet, FleetSettings
from mock_engine.json_file import write_json
from mock_engine.load import Load, aiperf_environment
from mock_engine.serve import print_plain

_POLL_S = 0.2
_AIPERF_STOP_S = 10.0


def bench(
    settings: FleetSettings, load: Load, output_folder: Path | None, json_path: Path | None, console: Console
) -> int:
    """Run it and print where the report is. Raises `ConfigError` or `ProcessError`."""
    for module, needed in (("aiperf", "AIPerf"), ("matplotlib", "matplotlib")):
        if importlib.util.find_spec(module) is None:
            raise ConfigError(f"bench needs {needed}, which is not installed. Run: pip install 'mock-engine[bench]'")
    folder = output_folder or Path(f"bench-{datetime.datetime.now():%Y%m%d-%H%M%S}")
    fleet = Fleet(settings, folder / "engine", is_recorded=True)
    load.check_fits(fleet.engine.scheduler.max_model_len)
    _make_folder(folder)
    prediction = predict(settings, load)
    with fleet:
        print_plain(console, f"{fleet.model} answers at {fleet.url}: {fleet.engine.profile.name}")
        ready_unix_s = time.time()
        command = load.aiperf_command(fleet.model, fleet.url, folder / "aiperf")
        print_plain(console, shlex.join(["aiperf", *command[1:]]))
        cache_folder = folder / "engine" / "tokenizer-cache"
        status = _run_aiperf(command, aiperf_environment(settings.model_path, cache_folder), fleet)
    for temporary in (cache_folder, folder / "engine" / "discovery"):
        shutil.rmtree(temporary, ignore_errors=True)
    if not (folder / "aiperf" / AIPERF_EXPORT).is_file():
        raise ProcessError(f"AIPerf ended with exit status {status} and without results. Its log: {folder}/aiperf/logs")
    results = read_results(folder, fleet, prediction, ready_unix_s)
    write_json(folder / "bench.json", results.to_json())
    write_json(json_path, results.to_json())
    write_report(folder, results)
    print_table(results, console)
    print_plain(console, f"\nreport: {folder / 'report.md'}")
    return status


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        taken = any(folder.iterdir())
    except OSError as error:
        raise ConfigError(f"--output-dir {folder}: {error.strerror}. Name a folder that can be written.") from error
    if taken:
        raise ConfigError(f"--output-dir {folder} is not empty; name a new folder, so that no results are mixed up")


def _run_aiperf(command: list[str], environment: dict[str, str], fleet: Fleet) -> int:
    """AIPerf's exit status. If a part of the fleet dies, or we are interrupted, AIPerf is stopped first."""
    process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        while process.poll() is None:
            fleet.check()
            time.sleep(_POLL_S)
        fleet.check()
    except ProcessError as error:
        raise ProcessError(f"the run was cut short: {error}") from error
    finally:
        stop_aiperf(process)
    return process.returncode


def stop_aiperf(process: subprocess.Popen[bytes]) -> None:
    """AIPerf is a dozen processes in a session of their own: ask the first to end, then see to it that none is left."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_AIPERF_STOP_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
