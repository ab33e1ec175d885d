"""
How TTFT and ITL of a replay move with the parameters.

    slopes = step_slopes(parameters, values, loads)         of the passes: seconds for each unit of a parameter
    ttft, itl = request_slopes(replayed, parameters, slopes)

Differences of whole replays would be noise: a pass that is a little longer lets another request in, and everything
after it is another story. So the story is kept, who is in which pass, and only the passes' times move. In a closed loop
that is what happens on average; in an open one, where slower passes also are fuller, it is too little, and the fit
takes a few more rounds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mock_engine.profile_fit.parameters import CURVES, DECODE_ATTENTION, MATRICES, Curve, Parameters
from mock_engine.profile_fit.replay import Replay
from mock_engine.step import StepLoad
from mock_engine.timing import TimingModel

FloatArray = NDArray[np.float64]

_CORRECTION_STEP = 0.05  # to either side: where `timing` takes out dips, what holds on average
_OVERHEAD_STEP = 0.05  # of the prior's standard deviation


def step_slopes(parameters: Parameters, values: FloatArray, loads: Sequence[StepLoad]) -> FloatArray:
    """Slope of the seconds of a pass of each load, shape (loads, values)."""
    base = parameters.apply(values)
    timing = TimingModel(base)

    def slope(which: NDArray[np.int64], step: float) -> FloatArray:
        """Of the seconds, when these values move together."""
        lowest = np.maximum(values[which] - step, parameters.at_least[which])
        moved = (parameters.apply(_with(values, which, side), like=base) for side in (lowest, values[which] + step))
        low_s, high_s = (step_times(TimingModel(each, like=timing), loads) for each in moved)
        return np.asarray((high_s - low_s) / (values[which] + step - lowest)[0])

    slopes = np.zeros((len(loads), len(values)))
    at = 0
    for curve in CURVES:
        own = np.arange(at, at + len(curve.knots))
        at += len(own)
        if curve is MATRICES or parameters.profile.tables == "steps":
            for each in own:
                slopes[:, each] = slope(np.array([each]), _CORRECTION_STEP)
        else:
            # Laying attention out is slow, and a load sees it at one place: the share of each knot there is known.
            slopes[:, own] = curve.shares(_places(curve, loads)) * slope(own, _CORRECTION_STEP)[:, np.newaxis]
    for index, overhead in enumerate(parameters.overheads, at):
        if overhead.is_in_steps:
            slopes[:, index] = slope(np.array([index]), _OVERHEAD_STEP * overhead.sd)
    return slopes


def _places(curve: Curve, loads: Sequence[StepLoad]) -> FloatArray:
    """Where on the axis of an attention curve a pass of each load is; of several prompts, where the longest is."""
    if curve is DECODE_ATTENTION:
        return np.array([float(load.context_tokens) for load in loads])
    return np.array([float(max((sum(chunk) for chunk in load.prefill_chunks), default=1)) for load in loads])


def _with(values: FloatArray, which: NDArray[np.int64], new: FloatArray) -> FloatArray:
    changed = values.copy()
    changed[which] = new
    return changed


def step_times(timing: TimingModel, loads: Sequence[StepLoad]) -> FloatArray:
    """Seconds of a pass of each load."""
    return np.array([timing.step_s(load) for load in loads])


def request_slopes(replayed: Replay, parameters: Parameters, slopes: FloatArray) -> tuple[FloatArray, FloatArray]:
    """
    Slopes of TTFT and of ITL of each request, shape (requests, values) each.

    `slopes` has a row for each entry of `replayed.steps`.
    """
    steps = replayed.steps
    passed = np.vstack([np.zeros(slopes.shape[1]), np.cumsum(slopes * steps.counts[:, np.newaxis], axis=0)])

    def until(moments_s: FloatArray) -> FloatArray:
        """Slopes of all passes before these moments together; of the one under way the share that is over."""
        at = np.searchsorted(steps.end_s, moments_s, side="right")
        inside = np.minimum(at, len(steps.end_s) - 1)
        lasted_s = np.maximum(steps.end_s[inside] - steps.start_s[inside], 1e-12)
        share = np.clip((moments_s - steps.start_s[inside]) / lasted_s, 0.0, 1.0)
        share = np.where(at < len(steps.end_s), share, 0.0)
        return np.asarray(passed[at] + share[:, np.newaxis] * (passed[inside + 1] - passed[inside]))

    first, last = until(replayed.first_token_s), until(replayed.last_token_s)
    ttft = first - until(replayed.queued_s)
    requests = replayed.run.requests[: len(replayed.ttft_s)]
    for index, overhead in enumerate(parameters.overheads, parameters.num_corrections):
        if overhead.key == "overhead_request_s":
            ttft[:, index] += 1.0
        elif overhead.key == "overhead_per_prompt_token_s":
            ttft[:, index] += [request.isl_tokens for request in requests]
    gaps = np.array([max(request.osl_tokens - 1, 1) for request in requests])
    return ttft, (last - first) / gaps[:, np.newaxis]
