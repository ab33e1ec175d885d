"""
`mock-engine bench`: a fleet, AIPerf against it, and a report of both.

    <output folder>/report.md      the page to read, with latency.png and timeline.png
    <output folder>/bench.json     AIPerf's own export, and beside it what the profile says
    <output folder>/aiperf/        all that AIPerf wrote
    <output folder>/engine/        what the workers recorded, and every part's log
"""

from __future__ import annotations

import datetime
import shlex
import shutil
import time
from pathlib import Path

from rich.console import Console

from mock_engine.aiperf_process import require_aiperf, run_aiperf
from mock_engine.bench_prediction import predict
from mock_engine.bench_report import print_table, write_report
from mock_engine.bench_results import AIPERF_EXPORT, read_results
from mock_engine.errors import ConfigError, ProcessError
from mock_engine.fleet import Fleet, FleetSettings
from mock_engine.json_file import write_json
from mock_engine.load import Load, aiperf_environment
from mock_engine.serve import print_plain


def bench(
    settings: FleetSettings, load: Load, output_folder: Path | None, json_path: Path | None, console: Console
) -> int:
    """Run it and print where the report is. Raises `ConfigError` or `ProcessError`."""
    require_aiperf("bench", ("matplotlib", "matplotlib"))
    folder = output_folder or Path(f"bench-{datetime.datetime.now():%Y%m%d-%H%M%S}")
    fleet = Fleet(settings, folder / "engine", is_recorded=True)
    load.check_fits(fleet.engine.scheduler.max_model_len)
    _make_folder(folder)
    prediction = predict(settings, load)
    with fleet:
        print_plain(console, f"{fleet.model} answers at {fleet.url}: {fleet.engine.profile.name}")
        ready_unix_s = time.time()
        dcgm_urls = list(fleet.dcgm_urls.values())
        command = load.aiperf_command(
            fleet.model,
            fleet.url,
            folder / "aiperf",
            metrics_urls=list(fleet.metrics_urls.values()),
            dcgm_urls=dcgm_urls,
        )
        print_plain(console, shlex.join(["aiperf", *command[1:]]))
        cache_folder = folder / "engine" / "tokenizer-cache"
        environment = aiperf_environment(settings.worker.model_path, cache_folder, dcgm_urls)
        status = run_aiperf(command, environment, lambda: _check(fleet))
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


def _check(fleet: Fleet) -> None:
    try:
        fleet.check()
    except ProcessError as error:
        raise ProcessError(f"the run was cut short: {error}") from error
