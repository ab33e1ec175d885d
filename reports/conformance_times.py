"""
How long the conformance suite takes with each driver, and what takes the time.

    python reports/conformance_times.py --out reports/conformance-times.md

Each run is `pytest --engine=... --engine-driver=...` in a process of its own, in an empty folder, without a database of
earlier examples. Drivers take turns, so that a busy host slows all of them.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mock_engine.bench_results import find_commit

_DRIVERS = ("plain", "bridge", "worker")
_ENGINES = (
    (
        "conformance.selftest.toy:ToyEngine",
        "--kv-events --metrics --logprobs --controls --logits",
        "the toy engine, everything on; the loop's time is virtual",
        True,
    ),
    ("mock_engine:MockLLMEngine", "--speedup-ratio 100", "MockLLMEngine a hundred times as fast", True),
    ("mock_engine:MockLLMEngine", "", "MockLLMEngine as it comes, at the speed of an H100; in real time", False),
)  # engine, its arguments, what that is, whether it is quick; the others run once
_LONGEST_RULES = 6


@dataclass(frozen=True, slots=True)
class Run:
    """One run of pytest."""

    wall_s: float
    clock: str
    num_rules: int
    num_examples: int
    rule_s: dict[str, float]

    @property
    def rules_s(self) -> float:
        return sum(self.rule_s.values())


def run_suite(engine: str, engine_args: str, driver: str, seed: int) -> Run:
    """Raises RuntimeError if the engine is not clean, since what is broken takes another time."""
    with tempfile.TemporaryDirectory() as folder:
        began_s = time.perf_counter()
        words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--hypothesis-seed={seed}"]
        words += [f"--engine={engine}", f"--engine-args={engine_args}", f"--engine-driver={driver}"]
        done = subprocess.run([*words, "--engine-report=out"], cwd=folder, capture_output=True, text=True, check=False)
        wall_s = time.perf_counter() - began_s
        if done.returncode:
            raise RuntimeError(f"{engine} {engine_args} {driver}:\n{done.stdout[-3000:]}{done.stderr[-1000:]}")
        report: dict[str, Any] = json.loads((Path(folder) / "out/conformance.json").read_text())
    judged = [verdict for verdict in report["verdicts"] if verdict["num_examples"]]
    return Run(
        wall_s,
        report["subject"]["clock"],
        len(judged),
        sum(verdict["num_examples"] for verdict in judged),
        {verdict["rule"]["id"]: verdict["seconds"] for verdict in judged},
    )


def longest(runs: list[Run]) -> str:
    """The rules that take longest, with their share of all rules' time."""
    seconds: dict[str, list[float]] = defaultdict(list)
    for run in runs:
        for rule, rule_s in run.rule_s.items():
            seconds[rule].append(rule_s)
    medians = sorted(((statistics.median(times), rule) for rule, times in seconds.items()), reverse=True)
    total_s = sum(rule_s for rule_s, _ in medians)
    return ", ".join(f"{rule} {rule_s / total_s:.0%}" for rule_s, rule in medians[:_LONGEST_RULES])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=3)
    flags = parser.parse_args()
    sections = []
    for engine, engine_args, what, is_quick in _ENGINES:
        runs: dict[str, list[Run]] = defaultdict(list)
        num_runs = flags.runs if is_quick else 1
        for seed in range(num_runs):
            for driver in _DRIVERS:
                runs[driver].append(run_suite(engine, engine_args, driver, seed))
                print(f"{engine} {engine_args} {driver}: {runs[driver][-1].wall_s:.1f} s", flush=True)
        usual_s = statistics.median(run.wall_s for run in runs["bridge"])
        lines = [
            f"## {what[0].upper()}{what[1:]} ({num_runs} {'runs' if num_runs > 1 else 'run'} a driver)",
            "",
            f"`pytest --engine={engine}" + (f' --engine-args="{engine_args}"`' if engine_args else "`"),
            "",
            "| driver | clock | rules judged | examples | whole process, s | against bridge | outside the rules "
            "| longest rules, share of all rules' time |",
            "|---|---|--:|--:|--:|--:|--:|---|",
        ]
        for driver in _DRIVERS:
            wall_s = statistics.median(run.wall_s for run in runs[driver])
            outside = statistics.median(1 - run.rules_s / run.wall_s for run in runs[driver])
            first = runs[driver][0]
            lines.append(
                f"| {driver} | {first.clock} | {first.num_rules} | {first.num_examples} | {wall_s:.1f} "
                f"| {wall_s / usual_s:.2f} | {outside:.0%} | {longest(runs[driver])} |"
            )
        sections.append("\n".join(lines))
    flags.out.write_text(
        f"""# How long the conformance suite takes

    python reports/conformance_times.py --out reports/conformance-times.md

Commit {find_commit()}, ai-dynamo {version("ai-dynamo")}, hypothesis {version("hypothesis")},
pytest {version("pytest")}, Python {platform.python_version()}, two shared cores. Medians over runs with
different seeds; drivers took turns. Outside the rules: starting Python, importing Dynamo, the dry run.

"""
        + "\n\n".join(sections)
        + "\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
