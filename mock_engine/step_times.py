"""
How long the steps of one engine take, one after the other.

    times = StepTimes(timing, jitter)
    times.step_s(load)                   the next step
    times.peek_decode_s(load, n)         the next n steps, if they only decode; then
    times.skip(n)                        those that were run are over

Step by step or many at once, the figures are the same to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mock_engine.step import StepLoad
from mock_engine.timing import StepJitter

FloatArray = NDArray[np.float64]


class Timing(Protocol):
    """What `timing.TimingModel` offers."""

    def step_s(self, load: StepLoad) -> float: ...

    def decode_run_s(self, batch_size: int, context_tokens: int, num_steps: int) -> FloatArray: ...

    def is_measured_at(self, load: StepLoad) -> bool: ...


class StepTimes:
    """
    The times of `timing`, each multiplied with a factor of `jitter`.

    `on_unmeasured` is called once, for the first load that lies outside what the profile measured.
    """

    def __init__(
        self, timing: Timing, jitter: StepJitter, on_unmeasured: Callable[[StepLoad], None] = lambda _: None
    ) -> None:
        self._timing = timing
        self._jitter = jitter
        self._on_unmeasured: Callable[[StepLoad], None] | None = on_unmeasured
        self._prefill_scale = self._decode_scale = 1.0

    def set_scale(self, prefill: float, decode: float) -> None:
        """From now on steps that only decode take `decode` times as long, and what prompts add to one, `prefill`."""
        self._prefill_scale, self._decode_scale = prefill, decode

    def set_jitter(self, jitter: StepJitter) -> None:
        """From now on these factors."""
        self._jitter = jitter

    def step_s(self, load: StepLoad) -> float:
        """Seconds of the next step."""
        self._check(load)
        seconds = self._timing.step_s(load)
        if self._prefill_scale != 1.0 or self._decode_scale != 1.0:
            seconds = self._scaled(load, seconds)
        return seconds * self._jitter.draw()

    def peek_decode_s(self, load: StepLoad, num_steps: int) -> FloatArray:
        """Seconds of each of the next steps, shape (num_steps,), if they only decode and the first has this load."""
        batch_size, context_tokens = load.decode_batch_size, load.context_tokens
        self._check(load)
        self._check(StepLoad((), batch_size, context_tokens + batch_size * (num_steps - 1)))
        seconds = self._timing.decode_run_s(batch_size, context_tokens, num_steps)
        if self._decode_scale != 1.0:
            seconds = seconds * self._decode_scale
        return seconds * self._jitter.peek(num_steps)

    def skip(self, num_steps: int) -> None:
        """So many of the steps that `peek_decode_s` has shown were run."""
        self._jitter.skip(num_steps)

    def _scaled(self, load: StepLoad, seconds: float) -> float:
        batch_size = load.decode_batch_size
        if not load.prefill_chunks:
            return seconds * self._decode_scale
        decode_s = (
            self._timing.step_s(StepLoad((), batch_size, load.context_tokens, load.num_draft_tokens))
            if batch_size
            else 0.0
        )
        return decode_s * self._decode_scale + (seconds - decode_s) * self._prefill_scale

    def _check(self, load: StepLoad) -> None:
        if self._on_unmeasured is not None and not self._timing.is_measured_at(load):
            self._on_unmeasured(load)
            self._on_unmeasured = None
