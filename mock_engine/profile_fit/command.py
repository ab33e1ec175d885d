"""
`mock-engine profiles fit`: runs in, a profile out, and what to make of it.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn
from rich.table import Table

from mock_engine.json_file import write_json
from mock_engine.profile import list_profiles, load_profile
from mock_engine.profile_fit.fit import Fit, fit_profile
from mock_engine.profile_fit.flags import FitSettings
from mock_engine.profile_fit.observed import ObservedRun
from mock_engine.profile_fit.readers import read_run
from mock_engine.profile_fit.report import (
    not_identified,
    only_together,
    parameter_rows,
    scheduling_note,
    step_rows,
    to_json,
    visited_range,
    warnings,
)
from mock_engine.profile_fit.start import as_server, choose_names, nearest_profiles
from mock_engine.profile_fit.writing import write_fit

_SHOWN_CANDIDATES = 3


def fit_command(flags: argparse.Namespace, console: Console) -> int:
    """Fit, write the profile, print the report. Raises `MockEngineError`."""
    settings = FitSettings.from_flags(flags)
    runs = sorted((read_run(path) for path in settings.runs), key=lambda run: run.concurrency)
    for run in runs:
        left_out = f", {run.num_left_out} rows left out" if run.num_left_out else ""
        _say(console, f"{run.name}: {len(run.requests)} requests, concurrency {run.concurrency}{left_out}")
    with _progress(console) as say:
        start_name = settings.start or _nearest(settings, runs, console, say)
        start = as_server(load_profile(start_name), settings.server)
        fit = fit_profile(
            start,
            runs,
            async_scheduling=settings.async_scheduling,
            only_overhead=settings.only_overhead,
            on_round=lambda number, error: say(f"round {number}, residuals {error:.1%}"),
        )
    if start_name not in list_profiles():  # a folder of this machine, which is nobody else's concern
        start_name = Path(start_name).name
    command = _build_command(settings, start_name)
    write_fit(fit, start_name, settings.out, command)
    notes = [note for note in (scheduling_note(fit), *only_together(fit), *warnings(fit)) if note]
    write_json(flags.json, to_json(fit, start_name, str(settings.out), command, notes))
    _print_fit(fit, start_name, notes, console)
    _say(console, f"\n{fit.profile.name}: {settings.out}. Try it:\nmock-engine simulate --profile {settings.out}")
    return 0


def _nearest(settings: FitSettings, runs: list[ObservedRun], console: Console, say: _Say) -> str:
    names = choose_names(settings.gpu, settings.model, settings.engine, settings.tp)
    candidates = nearest_profiles(
        runs, names, settings.server, lambda done, of: say(f"looking for the nearest: {done} of {of}")
    )
    _say(console, "Nearest profiles:")
    for candidate in candidates[:_SHOWN_CANDIDATES]:
        _say(
            console, f"  {candidate.name}: off by {candidate.error:.1%} if its times are taken x {candidate.scale:.2f}"
        )
    return candidates[0].name


def _print_fit(fit: Fit, start_name: str, notes: list[str], console: Console) -> None:
    rows = parameter_rows(fit)
    table = _table(f"Parameters, from {start_name}", "parameter", "start", "fitted", "sd", "known")
    for row in rows:
        if row.is_identified and row.is_factor:
            table.add_row(row.name, "", f"x {row.fitted:.3f}", f"{row.sd:.1%}", "yes")
        elif not row.is_factor:
            start, fitted, sd = (f"{value * 1e6:,.1f} us" for value in (row.start, row.fitted, row.sd))
            table.add_row(row.name, start, fitted, sd, "yes" if row.is_identified else "no")
    console.print(table)
    unknown = not_identified(rows)
    if unknown:
        _say(console, f"Not identified, and near what the others say: {'; '.join(unknown)}")
    table = _table("\nPasses of these runs", "passes", "count", "start, ms", "fitted, ms", "sd")
    for step in step_rows(fit):
        table.add_row(
            step.text,
            f"{step.num_passes:,}",
            f"{step.start_s * 1e3:.2f}",
            f"{step.fitted_s * 1e3:.2f}",
            f"{step.sd:.1%}",
        )
    console.print(table)
    reach = visited_range(fit.loads)
    _say(
        console,
        f"Beyond a batch of {reach['max_decode_batch_size']:,}, contexts of "
        f"{reach['max_context_tokens_per_sequence']:,} and prefills of {reach['max_prefill_tokens']:,} tokens it has "
        "the start profile's shape.",
    )
    table = _table("\nReplays beside the runs", "run", "concurrency", "TTFT before", "after", "ITL before", "after")
    for run in fit.runs:
        errors = (run.ttft_before, run.ttft_after, run.itl_before, run.itl_after)
        texts = ["" if error is None else f"{error:+.1%}" for error in errors]
        table.add_row(run.run.name, str(run.run.concurrency), *texts)
    console.print(table)
    for note in notes:
        _say(console, f"- {note}")


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim")
    table.add_column(first, no_wrap=True)
    for other in others:
        table.add_column(other, justify="right", no_wrap=True)
    return table


def _build_command(settings: FitSettings, start_name: str) -> str:
    """The command again, with names in the place of this machine's paths."""
    words = ["mock-engine", "profiles", "fit", *(path.name for path in settings.runs), "--from", start_name]
    for name, value in (
        ("--name", settings.server.name),
        ("--max-num-seqs", settings.server.max_num_seqs),
        ("--max-num-batched-tokens", settings.server.max_num_batched_tokens),
        ("--num-gpu-blocks-override", settings.server.num_gpu_blocks_override),
    ):
        words += [] if value is None else [name, str(value)]
    if settings.only_overhead:
        words.append("--only-overhead")
    if settings.async_scheduling is not None:
        words.append("--async-scheduling" if settings.async_scheduling else "--no-async-scheduling")
    return shlex.join([*words, "--out", "DIR"])


class _Say:
    """Says what is going on, where somebody is looking."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("reading", total=None)

    def __call__(self, text: str) -> None:
        self._progress.update(self._task, description=text)


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[_Say]:
    columns = (SpinnerColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield _Say(progress)


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True, markup=False)
