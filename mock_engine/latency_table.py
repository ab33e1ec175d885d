"""
Measured step times as they lie in a profile: one CSV file, one row a measured point.

    table = read_table(folder / "decode.csv", DECODE_COLUMNS)
    table.covers(batch_size, context)              inside what was measured?
    table.interpolate(log_residual, x, y)          the measurement's correction at any point

A table has one axis (`tokens`) or two (`batch_size`, `context_tokens_per_sequence`).
Two axes need not make a full grid: memory ends the rows of large batches early,
and a sweep over KV usage has its own contexts for each batch size.
"""

from __future__ import annotations

import csv
import math
from bisect import bisect_left
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mock_engine.errors import ProfileError

FloatArray = NDArray[np.float64]

TIME_COLUMN = "ms"
MAX_AXIS_VALUE = 2**18  # tokens, sequences: as far as step times are laid out


# Kriging of what two axes give: how like each other two measurements are by the octaves between them.
CORRELATION_OCTAVES = 2.5
CORRECTION_SD = 0.1  # of the corrections, in the logarithm, around ...
LEVEL_SD = 0.3  # ... a level that all of a table share
NOISE_SD = 0.002  # of one measurement, repeated


def matern(octaves: FloatArray, length_octaves: float) -> FloatArray:
    """Matern's correlation of order 3/2: smooth, but not infinitely so, as times of kernels are."""
    scaled = math.sqrt(3.0) / length_octaves * octaves
    return np.asarray((1.0 + scaled) * np.exp(-scaled))


def _likeness(octaves: FloatArray) -> FloatArray:
    return np.asarray(CORRECTION_SD**2 * matern(octaves, CORRELATION_OCTAVES) + LEVEL_SD**2)


def _octaves_between(places: FloatArray, points: FloatArray) -> FloatArray:
    """Distances on logarithmic axes, shape (places, points)."""
    x, y = (np.subtract.outer(np.log2(1.0 + places[:, i]), np.log2(1.0 + points[:, i])) for i in (0, 1))
    return np.asarray(np.hypot(x, y))


class _Hull:
    """The convex hull of points with one or two coordinates, sorted by the first."""

    def __init__(self, points: FloatArray) -> None:
        pairs = [(x, y) for x, *rest in points.tolist() for y in rest or [0.0]]
        self._low = _convex_chain(pairs)
        self._high = [(x, -y) for x, y in _convex_chain([(x, -y) for x, y in pairs])]

        self._spans: dict[float, tuple[float, float]] = {}

    def holds(self, x: float, y: float) -> bool:
        if x not in self._spans:  # looked up over and over: a simulation has few batch sizes, and millions of steps
            self._spans[x] = self._span(x)
        low, high = self._spans[x]
        return low <= y <= high

    def _span(self, x: float) -> tuple[float, float]:
        """From where to where it reaches at `x`; to nowhere if not at all."""
        slack = 1e-9  # of rounding, on logarithms
        first, last = self._low[0][0], self._low[-1][0]
        if not first - slack <= x <= last + slack:
            return math.inf, -math.inf
        return _on_chain(self._low, x) - slack, _on_chain(self._high, x) + slack


