"""
The pictures of simulations: `simulate --plots`.

    plot_timeline(folder / "timeline.png", results)     requests, KV blocks and tokens over simulated time
    plot_latency(folder / "latency.png", results)       how TTFT and ITL are spread over the requests
    plot_pareto(folder / "pareto.png", points)          what the points of a sweep give the GPU, and the user
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from mock_engine.aiperf_schema import PERCENTILES, FloatArray, Metric
from mock_engine.plot_style import BLUE, DPI, GREY, ORANGE, legend_above, plain
from mock_engine.simulation import SimulationResults
from mock_engine.sweep import SweepPoint, front

_LATENCIES = {
    "time_to_first_token": "Time to first token",
    "inter_token_latency": "Inter-token latency, mean of a request",
}
_MAX_TOKEN_BINS = 150
_LETTERS_PER_INCH, _LEGEND_LETTERS = 11, 6
_WIDE = 20  # the largest over the smallest of values that are drawn on a logarithmic scale


def plot_timeline(path: Path, results: SimulationResults) -> None:
    """Requests, KV blocks and output tokens over simulated time, all workers together."""
    timeline = results.timeline
    if not len(timeline.start_s):
        _write_words(path, "No worker did anything.")
        return
    end_s = max(results.simulated_s, float(np.nextafter(timeline.start_s[-1], np.inf)))
    edges_s = np.append(timeline.start_s, min(end_s, float(timeline.start_s[-1]) + timeline.bin_s))
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    requests, blocks, tokens = figure.subplots(3, 1, sharex=True)
    requests.stairs(timeline.num_running, edges_s, baseline=None, color=BLUE, label="running")
    requests.stairs(timeline.num_waiting, edges_s, baseline=None, color=ORANGE, label="waiting")
    requests.set_title("Requests", loc="left")
    legend_above(requests)
    used = 100 * timeline.kv_usage
    blocks.stairs(used, edges_s, fill=True, color=BLUE, alpha=0.2)
    blocks.stairs(used, edges_s, baseline=None, color=BLUE)
    blocks.set_title("KV blocks in use, % of all", loc="left")
    tokens.stairs(*_coarser(timeline.output_tokens_per_s, edges_s), baseline=None, color=BLUE)
    tokens.set_title("Output tokens a second", loc="left")
    tokens.set(xlabel="simulated seconds", xlim=(0, edges_s[-1]))
    for panel, top in ((requests, None), (blocks, min(100.0, max(5.0, 1.1 * float(used.max())))), (tokens, None)):
        panel.set_ylim(0, top)
        panel.yaxis.set_major_formatter(FuncFormatter(_thousands))
        plain(panel)
    figure.savefig(path, dpi=DPI)


def plot_latency(path: Path, results: SimulationResults) -> None:
    """TTFT and ITL: the share of requests at or below each time. Dots are what is known; lines join them."""
    present = {title: results.metrics[name] for name, title in _LATENCIES.items() if name in results.metrics}
    if not present:
        _write_words(path, "No request was answered.")
        return
    figure = Figure(figsize=(5 * len(present), 3.6), layout="constrained")
    for panel, (title, metric) in zip(figure.subplots(1, len(present), squeeze=False)[0], present.items(), strict=True):
        times_ms = [metric["min"], *(metric[f"p{percent}"] for percent in PERCENTILES), metric["max"]]
        shares = [0.0, *(percent / 100 for percent in PERCENTILES), 1.0]
        panel.plot(times_ms, shares, color=BLUE, marker="o", markersize=3)
        panel.set_title(f"{title}\n{_percentile_text(metric)}", loc="left", fontsize="medium")
        panel.set(xlabel="ms", ylabel="share of requests", ylim=(0, 1.02))
        _scale_x(panel, times_ms)
        plain(panel)
    figure.savefig(path, dpi=DPI)


def plot_pareto(path: Path, points: Iterable[SweepPoint]) -> None:
    """Output tokens a second of each GPU, against those that one user sees, and against TTFT."""
    points = [point for point in points if "output_token_throughput" in point.results.metrics]
    if not points:
        _write_words(path, "No request was answered.")
        return
    views = [view for view in _VIEWS if any(view.x_of(point) for point in points)]
    figure = Figure(figsize=(5.5 * len(views), 4.6), layout="constrained")
    panels = figure.subplots(1, len(views), squeeze=False, sharey=True)[0]
    swept = _most_values(points)
    for panel, view in zip(panels, views, strict=True):
        _draw_points(panel, view, points, swept)
    panels[0].set(ylabel="output tokens/s of each GPU", ylim=(0, None))
    words = "Filled: no other point is better in both." + (f" Numbers: {swept}." if swept else "")
    figure.suptitle(words, fontsize="medium", x=0.01, ha="left")
    lines, labels = panels[0].get_legend_handles_labels()
    if len(lines) > 1:
        num_columns = int(figure.get_figwidth() * _LETTERS_PER_INCH / (_LEGEND_LETTERS + max(map(len, labels))))
        figure.legend(lines, labels, loc="outside lower left", frameon=False, ncols=max(1, num_columns))
    figure.draw_without_rendering()  # after which it is known where texts are
    for panel in panels:
        _hide_overlapping(panel)
    figure.savefig(path, dpi=DPI)


def _coarser(rates: FloatArray, edges_s: FloatArray) -> tuple[FloatArray, FloatArray]:
    """At most `_MAX_TOKEN_BINS` bins instead: which step ends in which bin is noise."""
    starts = np.arange(0, len(rates), math.ceil(len(rates) / _MAX_TOKEN_BINS))
    coarse_s = np.append(edges_s[starts], edges_s[-1])
    return np.add.reduceat(rates * np.diff(edges_s), starts) / np.diff(coarse_s), coarse_s


@dataclass(frozen=True, slots=True)
class _View:
    """One panel of `plot_pareto`: what it has from left to right."""

    title: str
    x_of: Callable[[SweepPoint], float]
    is_larger_better: bool
    beside: tuple[float, float]  # where the number of a point goes: off the line, which falls or rises


def _ttft_ms(point: SweepPoint) -> float:
    p95: float = point.results.metrics["time_to_first_token"]["p95"]
    return p95


_VIEWS = (
    _View("tokens/s that one user sees", lambda point: point.tokens_per_user_s, True, (5, 4)),
    _View("time to first token p95, ms", _ttft_ms, False, (6, -10)),
)


def _draw_points(panel: Any, view: _View, points: list[SweepPoint], swept: str | None) -> None:
    """A colour for what was swept besides `swept`, whose value stands beside each point."""
    places = [(view.x_of(point), point.tokens_per_gpu_s) for point in points]
    on_front = front(places if view.is_larger_better else [(-x, y) for x, y in places])
    panel.plot(*zip(*(places[index] for index in on_front), strict=True), color=GREY, alpha=0.3, linewidth=5, zorder=1)
    groups: dict[str, list[int]] = {}
    for index, point in enumerate(points):
        groups.setdefault(_others(point, swept), []).append(index)
    colours = matplotlib.colormaps["tab10" if len(groups) <= 10 else "viridis"].resampled(max(10, len(groups)))
    colour_of: dict[int, Any] = {}
    for number, (label, members) in enumerate(groups.items()):
        colour_of |= dict.fromkeys(members, colours(number))
        line = zip(*(places[index] for index in members), strict=True)
        panel.plot(*line, color=colours(number), label=label, marker="o", markersize=6.5, linewidth=0.8)
    hollow = [index for index in range(len(points)) if index not in on_front]
    if hollow:
        centres = zip(*(places[index] for index in hollow), strict=True)
        panel.scatter(*centres, s=16, color="white", zorder=3)
    if swept is not None:
        for index in (*on_front, *hollow):
            text, look = _thousands(points[index].swept[swept]), {"fontsize": "small", "color": colour_of[index]}
            panel.annotate(text, places[index], view.beside, textcoords="offset points", **look)
    panel.margins(x=0.08)
    panel.set(xlabel=view.title)
    _scale_x(panel, [x for x, _ in places])
    panel.yaxis.set_major_formatter(FuncFormatter(_thousands))
    plain(panel)


def _most_values(points: list[SweepPoint]) -> str | None:
    """The name of what was swept over the most numbers."""
    numbers = {
        name: len({point.swept[name] for point in points})
        for name, value in points[0].swept.items()
        if isinstance(value, int | float)
    }
    return max(numbers, key=lambda name: numbers[name], default=None)


def _others(point: SweepPoint, swept: str | None) -> str:
    return ", ".join(f"{name} {value}" for name, value in point.swept.items() if name != swept)


def _hide_overlapping(panel: Any) -> None:
    """Of numbers that cover each other, the first stays; those that cover a point, or the axis, go too."""
    points = panel.transData.transform([text.xy for text in panel.texts])
    shown: list[Any] = []
    for text in panel.texts:
        box = text.get_window_extent()
        if any(box.overlaps(other) for other in shown) or box.count_contains(points) or box.y0 < panel.bbox.y0:
            text.set_visible(False)
        else:
            shown.append(box)


def _scale_x(panel: Any, values: Sequence[float]) -> None:
    """From zero, or on a logarithmic scale where values are far apart; numbers are written out."""
    if 0 < min(values) < max(values) / _WIDE:
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(values) < 200 * min(values) else (1,)))
        panel.xaxis.set_minor_formatter(NullFormatter())
    else:
        panel.set_xlim(0, 1.1 * max(values) or 1.0)
    panel.xaxis.set_major_formatter(FuncFormatter(_thousands))


def _thousands(value: Any, _: object = None) -> str:
    return f"{value:,.10g}"


def _percentile_text(metric: Metric) -> str:
    return ", ".join(f"{name} {metric[name]:,.1f}" for name in ("p50", "p95", "p99")) + " ms"


def _write_words(path: Path, words: str) -> None:
    """A picture of something that never happened."""
    figure = Figure(figsize=(5, 1))
    figure.text(0.5, 0.5, words, ha="center", va="center")
    figure.savefig(path, dpi=DPI)
