"""
How late tokens go out, as a histogram.

Lateness is the time a token was sent minus the time the model said it was due.
It is what the host adds to the modelled GPU; a run in which it is large says
more about the host than about the profile.
"""

from __future__ import annotations

import math

import numpy as np

_FIRST_EDGE_S = 10e-6
_EDGES_PER_DECADE = 20
_NUM_DECADES = 7  # up to 100 s


class LatenessHistogram:
    """Counts in logarithmic buckets from 10 us to 100 s, 12 % wide; quantiles are exact to one bucket."""

    def __init__(self) -> None:
        self._counts = np.zeros(_EDGES_PER_DECADE * _NUM_DECADES + 2, dtype=np.int64)

    @property
    def num_tokens(self) -> int:
        return int(self._counts.sum())

    def add(self, lateness_s: float) -> None:
        """Count one token."""
        if lateness_s <= _FIRST_EDGE_S:
            bucket = 0
        else:
            bucket = min(len(self._counts) - 1, 1 + int(math.log10(lateness_s / _FIRST_EDGE_S) * _EDGES_PER_DECADE))
        self._counts[bucket] += 1

    def quantile_s(self, quantile: float) -> float | None:
        """The upper edge, in seconds, of the bucket that holds the quantile (0 to 1). None without tokens."""
        total = self.num_tokens
        if total == 0:
            return None
        rank = max(1, math.ceil(quantile * total))
        bucket = int(np.searchsorted(np.cumsum(self._counts), rank))
        return float(_FIRST_EDGE_S * 10 ** (bucket / _EDGES_PER_DECADE))

    def rows(self) -> list[tuple[float, int]]:
        """(upper edge in seconds, tokens) of every bucket that is not empty."""
        return [
            (float(_FIRST_EDGE_S * 10 ** (bucket / _EDGES_PER_DECADE)), int(count))
            for bucket, count in enumerate(self._counts)
            if count
        ]
