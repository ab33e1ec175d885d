"""Statistics of spilled columns are those that numpy has of all figures at once, however they were cut."""

from __future__ import annotations

import gc
import tempfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mock_engine import columns
from mock_engine.aiperf_schema import PERCENTILES, summarize
from mock_engine.columns import Columns, SpillFile, WeightedColumn, summarize_weighted
from mock_engine.errors import ConfigError

FEW = st.sampled_from([-1.5, 0.0, 7.25, 7.250000000000001, 1e-300, 3e12])  # so that there are ties
FIGURES = st.one_of(FEW, st.floats(-1e15, 1e15))


@st.composite
def weighted_columns(draw):
    """A column, and the same figures repeated as often as they weigh."""
    runs = draw(st.lists(st.tuples(st.lists(FIGURES, max_size=8), st.integers(0, 300)), min_size=1, max_size=12))
    column = WeightedColumn(chunk_rows=draw(st.integers(1, 20)))
    for values, weight in runs:
        column.add(np.asarray(values, dtype=np.float64), weight)
    return column, np.concatenate([np.repeat(np.asarray(values, np.float64), weight) for values, weight in runs])


@pytest.mark.parametrize("max_sorted", [0, columns._MAX_SORTED], ids=["searched", "sorted"])
@given(weighted_columns())
@settings(max_examples=150)
def test_percentiles_are_exactly_numpy_s_of_the_repeated_figures(max_sorted, column_and_repeated):
    column, repeated = column_and_repeated
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns, "_MAX_SORTED", max_sorted)
        metric = summarize_weighted(column.chunks, "ms")
    if not len(repeated):
        assert metric is None
        return
    assert [metric[f"p{p}"] for p in PERCENTILES] == np.percentile(repeated, PERCENTILES).tolist()


@given(weighted_columns())
@settings(max_examples=100)
def test_the_rest_is_what_a_summary_says(column_and_repeated):
    column, repeated = column_and_repeated
    metric = summarize_weighted(column.chunks, "ms")
    if not len(repeated):
        assert metric is None
        return
    expected = summarize(repeated, "ms")
    assert list(metric) == list(expected)
    for name in ("unit", "min", "max", "count"):
        assert metric[name] == expected[name]
    rounding = 1e-12 * len(repeated) * np.abs(repeated).max()
    assert metric["sum"] == pytest.approx(expected["sum"], rel=1e-12, abs=rounding)
    assert metric["avg"] == pytest.approx(expected["avg"], rel=1e-12, abs=rounding)
    assert metric["std"] == pytest.approx(expected["std"], rel=1e-7, abs=rounding)


@given(num_rows=st.integers(0, 60), chunk_rows=st.integers(1, 12))
@settings(max_examples=100)
def test_a_table_gives_back_its_rows_in_order_at_any_time(num_rows, chunk_rows):
    columns = Columns(3, chunk_rows)
    rows = [(float(number), -number / 3, 1e9 + number) for number in range(num_rows)]
    for number, row in enumerate(rows, start=1):
        columns.add(*row)
        if number % 7 == 0:  # a reader that stops half-way must not disturb what comes after
            next(columns.chunks())
    read = [tuple(row) for chunk in columns.chunks() for row in chunk.T.tolist()]
    assert read == rows


def test_a_row_of_another_length_is_refused():
    with pytest.raises(Exception, match="expected 3 items"):
        Columns(3).add(1.0, 2.0)


def test_the_file_is_closed_with_its_owner(monkeypatch):
    opened = []
    real = tempfile.TemporaryFile

    def open_and_note():
        opened.append(real())
        return opened[-1]

    monkeypatch.setattr(tempfile, "TemporaryFile", open_and_note)
    columns = Columns(1, chunk_rows=2)
    columns.add(1.0)
    assert not opened
    columns.add(2.0)
    assert [file.closed for file in opened] == [False]
    del columns
    gc.collect()
    assert [file.closed for file in opened] == [True]


def test_a_full_disk_is_an_error_of_one_line(monkeypatch):
    def no_room():
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", no_room)
    with pytest.raises(ConfigError, match=r"cannot keep figures in .*: No space left on device\. Set TMPDIR"):
        SpillFile(1).append(np.ones((1, 3)))
