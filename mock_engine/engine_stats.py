"""
What an engine has to say about itself, as figures by name ("series"); `metric_tables` says what each is called outside.

    stats = EngineStats(profile, metrics, speedup_ratio, num_ranks)
    drive.on_step = stats.ranks[drive.dp_rank].steps.add
    stats.add_closed(live)                   on any thread
    stats.fold(open_requests)                before figures are read: takes in what open requests have made
    stats.ranks[0].values(drive)

Tokens are counted by the request, many at once: when it ends, and when somebody asks. Nothing is done for a single one.

Seconds are real ones, as a client measures them and as Prometheus counts them, also with a speed-up. Where nothing is
paced (`--speedup-ratio 0`) they are model seconds. The speed-up is that of the moment: of a request during which it
changes, the whole is taken to have passed at the last. Times of tokens are those at which they went out, not those at
which they were due: the difference is a series of its own ("lateness_s").
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from mock_engine.bucket_counts import BucketCounts
from mock_engine.drive_realtime import RealTimeDrive
from mock_engine.live_request import LiveRequest
from mock_engine.metric_tables import Metric
from mock_engine.profile import Profile
from mock_engine.step_stats import StepStats

# What vLLM calls the reasons, by what we call them.
_REASONS = {"eos": "stop", "cancelled": "abort"}
REASONS = ("stop", "length", "abort")  # are there from the start


class RankStats:
    """The figures of one data-parallel rank."""

    def __init__(self, profile: Profile, metrics: Iterable[Metric], speedup_ratio: float) -> None:
        self.histograms = {
            metric.series: BucketCounts(metric.edges) for metric in metrics if metric.kind == "histogram"
        }
        self.steps = StepStats(profile, speedup_ratio, self.histograms)
        self.ended_by_reason: Counter[str] = Counter(dict.fromkeys(REASONS, 0))
        self.prompt_tokens = 0
        self.output_tokens = 0
        self.num_probes = 0
        self.probe_tokens = 0  # of their prompts
        self._num_counted: dict[LiveRequest, list[int]] = {}  # tokens of each choice

    def values(self, drive: RealTimeDrive) -> dict[str, float]:
        """Gauges and counters, by series."""
        scheduler = drive.core.scheduler
        blocks = scheduler.blocks
        queries = scheduler.num_prefix_queries_tokens - self.probe_tokens
        hits = scheduler.num_prefix_hits_tokens
        num_ended = self.ended_by_reason.total()
        drafts = scheduler.speculation_counts
        return {
            "num_drafts": drafts.num_drafts if drafts else 0,
            "num_draft_tokens": drafts.num_draft_tokens if drafts else 0,
            "num_accepted_tokens": drafts.num_accepted_tokens if drafts else 0,
            "num_running": scheduler.num_running,
            "num_waiting": drive.num_waiting,
            "kv_usage": blocks.num_used / blocks.num_blocks,
            "kv_used_tokens": blocks.num_used * blocks.block_size,
            "kv_total_tokens": blocks.num_blocks * blocks.block_size,
            "prefix_queries_tokens": max(0, queries),
            "prefix_hits_tokens": hits,
            "prefix_hit_rate": hits / queries if queries > 0 else 0.0,
            "num_preemptions": scheduler.num_preemptions,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "num_ended": num_ended - self.ended_by_reason["abort"],
            "num_aborted": self.ended_by_reason["abort"],
            "num_steps": self.steps.num_steps,
            "busy_s": self.steps.busy_s,
            "model_s": drive.now_s(),
            "speedup_ratio": drive.speedup_ratio,
            "num_probes": self.num_probes,
        }

    def labelled(self, series: str, drive: RealTimeDrive) -> dict[str, float]:
        """A counter with a value for each of another label's values."""
        if series == "ended_by_reason":
            return dict(self.ended_by_reason)
        assert series == "accepted_by_position"
        counts = drive.core.scheduler.speculation_counts
        accepted = [] if counts is None else counts.num_accepted_tokens_per_pos
        return {str(position): number for position, number in enumerate(accepted)}

    def fold(self, live: LiveRequest) -> None:
        """Count the tokens that it has sent since the last time."""
        if live.is_probe:
            return
        stream, ratio = live.stream, live.stream.drive.speedup_ratio or 1.0
        counted = self._num_counted.setdefault(live, [0] * len(stream.sequences))
        for choice, num_before in enumerate(counted):
            sent_s = stream.sent_s[choice][max(0, num_before - 1) :]  # and the one before, where a gap begins
            num_new = len(sent_s) - (num_before > 0)
            if not num_new:
                continue
            counted[choice] = num_before + num_new
            self.output_tokens += num_new
            if not num_before:
                self.prompt_tokens += stream.sequences[choice].request.isl_tokens
                self._add("ttft_s", (sent_s[0] - stream.arrival_s) / ratio)
            times = np.asarray(sent_s) / ratio
            self._add_many("itl_s", np.diff(times))
            if stream.drive.speedup_ratio:
                due = np.asarray(stream.due_s[choice][num_before : num_before + num_new]) / ratio
                self._add_many("lateness_s", times[-num_new:] - due)

    def close(self, live: LiveRequest) -> None:
        """It has ended; nothing of it comes any more."""
        if live.is_probe:
            self.num_probes += 1
            self.probe_tokens += sum(
                sequence.request.isl_tokens
                for sequence in live.stream.sequences
                if sequence.num_cached_tokens is not None  # it was looked up
            )
            return
        self.fold(live)
        del self._num_counted[live]
        num_tokens = [len(sent_s) for sent_s in live.stream.sent_s]
        for choice, reason in enumerate(live.finish_reasons()):
            self.ended_by_reason[_REASONS.get(reason, reason)] += 1
            if reason != "cancelled":
                self._add_ended(live, choice)
        if live.is_ended:
            self._add("num_choices", len(num_tokens))
            self._add("longest_osl_tokens", max(num_tokens))

    def _add_ended(self, live: LiveRequest, choice: int) -> None:
        stream, ratio = live.stream, live.stream.drive.speedup_ratio or 1.0
        sent_s = stream.sent_s[choice]
        # Whose KV cache came from elsewhere may decode at once, without a prefill.
        started_s = stream.queued_s if stream.started_s[choice] is None else stream.started_s[choice]
        assert started_s is not None
        self._add("isl_tokens", stream.sequences[choice].request.isl_tokens)
        self._add("osl_tokens", len(sent_s))
        if live.max_tokens is not None:
            self._add("max_tokens", live.max_tokens)
        self._add("e2e_s", (sent_s[-1] - stream.arrival_s) / ratio)
        self._add("queue_s", (started_s - stream.arrival_s) / ratio)
        self._add("prefill_s", (sent_s[0] - started_s) / ratio)
        self._add("decode_s", (sent_s[-1] - sent_s[0]) / ratio)
        self._add("inference_s", (sent_s[-1] - started_s) / ratio)
        if len(sent_s) > 1:
            self._add("tpot_s", (sent_s[-1] - sent_s[0]) / (len(sent_s) - 1) / ratio)

    def _add(self, series: str, value: float) -> None:
        if series in self.histograms:
            self.histograms[series].add(value)

    def _add_many(self, series: str, values: NDArray[np.float64]) -> None:
        if series in self.histograms:
            self.histograms[series].add_many(values)


