"""
Measured step times as they lie in a profile: one CSV file, one row a measured point.

    table = read_table(folder / "decode.csv", DECODE_COLUMNS)
    table.covers(batch_size, context)              inside what was measured?
    table.interpolate(log_residual, x, y)          the measurement's correction at any point

A table has one axis (`tokens`) or two (`batch_size`, `context_tokens_per_sequence`).
Two axes need not make a full grid: memory ends the rows of large batches early,
and a sweep over KV usage has its own contexts for each batch size. Holes are
filled from what was measured around them.
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


def _fill(x_values: FloatArray, y_values: FloatArray, grid: FloatArray) -> FloatArray:
    """
    `grid` with its NaNs filled: each becomes the mean of its neighbours, the nearer the
    weightier (a discrete Laplace equation, as for heat in a plate held at the measured points).
    """
    holes = np.argwhere(np.isnan(grid))
    number = {(int(i), int(j)): k for k, (i, j) in enumerate(holes)}
    matrix, right = np.zeros((len(holes), len(holes))), np.zeros(len(holes))
    for (i, j), k in number.items():
        for i_near, j_near in ((i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)):
            if not (0 <= i_near < len(x_values) and 0 <= j_near < len(y_values)):
                continue
            weight = 1.0 / abs(x_values[i] - x_values[i_near] + y_values[j] - y_values[j_near])
            matrix[k, k] += weight
            if (i_near, j_near) in number:
                matrix[k, number[i_near, j_near]] -= weight
            else:
                right[k] += weight * grid[i_near, j_near]
    filled = grid.copy()
    if len(holes):
        filled[holes[:, 0], holes[:, 1]] = np.linalg.solve(matrix, right)
    return filled


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
        `values`, given at the points, at other places: linear in the logarithm of (1 + axis).

        `values` has shape (n,); `x` and `y` any shape, the result the same. Beyond the
        first and last value of an axis, what holds there is kept.
        """
        x_values = np.log1p(self.axis_values(0))
        if y is None:
            return np.asarray(np.interp(np.log1p(x), x_values, values))
        y_values = np.log1p(self.axis_values(1))
        grid = _fill(x_values, y_values, self._on_grid(values))
        row = np.interp(np.log1p(x), x_values, np.arange(len(x_values)))
        column = np.interp(np.log1p(y), y_values, np.arange(len(y_values)))
        i = np.minimum(row.astype(np.int64), max(len(x_values) - 2, 0))
        j = np.minimum(column.astype(np.int64), max(len(y_values) - 2, 0))
        i_next, j_next = np.minimum(i + 1, len(x_values) - 1), np.minimum(j + 1, len(y_values) - 1)
        u, v = row - i, column - j
        low = grid[i, j] * (1 - v) + grid[i, j_next] * v
        high = grid[i_next, j] * (1 - v) + grid[i_next, j_next] * v
        return np.asarray(low * (1 - u) + high * u)

    def _on_grid(self, values: FloatArray) -> FloatArray:
        """`values` on the grid of both axes' values, NaN where nothing was measured."""
        grid = np.full((len(self.axis_values(0)), len(self.axis_values(1))), np.nan)
        at = [np.searchsorted(self.axis_values(axis), self.points[:, axis]) for axis in (0, 1)]
        grid[at[0], at[1]] = values
        return grid

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
