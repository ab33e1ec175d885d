"""
The report of a benchmark: a table on the console, and a page with pictures.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mock_engine.aiperf_schema import Metric
from mock_engine.bench_plots import plot_latency, plot_timeline
from mock_engine.bench_results import Results
from mock_engine.serve import print_plain
from mock_engine.simulation_report import DRAFTS_LABEL, drafts_text

_LATENCIES = {
    "time_to_first_token": "TTFT",
    "inter_token_latency": "ITL",
    "request_latency": "Request latency",
}
_RATES = {
    "output_token_throughput": "Output tokens/s",
    "request_throughput": "Requests/s",
}
_SHOWN = ("p50", "p95", "p99")


@dataclass(frozen=True, slots=True)
class ComparisonRow:
    """One statistic of one metric: what AIPerf measured, what the model set, and what was predicted if anything was."""

    label: str
    measured: float
    model: float
    predicted: float | None

    def cells(self) -> list[str]:
        """As they are printed, differences to what AIPerf measured in percent of the others."""
        cells = [self.label, f"{self.measured:,.2f}", f"{self.model:,.2f}", _percent(self.measured / self.model - 1)]
        if self.predicted is not None:
            cells += [f"{self.predicted:,.2f}", _percent(self.measured / self.predicted - 1)]
        return cells


def comparison_rows(results: Results) -> list[ComparisonRow]:
    """All statistics that both AIPerf and the model have."""
    rows = []
    for names, statistics in ((_LATENCIES, _SHOWN), (_RATES, ("avg",))):
        for name, title in names.items():
            measured: Metric | None = results.aiperf.get(name)
            model = results.model.get(name)
            if not measured or not model:
                continue
            predicted = results.prediction.metrics.get(name)
            for statistic in statistics:
                if measured.get(statistic) is None:
                    continue
                label = f"{title} {statistic} ({measured['unit']})" if names is _LATENCIES else title
                rows.append(
                    ComparisonRow(
                        label, measured[statistic], model[statistic], predicted[statistic] if predicted else None
                    )
                )
    return rows


def print_table(results: Results, console: Console) -> None:
    """AIPerf's figures beside the model's and the prediction's, and who set the times."""
    table = Table(box=None, pad_edge=False, header_style="bold", title_justify="left")
    table.add_column("")
    for column in _columns(results):
        table.add_column(column, justify="right")
    for row in comparison_rows(results):
        table.add_row(*row.cells())
    console.print()
    print_plain(console, results.facts["profile"])
    console.print(table)
    console.print(f"\n{results.verdict}", highlight=False)
    if results.prediction.reason:
        console.print(results.prediction.reason, highlight=False)
    if num_errors := _num_errors(results):
        console.print(f"[bold red]{num_errors} requests failed[/bold red]: see report.md")


def _columns(results: Results) -> list[str]:
    return ["AIPerf", "model", "diff.", *(["predicted", "diff."] if results.prediction.metrics else [])]


def write_report(folder: Path, results: Results) -> None:
    """`report.md` and its pictures."""
    pictures = []
    if results.model:
        plot_latency(folder / "latency.png", results)
        plot_timeline(folder / "timeline.png", results)
        pictures = [
            "![TTFT and ITL as AIPerf measured them and as the model set them](latency.png)",
            "![requests running and waiting, KV blocks, tokens a second](timeline.png)",
        ]
    (folder / "report.md").write_text("\n".join([*_page(results), *pictures, ""]), encoding="utf-8")


def _page(results: Results) -> list[str]:
    facts = results.facts
    versions = ", ".join(f"{name} {facts[name]}" for name in ("mock-engine", "ai-dynamo", "aiperf"))
    aiperf = results.aiperf
    return [
        f"# {facts['profile']}",
        "",
        "```",
        shlex.join(results.command),
        "```",
        "",
        f"{versions}; commit {facts['commit'] or 'unknown (not a checkout)'}; {facts['started']}",
        "",
        results.verdict,
        "",
        f"| | {' | '.join(_columns(results))} |",
        f"|---|{'--:|' * len(_columns(results))}",
        *(f"| {' | '.join(row.cells())} |" for row in comparison_rows(results)),
        "",
        "AIPerf: what the client saw. Model: when each token was due by the profile, counted from the request's "
        "arrival at the engine; HTTP, tokenizing and detokenizing are the difference. Predicted: what a simulation of "
        "the same load said before the run.",
        "",
        "| | |",
        "|---|--:|",
        *(f"| {name} | {value} |" for name, value in _figures(results).items()),
        "",
        *(
            f"- **{error['count']} requests failed**: {error.get('error_details', error)}"
            for error in aiperf.get("error_summary") or []
        ),
    ]


def _figures(results: Results) -> dict[str, str]:
    facts = results.facts
    late_ms = {name: seconds * 1e3 for name, seconds in results.lateness_s.items()}
    speedup = facts["speedup_ratio"]
    drafts = results.speculative_decoding
    return {
        "Requests completed, failed, cancelled": (
            f"{int(results.aiperf['request_count']['avg']):,}, {_num_errors(results):,}, {results.num_cancelled:,}"
        ),
        "Duration": f"{results.aiperf['benchmark_duration']['avg']:.1f} s",
        "Workers": ", ".join(f"{number} {role}" for role, number in facts["roles"].items()),
        "Discovery, request plane, event plane": ", ".join(facts["planes"].values()),
        "Speed": "as fast as the host can" if speedup == 0 else f"{speedup:g} model seconds a second",
        "Lateness at the engine p50, p99, max": f"{late_ms['p50']:.2f}, {late_ms['p99']:.2f}, {late_ms['max']:.1f} ms",
        "KV blocks in use, average and highest": (
            f"{results.kv_usage['avg']:.1%}, {results.kv_usage['max']:.1%} of {facts['total_kv_blocks']:,}"
        ),
        "Prefix cache hit rate": f"{results.prefix_cache_hit_rate:.1%}",
        "Preemptions": f"{results.preemptions:,}",
        **({DRAFTS_LABEL: drafts_text(drafts["acceptance_rate"], drafts["tokens_per_step"])} if drafts else {}),
        "Worker processor time for each output token": f"{results.cpu_us_per_token:.0f} us",
    }


def _num_errors(results: Results) -> int:
    errors: list[dict[str, Any]] = results.aiperf.get("error_summary") or []
    return sum(int(error["count"]) for error in errors)


def _percent(difference: float) -> str:
    return f"{difference:+.1%}".replace("-0.0%", "+0.0%")
