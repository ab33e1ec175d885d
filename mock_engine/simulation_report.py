"""
What a simulation, a sweep or a search found, as tables.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from mock_engine.serve import print_plain
from mock_engine.simulation import SimulationResults, SimulationSettings
from mock_engine.sweep import MaxRate, SweepPoint, pareto_front

_LATENCIES = {
    "time_to_first_token": "TTFT (ms)",
    "inter_token_latency": "ITL (ms)",
    "inter_chunk_latency": "ICL (ms)",
    "request_latency": "Latency (ms)",
    "output_token_throughput_per_user": "Tokens/s/user",
}
DRAFTS_LABEL = "Draft tokens accepted, tokens of a request a step"
_STATISTICS = ("avg", "p50", "p90", "p95", "p99", "max")


def print_results(settings: SimulationSettings, results: SimulationResults, console: Console) -> None:
    """Latencies as AIPerf shows them, then the deployment's own figures."""
    print_plain(console, _deployment(settings))
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for statistic in _STATISTICS:
        table.add_column(statistic, justify="right")
    for name, title in _LATENCIES.items():
        metric = results.metrics.get(name)
        if metric is not None:
            table.add_row(title, *(f"{metric[statistic]:,.2f}" for statistic in _STATISTICS))
    console.print(table)
    console.print()
    figures = Table(box=None, pad_edge=False, show_header=False)
    figures.add_column()
    figures.add_column(justify="right")
    for name, value in _figures(results).items():
        figures.add_row(name, value)
    console.print(figures)
    _print_notes(results, console)


def print_sweep(points: Sequence[SweepPoint], console: Console) -> None:
    """One row a point; a star where no other is better for the GPU and for the user."""
    front = {id(point) for point in pareto_front(points)}
    has_goodput = any("goodput" in point.results.metrics for point in points)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in points[0].swept:
        table.add_column(name.replace("-", "\n"), justify="right", no_wrap=True)
    for column in (
        "tokens/s\nper GPU",
        "\nper user",
        "requests\n/s",
        "TTFT\np50",
        "(ms)\np95",
        "ITL\np50",
        "(ms)\np95",
    ):
        table.add_column(column, justify="right")
    if has_goodput:
        table.add_column("good\n%", justify="right")
    table.add_column("Pareto\nfront", justify="center")
    for point in points:
        metrics = point.results.metrics
        if not point.has_answers:
            table.add_row(*map(str, point.swept.values()), "no request was answered")
            continue
        cells = [*map(str, point.swept.values()), f"{point.tokens_per_gpu_s:,.0f}", f"{point.tokens_per_user_s:,.1f}"]
        cells.append(f"{metrics['request_throughput']['avg']:,.2f}")
        for name in ("time_to_first_token", "inter_token_latency"):
            metric = metrics.get(name)
            cells += [f"{metric[statistic]:,.1f}" if metric else "-" for statistic in ("p50", "p95")]
        if has_goodput:
            cells.append(f"{100 * metrics['good_request_count']['avg'] / point.results.num_sent:.1f}")
        table.add_row(*cells, "*" if id(point) in front else "")
    console.print(table)
    for point in points:
        _print_notes(point.results, console, point.label)


