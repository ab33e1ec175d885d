"""
The state of a deployment over simulated time: how many ran and waited, how full the KV cache was.

    log = StateLog(num_workers)
    log.add(start_s, end_s, num_running, num_waiting, start_usage, end_usage, num_output_tokens)
    log.usage()         averages over time, and maxima
    log.timeline()      at most 1,000 bins, to plot

Each worker says what it was like from one moment to the next, and nothing while it is idle. Memory is
bounded: time is cut into bins that become twice as wide whenever the run outgrows them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mock_engine.aiperf_schema import FloatArray
from mock_engine.columns import RowBuffer

MAX_BINS = 1000
_FIRST_BIN_S = 2.0**-10  # a power of two, so that a time divided by a bin is exact
_FOLD_ROWS = 4096


@dataclass(frozen=True, slots=True)
class Usage:
    """Averages are over time and workers, from the first moment to the last; maxima are those of a single worker."""

    avg_num_running: float
    max_num_running: float
    avg_num_waiting: float
    max_num_waiting: float
    avg_kv_usage: float  # share of a worker's blocks
    max_kv_usage: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """The deployment over time, an entry a bin: averages of the bin, of all workers together."""

    bin_s: float
    start_s: FloatArray  # of each bin
    num_running: FloatArray
    num_waiting: FloatArray
    kv_usage: FloatArray  # share of all blocks
    output_tokens_per_s: FloatArray


class StateLog:
    """What `num_workers` workers were like, and when. KV usage is the share of a worker's blocks that is in use."""

    def __init__(self, num_workers: int) -> None:
        self._num_workers = num_workers
        self._rows = RowBuffer(7, self._fold, _FOLD_ROWS)
        self._bin_s = _FIRST_BIN_S
        # Of each bin: sequence-seconds running and waiting, usage-seconds, output tokens.
        self._bins = np.zeros((4, MAX_BINS))
        self._max = np.zeros(3)  # running, waiting, KV usage
        self._first_s = np.inf
        self._last_s = 0.0

    def add(
        self,
        start_s: float,
        end_s: float,
        num_running: float,
        num_waiting: float,
        start_usage: float,
        end_usage: float,
        num_output_tokens: float,
    ) -> None:
        """
        What one worker was like from `start_s` to `end_s`, of which no worker may say two things.

        KV usage grows evenly from one number to the other, and the output tokens come evenly.
        """
        self._rows.add(start_s, end_s, num_running, num_waiting, start_usage, end_usage, num_output_tokens)

    def usage(self) -> Usage | None:
        """None if nothing was added, or no time passed."""
        self._rows.flush()
        span_s = self._last_s - self._first_s
        if not 0 < span_s < np.inf:
            return None
        running, waiting, kv_usage, _ = (self._bins.sum(axis=1) / (span_s * self._num_workers)).tolist()
        max_running, max_waiting, max_kv_usage = self._max.tolist()
        return Usage(
            avg_num_running=running,
            max_num_running=max_running,
            avg_num_waiting=waiting,
            max_num_waiting=max_waiting,
            avg_kv_usage=kv_usage,
            max_kv_usage=max_kv_usage,
        )

    def timeline(self) -> Timeline:
        """From time zero to the last moment; its last bin may be a short one."""
        self._rows.flush()
        num_bins = int(np.ceil(self._last_s / self._bin_s))
        start_s: FloatArray = np.arange(num_bins, dtype=np.float64) * self._bin_s
        width_s = np.minimum(self._bin_s, self._last_s - start_s)
        running, waiting, kv_usage, tokens = self._bins[:, :num_bins] / width_s
        return Timeline(
            bin_s=self._bin_s,
            start_s=start_s,
            num_running=running,
            num_waiting=waiting,
            kv_usage=kv_usage / self._num_workers,
            output_tokens_per_s=tokens,
        )

    def _fold(self, rows: FloatArray) -> None:
        """Cut every row at the edges of bins, and add the pieces up."""
        start_s, end_s, running, waiting, start_usage, end_usage, tokens = rows
        self._first_s = min(self._first_s, float(start_s.min()))
        self._last_s = max(self._last_s, float(end_s.max()))
        self._max = np.maximum(
            self._max, [running.max(), waiting.max(), max(float(start_usage.max()), float(end_usage.max()))]
        )
        while self._last_s >= MAX_BINS * self._bin_s:
            self._widen()
        first_bin = np.floor(start_s / self._bin_s).astype(np.int64)
        last_bin = np.maximum(first_bin, np.ceil(end_s / self._bin_s).astype(np.int64) - 1)
        num_pieces = last_bin - first_bin + 1
        row = np.repeat(np.arange(len(start_s)), num_pieces)
        index = np.arange(len(row)) - np.repeat(np.cumsum(num_pieces) - num_pieces, num_pieces)
        bin_of = first_bin[row] + index
        low_s = np.maximum(start_s[row], bin_of * self._bin_s)
        high_s = np.minimum(end_s[row], (bin_of + 1) * self._bin_s)
        piece_s = high_s - low_s
        span_s = (end_s - start_s)[row]
        instant = span_s == 0
        span_s[instant] = 1.0
        middle = ((low_s + high_s) / 2 - start_s[row]) / span_s  # of the piece, as a share of its row
        usage = start_usage[row] + (end_usage - start_usage)[row] * middle
        share = np.where(instant, 1.0, piece_s / span_s)
        amounts = (running[row] * piece_s, waiting[row] * piece_s, usage * piece_s, tokens[row] * share)
        for bins, amount in zip(self._bins, amounts, strict=True):
            bins += np.bincount(bin_of, weights=amount, minlength=MAX_BINS)

    def _widen(self) -> None:
        self._bin_s *= 2
        half = MAX_BINS // 2
        self._bins[:, :half] = self._bins[:, ::2] + self._bins[:, 1::2]
        self._bins[:, half:] = 0.0
