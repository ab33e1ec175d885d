"""
A histogram as Prometheus wants it: counts by upper edge, and a sum.

    counts = BucketCounts((0.1, 0.5, 1.0))
    counts.add(0.3)                     one observation
    counts.add_many(gaps_s)             many at once, at a fraction of the cost each
    counts.cumulative()                 [("0.1", 0), ("0.5", 1), ("1.0", 1), ("+Inf", 1)]

`prometheus_client.Histogram` takes a lock and walks its buckets for every observation; an engine that makes ten
thousand tokens a second on two cores cannot afford that for each of them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray


class BucketCounts:
    """Observations in buckets; a bucket counts what is at most its edge. Written by one thread at a time."""

    __slots__ = ("_counts", "_edges", "_edges_array", "sum")

    def __init__(self, edges: Sequence[float]) -> None:
        """`edges` rise; one more bucket, without an edge, takes what is above the last."""
        self._edges = tuple(edges)
        self._edges_array = np.asarray(self._edges, dtype=np.float64)
        self._counts = [0] * (len(self._edges) + 1)
        self.sum = 0.0

    @property
    def count(self) -> int:
        """Observations in all."""
        return sum(self._counts)

    def add(self, value: float) -> None:
        """Count one observation."""
        self._counts[bisect_left(self._edges, value)] += 1
        self.sum += value

    def add_many(self, values: Sequence[float] | NDArray[np.float64]) -> None:
        """Count each of `values`: what `add` does for one after the other."""
        array = np.asarray(values, dtype=np.float64)
        if not len(array):
            return
        numbers = np.bincount(np.searchsorted(self._edges_array, array)).tolist()
        for place, number in enumerate(numbers):
            self._counts[place] += number
        self.sum += float(array.sum())

    def cumulative(self) -> list[tuple[str, int]]:
        """(upper edge as Prometheus writes it, observations up to it), the last for "+Inf"."""
        names = [*map(repr, map(float, self._edges)), "+Inf"]
        return list(zip(names, accumulate(self._counts), strict=True))
