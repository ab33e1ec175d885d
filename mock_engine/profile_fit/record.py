"""
`mock-engine profiles record`: AIPerf against a server, once for each concurrency.

    <out>/concurrency-1/      AIPerf's artifact folder, as `profiles fit` reads it; aiperf.log is what it printed
    <out>/concurrency-4/
"""

from __future__ import annotations

import http.client
import os
import urllib.error
import urllib.request
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from mock_engine.aiperf_process import require_aiperf, run_aiperf
from mock_engine.errors import ConfigError, ProcessError
from mock_engine.load import Load
from mock_engine.profile_fit.flags import RecordSettings
from mock_engine.profile_fit.readers import AIPERF_RECORDS, read_run

_ANSWER_TIMEOUT_S = 10.0
_LOG = "aiperf.log"
_LOG_TAIL_LINES = 5


def record(settings: RecordSettings, console: Console) -> int:
    """Run the sweep; say where it is and what to do with it. Raises `ConfigError` or `ProcessError`."""
    require_aiperf("profiles record")
    loads = [_load(settings, concurrency) for concurrency in settings.concurrencies]
    _check_reachable(settings.url)
    folders = []
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        for number, load in enumerate(loads, 1):
            what = f"concurrency {load.concurrency}, {load.request_count} requests"
            task = progress.add_task(f"run {number} of {len(loads)}: {what}", total=None)
            folder = settings.out / f"concurrency-{load.concurrency}"
            _run(settings, load, folder)
            progress.remove_task(task)
            _say(console, f"{folder}: {what}{_figures(folder)}")
            folders.append(folder)
    _say(console, f"Now: mock-engine profiles fit {settings.out}/* --out my-profile")
    return 0


def _load(settings: RecordSettings, concurrency: int) -> Load:
    return Load(
        isl=settings.isl,
        isl_stddev=settings.isl_stddev,
        osl=settings.osl,
        osl_stddev=settings.osl_stddev,
        concurrency=concurrency,
        request_count=settings.num_requests(concurrency),
        aiperf_flags=("--random-seed", str(concurrency), *settings.aiperf_flags),
    )


def _run(settings: RecordSettings, load: Load, folder: Path) -> None:
    folder.mkdir(parents=True)
    command = load.aiperf_command(settings.model, settings.url, folder, settings.tokenizer, settings.endpoint_type)
    status = run_aiperf(command, os.environ, log_path=folder / _LOG)
    if not (folder / AIPERF_RECORDS).is_file():
        text = (folder / _LOG).read_text(encoding="utf-8", errors="replace")
        lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()][-_LOG_TAIL_LINES:]
        raise ProcessError(
            f"AIPerf ended with exit status {status} and without {AIPERF_RECORDS}; its last words: "
            f"{' / '.join(lines) or 'none'}. All of them: {folder / _LOG}"
        )


def _figures(folder: Path) -> str:
    """Mean TTFT and ITL in words. Raises `ConfigError` if no request was answered."""
    run = read_run(folder)
    ttft_ms = 1e3 * sum(request.ttft_s for request in run.requests) / len(run.requests)
    itls_s = [request.itl_s for request in run.requests if request.itl_s is not None]
    itl = f", ITL {1e3 * sum(itls_s) / len(itls_s):.2f} ms" if itls_s else ""
    failed = f"; {run.num_left_out} left out" if run.num_left_out else ""
    return f": TTFT {ttft_ms:.1f} ms{itl}{failed}"


def _check_reachable(url: str) -> None:
    """Raise `ConfigError` if nothing answers there; what it answers is AIPerf's concern."""
    try:
        urllib.request.urlopen(url, timeout=_ANSWER_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return  # it speaks HTTP
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise ConfigError(
            f"--url {url}: nothing answers there ({reason}). Start the server, or name another."
        ) from error


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True, markup=False)
