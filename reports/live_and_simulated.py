"""
Do the live engine and the simulator agree? The same requests, at the same moments, through `bench` and `simulate`.

    python reports/live_and_simulated.py --out reports/live-and-simulated.md

Lengths and arrival times are drawn once and written as a trace, which AIPerf sends by its clock to the live engine,
and the simulator by its own. Prompts are long, on a large model, so that what HTTP, tokenizing and AIPerf add to a
TTFT is a small share of it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from mock_engine.workload import Workload

_PROFILE = "h100-sxm/llama-3.1-70b/vllm-tp4-bf16"
_WORKLOAD = Workload(isl=2048, isl_stddev=512, osl=128, osl_stddev=32, request_rate=3.0, request_count=500)
_BLOCK_TOKENS = 512  # of Mooncake's traces
_WITHIN = 0.05


def write_trace(path: Path) -> None:
    """The workload as Mooncake's rows; no two requests have anything in common."""
    next_id = 0
    with path.open("w", encoding="utf-8") as file:
        for arrival_s, (turn,) in _WORKLOAD.sessions(_BLOCK_TOKENS):
            num_blocks = -(-turn.isl_tokens // _BLOCK_TOKENS)
            row = {
                "timestamp": round((arrival_s or 0.0) * 1e3),
                "input_length": turn.isl_tokens,
                "output_length": turn.osl_tokens,
                "hash_ids": list(range(next_id, next_id + num_blocks)),
            }
            next_id += num_blocks
            file.write(json.dumps(row) + "\n")


def main() -> None:
    """Run both and write the page."""
    parser = argparse.ArgumentParser(description="Hold the live engine against the simulator.")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the page to write")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/tmp") as name:  # AIPerf's sockets need a short path
        folder = Path(name)
        write_trace(folder / "trace.jsonl")
        load = ["--profile", _PROFILE, "--input-file", "trace.jsonl"]
        load += ["--custom-dataset-type", "mooncake_trace", "--fixed-schedule"]
        outputs = {}
        for command, more in (("simulate", []), ("bench", ["--output-dir", "bench"])):
            argv = ["mock_engine", command, *load, *more, "--json", f"{command}.json"]
            subprocess.run([sys.executable, "-m", *argv], cwd=folder, check=True, stdout=sys.stderr)
            outputs[command] = json.loads((folder / f"{command}.json").read_text(encoding="utf-8"))
    flags.out.write_text(page(outputs["simulate"], outputs["bench"], load), encoding="utf-8")


def page(simulated: dict[str, dict[str, float]], live: dict[str, dict[str, dict[str, float]]], load: list[str]) -> str:
    """The page: AIPerf's figures and the live engine's own beside the simulator's."""
    facts: dict[str, object] = live["facts"]  # type: ignore[assignment]
    rows = []
    for metric, title in (("time_to_first_token", "TTFT"), ("inter_token_latency", "ITL")):
        for statistic, name in (("avg", "mean"), ("p95", "p95")):
            value = simulated[metric][statistic]
            cells = [f"{title} {name} (ms)", f"{value:,.2f}"]
            differences = []
            for source in (live["model"], live):
                measured: float = source[metric][statistic]  # type: ignore[index, assignment]
                differences.append(measured / value - 1)
                cells += [f"{measured:,.2f}", f"{differences[-1]:+.1%}"]
            cells.append("met" if max(map(abs, differences)) <= _WITHIN else "missed")
            rows.append(f"| {' | '.join(cells)} |")
    count = int(live["request_count"]["avg"])  # type: ignore[call-overload]
    return "\n".join(
        [
            "# The live engine and the simulator",
            "",
            "```",
            "python reports/live_and_simulated.py --out reports/live-and-simulated.md",
            "```",
            "",
            f"mock-engine {facts['mock-engine']}, commit {facts['commit']}; ai-dynamo {facts['ai-dynamo']}; "
            f"aiperf {facts['aiperf']}; {facts['started']}; {count} requests.",
            "",
            f"The same trace ({_WORKLOAD.request_count} requests at {_WORKLOAD.request_rate:g} a second, Poisson; "
            f"ISL {_WORKLOAD.isl} ± {_WORKLOAD.isl_stddev:g}, OSL {_WORKLOAD.osl} ± {_WORKLOAD.osl_stddev:g}) "
            f"through `mock-engine simulate` and `mock-engine bench`, each with `{shlex.join(load)}`.",
            "",
            f"| | simulate | live engine, due times | | live engine, as AIPerf saw it | | within {_WITHIN:.0%} |",
            "|---|--:|--:|--:|--:|--:|---|",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    main()
