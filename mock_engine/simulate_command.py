"""
`mock-engine simulate`: one simulation, a sweep of them, or a search for the highest rate.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from mock_engine.drive_virtual import Observer
from mock_engine.engine_settings import flag_of
from mock_engine.errors import ConfigError
from mock_engine.json_file import write_json
from mock_engine.parallel import make_pool
from mock_engine.simulate_flags import settings_from_flags, swept_flags
from mock_engine.simulation import SimulationSettings, simulate, unobserved
from mock_engine.simulation_report import print_max_rate, print_results, print_sweep
from mock_engine.sweep import SweepPoint, find_max_rate, pareto_front
from mock_engine.trace_events import TraceEvents

# TRACE from mock_engine.trace_events import TraceFile


def simulate_command(flags: argparse.Namespace, console: Console) -> int:
    """Run what the flags ask for, print it, and write the files they name. Raises `ConfigError`."""
    for name in ("json", "requests_out", "timeline"):
        _check_folder(flag_of(name), getattr(flags, name))
    if flags.plots is not None:
        _prepare_plots(flags.plots)
    if flags.sweep or flags.find_max:
        for name in ("requests_out", "timeline"):
            if getattr(flags, name) is not None:
                raise ConfigError(
                    f"--{name.replace('_', '-')} is about one simulation; leave out --sweep and --find-max"
                )
    elif flags.ray or flags.processes is not None:
        raise ConfigError("--ray and --processes are for many simulations; add --sweep or --find-max")
    if flags.sweep and flags.find_max:
        raise ConfigError("--sweep and --find-max each choose what to simulate; leave one out")
    if flags.sweep:
        return _sweep(flags, console)
    if flags.find_max:
        return _find_max(flags, console)
    return _simulate(flags, console)


def _simulate(flags: argparse.Namespace, console: Console) -> int:
    settings = settings_from_flags(flags)
    start_s = time.perf_counter()
    with contextlib.ExitStack() as stack:
        on_progress = stack.enter_context(_progress_in_simulated_time(settings, console))
        observer_of: Callable[[int, int], Observer | None] = unobserved
        if flags.timeline is not None:
            trace = stack.enter_context(contextlib.closing(TraceEvents(flags.timeline, settings.deployment)))
            observer_of = trace.observer_of
        try:
            results = simulate(settings, flags.requests_out, observer_of, on_progress)
        except KeyboardInterrupt:
            for path in filter(None, (flags.requests_out, flags.timeline)):
                print(f"mock-engine: {path} ends where the simulation was stopped", file=sys.stderr)
            raise
    wall_s = time.perf_counter() - start_s
    print_results(settings, results, console)
    console.print(f"\nsimulated {results.simulated_s:,.1f} s in {wall_s:.3f} s", highlight=False)
    write_json(flags.json, results.to_json())
    if flags.plots is not None:
        from mock_engine.simulation_plots import plot_latency, plot_timeline

        plot_timeline(flags.plots / "timeline.png", results)
        plot_latency(flags.plots / "latency.png", results)
    return 0 if results.num_finished else 1


def _sweep(flags: argparse.Namespace, console: Console) -> int:
    swept = [(values, settings_from_flags(changed)) for values, changed in swept_flags(flags)]
    with make_pool(flags.processes, flags.ray) as pool, _progress(console, "simulations", len(swept)) as on_done:
        results = pool.run([settings for _, settings in swept], on_done)
    points = [SweepPoint(values, each) for (values, _), each in zip(swept, results, strict=True)]
    print_sweep(points, console)
    front = pareto_front(points)
    write_json(
        flags.json,
        {
            "points": [{"swept": point.swept, **point.results.to_json()} for point in points],
            "pareto": [index for index, point in enumerate(points) if any(point is other for other in front)],
        },
    )
    if flags.plots is not None:
        from mock_engine.simulation_plots import plot_pareto

        plot_pareto(flags.plots / "pareto.png", points)
    return 0


def _find_max(flags: argparse.Namespace, console: Console) -> int:
    settings = settings_from_flags(flags)
    attainment: float = flags.slo_attainment_fraction
    with make_pool(flags.processes, flags.ray) as pool, _progress(console, "simulations", None) as on_done:
        found = find_max_rate(settings, attainment, pool, on_done)
    print_max_rate(settings, found, attainment, console)
    write_json(flags.json, found.to_json())
    return 0 if found.best else 1


def _check_folder(flag: str, path: Path | None) -> None:
    """Find out before the run, not after it, that a file cannot be written."""
    if path is not None and not path.resolve().parent.is_dir():
        raise ConfigError(f"{flag} {path}: there is no folder {path.parent}. Make it, or name another file.")


def _prepare_plots(folder: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plots needs matplotlib, which is not installed. Run: pip install 'mock-engine[bench]'")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--plots {folder}: {error.strerror}. Name a folder that can be written.") from error


@contextlib.contextmanager
def _progress(console: Console, unit: str, total: int | None) -> Iterator[Callable[[], None]]:
    """A bar on a terminal, nothing elsewhere."""
    if not console.is_terminal:
        yield lambda: None
        return
    columns = (TextColumn(unit), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(unit, total=total)
        yield lambda: progress.advance(task)


@contextlib.contextmanager
def _progress_in_simulated_time(
    settings: SimulationSettings, console: Console
) -> Iterator[Callable[[int, float], None]]:
    """A bar of requests that have ended, and the simulated time."""
    if not console.is_terminal:
        yield lambda _num_ended, _now_s: None
        return
    columns = (
        TextColumn("requests"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[simulated_s]:,.1f} s simulated in"),
        TimeElapsedColumn(),
    )
    total = settings.workload.num_requests
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("requests", total=total, simulated_s=0.0)
        yield lambda num_ended, now_s: progress.update(task, completed=num_ended, simulated_s=now_s)
