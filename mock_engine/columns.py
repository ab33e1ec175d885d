"""
Exact statistics of more figures than fit in memory.

    columns = Columns(3)
    columns.add(1.0, 2.0, 3.0)                    a row
    for chunk in columns.chunks(): ...            all rows again, as arrays of shape (3, rows)

    gaps = WeightedColumn()
    gaps.add(values, weight)                      each of `values`, `weight` times
    summarize_weighted(gaps.chunks, "ms")

A row is packed into bytes at once, 16,384 rows into an array, and full arrays into a temporary file
without a name, which is gone with its owner. So memory does not grow, whatever is added, and a row costs
a fraction of a microsecond. The file lies where `TMPDIR` says and takes eight bytes a figure.
"""

from __future__ import annotations

import math
import os
import struct
import tempfile
import weakref
from collections.abc import Callable, Iterator
from typing import IO

import numpy as np

from mock_engine.aiperf_schema import PERCENTILES, FloatArray, Metric, to_metric
from mock_engine.errors import ConfigError

CHUNK_ROWS = 16_384
_BYTES = 8  # of a figure
_DIGIT_BITS = 16
_MAX_SORTED = 1 << 18  # so many are sorted in memory faster than they are searched for
_SIGN = np.uint64(1 << 63)

Chunks = Callable[[], Iterator[FloatArray]]


class RowBuffer:
    """Rows of figures, handed to `take` as an array of shape (num_columns, rows) whenever there are `max_rows`."""

    __slots__ = ("_full_bytes", "_num_columns", "_pack", "_packed", "_take")

    def __init__(self, num_columns: int, take: Callable[[FloatArray], None], max_rows: int = CHUNK_ROWS) -> None:
        self._num_columns = num_columns
        self._take = take
        self._pack = struct.Struct(f"{num_columns}d").pack
        self._packed = bytearray()
        self._full_bytes = max_rows * num_columns * _BYTES

    def add(self, *figures: float) -> None:
        """Add one row."""
        self._packed += self._pack(*figures)
        if len(self._packed) >= self._full_bytes:
            self.flush()

    def flush(self) -> None:
        """Hand over what there is, if there is anything."""
        if self._packed:
            chunk = self.pending()
            self._packed = bytearray()
            self._take(chunk)

    def pending(self) -> FloatArray:
        """The rows that have not been handed over."""
        return np.frombuffer(bytes(self._packed)).reshape(-1, self._num_columns).T


class SpillFile:
    """Arrays of shape (num_columns, any), in a file without a name. Raises `ConfigError` if there is no room."""

    def __init__(self, num_columns: int) -> None:
        self._num_columns = num_columns
        self._lengths: list[int] = []
        self._file: IO[bytes] | None = None

    def append(self, chunk: FloatArray) -> None:
        """Write an array of shape (num_columns, rows)."""
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile()  # noqa: SIM115 (open for as long as we live)
                weakref.finalize(self, self._file.close)
            self._file.seek(0, os.SEEK_END)
            self._file.write(np.ascontiguousarray(chunk).data)
        except OSError as error:
            raise ConfigError(
                f"cannot keep figures in {tempfile.gettempdir()}: {error.strerror}. Set TMPDIR to a folder with room."
            ) from error
        self._lengths.append(chunk.shape[1])

    def chunks(self) -> Iterator[FloatArray]:
        """What was appended, in that order."""
        offset = 0
        for length in self._lengths:
            assert self._file is not None
            self._file.seek(offset)
            data = self._file.read(self._num_columns * length * _BYTES)
            offset += len(data)
            yield np.frombuffer(data).reshape(self._num_columns, length)


class Columns:
    """A table of figures that only grows."""

    def __init__(self, num_columns: int, chunk_rows: int = CHUNK_ROWS) -> None:
        self._file = SpillFile(num_columns)
        self._buffer = RowBuffer(num_columns, self._file.append, chunk_rows)
        self.add = self._buffer.add

    def chunks(self) -> Iterator[FloatArray]:
        """All rows in the order in which they came, as arrays of shape (num_columns, rows)."""
        yield from self._file.chunks()
        pending = self._buffer.pending()
        if pending.size:
            yield pending


class WeightedColumn:
    """Figures that each count a whole number of times."""

    def __init__(self, chunk_rows: int = CHUNK_ROWS) -> None:
        self._file = SpillFile(2)
        self._chunk_rows = chunk_rows
        self._values: list[FloatArray] = []
        self._weights: list[int] = []
        self._num_pending = 0

    def add(self, values: FloatArray, weight: int) -> None:
        """Count each of `values` `weight` times. The array is kept for a while: it must not change."""
        if weight == 0:
            return
        self._values.append(values)
        self._weights.append(weight)
        self._num_pending += len(values)
        if self._num_pending >= self._chunk_rows:
            self._file.append(self._pending())
            self._values, self._weights, self._num_pending = [], [], 0

    def _pending(self) -> FloatArray:
        lengths = [len(values) for values in self._values]
        return np.stack([np.concatenate(self._values), np.repeat(np.asarray(self._weights, np.float64), lengths)])

    def chunks(self) -> Iterator[FloatArray]:
        """All figures in the order in which they came, as arrays of shape (2, rows): values, weights."""
        yield from self._file.chunks()
        if self._num_pending:
            yield self._pending()


