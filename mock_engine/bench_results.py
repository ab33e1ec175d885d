"""
What a benchmark found: AIPerf's export, and what the workers recorded meanwhile.

`Results.model` has the metrics that AIPerf would have measured had every token
gone out when the model said it was due and reached the client in no time, under
AIPerf's names and in its schema. The difference is what the host added. `Results.prediction`
has what the same load gives in virtual time.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from mock_engine.aiperf_schema import FinishedRequests, FloatArray, Metric, RunTotals, request_metrics, run_metrics
from mock_engine.bench_prediction import Prediction
from mock_engine.fleet import Fleet
from mock_engine.recorder import RequestRow, TimelineRow, joined, read_requests, read_timeline
from mock_engine.roles import ROLES

AIPERF_EXPORT = "profile_export_aiperf.json"
AIPERF_RECORDS = "profile_export.jsonl"
_LATE_P99_S = 0.005  # above this, the host rather than the model set the times


@dataclass(frozen=True, slots=True)
class Results:
    """Everything that the report says. Times of `requests` and `timelines` are model seconds."""

    command: list[str]  # what the user typed
    facts: dict[str, Any]  # profile, versions, commit, capacity
    aiperf: dict[str, Any]  # AIPerf's export as it is
    records: list[dict[str, Any]]  # AIPerf's, one a request
    model: dict[str, Metric]
    prediction: Prediction
    lateness_s: dict[str, float]  # p50, p99, max
    kv_usage: dict[str, float]  # share of blocks in use: avg, max
    preemptions: int
    prefix_cache_hit_rate: float
    speculative_decoding: dict[str, float] | None  # as `simulate` has it, less positions; None without draft tokens
    cpu_us_per_token: float  # of the workers, while requests were under way
    num_cancelled: int
    requests: list[RequestRow]
    timelines: list[list[TimelineRow]]

    @property
    def verdict(self) -> str:
        """One sentence on who set the times: the profile, or this host."""
        late_ms = self.lateness_s["p99"] * 1e3
        if self.facts["speedup_ratio"] == 0:
            return "The engine ran as fast as it could: the times are this host's, not the profile's."
        if self.lateness_s["p99"] > _LATE_P99_S:
            return (
                f"The host set some of these times: 1 % of the tokens left the engine {late_ms:.1f} ms late or later. "
                f"Lower the load, use a larger machine, or slow the model down with --speedup-ratio 0.5."
            )
        return (
            f"The profile set these times: 99 % of the tokens left the engine within {late_ms:.1f} ms of when due."
            f"{self._ttft_share}"
        )

    @property
    def _ttft_share(self) -> str:
        """What lies outside the engine shows in TTFT once, whatever the engine does."""
        measured, model = self.aiperf.get("time_to_first_token"), self.model.get("time_to_first_token")
        if not measured or not model:
            return ""
        return f" HTTP, tokenizing and AIPerf itself add {measured['p50'] - model['p50']:.1f} ms to TTFT p50."

    def to_json(self) -> dict[str, Any]:
        """AIPerf's export with our figures added; nothing of AIPerf's is changed."""
        return {
            **self.aiperf,
            "model": self.model,
            "prediction": self.prediction.metrics,
            "lateness_s": self.lateness_s,
            "kv_usage": self.kv_usage,
            "preemptions": self.preemptions,
            "prefix_cache_hit_rate": self.prefix_cache_hit_rate,
            "speculative_decoding": self.speculative_decoding,
            "cpu_us_per_token": self.cpu_us_per_token,
            "wall_s": self.aiperf["benchmark_duration"]["avg"],
            "facts": self.facts,
            "command": self.command,
        }


def read_results(folder: Path, fleet: Fleet, prediction: Prediction, ready_unix_s: float) -> Results:
    """Results of a run that is over; only requests that came after `ready_unix_s` count."""
    workers = range(len(fleet.settings.roles))
    recorded: dict[str, list[RequestRow]] = {role: [] for role in ROLES}
    for worker, role in enumerate(fleet.settings.roles):
        rows = read_requests(fleet.record_folder(worker))
        recorded[role] += [row for row in rows if row.arrival_unix_s >= ready_unix_s]
    requests = recorded["agg"] + joined(recorded["prefill"], recorded["decode"])
    found = [read_timeline(fleet.record_folder(worker)) for worker in workers]
    timelines = [timeline for timeline in found if timeline]  # a fault may keep a worker from starting
    aiperf = json.loads((folder / "aiperf" / AIPERF_EXPORT).read_text(encoding="utf-8"))
    whole = [row for row in requests if row.is_whole]
    speedup_ratio = fleet.settings.worker.engine.speedup_ratio or 1.0
    late = [sent - due for row in requests for due, sent in zip(row.due_s, row.sent_s, strict=True)]
    late_s = np.asarray(late or [0.0]) / speedup_ratio
    usage = [
        row.kv_used_blocks / row.kv_total_blocks
        for timeline in timelines
        for row in timeline
        if row.unix_s >= ready_unix_s
    ]
    last = [timeline[-1] for timeline in timelines]
    queries = sum(row.prefix_queries_tokens for row in last)
    return Results(
        command=["mock-engine", *sys.argv[1:]],
        facts=_facts(fleet, aiperf),
        aiperf=aiperf,
        records=_records(folder / "aiperf" / AIPERF_RECORDS),
        model=model_metrics(whole, speedup_ratio),
        prediction=prediction,
        lateness_s={
            "p50": float(np.percentile(late_s, 50)),
            "p99": float(np.percentile(late_s, 99)),
            "max": float(late_s.max()),
        },
        kv_usage={"avg": float(np.mean(usage)) if usage else 0.0, "max": max(usage, default=0.0)},
        preemptions=sum(row.num_preemptions for row in last),
        prefix_cache_hit_rate=sum(row.prefix_hits_tokens for row in last) / queries if queries else 0.0,
        speculative_decoding=speculation_figures(last),
        cpu_us_per_token=_cpu_us_per_token(timelines, ready_unix_s),
        num_cancelled=len(requests) - len(whole),
        requests=requests,
        timelines=timelines,
    )


def model_metrics(rows: Sequence[RequestRow], speedup_ratio: float) -> dict[str, Metric]:
    """
    AIPerf's metrics (same names, units and schema) from the times at which tokens were due, in real time.

    `rows` are requests that got all their tokens; without any, the result is empty. Definitions: AIPerf 0.13.0.
    """
    if not rows:
        return {}
    to_ms = 1e3 / speedup_ratio
    latency_ms = _column(row.due_s[-1] - row.arrival_s for row in rows) * to_ms
    arrival_unix_s = _column(row.arrival_unix_s for row in rows)
    finished = FinishedRequests(
        ttft_ms=_column(row.ttft_s for row in rows) * to_ms,
        ttst_ms=_column(row.due_s[min(1, len(row.due_s) - 1)] - row.due_s[0] for row in rows) * to_ms,
        latency_ms=latency_ms,
        isl_tokens=_column(row.isl_tokens for row in rows),
        osl_tokens=_column(len(row.due_s) for row in rows),
        cached_tokens=_column(row.num_cached_tokens for row in rows),
    )
    totals = RunTotals(
        num_finished=len(rows),
        isl_tokens=sum(row.isl_tokens for row in rows),
        osl_tokens=sum(len(row.due_s) for row in rows),
        duration_s=float(np.max(arrival_unix_s + latency_ms / 1e3) - np.min(arrival_unix_s)),
    )
    return request_metrics(finished) | run_metrics(totals)


def speculation_figures(last: Sequence[TimelineRow]) -> dict[str, float] | None:
    """What became of draft tokens, from the last state of each worker; None if there were none."""
    num_drafts = sum(row.num_drafts for row in last)
    if not num_drafts:
        return None
    num_draft_tokens = sum(row.num_draft_tokens for row in last)
    num_accepted_tokens = sum(row.num_accepted_tokens for row in last)
    return {
        "num_drafts": num_drafts,
        "num_draft_tokens": num_draft_tokens,
        "num_accepted_tokens": num_accepted_tokens,
        "acceptance_rate": num_accepted_tokens / num_draft_tokens,
        "tokens_per_step": 1 + num_accepted_tokens / num_drafts,
    }


def _column(values: Iterable[float]) -> FloatArray:
    return np.fromiter(values, dtype=np.float64)


def _cpu_us_per_token(timelines: Sequence[Sequence[TimelineRow]], since_unix_s: float) -> float:
    """Processor time of the workers for each output token, over the intervals in which tokens came out."""
    cpu_s, tokens = 0.0, 0
    for timeline in timelines:
        for before, after in pairwise(row for row in timeline if row.unix_s >= since_unix_s):
            made = after.num_output_tokens - before.num_output_tokens
            if made:
                tokens += made
                cpu_s += after.cpu_s - before.cpu_s
    return cpu_s * 1e6 / tokens if tokens else 0.0


def _records(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _facts(fleet: Fleet, aiperf: dict[str, Any]) -> dict[str, Any]:
    return {
        "profile": fleet.engine.profile.name,
        "num_workers": len(fleet.settings.roles),
        "roles": dict(fleet.settings.groups),
        "data_parallel_size": fleet.settings.worker.data_parallel_size,
        "router_mode": fleet.settings.router.router_mode,
        "total_kv_blocks": fleet.engine.num_blocks,
        "block_size": fleet.engine.block_size,
        "speedup_ratio": fleet.settings.worker.engine.speedup_ratio,
        "seed": fleet.settings.worker.engine.seed,
        "planes": asdict(fleet.settings.planes),
        "started": aiperf.get("start_time"),
        "mock-engine": version("mock-engine"),
        "commit": find_commit(),
        "ai-dynamo": version("ai-dynamo"),
        "aiperf": version("aiperf"),
    }


def find_commit() -> str | None:
    """The commit that this package runs from, if it runs from a checkout."""
    package = Path(__file__).parent
    if not (package.parent / ".git").exists():
        return None
    git = ["git", "-C", str(package), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
