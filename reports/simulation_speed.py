"""
How fast `mock-engine simulate` is beside Dynamo's Rust simulator (`python -m dynamo.replay`), and how its cost grows.

    python reports/simulation_speed.py --mooncake conversation_trace.jsonl --out reports/simulation-speed.md

The same loads on both, in turns; the medians of all turns are compared. Both are started afresh for each; the whole
process is timed, and each says itself how long the simulation took: ours from the first look at the profile to the
last percentile, Dynamo's what its report calls wall time. Both have as many KV blocks, of the same size, and the same
limits; step times differ, since each has its own model of them. Without `--mooncake` the rows of that trace are left
out.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from mock_engine.bench_results import find_commit

_OURS = ("-m", "mock_engine", "simulate")
_PEER = ("-m", "dynamo.replay", "--replay-mode", "offline")
# What Dynamo's mocker has by default; its steps have no jitter.
_SAME_ENGINE = shlex.split(
    "--block-size 64 --num-gpu-blocks-override 16384 --max-num-seqs 256 --max-num-batched-tokens 8192 --jitter 0"
)
_DECADES = (10, 100, 1_000, 10_000, 100_000, 1_000_000)
_DECADE_LOAD = shlex.split("--isl 1024 --osl 256 --osl-stddev 64 --concurrency 64")


@dataclass(frozen=True, slots=True)
class Row:
    """One load, in the flags of both, and how many times as fast as the peer ours is to be."""

    name: str
    ours: list[str]
    peer: list[str]
    target: float = 1.0


@dataclass(frozen=True, slots=True)
class Run:
    """One process, from start to end."""

    process_s: float
    simulation_s: float
    peak_bytes: int


def rows(mooncake: Path | None) -> list[Row]:
    """All loads that are compared."""
    made_up = [
        _closed_loop(1_000, 32, 256),
        _closed_loop(1_000, 256, 256),
        _closed_loop(10_000, 32, 256),
        _closed_loop(10_000, 256, 256),
        _closed_loop(10_000, 256, 1024, target=3.0),
    ]
    if mooncake is None:
        return made_up
    trace = shlex.split("--custom-dataset-type mooncake_trace --fixed-schedule --workers 8")
    return made_up + [
        Row(
            f"Mooncake conversation trace, 8 workers, {title}",
            ["--input-file", str(mooncake), *trace, "--router-mode", ours],
            [str(mooncake), "--num-workers", "8", "--router-mode", peer],
        )
        for title, ours, peer in (("round robin", "round-robin", "round_robin"), ("KV routing", "kv", "kv_router"))
    ]


def _closed_loop(request_count: int, concurrency: int, osl: int, target: float = 1.0) -> Row:
    return Row(
        f"{request_count:,} requests 1024/{osl}, concurrency {concurrency}",
        shlex.split(f"--isl 1024 --osl {osl} --request-count {request_count} --concurrency {concurrency}"),
        shlex.split(
            f"--input-tokens 1024 --output-tokens {osl} "
            f"--request-count {request_count} --replay-concurrency {concurrency}"
        ),
        target,
    )


def run(arguments: Sequence[str], folder: Path) -> Run:
    """Run `python <arguments>`, which says how long it simulated. Raises `SystemExit` if it fails."""
    log = folder / "output.txt"
    start_s = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen([sys.executable, *arguments], stdout=output, stderr=subprocess.STDOUT, cwd=folder)
        _, status, usage = os.wait4(process.pid, 0)
    process_s = time.perf_counter() - start_s
    process.returncode = os.waitstatus_to_exitcode(status)
    text = log.read_text(encoding="utf-8")
    ours = re.search(r"^simulated [\d.,]+ s in ([\d.]+) s$", text, re.MULTILINE)
    peer = re.search(r"Wall Time \(ms\): ([\d.,]+)", text)
    if process.returncode or not (ours or peer):
        sys.exit(f"{shlex.join(arguments)} failed:\n{text[-2000:]}")
    simulation_s = float(ours[1]) if ours else float(peer[1].replace(",", "")) / 1e3 if peer else 0.0
    return Run(process_s, simulation_s, usage.ru_maxrss * 1024)


def compare(row: Row, num_turns: int, folder: Path) -> str:
    """A line of the table: medians of both, and their ratios."""
    ours, peer = [], []
    for turn in range(num_turns):
        print(f"{row.name}: turn {turn + 1} of {num_turns}", file=sys.stderr, flush=True)
        ours.append(run([*_OURS, *_SAME_ENGINE, *row.ours], folder))
        peer.append(run([*_PEER, *row.peer, "--report-json", str(folder / "report.json")], folder))
    cells = []
    ratio = 0.0
    for field in ("simulation_s", "process_s"):
        our_s, peer_s = (statistics.median(getattr(each, field) for each in runs) for runs in (ours, peer))
        cells += [f"{our_s:.3f}", f"{peer_s:.3f}", f"{peer_s / our_s:.2f}x"]
        ratio = ratio or peer_s / our_s
    is_met = "met" if ratio >= row.target else "missed"
    return f"| {row.name} | {' | '.join(cells)} | {row.target:g}x {is_met} |"


def grow(request_count: int, folder: Path) -> str:
    """A line of the table: what so many requests cost."""
    print(f"{request_count:,} requests", file=sys.stderr, flush=True)
    result = run([*_OURS, *_DECADE_LOAD, "--request-count", str(request_count)], folder)
    per_request_us = result.simulation_s / request_count * 1e6
    return f"| {request_count:,} | {result.simulation_s:.2f} | {per_request_us:,.0f} | {result.peak_bytes / 1e6:.0f} |"


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description="Compare the speed of two simulators.")
    parser.add_argument("--mooncake", type=Path, metavar="FILE", help="Mooncake's conversation trace, as JSON lines")
    parser.add_argument("--turns", type=int, default=5, help="runs of each, in turns (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the page to write")
    flags = parser.parse_args()
    mooncake = flags.mooncake.resolve() if flags.mooncake else None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        compared = [compare(row, flags.turns, folder) for row in rows(mooncake)]
        grown = [grow(request_count, folder) for request_count in _DECADES]
    shown = ["--mooncake", flags.mooncake.name] if flags.mooncake else []
    command = shlex.join(["python", "reports/simulation_speed.py", *shown, "--out", f"reports/{flags.out.name}"])
    page = [
        "# Speed of simulation",
        "",
        "```",
        command,
        "```",
        "",
        f"mock-engine {version('mock-engine')}, commit {find_commit()}; ai-dynamo {version('ai-dynamo')}; "
        f"Python {platform.python_version()}, {os.cpu_count()} cores, shared; medians of {flags.turns} runs in turns.",
        "",
        "Seconds for the simulation alone, as each says itself, and for the whole process; and how many times as fast "
        "ours is. The target is for the simulation alone.",
        "",
        "| load | ours | dynamo.replay | | process: ours | dynamo.replay | | target |",
        "|---|--:|--:|--:|--:|--:|--:|---|",
        *compared,
        "",
        f"Both engines: `{shlex.join(_SAME_ENGINE)}`, Dynamo mocker's defaults. Ours with its default jitter takes up "
        "to a tenth longer. In the trace, a third of our time goes to KV blocks (two million hashes are stored, found, "
        "released and evicted), a tenth to reading it, and the rest to 26,000 steps with prefill and 17,000 runs of "
        "decode.",
        "",
        f"How the cost grows: `mock-engine simulate {shlex.join(_DECADE_LOAD)} --request-count N`, one run each; "
        "peak memory is that of the whole process, the interpreter and NumPy included.",
        "",
        "| requests | simulation s | us a request | peak MB |",
        "|--:|--:|--:|--:|",
        *grown,
        "",
    ]
    flags.out.write_text("\n".join(page), encoding="utf-8")


if __name__ == "__main__":
    main()