def _convex_chain(pairs: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Corners of the lower hull (Andrew's monotone chain), each x once."""
    chain: list[tuple[float, float]] = []
    for x, y in sorted(pairs):
        if chain and chain[-1][0] == x:
            continue
        while len(chain) >= 2:
            (x0, y0), (x1, y1) = chain[-2:]
            if (x1 - x0) * (y - y0) > (y1 - y0) * (x - x0):
                break
            chain.pop()
        chain.append((x, y))
    return chain


def _on_chain(chain: list[tuple[float, float]], x: float) -> float:
    at = min(max(bisect_left(chain, (x, -math.inf)), 1), len(chain) - 1)
    if at == 0:
        return chain[0][1]
    (x0, y0), (x1, y1) = chain[at - 1 : at + 1]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


@dataclass(frozen=True, slots=True)
class LatencyTable:
    """
    Measured points of one table.

    `points` has shape (n, 1) or (n, 2), sorted, each point once; `seconds` shape (n,), all above 0.
    """

    name: str
    columns: tuple[str, ...]
    points: FloatArray
    seconds: FloatArray
    _hull: _Hull = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hull", _Hull(np.log1p(self.points)))

    def axis_values(self, axis: int) -> FloatArray:
        """The distinct values on one axis, ascending."""
        return np.array(sorted(set(self.points[:, axis].tolist())))  # np.unique would load numpy.ma, for 15 ms

    def covers(self, x: float, y: float = 0.0) -> bool:
        """Whether a point lies among the measured ones: in their convex hull on logarithmic axes."""
        return self._hull.holds(math.log1p(x), math.log1p(y))

    def interpolate(self, values: FloatArray, x: FloatArray, y: FloatArray | None = None) -> FloatArray:
        """
        `values`, given at the points, at other places: with one axis linear in the logarithm of (1 + axis), with two by
        kriging (the mean of a Gaussian process, see `_likeness`), which needs no grid of points.

        `values` has shape (n,); `x` and `y` any shape, the result the same. Beyond the
        first and last value of an axis, what holds there is kept.
        """
        if y is None:
            return np.asarray(np.interp(np.log1p(x), np.log1p(self.axis_values(0)), values))
        places = np.column_stack([np.ravel(x), np.ravel(y)])
        places = np.clip(places, self.points.min(axis=0), self.points.max(axis=0))
        places, index = np.unique(places, axis=0, return_inverse=True)
        level = np.median(values)
        weights = np.linalg.solve(self._likeness_of_points(), values - level)
        found = level + _likeness(_octaves_between(places, self.points)) @ weights
        return np.asarray(found[np.ravel(index)].reshape(np.shape(x)))

    def left_out(self, values: FloatArray) -> FloatArray:
        """What `interpolate` says of each point from all the others, shape (n,)."""
        if len(self.columns) == 1:
            x = np.log1p(self.points[:, 0])
            return np.array([np.interp(x[i], np.delete(x, i), np.delete(values, i)) for i in range(len(x))])
        # The inverse for all points holds those for all but one (Dubrule, Mathematical Geology 15, 1983).
        inverse = np.linalg.inv(self._likeness_of_points())
        return np.asarray(values - inverse @ (values - np.median(values)) / np.diag(inverse))

    def _likeness_of_points(self) -> FloatArray:
        likeness = _likeness(_octaves_between(self.points, self.points))
        likeness[np.diag_indices_from(likeness)] += NOISE_SD**2
        return likeness

    def without(self, index: int) -> LatencyTable:
        """The same table less one point (for leave-one-out checks)."""
        return make_table(
            self.name, self.columns, np.delete(self.points, index, axis=0), np.delete(self.seconds, index)
        )


def make_table(name: str, columns: tuple[str, ...], points: FloatArray, seconds: FloatArray) -> LatencyTable:
    """A table of `points` (shape (n, axes), any order) and `seconds` (shape (n,)). Values are checked."""
    order = np.lexsort(tuple(points[:, axis] for axis in reversed(range(points.shape[1]))))
    return LatencyTable(name, columns, points[order], seconds[order])


def read_table(path: Path, columns: tuple[str, ...]) -> LatencyTable:
    """
    The table in a CSV file whose header is `columns` followed by `ms`.

    Raises `ProfileError` with file, line and column for the first thing wrong.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
    except FileNotFoundError:
        raise ProfileError(f"{path}: the file is missing; the profile needs it") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ProfileError(f"{path}: cannot be read as CSV: {error}") from None
    header = (*columns, TIME_COLUMN)
    if not rows or tuple(rows[0]) != header:
        found = ",".join(rows[0]) if rows else "nothing"
        raise ProfileError(f"{path}, line 1: found the header {found!r}; allowed is {','.join(header)!r}")
    seen: dict[tuple[float, ...], int] = {}
    seconds = []
    for number, cells in enumerate(rows[1:], start=2):
        if len(cells) != len(header):
            raise ProfileError(f"{path}, line {number}: found {len(cells)} cells; needed are {len(header)}")
        *place, milliseconds = (_number(path, number, column, cell) for column, cell in zip(header, cells, strict=True))
        if tuple(place) in seen:
            raise ProfileError(f"{path}, line {number}: the same point as line {seen[tuple(place)]}; keep one of them")
        seen[tuple(place)] = number
        seconds.append(milliseconds / 1e3)
    if len(seen) < 2:
        raise ProfileError(f"{path}: found {len(seen)} measured points; at least 2 are needed")
    return make_table(path.name, columns, np.asarray(list(seen), dtype=np.float64), np.asarray(seconds))


def write_table(path: Path, table: LatencyTable) -> None:
    """Write a table in the form that `read_table` reads: whole numbers for the axes, ms with 6 digits."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*table.columns, TIME_COLUMN])
        for point, seconds in zip(table.points, table.seconds, strict=True):
            writer.writerow([*(int(value) for value in point), f"{seconds * 1e3:.6g}"])


def _number(path: Path, line: int, column: str, cell: str) -> float:
    """One cell as a number: ms above 0, anything else a count."""
    allowed = "a number above 0" if column == TIME_COLUMN else f"a whole number, 0 to {MAX_AXIS_VALUE:,}"
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    is_count = 0 <= value <= MAX_AXIS_VALUE and value.is_integer()
    is_allowed = (math.isfinite(value) and value > 0) if column == TIME_COLUMN else is_count
    if not is_allowed:
        raise ProfileError(f"{path}, line {line}, column {column}: found {cell!r}; allowed is {allowed}")
    return value
