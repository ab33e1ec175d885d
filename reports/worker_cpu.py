"""
Processor time of one Dynamo worker process for each output token: five backends, the same load.

    python reports/worker_cpu.py --concurrency 32 --isl 256 --osl 256 --request-count 128 --out reports/worker-cpu.md

Each backend gets a frontend of its own, and AIPerf. Counted is user plus system time of the worker,
all threads, while AIPerf runs; what it uses when idle is measured first, and taken off for the
seconds in which AIPerf itself starts and ends.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import FrameType

import psutil  # type: ignore[import-untyped]

from mock_engine.aiperf_process import stop_aiperf
from mock_engine.bench_results import AIPERF_EXPORT, AIPERF_RECORDS, find_commit
from mock_engine.engine_settings import DEFAULT_TOKENIZER
from mock_engine.errors import MockEngineError
from mock_engine.fleet import Fleet, FleetSettings
from mock_engine.load import Load, aiperf_environment
from mock_engine.worker_settings import WorkerSettings

_ROOT = Path(__file__).resolve().parent.parent
_MODEL = str(DEFAULT_TOKENIZER)  # folder and served name: sample_main and the mocker take one for both
_SETTLE_S, _IDLE_S, _POLL_S = 2.0, 3.0, 0.2
_AIPERF_TIMEOUT_S = 600.0
_SPREAD = 0.15  # two runs of the same backend differ by this share at times

_OURS = "mock-engine worker"
_OURS_FAST = "mock-engine worker --speedup-ratio 0"
_SAMPLE = "dynamo.common.backend.sample_main"
_SAMPLE_FAST = "dynamo.common.backend.sample_main --delay 0"
_MOCKER = "dynamo.mocker --speedup-ratio 1000"


@dataclass(frozen=True, slots=True)
class Measurement:
    """What one backend did under the load."""

    output_tokens: int  # as the frontend's usage says
    tokens_per_s: float
    tokens_per_chunk: float  # as AIPerf received them
    cpu_us_per_token: float
    num_failed: int


class OneBackend(Fleet):
    """A fleet whose only worker is `python <arguments>`."""

    def __init__(self, arguments: Sequence[str], folder: Path) -> None:
        super().__init__(FleetSettings(WorkerSettings(model_name=_MODEL), port=0), folder)
        self._arguments = arguments

    def _worker_arguments(self, worker: int) -> list[str]:
        del worker
        return [*self._arguments, *self.settings.planes.to_argv()]


def backends(osl_tokens: int) -> dict[str, list[str]]:
    """Arguments for Python, by name, in the order in which they are measured."""
    ours = ["-m", "mock_engine", "worker", "--model-path", _MODEL, "--model-name", _MODEL]
    sample = ["-m", "dynamo.common.backend.sample_main", "--model-name", _MODEL, "--max-tokens", str(osl_tokens)]
    return {
        _OURS: ours,
        _OURS_FAST: [*ours, "--speedup-ratio", "0"],
        _SAMPLE: sample,
        _SAMPLE_FAST: [*sample, "--delay", "0"],
        _MOCKER: ["-m", "dynamo.mocker", "--model-path", _MODEL, "--speedup-ratio", "1000"],
    }


def measure(arguments: Sequence[str], load: Load, request_count: int, folder: Path) -> Measurement:
    """Start it, load it, stop it. Raises `MockEngineError` if it does not start, dies, or gives no results."""
    fleet = OneBackend(arguments, folder)
    with fleet:
        worker = psutil.Process(fleet.parts[-1].process.pid)
        time.sleep(_SETTLE_S)
        start_s, start_cpu_s = time.monotonic(), _cpu_s(worker)
        time.sleep(_IDLE_S)
        before_s, before_cpu_s = time.monotonic(), _cpu_s(worker)
        _run_aiperf(load.aiperf_command(_MODEL, fleet.url, folder / "aiperf"), folder / "cache", fleet)
        cpu_s, wall_s = _cpu_s(worker) - before_cpu_s, time.monotonic() - before_s
    idle_share = (before_cpu_s - start_cpu_s) / (before_s - start_s)
    export = json.loads((folder / "aiperf" / AIPERF_EXPORT).read_text(encoding="utf-8"))
    output_tokens = int(export.get("total_usage_completion_tokens", {}).get("avg", 0))
    if not output_tokens:
        raise MockEngineError("no request was answered")
    loaded_s = export["benchmark_duration"]["avg"]
    return Measurement(
        output_tokens=output_tokens,
        tokens_per_s=output_tokens / loaded_s,
        tokens_per_chunk=output_tokens / _num_chunks(folder / "aiperf" / AIPERF_RECORDS),
        cpu_us_per_token=(cpu_s - idle_share * (wall_s - loaded_s)) * 1e6 / output_tokens,
        num_failed=request_count - int(export["request_count"]["avg"]),
    )


def _cpu_s(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.Error as error:
        raise MockEngineError("the worker died") from error
    return float(times.user + times.system)


def _run_aiperf(command: list[str], cache_folder: Path, fleet: Fleet) -> None:
    deadline_s = time.monotonic() + _AIPERF_TIMEOUT_S
    environment = aiperf_environment(DEFAULT_TOKENIZER, cache_folder)
    with (fleet.folder / "aiperf.log").open("wb") as log:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        try:
            while process.poll() is None:
                fleet.check()
                if time.monotonic() > deadline_s:
                    raise MockEngineError(f"AIPerf did not end within {_AIPERF_TIMEOUT_S:g} s")
                time.sleep(_POLL_S)
        finally:
            stop_aiperf(process)
    if not (fleet.folder / "aiperf" / AIPERF_EXPORT).is_file():
        raise MockEngineError(f"AIPerf ended with exit status {process.returncode} and without results")


def _num_chunks(path: Path) -> int:
    with path.open(encoding="utf-8") as file:
        metrics = [json.loads(line)["metrics"] for line in file]
    return sum(1 + len(row["inter_chunk_latency"]["value"]) if "inter_chunk_latency" in row else 1 for row in metrics)


def report(command: str, load: Load, results: Mapping[str, Measurement | str]) -> str:
    """The Markdown page. A result that is a string says why there are no figures."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("mock-engine", "ai-dynamo", "aiperf"))
    lines = ["# Processor time of a worker", "", f"    {command}", ""]
    lines += [
        f"Commit {find_commit() or 'unknown'}; {packages}, Python {platform.python_version()}; {os.cpu_count()} cores.",
        f"Each backend: concurrency {load.concurrency}, ISL {load.isl}, OSL {load.osl}, {load.request_count} requests.",
        "",
    ]
    lines += ["| backend | output tokens | tokens/s | tokens/chunk | worker CPU us/token | requests failed |"]
    lines += ["|---|--:|--:|--:|--:|--:|"]
    for name, result in results.items():
        if isinstance(result, str):
            lines.append(f"| `{name}` | {result} | | | | |")
        else:
            lines.append(
                f"| `{name}` | {result.output_tokens} | {result.tokens_per_s:.0f} | {result.tokens_per_chunk:.2f} | "
                f"{result.cpu_us_per_token:.1f} | {result.num_failed} |"
            )
    measured = {name: result for name, result in results.items() if isinstance(result, Measurement)}
    return "\n".join([*lines, "", *_meaning(measured), ""])


