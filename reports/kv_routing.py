"""
What does routing by KV cache gain? One load with shared prefixes on four workers, by Dynamo's KV router and in turns.

    python reports/kv_routing.py --out reports/kv-routing.md

Arrival times and prefixes are drawn once and written as a trace, which AIPerf sends by its clock to the live engines,
and the simulator by its own. All prefixes together fit the four KV caches, and not one of them: in turns each worker
computes most prompts whole. Prompts are long, on a large model, so that what HTTP, tokenizing and AIPerf add to a TTFT
is a small share of it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

_PROFILE = "h100-sxm/llama-3.1-70b/vllm-tp4-bf16"
_BLOCK_TOKENS = 512  # of Mooncake's traces
_NUM_REQUESTS, _REQUEST_RATE = 400, 6.0
_NUM_PREFIXES, _PREFIX_BLOCKS, _OWN_TOKENS, _OSL = 40, 8, 400, 64
_DEPLOYMENT = ["--profile", _PROFILE, "--workers", "4", "--num-gpu-blocks-override", "4000", "--max-model-len", "8192"]
_LOAD = ["--input-file", "trace.jsonl", "--custom-dataset-type", "mooncake_trace", "--fixed-schedule"]
_KV = ["--router-mode", "kv"]
_ROUTERS = [["--router-mode", "round-robin"], _KV, [*_KV, "--router-prefill-load-scale", "4"]]
_FIGURES = (("mean", "avg"), ("median", "p50"), ("p95", "p95"))


def write_trace(path: Path) -> None:
    """Poisson arrivals, each with one of the prefixes and a question of its own."""
    rng = np.random.default_rng(0)
    arrivals_s = np.cumsum(rng.exponential(1 / _REQUEST_RATE, _NUM_REQUESTS))
    with path.open("w", encoding="utf-8") as file:
        for number, (arrival_s, prefix) in enumerate(
            zip(arrivals_s, rng.integers(_NUM_PREFIXES, size=_NUM_REQUESTS), strict=True)
        ):
            row = {
                "timestamp": round(arrival_s * 1e3),
                "input_length": _PREFIX_BLOCKS * _BLOCK_TOKENS + _OWN_TOKENS,
                "output_length": _OSL,
                "hash_ids": [int(prefix) * _PREFIX_BLOCKS + i for i in range(_PREFIX_BLOCKS)] + [10_000 + number],
            }
            file.write(json.dumps(row) + "\n")


def main() -> None:
    """Run all four and write the page."""
    parser = argparse.ArgumentParser(description="Dynamo's KV router against turns, live and simulated.")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the page to write")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/tmp") as name:  # AIPerf's sockets need a short path
        folder = Path(name)
        write_trace(folder / "trace.jsonl")
        runs = []
        for number, router in enumerate(_ROUTERS):
            outputs = {}
            for command, more in (("simulate", []), ("bench", ["--output-dir", f"bench-{number}"])):
                argv = ["mock_engine", command, *_DEPLOYMENT, *router, *_LOAD, *more, "--json", f"{command}.json"]
                subprocess.run([sys.executable, "-m", *argv], cwd=folder, check=True, stdout=sys.stderr)
                outputs[command] = json.loads((folder / f"{command}.json").read_text(encoding="utf-8"))
            runs.append((shlex.join(router), outputs["simulate"], outputs["bench"]))
    flags.out.write_text(page(runs), encoding="utf-8")


def page(runs: list[tuple[str, dict[str, Any], dict[str, Any]]]) -> str:
    """The page: each router as simulated, as the live engines' tokens were due, and as AIPerf saw them."""
    facts = runs[0][2]["facts"]
    rows = []
    for router, simulated, live in runs:
        hits = [f"{run['prefix_cache_hit_rate']:.1%}" for run in (simulated, live)]
        rows.append(f"| `{router}` | prefix cache hit rate | {hits[0]} | {hits[1]} | |")
        for name, statistic in _FIGURES:
            values = [run["time_to_first_token"][statistic] for run in (simulated, live["model"], live)]
            rows.append(f"| | TTFT {name} (ms) | {' | '.join(f'{value:,.1f}' for value in values)} |")
    late_ms = max(live["lateness_s"]["p99"] for _, _, live in runs) * 1e3
    prefix_tokens = _PREFIX_BLOCKS * _BLOCK_TOKENS
    return "\n".join(
        [
            "# Routing by KV cache",
            "",
            "```",
            "python reports/kv_routing.py --out reports/kv-routing.md",
            "```",
            "",
            f"mock-engine {facts['mock-engine']}, commit {facts['commit']}; ai-dynamo {facts['ai-dynamo']}; "
            f"aiperf {facts['aiperf']}; {facts['started']}.",
            "",
            f"{_NUM_REQUESTS} requests, {_REQUEST_RATE:g} a second (Poisson), each with one of {_NUM_PREFIXES} "
            f"prefixes of {prefix_tokens:,} tokens, {_OWN_TOKENS} tokens of its own, and {_OSL} of output. The "
            f"prefixes have {_NUM_PREFIXES * prefix_tokens:,} tokens together; each of the four workers keeps 64,000. "
            "The same trace, at the same moments, through `mock-engine simulate` and `mock-engine bench`, with "
            f"`{shlex.join(_DEPLOYMENT)}`.",
            "",
            "| router | | simulate | live engines, due times | live engines, as AIPerf saw them |",
            "|---|---|--:|--:|--:|",
            *rows,
            "",
            f"99 % of the tokens left the live engines within {late_ms:.1f} ms of when they were due.",
            "",
            "Dynamo's KV router (the frontend that production runs) takes the worker with the lowest sum of blocks to "
            "prefill and blocks that decode, so a prefix gives way to a worker with less to do; with "
            "`--router-prefill-load-scale` it counts for more. A TTFT is either that of a whole prompt or of a cached "
            "one, so where about half are cached, the median jumps from one to the other with few requests.",
            "",
            "What differs between simulated and live: the live router hears of a block some milliseconds after it is "
            "in the cache; among workers that cost the same it draws; and its frontend tokenizes a prompt before it "
            "routes it.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
