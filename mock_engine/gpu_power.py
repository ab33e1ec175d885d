"""
What a GPU draws: an estimate from how busy it is.

    power = GPU_POWER["h100-sxm"]
    power.watts(tensor_share, dram_share)      in a pass
    power.idle_w                               between passes

Of the power between idle and the limit (TDP), a pass takes

    0.13 + 0.84 * (memory traffic / data sheet) + 1.66 * (arithmetic / data sheet)

and no more than all of it. Fitted by least squares on Splitwise's measurements (Mutinifni/splitwise-sim 8f99e7d,
data/perf_model.csv, MIT): Llama-2-70B on 2, 4 and 8 A100-SXM-80GB, 33 settings for prompts and 27 for decoding, power
as shares of the limit. The median error is 2 % of the limit, the largest 42 % (prompts of 512 tokens in batches of 16,
which ran slower there than their arithmetic explains, and drew all the same). tests/reference/power_a100.csv has the
rows.

No H100 or H200 is in that source: for them the coefficients are carried over, an estimate that nothing has checked.
Idle is 17 % of the limit, the lowest average in the same file (68 W of 400), and assumed for the others too.
"""

from __future__ import annotations

from dataclasses import dataclass

_BUSY, _PER_DRAM_SHARE, _PER_TENSOR_SHARE = 0.129, 0.842, 1.656
_IDLE_SHARE = 0.17
# Air-cooled in a data centre. Between idle and the limit the temperature is taken to follow the power at once.
_IDLE_C, _LIMIT_C = 32.0, 68.0


@dataclass(frozen=True, slots=True)
class GpuPower:
    """Power and clocks of one kind of GPU, from its data sheet: the limit (TDP) in watts, highest clocks in MHz."""

    limit_w: float
    sm_clock_mhz: int
    memory_clock_mhz: int

    @property
    def idle_w(self) -> float:
        """With a model loaded and nothing to do."""
        return _IDLE_SHARE * self.limit_w

    def watts(self, tensor_share: float, dram_share: float) -> float:
        """In a pass that uses these shares of the data sheet's arithmetic and memory bandwidth."""
        share = _BUSY + _PER_DRAM_SHARE * dram_share + _PER_TENSOR_SHARE * tensor_share
        return self.idle_w + (self.limit_w - self.idle_w) * min(1.0, share)

    def celsius(self, watts: float) -> float:
        """The GPU's temperature at that power; a guess at a well-cooled machine."""
        return _IDLE_C + (_LIMIT_C - _IDLE_C) * max(0.0, watts - self.idle_w) / (self.limit_w - self.idle_w)


GPU_POWER = {
    "h100-sxm": GpuPower(700, 1980, 2619),
    "h200-sxm": GpuPower(700, 1980, 3201),
    "a100-sxm": GpuPower(400, 1410, 1593),
}
