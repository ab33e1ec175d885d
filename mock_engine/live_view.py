"""
What a fleet is doing, on a terminal and as plain lines.

    view = FleetView(fleet.settings.worker_names)
    view.table([fleet.status(0), ...])     for rich's Live, one row a worker
    view.line([...])                       one line for a log
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from mock_engine.recorder import TimelineRow

_BAR_CELLS = 12
_RATE_WINDOW_S = 1.0


class FleetView:
    """Remembers what it saw, to say how many tokens a second went out since."""

    def __init__(self, names: Sequence[str] = ()) -> None:
        self._names = [name.removeprefix("worker-") for name in names]
        self._seen: dict[int, list[TimelineRow]] = {}

    def table(self, states: Sequence[TimelineRow | None]) -> Table:
        """One row a worker, in order; a worker without a state yet has an empty one."""
        table = Table(box=None, pad_edge=False, header_style="dim")
        table.add_column("worker")
        for column in ("running", "waiting"):
            table.add_column(column, justify="right")
        table.add_column("KV blocks: used, cached, free")
        for column in ("tokens/s", "prefix hits", "preempted", "late p50", "late p99"):
            table.add_column(column, justify="right")
        for worker, state in enumerate(states):
            name = self._names[worker] if self._names else str(worker)
            if state is None:
                table.add_row(name)
                continue
            table.add_row(
                name,
                str(state.num_running),
                str(state.num_waiting),
                _kv_bar(state),
                f"{self._tokens_per_s(worker, state):,.0f}",
                _percent(state.prefix_hits_tokens, state.prefix_queries_tokens),
                str(state.num_preemptions),
                _milliseconds(state.lateness_p50_s),
                _milliseconds(state.lateness_p99_s),
            )
        return table

    def line(self, states: Sequence[TimelineRow | None]) -> str:
        """All workers together."""
        known = [(worker, state) for worker, state in enumerate(states) if state is not None]
        used = sum(state.kv_used_blocks for _, state in known)
        total = sum(state.kv_total_blocks for _, state in known)
        late_s = [state.lateness_p99_s for _, state in known if state.lateness_p99_s is not None]
        return (
            f"running {sum(state.num_running for _, state in known)}, "
            f"waiting {sum(state.num_waiting for _, state in known)}, "
            f"KV blocks {used}/{total} used, "
            f"{sum(self._tokens_per_s(worker, state) for worker, state in known):,.0f} tokens/s, "
            f"lateness p99 {_milliseconds(max(late_s, default=None))}"
        )

    def _tokens_per_s(self, worker: int, state: TimelineRow) -> float:
        """Output tokens a second of real time, over the last second."""
        seen = self._seen.setdefault(worker, [])
        if not seen or seen[-1].unix_s < state.unix_s:
            seen.append(state)
        while len(seen) > 2 and seen[1].unix_s <= state.unix_s - _RATE_WINDOW_S:
            del seen[0]
        seconds = state.unix_s - seen[0].unix_s
        return (state.num_output_tokens - seen[0].num_output_tokens) / seconds if seconds > 0 else 0.0


def _kv_bar(state: TimelineRow) -> Text:
    used = round(_BAR_CELLS * state.kv_used_blocks / state.kv_total_blocks)
    cached = min(_BAR_CELLS - used, round(_BAR_CELLS * state.kv_cached_blocks / state.kv_total_blocks))
    free_blocks = state.kv_total_blocks - state.kv_used_blocks - state.kv_cached_blocks
    return Text.assemble(
        ("█" * used, "green"),
        ("▒" * cached, "yellow"),
        ("·" * (_BAR_CELLS - used - cached), "dim"),
        f" {state.kv_used_blocks:,}, {state.kv_cached_blocks:,}, {free_blocks:,}",
    )


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "-"


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.1f} ms"