def print_max_rate(settings: SimulationSettings, found: MaxRate, attainment: float, console: Console) -> None:
    """The rate, what it looks like there, and how the rates around it did."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("sent/s", "answered/s", "good", "TTFT p95 (ms)", "ITL p95 (ms)"):
        table.add_column(column, justify="right")
    for each in found.tried:
        metrics = each.results.metrics
        p95 = [f"{metrics[name]['p95']:,.1f}" if name in metrics else "-" for name in list(_LATENCIES)[:2]]
        answered = f"{each.results.answered_rate:,.3f}{'' if each.results.keeps_up else ' !'}"
        table.add_row(f"{each.request_rate:,.3f}", answered, f"{each.attainment:.1%}", *p95)
    console.print(table)
    if not all(each.results.keeps_up for each in found.tried):
        console.print("! answered more slowly than sent: the queue grows, so that rate does not count")
    console.print()
    if found.best is None:
        console.print(
            f"No rate meets the objectives for {attainment:.0%} of the requests, not even "
            f"{found.tried[0].request_rate:g} requests a second.",
            highlight=False,
        )
        return
    console.print(
        f"[bold]{found.best.request_rate:,.2f} requests a second[/bold] is the highest rate at which "
        f"{attainment:.0%} of the requests meet the objectives. There:\n",
        highlight=False,
    )
    print_results(settings, found.best.results, console)


def _deployment(settings: SimulationSettings) -> str:
    """What runs where, in a few words."""
    plan = settings.deployment
    parts = []
    for group in plan.groups:
        role = "" if group.role == "agg" else f" {group.role}"
        parts.append(f"{group.num_workers}{role} x {group.engine.profile}")
    ranks = f", {plan.data_parallel_size} ranks each" if plan.data_parallel_size > 1 else ""
    router = f", {plan.router.router_mode}" if plan.num_workers * plan.data_parallel_size > 1 else ""
    return " + ".join(parts) + ranks + router


def _figures(results: SimulationResults) -> dict[str, str]:
    metrics = results.metrics
    counts = [f"{results.num_finished:,} finished"]
    counts += [f"{results.num_cancelled:,} cancelled"] if results.num_cancelled else []
    counts += [f"{results.num_failed:,} failed"] if results.num_failed else []
    figures = {"Requests": ", ".join(counts)}
    if results.num_finished:
        figures["Requests a second"] = f"{metrics['request_throughput']['avg']:,.2f}"
        figures["Output tokens a second"] = f"{metrics['output_token_throughput']['avg']:,.0f}"
    if "goodput" in metrics:
        share = metrics["good_request_count"]["avg"] / results.num_sent
        figures["Goodput"] = f"{metrics['goodput']['avg']:,.2f} requests a second, {share:.1%} of all"
    figures["GPUs, GPU-hours"] = f"{results.num_gpus}, {results.gpu_hours:,.3f}"
    figures["Output tokens of a GPU a second"] = f"{results.output_tokens_per_gpu_s:,.0f}"
    usage = results.usage
    if usage is not None:
        figures["Running, waiting: average of a worker"] = f"{usage.avg_num_running:,.1f}, {usage.avg_num_waiting:,.1f}"
        figures["KV usage: average, highest of a worker"] = f"{usage.avg_kv_usage:.1%}, {usage.max_kv_usage:.1%}"
    for role, of_role in results.usage_by_role.items():
        running, waiting = of_role.avg_num_running, of_role.avg_num_waiting
        figures[f"  {role}: running, waiting; KV usage"] = f"{running:,.1f}, {waiting:,.1f}; {of_role.avg_kv_usage:.1%}"
    if results.avg_transfer_s is not None:
        figures["KV transfer, waiting for links included"] = f"{results.avg_transfer_s * 1e3:,.2f} ms"
    if results.num_migrated:
        figures["Requests sent again after a loss"] = f"{results.num_migrated:,}"
    figures["Prefix cache hit rate"] = f"{results.prefix_cache_hit_rate:.1%}"
    figures["Preemptions"] = f"{results.preemptions:,}"
    drafts = results.speculation
    if drafts is not None:
        figures[DRAFTS_LABEL] = drafts_text(drafts.acceptance_rate, drafts.tokens_per_step)
    return figures


def drafts_text(acceptance_rate: float, tokens_per_step: float) -> str:
    """The figures under `DRAFTS_LABEL`."""
    return f"{acceptance_rate:.1%}, {tokens_per_step:,.2f}"


def _print_notes(results: SimulationResults, console: Console, label: str = "") -> None:
    """What the reader should know before trusting the figures."""
    before = f"{label}: " if label else ""
    for reason, number in results.failures.items():
        console.print(f"[bold red]{before}{number:,} requests failed[/bold red]: {reason}", highlight=False)
    if not results.keeps_up:
        console.print(
            f"{before}{results.offered_rate:,.2f} requests a second were sent, {results.answered_rate:,.2f} answered: "
            f"too much for this deployment, or a run too short to tell. Its latencies depend on how long it goes on; "
            f"raise --request-count to see.",
            highlight=False,
        )
    for event in results.too_late:
        console.print(
            f"{before}{event}, after the last request had ended at {results.simulated_s:,.1f} s", highlight=False
        )
    for profile, load in results.unmeasured.items():
        console.print(
            f"{before}{profile} was not measured at this load, the first such: "
            f"{load.num_tokens - load.decode_batch_size:,} prefill tokens, {load.decode_batch_size:,} decoding, "
            f"{load.context_tokens:,} context tokens. Times outside the measured range follow the roofline.",
            highlight=False,
        )
