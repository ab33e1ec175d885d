"""
What the steps of one data-parallel rank add up to: how many, how long, how busy the GPU was, and what it drew.

    stats = StepStats(profile, speedup_ratio, histograms)
    drive.on_step = stats.add
    stats.shares(drive.now_s())          of the last second: busy, tensor, DRAM, watts

One call a step, and about three microseconds of it; nothing is counted by the token.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from mock_engine.bucket_counts import BucketCounts
from mock_engine.core import Step
from mock_engine.gpu_power import GPU_POWER
from mock_engine.gpu_work import GpuWork
from mock_engine.profile import Profile

_WINDOW_S = 1.0  # real seconds over which shares are means, as DCGM's are over about as many


class Shares(NamedTuple):
    """Of each GPU, over the window: shares from 0 to 1 of the time and of the data sheet, and the mean power."""

    busy: float
    tensor: float
    dram: float
    watts: float | None  # of GPUs whose power is known


class _Done(NamedTuple):
    end_s: float
    seconds: float
    flops: float
    dram_bytes: float
    extra_joules: float  # above what an idle GPU would have taken


class StepStats:
    """Written on the drive's loop, read on any thread; a reader may see all but the last step."""

    def __init__(self, profile: Profile, speedup_ratio: float, histograms: dict[str, BucketCounts]) -> None:
        """Fills "step_tokens" and "step_s" of `histograms`, where they are."""
        self.num_steps = 0
        self.busy_s = 0.0  # model seconds, as everywhere here
        self.nvlink_bytes = 0.0  # that each GPU has sent
        self._extra_joules = 0.0
        self._work = GpuWork(profile.roofline)
        self._datasheet = profile.datasheet
        self._power = GPU_POWER.get(profile.gpu)
        self.set_pace(speedup_ratio)
        self._recent: deque[_Done] = deque()
        self._step_tokens = histograms.get("step_tokens")
        self._step_s = histograms.get("step_s")

    def set_pace(self, speedup_ratio: float) -> None:
        """How many model seconds pass in a real one; from now on the window is of so many."""
        self._window_s = _WINDOW_S * (speedup_ratio or 1.0)

    def add(self, step: Step, end_s: float) -> None:
        """A step is over."""
        load, seconds = step.schedule.load, step.seconds
        work = self._work.of(load)
        extra_joules = 0.0
        if self._power is not None:
            tensor = work.flops / seconds / self._datasheet.flops_per_s
            dram = work.dram_bytes / seconds / self._datasheet.memory_bytes_per_s
            extra_joules = (self._power.watts(tensor, dram) - self._power.idle_w) * seconds
        self.num_steps += 1
        self.busy_s += seconds
        self.nvlink_bytes += work.nvlink_bytes
        self._extra_joules += extra_joules
        recent = self._recent
        recent.append(_Done(end_s, seconds, work.flops, work.dram_bytes, extra_joules))
        while recent[0].end_s <= end_s - self._window_s:
            recent.popleft()
        if self._step_tokens is not None:
            self._step_tokens.add(load.num_tokens)
        if self._step_s is not None:
            self._step_s.add(seconds)

    def shares(self, now_s: float) -> Shares:
        """Means over the window that ends now. A step that is under way counts when it is over."""
        start_s = now_s - self._window_s
        busy_s = flops = dram_bytes = extra_joules = 0.0
        for done in self._recent.copy():
            inside_s = min(done.end_s, now_s) - max(done.end_s - done.seconds, start_s)
            if inside_s > 0:
                part = inside_s / done.seconds
                busy_s += inside_s
                flops += done.flops * part
                dram_bytes += done.dram_bytes * part
                extra_joules += done.extra_joules * part
        window_s = self._window_s
        return Shares(
            min(1.0, busy_s / window_s),
            min(1.0, flops / window_s / self._datasheet.flops_per_s),
            min(1.0, dram_bytes / window_s / self._datasheet.memory_bytes_per_s),
            None if self._power is None else self._power.idle_w + extra_joules / window_s,
        )

    def joules(self, now_s: float) -> float | None:
        """What each GPU has taken since the model's time began."""
        return None if self._power is None else self._power.idle_w * now_s + self._extra_joules
