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

from mock_engine.profile import Profile
from mock_engine.step import PrefillChunk, StepLoad
from mock_engine.timing import TimingModel, predict

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
        roofline_s = getattr(profile.roofline, f"{name}_s")
        missed = []
        for index, point in enumerate(table.points):
            others = table.without(index)
            if others.covers(*point):
                predicted_s = predict(others, roofline_s, *(point[:, np.newaxis]))[0]
                pass_s = timing.step_s(PASS_OF[name](*(int(value) for value in point)))
                missed.append(abs(predicted_s - table.seconds[index]) / pass_s)
        if len(missed) >= MIN_POINTS:
            errors[name] = round(float(np.median(missed)), 4)
    return errors
