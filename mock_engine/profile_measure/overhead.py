"""
What whole passes take beyond the sum of their parts: so much a step, and so much a sequence.

    fit = fit_overhead(comparisons)
    fit.step_s, fit.per_seq_s
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mock_engine.step import StepLoad

FloatArray = NDArray[np.float64]


class Comparison(NamedTuple):
    """One whole pass as measured, and the sum of its parts as the profile's tables have it."""

    load: StepLoad
    whole_s: float
    sum_s: float

    @property
    def num_sequences(self) -> int:
        return len(self.load.prefill_chunks) + self.load.decode_batch_size


@dataclass(frozen=True, slots=True)
class OverheadFit:
    """Errors are of sum / whole - 1, before the overhead is added and after."""

    step_s: float
    per_seq_s: float
    errors_before: tuple[float, ...]
    errors_after: tuple[float, ...]

    @property
    def mean_before(self) -> float:
        return float(np.mean(np.abs(self.errors_before)))

    @property
    def mean_after(self) -> float:
        return float(np.mean(np.abs(self.errors_after)))


def fit_overhead(comparisons: list[Comparison]) -> OverheadFit:
    """The two figures, neither negative, that leave the smallest sum of squared relative errors."""
    whole_s = np.array([found.whole_s for found in comparisons])
    missing = 1 - np.array([found.sum_s for found in comparisons]) / whole_s
    columns = np.stack([1 / whole_s, np.array([found.num_sequences for found in comparisons]) / whole_s], axis=1)
    candidates = [np.zeros(2)]
    for used in ([0, 1], [0], [1]):  # the best fit lies inside, on one of the two edges, or at nothing
        solution = np.zeros(2)
        solution[used] = np.linalg.lstsq(columns[:, used], missing, rcond=None)[0]
        if (solution >= 0).all():
            candidates.append(solution)
    best = min(candidates, key=lambda solution: float(np.sum((columns @ solution - missing) ** 2)))
    return OverheadFit(
        step_s=float(best[0]),
        per_seq_s=float(best[1]),
        errors_before=tuple((-missing).tolist()),
        errors_after=tuple((columns @ best - missing).tolist()),
    )
