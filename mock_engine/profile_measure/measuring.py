"""
The measuring itself: points one by one, coarse ones first, until the time is up.

    measured = measure(model, timer, plan, on_point)

A run of a part goes over some of the model's layers and counts for all: layers are of one shape, so the same kernels
run in each. Their weights and KV cache are not the same bytes, so none are found in the GPU's cache because the layer
before had read them. How many layers: so many that a run takes some milliseconds, beside which its start is nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mock_engine.profile_measure.grid import Point, levels
from mock_engine.profile_measure.memory import Limits
from mock_engine.roofline import Roofline
from mock_engine.step import StepLoad

Work = Callable[[], object]

_RUN_S = 0.02  # what a run should take at least, by the data sheet
_MIN_LAYERS = 4


class Model(Protocol):
    """What can be run of a model; each piece of work may run any number of times."""

    def linear(self, tokens: int, num_layers: int) -> Work: ...

    def head(self, sequences: int) -> Work: ...

    def prefill_attention(self, new_tokens: int, past_tokens: int, num_layers: int) -> Work: ...

    def decode_attention(self, batch_size: int, context_tokens: int, num_layers: int) -> Work: ...

    def step(self, load: StepLoad) -> Work: ...


class Timer(Protocol):
    """Times work."""

    def time(self, work: Work, repeats: int) -> list[float]:
        """Seconds of each repeat: at most `repeats` of them, and at least three."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure, and for how long."""

    limits: Limits
    kv_tokens: int
    roofline: Roofline
    repeats: int
    max_s: float


@dataclass(frozen=True, slots=True)
class Measurement:
    """One point. `seconds` is the median of the repeats, for all layers of the model."""

    point: Point
    seconds: float
    cv: float  # of the repeats
    repeats_s: tuple[float, ...]  # as timed, for `num_layers`
    num_layers: int


def measure(
    model: Model,
    timer: Timer,
    plan: Plan,
    on_point: Callable[[int, int, int], None],
    clock: Callable[[], float] = time.monotonic,
) -> list[Measurement]:
    """
    Measure the coarsest grid, and of the finer ones what fits into `plan.max_s`.

    Calls `on_point(level, done, of)` after each point of a level.
    """
    end_s = clock() + plan.max_s
    found: list[Measurement] = []
    for level, points in enumerate(levels(plan.limits, plan.kv_tokens)):
        for done, point in enumerate(interleaved(points), start=1):
            if level and clock() >= end_s:
                return found
            found.append(_measure_point(model, timer, plan, point))
            on_point(level, done, len(points))
    return found


def interleaved(points: Sequence[Point]) -> list[Point]:
    """The same points, those of all tables mixed evenly: wherever time ends, each is refined about as far."""
    by_table: dict[str, list[Point]] = {}
    for point in points:
        by_table.setdefault(point.table, []).append(point)
    shares = [(place / len(rows), point) for rows in by_table.values() for place, point in enumerate(rows)]
    return [point for _, point in sorted(shares, key=lambda pair: pair[0])]


def layers_in_run(whole_s: float, num_layers: int) -> int:
    """How many of a model's layers to run, of a part that takes `whole_s` in all of them by the data sheet."""
    wanted = int(np.ceil(_RUN_S / max(whole_s / num_layers, 1e-12)))
    return min(num_layers, max(_MIN_LAYERS, wanted))


def _measure_point(model: Model, timer: Timer, plan: Plan, point: Point) -> Measurement:
    all_layers = plan.roofline.shape.num_layers
    num_layers = all_layers
    if point.load is not None:
        work = model.step(point.load)
    elif point.table == "head":
        work = model.head(*point.at)
    else:
        arguments = [np.array([float(value)]) for value in point.at]
        whole_s = getattr(plan.roofline, f"{point.table}_s")(*arguments)[0]
        num_layers = layers_in_run(float(whole_s), all_layers)
        work = getattr(model, point.table)(*point.at, num_layers)
    repeats_s = timer.time(work, plan.repeats)
    return Measurement(
        point=point,
        seconds=statistics.median(repeats_s) * all_layers / num_layers,
        cv=statistics.stdev(repeats_s) / statistics.mean(repeats_s),
        repeats_s=tuple(repeats_s),
        num_layers=num_layers,
    )
