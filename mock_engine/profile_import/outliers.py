"""
Points that cannot be right in a table of times: slower by far than what does more of everything.

    table, left_out = without_outliers(table)

The timing model takes small dips out by moving both sides of one. A single
outlier would then move many good points, so it is left out beforehand.
"""

from __future__ import annotations

import numpy as np

from mock_engine.latency_table import LatencyTable, make_table

TOO_SLOW = 1.25  # times as slow as a point that is no smaller on any axis


def without_outliers(table: LatencyTable) -> tuple[LatencyTable, int]:
    """
    The table without its outliers, and how many they were.

    Of all pairs out of order by more than a quarter, the point in most of them goes first, until there are none.
    """
    points, seconds = table.points, table.seconds
    is_after = (points[:, np.newaxis] >= points[np.newaxis]).all(axis=2)  # [i, j]: i is at or after j
    clashes = is_after & (seconds[:, np.newaxis] * TOO_SLOW < seconds[np.newaxis])
    clashes |= clashes.T
    kept = np.ones(len(seconds), dtype=bool)
    while (counts := clashes[:, kept].sum(axis=1) * kept).any():
        kept[np.argmax(counts)] = False
    left_out = int((~kept).sum())
    return (make_table(table.name, table.columns, points[kept], seconds[kept]) if left_out else table), left_out
