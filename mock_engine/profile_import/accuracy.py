"""
How well a profile's tables predict what is not in them.

    leave_one_out(profile)      {"linear": 0.012, "decode_attention": 0.004, ...}

Each point inside the measured range is left out in turn and predicted from the
others; the error counts as a share of the whole pass that the point belongs to.
This is the error of interpolating, not that of the measurement.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from mock_engine.latency_table import LatencyTable
from mock_engine.profile import Profile
from mock_engine.roofline import smooth_max
from mock_engine.step import PrefillChunk, StepLoad
from mock_engine.timing import TimingModel

FloatArray = NDArray[np.float64]

MIN_POINTS = 3  # fewer say nothing
HEAD_CONTEXT_TOKENS = 1024  # of each sequence in the pass that a point of `head` belongs to


def _prefill(new_tokens: int, past_tokens: int = 0) -> StepLoad:
    return StepLoad((PrefillChunk(new_tokens, past_tokens),), 0, 0)


def _decode(batch_size: int, context_tokens: int = HEAD_CONTEXT_TOKENS) -> StepLoad:
    return StepLoad((), batch_size, batch_size * context_tokens)


# The pass that a table's point is part of.
PASS_OF: dict[str, Callable[..., StepLoad]] = {
    "linear": _prefill,
    "communication": _prefill,
    "head": _decode,
    "prefill_attention": _prefill,
    "decode_attention": _decode,
    "prefill": _prefill,
    "decode": _decode,
}


def leave_one_out(profile: Profile) -> dict[str, float]:
    """Median |predicted - measured| / pass by table; a table with too few points inside the others is absent."""
    timing = TimingModel(profile)
    errors = {}
    for name, table in profile.latency.items():
        pass_s = [timing.step_s(PASS_OF[name](*(int(value) for value in point))) for point in table.points]
        missed = np.abs(left_out(table, getattr(profile.roofline, f"{name}_s")) - table.seconds) / pass_s
        if np.sum(~np.isnan(missed)) >= MIN_POINTS:
            errors[name] = round(float(np.nanmedian(missed)), 4)
    return errors


def left_out(table: LatencyTable, roofline_s: Callable[..., FloatArray]) -> FloatArray:
    """Seconds at each point as the others predict it, shape (n,); NaN where it does not lie among them."""
    bound_s = smooth_max(roofline_s(*table.points.T), np.min(table.seconds))
    predicted_s = bound_s * np.exp(table.left_out(np.log(table.seconds / bound_s)))
    is_among = [table.without(index).covers(*point) for index, point in enumerate(table.points)]
    return np.where(is_among, predicted_s, np.nan)