def _meaning(measured: Mapping[str, Measurement]) -> list[str]:
    sentences = []
    if _OURS in measured:
        us = measured[_OURS].cpu_us_per_token
        text = f"At model speed the mock-engine worker uses {us:.0f} us of processor time for each output token"
        if _SAMPLE in measured:
            ratio = us / measured[_SAMPLE].cpu_us_per_token
            text += ", about as much as" if abs(ratio - 1) < _SPREAD else f", {ratio:.2f} times what is used by"
            text += " Dynamo's sample engine, which only sleeps for each token"
        sentences.append(f"{text}; {1e6 / us:,.0f} tokens/s at that cost are one core's worth.")
    fast = [(name, measured[name]) for name in (_OURS_FAST, _SAMPLE_FAST, _MOCKER) if name in measured]
    if fast:
        costs = [
            f"`{name}` {row.cpu_us_per_token:.0f} us/token ({row.cpu_us_per_token * row.tokens_per_chunk:.0f} us/chunk)"
            for name, row in fast
        ]
        sentences.append(f"Without pacing: {'; '.join(costs)}.")
    return sentences


def _reason(error: MockEngineError) -> str:
    """Its first sentence, without this machine's paths and without what would break the table."""
    return str(error).splitlines()[0].split(". ")[0].rstrip(".").replace(str(_ROOT), ".").replace("|", "/")


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> int:
    """Measure all backends; print the page and write it."""
    parser = argparse.ArgumentParser(description="Processor time of one worker for each output token.")
    for flag, value in (("--concurrency", 32), ("--isl", 256), ("--osl", 256), ("--request-count", 128)):
        parser.add_argument(flag, type=int, default=value)
    parser.add_argument("--out", type=Path, default=Path("reports/worker-cpu.md"))
    flags = parser.parse_args()
    signal.signal(signal.SIGTERM, _interrupt)
    results: dict[str, Measurement | str] = {}
    try:
        sizes = {name: value for name, value in vars(flags).items() if name != "out"}
        load = Load(**sizes, aiperf_flags=("--no-server-metrics",))
        for name, arguments in backends(flags.osl).items():
            with tempfile.TemporaryDirectory(prefix="worker-cpu-", ignore_cleanup_errors=True) as folder:
                try:
                    results[name] = measure(arguments, load, flags.request_count, Path(folder))
                except MockEngineError as error:
                    results[name] = _reason(error)
            print(f"{name}: {results[name]}", file=sys.stderr)
    except MockEngineError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    page = report(shlex.join(["python", "reports/worker_cpu.py", *sys.argv[1:]]), load, results)
    flags.out.write_text(page, encoding="utf-8")
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
