"""
What a run says, in few figures: the mean logarithm of ITL and of TTFT in groups of like requests.

    groups = group_requests(run, is_compared)
    residuals, sds = compare(groups, observed_values(run, n), replayed.values)

ITL is grouped by the mean context, TTFT by the tokens that were computed, and apart from the others those that
were sent before any was answered: they wait for each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mock_engine.profile_fit.observed import ObservedRun

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

_ITL_FLOOR = 0.01  # what the model as such is trusted to, a share
_TTFT_FLOOR = 0.015
_ITL_GROUPS, _TTFT_GROUPS, _FIRST_WAVE_GROUPS = 4, 12, 4
_MIN_IN_GROUP = 5


@dataclass(frozen=True, slots=True)
class Group:
    """Requests of one run whose ITL or TTFT is compared as one figure."""

    metric: str  # "ttft" or "itl"
    requests: IntArray  # their indices
    floor: float
    is_first_wave: bool
    is_mean: bool  # of the run only means are known: compare means, not means of logarithms

    def figure(self, values: FloatArray) -> float:
        """The logarithm of the mean, or the mean logarithm, of the group's values."""
        own = values[self.requests]
        return float(np.log(own.mean()) if self.is_mean else np.log(own).mean())

    def weights(self, values: FloatArray) -> FloatArray:
        """How much the figure moves when each of the group's values grows by a second."""
        own = values[self.requests]
        return np.full(len(own), 1 / own.sum()) if self.is_mean else 1 / (own * len(own))

    def sd(self, observed: FloatArray, replayed: FloatArray) -> float:
        """Standard deviation of the difference of both figures: chance, and the floor."""
        of_replay = np.log(replayed[self.requests])
        size = len(of_replay)
        chance = 0.0 if size < 2 else float(of_replay.var(ddof=1)) / size
        if not self.is_mean and size > 1:
            # Both had the same requests: what differs request by request is chance, what all share is not.
            chance = float((np.log(observed[self.requests]) - of_replay).var(ddof=1)) / size
        return float(np.sqrt(chance + self.floor**2))


def group_requests(run: ObservedRun, is_compared: NDArray[np.bool_]) -> list[Group]:
    """The groups among the requests of a replay."""
    requests = run.requests[: len(is_compared)]
    compared = np.flatnonzero(is_compared)
    new_tokens = np.array([request.new_tokens for request in requests])
    context = np.array([request.isl_tokens + request.osl_tokens / 2 for request in requests])
    with_itl = np.array([index for index in compared if requests[index].itl_s is not None], dtype=np.int64)
    if run.has_only_means:
        groups = [Group("ttft", compared, 2 * _TTFT_FLOOR, False, True)] if len(compared) else []
        return groups + ([Group("itl", with_itl, _ITL_FLOOR, False, True)] if len(with_itl) else [])
    found = [Group("itl", part, _ITL_FLOOR, False, False) for part in _parts(with_itl, context, _ITL_GROUPS)]
    first_wave = _first_wave(run, compared)
    later = np.setdiff1d(compared, first_wave)
    # Queueing is chaotic: the more are under way, the less does one run repeat another.
    floor = _TTFT_FLOOR * (1 + 0.25 * np.log2(run.concurrency))
    found += [Group("ttft", part, floor, False, False) for part in _parts(later, new_tokens, _TTFT_GROUPS)]
    order = np.arange(len(requests))
    found += [Group("ttft", part, floor, True, False) for part in _parts(first_wave, order, _FIRST_WAVE_GROUPS)]
    return found


def observed_values(run: ObservedRun, num_requests: int) -> dict[str, FloatArray]:
    """TTFT and ITL of the first requests, by metric; NaN for what one has not."""
    requests = run.requests[:num_requests]
    return {
        "ttft": np.array([request.ttft_s for request in requests]),
        "itl": np.array([np.nan if request.itl_s is None else request.itl_s for request in requests]),
    }


def compare(
    groups: Sequence[Group], observed: dict[str, FloatArray], replayed: dict[str, FloatArray]
) -> tuple[list[float], list[float]]:
    """Of each group, how far its figure of the run is above that of the replay, and how far it may be by chance."""
    pairs = [(group, observed[group.metric], replayed[group.metric]) for group in groups]
    return (
        [group.figure(seen) - group.figure(own) for group, seen, own in pairs],
        [group.sd(seen, own) for group, seen, own in pairs],
    )


def _first_wave(run: ObservedRun, compared: IntArray) -> IntArray:
    """Requests that were sent before any was answered; with a concurrency of 1 the first is one like all others."""
    if run.concurrency == 1:
        return compared[:0]
    first_end_s = min((request.start_s or 0.0) + request.latency_s for request in run.requests)
    if run.requests[0].start_s is None:
        return compared[compared < run.concurrency]
    return np.array([index for index in compared if (run.requests[index].start_s or 0.0) < first_end_s], dtype=np.int64)


def _parts(indices: IntArray, by: NDArray[np.int64] | FloatArray, most: int) -> list[IntArray]:
    """`indices`, sorted by their value of `by`, in up to `most` parts of about equal size."""
    if not len(indices):
        return []
    ordered = indices[np.argsort(by[indices], kind="stable")]
    num_parts = max(1, min(most, len(ordered) // _MIN_IN_GROUP))
    return [np.sort(part) for part in np.array_split(ordered, num_parts)]