def summarize_weighted(chunks: Chunks, unit: str) -> Metric | None:
    """
    What `aiperf_schema.summarize` says of all values repeated as often as they weigh; None if there are none.

    `chunks` gives arrays of values and whole weights of 1 or more, the same whenever it is called. The percentiles
    are exactly those of the repeated values. Sums are of sums of chunks, correctly rounded. Memory: 10 MB and a chunk.
    """
    num_rows = 0
    counts, sums, smallest, largest = [], [], math.inf, -math.inf
    for values, weights in chunks():
        num_rows += len(values)
        counts.append(int(weights.sum()))
        sums.append(float((values * weights).sum()))
        smallest, largest = min(smallest, float(values.min())), max(largest, float(values.max()))
    count = sum(counts)
    if not count:
        return None
    total = math.fsum(sums)
    mean = total / count
    variance = math.fsum(float((weights * (values - mean) ** 2).sum()) for values, weights in chunks()) / count
    return to_metric(
        unit,
        mean=mean,
        percentiles=_percentiles(chunks, num_rows, count),
        smallest=smallest,
        largest=largest,
        std=math.sqrt(variance),
        count=count,
        total=total,
    )


def _percentiles(chunks: Chunks, num_rows: int, count: int) -> list[float]:
    """`PERCENTILES` of `num_rows` values, `count` when repeated; linear between two neighbours, as numpy has it."""
    positions = (count - 1) * (np.asarray(PERCENTILES) / 100)
    below = np.floor(positions).astype(np.int64)
    above = np.minimum(below + 1, count - 1)
    ranks = np.concatenate([below, above])
    find = _sorted_values_at if num_rows <= _MAX_SORTED else _values_at
    neighbours = find(ranks, chunks).reshape(2, -1)
    # numpy's own interpolation between two values, so that even the rounding is the same.
    return [float(np.quantile(pair, share)) for pair, share in zip(neighbours.T, positions - below, strict=True)]


def _sorted_values_at(ranks: np.ndarray, chunks: Chunks) -> FloatArray:
    """The values that stand at `ranks` (from 0) when all are sorted and repeated."""
    values, weights = np.concatenate(list(chunks()), axis=1)
    order = values.argsort(kind="stable")
    return np.asarray(values[order][weights[order].cumsum().searchsorted(ranks, side="right")])


def _values_at(ranks: np.ndarray, chunks: Chunks) -> FloatArray:
    """
    The same for more than fit in memory.

    A radix search: values become integers of the same order, and each pass over the data settles 16 bits more of the
    integer at each rank, by counting, among those that agree in all bits settled so far, what the next 16 are.
    """
    num_digits = 1 << _DIGIT_BITS
    settled = np.zeros(1, dtype=np.uint64)  # the leading bits that occur among the answers, in ascending order
    which = np.zeros(len(ranks), dtype=np.int64)  # of them, for each rank
    rest = ranks.astype(np.float64)  # the rank among the values that begin with these bits
    for shift in range(64 - _DIGIT_BITS, -1, -_DIGIT_BITS):
        histogram = np.zeros(len(settled) * num_digits)
        for values, weights in chunks():
            leading = _sortable(values) >> np.uint64(shift)
            before = leading >> np.uint64(_DIGIT_BITS)
            row = np.minimum(np.searchsorted(settled, before), len(settled) - 1)
            agrees = settled[row] == before
            digit = (leading[agrees] & np.uint64(num_digits - 1)).astype(np.int64)
            np.add.at(histogram, row[agrees] * num_digits + digit, weights[agrees])
        up_to = histogram.reshape(-1, num_digits).cumsum(axis=1)
        digits = np.asarray(
            [np.searchsorted(up_to[row], rank, side="right") for row, rank in zip(which, rest, strict=True)]
        )
        rest -= np.where(digits > 0, up_to[which, digits - 1], 0.0)
        settled, which = np.unique(
            settled[which] << np.uint64(_DIGIT_BITS) | digits.astype(np.uint64), return_inverse=True
        )
    return _from_sortable(settled[which])


def _sortable(values: FloatArray) -> np.ndarray:
    """Unsigned integers in the order of the values: the sign bit flipped, and in negative ones all others too."""
    bits = np.ascontiguousarray(values).view(np.uint64)
    return np.where(bits & _SIGN, ~bits, bits | _SIGN)


def _from_sortable(keys: np.ndarray) -> FloatArray:
    return np.where(keys & _SIGN, keys ^ _SIGN, ~keys).view(np.float64)
