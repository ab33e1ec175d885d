"""
Does `mock-engine profiles fit` find a profile that it cannot see?

    python reports/fit_recovery.py --out reports/fit-recovery.md

A hidden profile is benchmarked in the simulator, with its jitter, as `profiles record` does by default (concurrency
1, 4, 16 and 64); what AIPerf would have written goes to a file. Another profile is fitted to that, as `profiles fit
--from` does; of the hidden one it is told what a user knows of a server: its names, --max-num-seqs and
--max-num-batched-tokens. Then step times of both are compared at each load that the hidden profile visits when the
runs are replayed.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from mock_engine.bench_results import find_commit
from mock_engine.deployment import DeploymentSettings, WorkerGroup
from mock_engine.engine_settings import EngineSettings
from mock_engine.profile import Profile, load_profile, to_document
from mock_engine.profile_fit import ObservedRun, fit_profile, read_run, replay
from mock_engine.profile_fit.flags import DEFAULT_ISL, DEFAULT_ISL_STDDEV, DEFAULT_OSL, DEFAULT_OSL_STDDEV
from mock_engine.profile_fit.replay import visited
from mock_engine.profile_fit.sensitivity import step_times
from mock_engine.profile_fit.start import Server, as_server
from mock_engine.profile_writing import write_folder
from mock_engine.simulation import SimulationSettings, simulate
from mock_engine.step import StepLoad
from mock_engine.timing import TimingModel
from mock_engine.workload import Workload

_COUNTS = {1: 64, 4: 64, 16: 128, 64: 512}  # concurrency -> requests


@dataclass(frozen=True, slots=True)
class Pair:
    """What is hidden, and where the fit starts. With `request_s` the server spends that before it queues a request."""

    hidden: str
    start: str
    request_s: float = 0.0
    per_prompt_token_s: float = 0.0
    turnaround_s: float = 0.0


_PAIRS = (
    Pair("h100-sxm/llama-3.1-8b/vllm-tp1-bf16", "a100-sxm/llama-3.1-8b/vllm-tp1-bf16"),
    Pair("h100-sxm/llama-3.1-8b/vllm-tp1-bf16", "h100-sxm/llama-3.1-8b/sglang-tp1-bf16"),
    Pair("h100-sxm/llama-3.1-8b/vllm-tp1-bf16", "h100-sxm/llama-3.1-8b/sglang-tp1-bf16", 4e-3, 1e-6, 1e-3),
    Pair("h100-sxm/llama-3.1-70b/vllm-tp8-bf16", "h100-sxm/llama-3.1-70b/vllm-tp4-bf16"),
    Pair("h100-sxm/mixtral-8x7b/vllm-tp2-bf16", "a100-sxm/mixtral-8x7b/vllm-tp2-bf16"),
    Pair("h100-sxm/qwen3-14b/trtllm-tp1-bf16", "h100-sxm/llama-3.1-8b/vllm-tp1-bf16"),
    Pair("h100-sxm/llama-3.3-70b/trtllm-tp4-fp8", "h100-sxm/llama-3.3-70b/vllm-tp4-fp8"),
    Pair("h100-sxm/llama-3.3-70b/vllm-tp4-fp8", "h100-sxm/llama-3.3-70b/trtllm-tp4-fp8"),
    Pair("a100-sxm/qwen3-32b/trtllm-tp2-bf16", "h100-sxm/qwen3-32b/vllm-tp4-bf16"),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Errors of step times over visited loads, signed shares; one of several seeds."""

    loads: Sequence[StepLoad]
    counts: np.ndarray[tuple[int], np.dtype[np.int64]]
    before: np.ndarray[tuple[int], np.dtype[np.float64]]
    after: np.ndarray[tuple[int], np.dtype[np.float64]]
    sd: np.ndarray[tuple[int], np.dtype[np.float64]]
    is_scheduling_found: bool
    fit_s: float


def main() -> None:
    """Fit all pairs and write the page."""
    parser = argparse.ArgumentParser(description="Fit profiles to benchmarks of hidden ones.")
    parser.add_argument("--seeds", type=int, default=2, help="benchmarks of each hidden profile (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the page to write")
    flags = parser.parse_args()
    rows, worst = [], []
    for pair in _PAIRS:
        outcomes = [recover(pair, seed) for seed in range(1, flags.seeds + 1)]
        rows.append(table_row(pair, outcomes))
        worst.append(worst_row(pair, outcomes))
        print(rows[-1], flush=True)
    flags.out.write_text(page(rows, worst, flags.seeds, flags.out.name), encoding="utf-8")


def recover(pair: Pair, seed: int) -> Outcome:
    """Benchmark the hidden profile, fit the other one to it, compare."""
    with tempfile.TemporaryDirectory() as name:
        hidden_path = hide(pair, Path(name) / "hidden")
        runs = [record(hidden_path, Path(name), *load, seed, pair.turnaround_s) for load in _COUNTS.items()]
        hidden = load_profile(hidden_path)
    start = as_server(load_profile(pair.start), server_of(hidden, load_profile(pair.start)))
    begin_s = time.perf_counter()
    fit = fit_profile(start, runs)
    fit_s = time.perf_counter() - begin_s
    found = visited([replay(hidden, run) for run in runs])
    loads = list(found)
    true_s = step_times(TimingModel(hidden), loads)
    return Outcome(
        loads,
        np.array(list(found.values())),
        step_times(TimingModel(start), loads) / true_s - 1,
        step_times(TimingModel(fit.profile), loads) / true_s - 1,
        fit.step_sd(loads),
        fit.profile.async_scheduling == hidden.async_scheduling,
        fit_s,
    )


