"""
Service level objectives: what a request must meet to count as good.

    slos = parse_slos("time_to_first_token:200ms inter_token_latency:20ms")
    good = meets_all(slos, finished)         one entry a request
    text = to_aiperf_goodput(slos)           "time_to_first_token:200 inter_token_latency:20"

Metrics have AIPerf's names. AIPerf's own `--goodput` takes bare numbers, in a unit that depends on the
metric; ours must say which, because 0.2 might be meant in seconds, and nobody would notice. A request is good if it
meets every objective; one without a value (no inter-token latency for a single token) is not, as in AIPerf 0.13.0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np

from mock_engine.aiperf_schema import REQUEST_METRICS, FinishedRequests
from mock_engine.errors import ConfigError

# A spelling of a unit: by how much to multiply for AIPerf's unit.
_UNITS = {
    "ms": {"ms": Decimal(1), "s": Decimal(1000)},
    "tokens/sec/user": {"tokens/sec/user": Decimal(1), "tokens/s": Decimal(1)},
}
_ALLOWED = {name: metric for name, metric in REQUEST_METRICS.items() if metric.unit in _UNITS}
_NUMBER_AND_UNIT = re.compile(r"([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)(.*)", re.ASCII)
_EXAMPLE = "--goodput 'time_to_first_token:200ms inter_token_latency:20ms'"


@dataclass(frozen=True, slots=True)
class Slo:
    """A bound on one of AIPerf's metrics: at least `value` where more is better, else at most."""

    metric: str
    value: float  # in the metric's own unit: ms, or tokens/sec/user


def parse_slos(text: str) -> tuple[Slo, ...]:
    """The objectives in `metric:value`s with units, separated by spaces. Raises `ConfigError` for any that is wrong."""
    slos = tuple(_parse_slo(item) for item in text.split())
    if not slos:
        raise ConfigError(f"--goodput is empty; it takes objectives, such as {_EXAMPLE}. Leave it out for none.")
    metrics = [slo.metric for slo in slos]
    for metric in metrics:
        if metrics.count(metric) > 1:
            raise ConfigError(
                f"--goodput has {metric} {metrics.count(metric)} times; once is allowed. Keep one of them."
            )
    return slos


def _parse_slo(item: str) -> Slo:
    metric, separator, value = item.partition(":")
    if not separator:
        raise ConfigError(f"--goodput has {item!r}, which is not metric:value. Write it as in {_EXAMPLE}.")
    if metric not in _ALLOWED:
        raise ConfigError(f"--goodput has the metric {metric!r}; allowed are {', '.join(_ALLOWED)}. Use one of these.")
    units = _UNITS[_ALLOWED[metric].unit]
    found = _NUMBER_AND_UNIT.fullmatch(value)
    if found is None:
        raise ConfigError(
            f"--goodput has {item!r}; {value!r} is not a number and a unit. Write it as in {_example(metric)}."
        )
    number, unit = found.groups()
    if unit not in units:
        what = f"the unit {unit!r}" if unit else "no unit"
        advice = "Use one of these" if unit else f"Write {metric}:{number}{next(iter(units))}, if that is what you mean"
        raise ConfigError(f"--goodput has {item!r}, with {what}; allowed for {metric}: {', '.join(units)}. {advice}.")
    bound = float(Decimal(number) * units[unit])
    if not 0 < bound < math.inf:
        raise ConfigError(
            f"--goodput has {item!r}; {number} is out of range. Write a number above 0: {_example(metric)}."
        )
    return Slo(metric, bound)


def _example(metric: str) -> str:
    return f"{metric}:200{_ALLOWED[metric].unit}"


def to_aiperf_goodput(slos: Sequence[Slo]) -> str:
    """The same objectives as AIPerf's `--goodput` takes them: without units."""
    return " ".join(f"{slo.metric}:{repr(slo.value).removesuffix('.0')}" for slo in slos)


def meets_all(slos: Sequence[Slo], finished: FinishedRequests) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """For each request whether it is good; all are if there are no objectives."""
    good = np.ones(len(finished.latency_ms), dtype=np.bool_)
    for slo in slos:
        metric = REQUEST_METRICS[slo.metric]
        values = metric.values(finished)  # NaN, where there is none, meets nothing
        good &= values >= slo.value if metric.is_larger_better else values <= slo.value
    return good
