"""
Does a benchmark against the mock read like the model? AIPerf's TTFT and ITL beside the model's own due times.

    python reports/bench_accuracy.py                    writes reports/bench-accuracy.md

One `mock-engine bench` a row, one after the other. Run it on a machine that does nothing else meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

MAX_ITL_DIFFERENCE = 0.03
MAX_TTFT_DIFFERENCE, MAX_TTFT_DIFFERENCE_MS = 0.10, 10.0

# OSL differs between requests, as it does in production: with equal ones all requests of a batch end at the same
# moment, and what AIPerf then measures as TTFT is how fast it can itself open as many connections at once.
LOAD = ("--isl", "512", "--osl", "256", "--osl-stddev", "64")


def main() -> int:
    """Run all rows and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().splitlines()[0])
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--speedup-ratio", type=float, nargs="+", default=[1.0, 0.25])
    parser.add_argument("--profile", default="h100-sxm/llama-3.1-8b/vllm-tp1-bf16")
    parser.add_argument("--out", type=Path, default=Path("reports/bench-accuracy.md"))
    flags = parser.parse_args()
    rows = []
    for speedup_ratio in flags.speedup_ratio:
        for concurrency in flags.concurrency:
            results = run(flags.profile, speedup_ratio, concurrency)
            rows.append((speedup_ratio, concurrency, results))
            print(row_of(*rows[-1]), flush=True)
    flags.out.write_text(page(rows), encoding="utf-8")
    print(f"written to {flags.out}")
    return 0


def run(profile: str, speedup_ratio: float, concurrency: int) -> dict[str, Any]:
    """bench.json of one run. The load ramps up, so that the first requests do not all come at once."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "mock_engine", "bench", "--profile", profile, *LOAD]
        command += ["--speedup-ratio", str(speedup_ratio), "--concurrency", str(concurrency)]
        command += ["--request-count", str(num_requests(concurrency)), "--output-dir", f"{folder}/out"]
        command += ["--", "--concurrency-ramp-duration", str(3 / speedup_ratio)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        results: dict[str, Any] = json.loads((Path(folder) / "out" / "bench.json").read_text(encoding="utf-8"))
        return results


def num_requests(concurrency: int) -> int:
    return max(16, 5 * concurrency)


def row_of(speedup_ratio: float, concurrency: int, results: dict[str, Any]) -> str:
    """One line of the table. Differences in milliseconds are real ones, whatever the speed."""
    ttft, itl = (
        (results[name]["p50"], results["model"][name]["p50"]) for name in ("time_to_first_token", "inter_token_latency")
    )
    ttft_more_ms, ttft_more = ttft[0] - ttft[1], ttft[0] / ttft[1] - 1
    itl_more = itl[0] / itl[1] - 1
    is_ttft_met = abs(ttft_more_ms) <= MAX_TTFT_DIFFERENCE_MS or abs(ttft_more) <= MAX_TTFT_DIFFERENCE
    is_itl_met = abs(itl_more) <= MAX_ITL_DIFFERENCE
    cells = [
        f"{speedup_ratio:g}",
        f"{concurrency}",
        f"{results['output_token_throughput']['avg']:,.0f}",
        f"{ttft[0]:.1f}",
        f"{ttft[1]:.1f}",
        f"{ttft_more_ms:+.1f} ms, {ttft_more:+.1%}",
        "yes" if is_ttft_met else "**no**",
        f"{itl[0]:.2f}",
        f"{itl[1]:.2f}",
        f"{itl_more:+.1%}",
        "yes" if is_itl_met else "**no**",
        f"{results['lateness_s']['p99'] * 1e3:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def page(rows: list[tuple[float, int, dict[str, Any]]]) -> str:
    """The report."""
    facts = rows[0][2]["facts"]
    versions = ", ".join(f"{name} {facts[name]}" for name in ("mock-engine", "ai-dynamo", "aiperf"))
    return "\n".join(
        [
            "# Does a benchmark against the mock read like the model?",
            "",
            f"    python {' '.join([Path(sys.argv[0]).as_posix(), *sys.argv[1:]])}",
            "",
            f"{versions}, Python {platform.python_version()}; commit {facts['commit']}; {os.cpu_count()} cores, which "
            f"AIPerf, Dynamo's frontend and the worker share.",
            "",
            f"`{facts['profile']}`, {' '.join(LOAD)}. One run a row, p50 in ms of real time. Model: when tokens were "
            f"due, from a request's arrival at the engine. Met: TTFT within {MAX_TTFT_DIFFERENCE_MS:g} ms or "
            f"{MAX_TTFT_DIFFERENCE:.0%}, ITL within {MAX_ITL_DIFFERENCE:.0%}. Lateness: how late tokens left the "
            f"engine.",
            "",
            "| speed | concurrency | tokens/s | TTFT AIPerf | model | difference | met "
            "| ITL AIPerf | model | difference | met | lateness p99 ms |",
            "|--:|--:|--:|--:|--:|--:|---|--:|--:|--:|---|--:|",
            *(row_of(*row) for row in rows),
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
