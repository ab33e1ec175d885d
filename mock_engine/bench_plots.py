"""
The pictures of a benchmark's report.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from mock_engine.bench_results import Results
from mock_engine.plot_style import BLUE, DPI, ORANGE, SAND, legend_above, plain
from mock_engine.recorder import TimelineRow

matplotlib.use("Agg")
from matplotlib import pyplot

_MEASURED, _MODEL, _CACHED = BLUE, ORANGE, SAND


def plot_latency(path: Path, results: Results) -> None:
    """TTFT and ITL: the share of requests at or below each time, AIPerf's over the model's."""
    speedup_ratio = results.facts["speedup_ratio"] or 1.0
    to_ms = 1e3 / speedup_ratio
    whole = [row for row in results.requests if row.is_whole]
    model = {
        "time_to_first_token": [row.ttft_s * to_ms for row in whole],
        "inter_token_latency": [row.itl_s * to_ms for row in whole if row.itl_s is not None],
    }
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for panel, (name, values), title in zip(
        panels, model.items(), ("Time to first token", "Inter-token latency, mean of a request"), strict=True
    ):
        measured = [record["metrics"][name]["value"] for record in results.records if name in record["metrics"]]
        for values_ms, colour, label in ((values, _MODEL, "model"), (measured, _MEASURED, "AIPerf")):
            if values_ms:
                panel.ecdf(values_ms, color=colour, label=label)
        panel.set(title=title, xlabel="ms", ylabel="share of requests", ylim=(0, 1))
        plain(panel)
        panel.legend(frameon=False, loc="upper left")
    panels[0].set_xlim(left=0)
    figure.savefig(path, dpi=DPI)
    pyplot.close(figure)


def plot_timeline(path: Path, results: Results) -> None:
    """Requests, KV blocks and tokens over time, all workers together."""
    time_s, columns = _together(results)
    figure, (requests, blocks, tokens) = pyplot.subplots(3, 1, figsize=(10, 6.4), sharex=True, layout="constrained")
    requests.plot(time_s, columns["num_running"], color=_MEASURED, label="running")
    requests.plot(time_s, columns["num_waiting"], color=_MODEL, label="waiting")
    requests.set_title("Requests", loc="left")
    requests.set(ylim=(0, None))
    total = columns["kv_total_blocks"]
    used, cached = 100 * columns["kv_used_blocks"] / total, 100 * columns["kv_cached_blocks"] / total
    blocks.stackplot(time_s, used, cached, colors=(_MEASURED, _CACHED), labels=("used", "cached"))
    top = max(5.0, 1.1 * float(np.max(used + cached)))
    blocks.set_title("KV blocks, % of all", loc="left")
    blocks.set(ylim=(0, min(100.0, top)))
    made = np.diff(columns["num_output_tokens"]) / np.diff(time_s)
    tokens.step(time_s[1:], made, where="pre", color=_MEASURED)
    tokens.set_title("Output tokens a second", loc="left")
    tokens.set(xlabel="seconds", ylim=(0, None))
    for panel in (requests, blocks, tokens):
        plain(panel)
    for panel in (requests, blocks):
        legend_above(panel)
    figure.savefig(path, dpi=DPI)
    pyplot.close(figure)


def _together(results: Results) -> tuple[Any, dict[str, Any]]:
    """The workers' timelines summed on one time axis, in seconds since the first request."""
    start_s = min(row.arrival_unix_s for row in results.requests)
    timelines = [[row for row in timeline if row.unix_s >= start_s - 1] for timeline in results.timelines]
    timelines = [timeline for timeline in timelines if timeline]  # a fault may have ended a worker before
    end_s = max(_last_busy_s(timeline) for timeline in timelines) + 1
    axis = np.arange(start_s - 0.5, end_s, 0.25)
    columns = {
        name: sum(
            np.interp(axis, [row.unix_s for row in timeline], [getattr(row, name) for row in timeline])
            for timeline in timelines
        )
        for name in (
            "num_running",
            "num_waiting",
            "kv_used_blocks",
            "kv_cached_blocks",
            "kv_total_blocks",
            "num_output_tokens",
        )
    }
    return axis - start_s, columns


def _last_busy_s(timeline: list[TimelineRow]) -> float:
    return max((row.unix_s for row in timeline if row.num_running or row.num_waiting), default=timeline[0].unix_s)
