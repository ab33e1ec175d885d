"""
Functions of one or two load figures that never fall and have no jumps.

    surface = MonotoneSurface(x_knots, y_knots, seconds)
    surface(x, y)

Measurements have small dips; a queue simulated on top of them would reward a
larger batch now and then. `in_order` takes dips out of measured points, and
`between_points` out of a prediction around them, without moving the points. Linear
interpolation between values that never fall never falls either. Beyond the last
knot the value grows in proportion. One call takes about a microsecond: plain
lists and `bisect`, because NumPy is slow on single numbers.
"""

from __future__ import annotations

from bisect import bisect_right

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

KNOTS_PER_OCTAVE = 8


def knots_up_to(limit: float, measured: FloatArray) -> FloatArray:
    """Ascending knots from the smallest measured value (at most 1) to `limit`: the measured ones and a log grid."""
    steps = int(np.ceil(np.log2(limit) * KNOTS_PER_OCTAVE)) + 1
    grid = np.round(np.geomspace(1.0, limit, steps))
    return np.array(sorted({*grid.tolist(), *measured[measured <= limit].tolist()}))


def in_order(points: FloatArray, values: FloatArray) -> FloatArray:
    """
    `values` (shape (n,), above 0) at `points` (shape (n, axes)), moved so that none is below
    that of a point which is smaller or equal on every axis.

    A value out of order comes to lie half way, in the logarithm, between the largest
    before and the smallest after it; the others stay as they are.
    """
    is_after = (points[:, np.newaxis] >= points[np.newaxis]).all(axis=2)  # [i, j]: i is at or after j
    above = np.where(is_after, values[np.newaxis], -np.inf).max(axis=1)
    below = np.where(is_after.T, values[np.newaxis], np.inf).min(axis=1)
    return np.where(above == below, values, np.sqrt(above * below))


def without_dips(values: FloatArray) -> FloatArray:
    """The same for values on a grid (any shape, 0 allowed), along each of its axes."""
    above, below = _running(values, np.maximum), _running_back(values, np.minimum)
    return np.where(above == below, values, np.sqrt(above * below))


def between_points(predicted: FloatArray, measured: FloatArray) -> FloatArray:
    """
    `predicted` (on a grid) made to fall nowhere and to meet `measured`: same shape, NaN where nothing was
    measured, in order elsewhere. What the points before and after allow is kept; then dips are taken out.
    """
    at_least = _running(np.where(np.isnan(measured), -np.inf, measured), np.maximum)
    at_most = _running_back(np.where(np.isnan(measured), np.inf, measured), np.minimum)
    return without_dips(np.clip(predicted, at_least, at_most))


def _running(values: FloatArray, ufunc: np.ufunc) -> FloatArray:
    """Accumulated from the start along each axis."""
    for axis in range(values.ndim):
        values = ufunc.accumulate(values, axis=axis)
    return values


def _running_back(values: FloatArray, ufunc: np.ufunc) -> FloatArray:
    """Accumulated from the end along each axis."""
    return np.flip(_running(np.flip(values), ufunc))


class MonotoneCurve:
    """A function of one variable; `values` (not negative, in order) are given at `knots` (ascending)."""

    def __init__(self, knots: FloatArray, values: FloatArray) -> None:
        self._knots: list[float] = knots.tolist()
        self._values: list[float] = values.tolist()
        self._knots_array = knots
        self._values_array = values

    def __call__(self, x: float) -> float:
        knots, values = self._knots, self._values
        if x >= knots[-1]:
            return values[-1] * (x / knots[-1])
        if x <= knots[0]:
            return values[0]
        i = bisect_right(knots, x) - 1
        low = values[i]
        return low + (values[i + 1] - low) * (x - knots[i]) / (knots[i + 1] - knots[i])

    def many(self, x: FloatArray) -> FloatArray:
        """The same for an array in ascending order, to the last bit."""
        first, last = float(x[0]), float(x[-1])
        j = bisect_right(self._knots, first) - 1
        if 0 <= j < len(self._knots) - 1 and first > self._knots[0] and last < self._knots[j + 1]:
            # All between two knots, as decode steps in a row mostly are.
            below, start = self._values[j], self._knots[j]
            return np.asarray(below + (self._values[j + 1] - below) * (x - start) / (self._knots[j + 1] - start))
        knots, values = self._knots_array, self._values_array
        i = knots.searchsorted(x, side="right")
        i -= 1
        if i[-1] >= len(knots) - 1 or x[0] <= knots[0]:
            return np.array([self(each) for each in x.tolist()])  # partly outside; rare, and told apart one by one
        low, left = values[i], knots[i]
        i += 1
        return np.asarray(low + (values[i] - low) * (x - left) / (knots[i] - left))


class MonotoneSurface:
    """A function of two variables; `values[i, j]` (not negative, in order) is given at `x_knots[i], y_knots[j]`."""

    def __init__(self, x_knots: FloatArray, y_knots: FloatArray, values: FloatArray) -> None:
        self._x_knots: list[float] = x_knots.tolist()
        self._y_knots: list[float] = y_knots.tolist()
        self._values: list[list[float]] = values.tolist()
        self._y_knots_array = y_knots
        self._values_array = values
        self._rows: dict[float, MonotoneCurve] = {}

    def __call__(self, x: float, y: float) -> float:
        x_knots, y_knots = self._x_knots, self._y_knots
        beyond = 1.0
        if x > x_knots[-1]:
            beyond = x / x_knots[-1]
        if y > y_knots[-1]:
            beyond *= y / y_knots[-1]
        x = min(max(x, x_knots[0]), x_knots[-1])
        y = min(max(y, y_knots[0]), y_knots[-1])
        i = min(bisect_right(x_knots, x), len(x_knots) - 1) - 1
        j = min(bisect_right(y_knots, y), len(y_knots) - 1) - 1
        v = (y - y_knots[j]) / (y_knots[j + 1] - y_knots[j])
        low, high = self._values[i], self._values[i + 1]
        at_low = low[j] + (low[j + 1] - low[j]) * v
        at_high = high[j] + (high[j + 1] - high[j]) * v
        return beyond * (at_low + (at_high - at_low) * (x - x_knots[i]) / (x_knots[i + 1] - x_knots[i]))

    def at(self, x: float) -> MonotoneCurve:
        """The function of `y` alone that this is at one `x`; kept, for many looks at few places."""
        if x not in self._rows:
            self._rows[x] = self._row(x)
        return self._rows[x]

    def _row(self, x: float) -> MonotoneCurve:
        x_knots = self._x_knots
        beyond = max(1.0, x / x_knots[-1])
        x = min(max(x, x_knots[0]), x_knots[-1])
        i = min(bisect_right(x_knots, x), len(x_knots) - 1) - 1
        low, high = self._values_array[i], self._values_array[i + 1]
        share = (x - x_knots[i]) / (x_knots[i + 1] - x_knots[i])
        return MonotoneCurve(self._y_knots_array, beyond * (low + (high - low) * share))
