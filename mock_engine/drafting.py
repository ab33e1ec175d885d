"""
Step times of an engine that speculates: what its passes take, and drafting.

    timing = DraftedTiming(TimingModel(profile), speculation)

What the pass takes that verifies draft tokens, the timing model says: it knows of `StepLoad.num_draft_tokens`. Drafting
a token takes `draft_cost` of a decode pass of the same sequences, and draft tokens are made one after the other.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mock_engine.speculation import Speculation
from mock_engine.step import StepLoad
from mock_engine.step_times import Timing


class DraftedTiming:
    """The seconds of `timing`, and of drafting where a step has draft tokens."""

    def __init__(self, timing: Timing, speculation: Speculation) -> None:
        self._timing = timing
        self._share = speculation.num_tokens * speculation.draft_cost

    def step_s(self, load: StepLoad) -> float:
        """Seconds for the pass, and for drafting what the next one verifies."""
        seconds = self._timing.step_s(load)
        if load.num_draft_tokens and self._share:
            seconds += self._share * self._timing.step_s(StepLoad((), load.decode_batch_size, load.context_tokens))
        return seconds

    def decode_run_s(self, batch_size: int, context_tokens: int, num_steps: int) -> NDArray[np.float64]:
        """Passes in a row without draft tokens."""
        return self._timing.decode_run_s(batch_size, context_tokens, num_steps)

    def is_measured_at(self, load: StepLoad) -> bool:
        """Whether the pass itself lies within what was measured."""
        return self._timing.is_measured_at(load)