def hide(pair: Pair, folder: Path) -> str:
    """The hidden profile: a shipped one, or one with time before the queue in a folder of its own."""
    if not pair.request_s:
        return pair.hidden
    profile = load_profile(pair.hidden)
    document = to_document(profile)
    document["timing"] |= {
        "overhead_request_s": pair.request_s,
        "overhead_per_prompt_token_s": pair.per_prompt_token_s,
    }
    write_folder(folder, document, profile.latency)
    return str(folder)


def server_of(hidden: Profile, start: Profile) -> Server:
    """What a user knows of a server. A model of another shape keeps the shape that the start has."""
    is_same_split = (hidden.tp > 1) == (start.tp > 1)
    last = f"{hidden.engine}-tp{hidden.tp}-{hidden.dtype}" if is_same_split else ""
    return Server(f"{hidden.gpu}/{hidden.model}/{last}", hidden.max_num_seqs, hidden.max_num_batched_tokens)


def record(
    profile: str, folder: Path, concurrency: int, num_requests: int, seed: int, turnaround_s: float
) -> ObservedRun:
    """One run, as AIPerf writes it."""
    artifacts = folder / f"concurrency-{concurrency}"
    artifacts.mkdir()
    workload = Workload(
        isl=DEFAULT_ISL,
        isl_stddev=float(DEFAULT_ISL_STDDEV),
        osl=DEFAULT_OSL,
        osl_stddev=float(DEFAULT_OSL_STDDEV),
        concurrency=concurrency,
        request_count=num_requests,
        random_seed=seed * 100 + concurrency,
    )
    deployment = DeploymentSettings((WorkerGroup(EngineSettings(profile=profile, seed=seed)),))
    settings = SimulationSettings(deployment, workload, client_turnaround_s=turnaround_s)
    simulate(settings, requests_out=artifacts / "profile_export.jsonl")
    return read_run(artifacts)


def table_row(pair: Pair, outcomes: Sequence[Outcome]) -> str:
    """One pair, all seeds pooled."""
    before, after = (np.abs(np.concatenate([getattr(o, name) for o in outcomes])) for name in ("before", "after"))
    passes = np.concatenate([np.repeat(np.abs(o.after), o.counts) for o in outcomes])
    within = np.concatenate([np.abs(o.after) < 2 * o.sd for o in outcomes])
    cells = [name_of(pair), f"`{pair.start}`"]
    cells += [f"{share:.1%}" for share in (np.median(before), np.percentile(before, 95), before.max())]
    cells += [f"{share:.1%}" for share in (np.median(after), np.percentile(after, 95), after.max())]
    cells += [f"{np.percentile(passes, 95):.1%}", f"{within.mean():.0%}"]
    cells += [f"{sum(o.is_scheduling_found for o in outcomes)} of {len(outcomes)}"]
    cells += [f"{np.mean([o.fit_s for o in outcomes]):.0f}"]
    return f"| {' | '.join(cells)} |"


def worst_row(pair: Pair, outcomes: Sequence[Outcome]) -> str:
    """Where a pair is off the most, and how much that weighs."""
    outcome = max(outcomes, key=lambda o: float(np.abs(o.after).max()))
    index = int(np.abs(outcome.after).argmax())
    load = outcome.loads[index]
    counts = np.concatenate([o.counts for o in outcomes])
    beyond = np.concatenate([o.counts[np.abs(o.after) > 0.03] for o in outcomes])
    prefill = " + ".join(f"{chunk.new_tokens:,}" for chunk in load.prefill_chunks) or "0"
    return (
        f"| {name_of(pair)} | `{pair.start}` | {outcome.after[index]:+.1%} | prefill of {prefill} tokens, decode of "
        f"{load.decode_batch_size} | {beyond.sum() / counts.sum():.1%} |"
    )


def name_of(pair: Pair) -> str:
    more = f", {pair.request_s * 1e3:g} ms + {pair.per_prompt_token_s * 1e6:g} us a prompt token before the queue"
    return f"`{pair.hidden}`{more if pair.request_s else ''}"


def page(rows: Sequence[str], worst: Sequence[str], num_seeds: int, name: str) -> str:
    """The whole page."""
    command = shlex.join(["python", "reports/fit_recovery.py", "--out", f"reports/{name}"])
    counts = ", ".join(f"{count} at {concurrency}" for concurrency, count in _COUNTS.items())
    lines = [
        "# Profiles found again",
        "",
        "```",
        command,
        "```",
        "",
        f"mock-engine {version('mock-engine')}, commit {find_commit()}; numpy {version('numpy')}; "
        f"Python {platform.python_version()}, {os.cpu_count()} cores, shared; {num_seeds} seeds of each pair.",
        "",
        "A hidden profile is benchmarked in the simulator with its own jitter (requests by concurrency: "
        f"{counts}; ISL {DEFAULT_ISL} ± {DEFAULT_ISL_STDDEV}, OSL {DEFAULT_OSL} ± {DEFAULT_OSL_STDDEV}), and another "
        "profile is fitted to TTFT and ITL of those requests, told only the server's name and its limits. Errors are "
        "of step times at every distinct load that the hidden profile visits, each counted once; *by passes*: each "
        "counted as often as it was visited, which is mostly decode. *Within 2 sd*: share of the loads where the "
        "error is at most twice what the fit itself admits to. *Scheduling*: how often it was found whether the hidden "
        "engine schedules asynchronously. Seconds are for both ways of scheduling together.",
        "",
        "| hidden | start | before: median | p95 | max | after: median | p95 | max | by passes: p95 | within 2 sd "
        "| scheduling | s |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
        *rows,
        "",
        "Where each is off the most, and how many of all passes are off by more than 3 %:",
        "",
        "| hidden | start | error | at | passes beyond 3 % |",
        "|---|---|--:|---|--:|",
        *worst,
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