class EngineStats:
    """
    The figures of all ranks of one engine.

    Requests end on any thread, also inside a garbage collection in the middle of a `fold`. So whoever ends one never
    waits for the lock: a request that finds it taken is left in a queue, and taken in by the next who comes.
    """

    def __init__(self, profile: Profile, metrics: list[Metric], speedup_ratio: float, num_ranks: int = 1) -> None:
        self.ranks = [RankStats(profile, metrics, speedup_ratio) for _ in range(num_ranks)]
        self._closed: deque[LiveRequest] = deque()
        self._lock = threading.Lock()

    @property
    def steps(self) -> list[StepStats]:
        """Those of each rank."""
        return [rank.steps for rank in self.ranks]

    def add_closed(self, live: LiveRequest) -> None:
        """A request has ended. Call it once for each; it never waits."""
        self._closed.append(live)
        if self._lock.acquire(blocking=False):
            try:
                self._take_closed()
            finally:
                self._lock.release()

    def fold(self, open_requests: Iterable[LiveRequest]) -> None:
        """
        Take in all that has happened up to now. `open_requests` may hold some that have just ended; none is counted
        twice. Not to be called by who ends requests: it waits for the lock.
        """
        with self._lock:
            for live in open_requests:
                if not live.is_closed:  # else it is in the queue, or was
                    self.ranks[live.stream.drive.dp_rank].fold(live)
            self._take_closed()

    def _take_closed(self) -> None:
        while self._closed:
            live = self._closed.popleft()
            self.ranks[live.stream.drive.dp_rank].close(live)
