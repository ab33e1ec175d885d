"""
What does routing by KV cache gain? One load with shared prefixes on four workers, by Dynamo's KV router and in turns.

    python reports/kv_routing.py --out reports/kv-routing.md

Arrival times and prefixes are drawn once and written as a trace, which AIPerf sends by its clock to the live engines, and the
simulator by its own. All prefixes together fit the four KV caches, and not one of them: in turns each worker computes most
prompts whole, by KV cache hardly any. Prompts are long, on a large model, so that what HTTP, tokenizing and AIPerf add to a
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
from typing import Any

import numpy as np

_PROFILE = "h100-sxm/llama-3.1-70b/vllm-tp4-bf16"
_BLOCK_TOKENS = 512  # of Mooncake's traces
_NUM_REQUESTS, _REQUEST_RATE = 400, 6.0
_NUM_PREFIXES, _PREFIX_BLOCKS, _OWN_TOKENS, _OSL = 40, 8, 400, 64
_DEPLOYMENT = ["--profile", _PROFILE, "--workers", "4", "--num-gpu-blocks-override", "4000", "--max-model-len", "8192"]
_LOAD = ["--input-file", "trace.jsonl", "--custom-dataset-type", "mooncake_trace", "--fixed-schedule"]
_MODES = ("round-robin", "kv")
_FIGURES = (("TTFT p50 (ms)", "p50"), ("TTFT p95 (ms)", "p95"))


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
        runs = {}
        for mode in _MODES:
            for command, more in (("simulate", []), ("bench", ["--output-dir", mode])):
                out = f"{command}-{mode}.json"
                argv = ["mock_engine", command, *_DEPLOYMENT, "--router-mode", mode, *_LOAD, *more, "--json", out]
                subprocess.run([sys.executable, "-m", *argv], cwd=folder, check=True, stdout=sys.stderr)
                runs[command, mode] = json.loads((folder / out).read_text(encoding="utf-8"))
    flags.out.write_text(page(runs), encoding="utf-8")
    print(flags.out.read_text(encoding="utf-8"))


def page(runs: dict[tuple[str, str], dict[str, Any]]) -> str:
    """The page: both modes, as simulated, as the live engines' tokens were due, and as AIPerf saw them."""
    facts = runs["bench", "kv"]["facts"]
    rows = []
    for mode in _MODES:
        simulated, live = runs["simulate", mode], runs["bench", mode]
        hits = [f"{run['prefix_cache_hit_rate']:.1%}" for run in (simulated, live)]
        rows.append(f"| {mode} | prefix cache hit rate | {hits[0]} | {hits[1]} | |")
        for title, statistic in _FIGURES:
            values = [run["time_to_first_token"][statistic] for run in (simulated, live["model"], live)]
            rows.append(f"| | {title} | {' | '.join(f'{value:,.1f}' for value in values)} |")
    gains = {
        title: [
            runs[key, "round-robin"]["time_to_first_token"][statistic]
            / runs[key, "kv"]["time_to_first_token"][statistic]
            for key in ("simulate", "bench")
        ]
        for title, statistic in _FIGURES
    }
    said = "; ".join(
        f"{title.removesuffix(' (ms)')} is {live:.1f} times shorter by KV cache (simulated: {simulated:.1f} times)"
        for title, (simulated, live) in gains.items()
    )
    late_ms = max(runs["bench", mode]["lateness_s"]["p99"] for mode in _MODES) * 1e3
    tokens = _NUM_PREFIXES * _PREFIX_BLOCKS * _BLOCK_TOKENS
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
            f"{_NUM_REQUESTS} requests, {_REQUEST_RATE:g} a second (Poisson), each with one of {_NUM_PREFIXES} prefixes of "
            f"{_PREFIX_BLOCKS * _BLOCK_TOKENS:,} tokens, {_OWN_TOKENS} tokens of its own, and {_OSL} of output. The "
            f"prefixes have {tokens:,} tokens together; each of the four workers keeps 64,000. The same trace, at the same "
            f"moments, through `mock-engine simulate` and `mock-engine bench`, with `{shlex.join(_DEPLOYMENT)}` and "
            "`--router-mode`.",
            "",
            "| router | | simulate | live engines, due times | live engines, as AIPerf saw them |",
            "|---|---|--:|--:|--:|",
            *rows,
            "",
            f"{said}. 99 % of the tokens left the live engines within {late_ms:.1f} ms of when they were due.",
            "",
            "What differs between the two: the live router hears of a block some milliseconds after it is in the cache, "
            "and of blocks that decoding fills when their request ends or another is admitted; it breaks ties at random; its "
            "frontend takes time of its own to tokenize a long prompt, before it routes it.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
