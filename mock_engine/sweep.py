"""
Many simulations of one question: the points of a sweep, or the highest rate that meets objectives.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mock_engine.engine_settings import flag_of
from mock_engine.errors import ConfigError
from mock_engine.parallel import OnDone, Pool
from mock_engine.simulation import SimulationResults, SimulationSettings

_FIRST_RATE = 1.0  # requests a second
_LOWEST_RATE = 2.0**-10
_HIGHEST_RATE = 2.0**20
_PRECISION = 1.01  # the rate found and the lowest that misses are no farther apart than this
_AT_ONCE = 3  # rates of a bracket, each twice the one before: those too high take the longest
# A rate is sent for so many times what a request alone takes, and at least so long, unless the user says otherwise.
_LATENCIES = 60.0
_SHORTEST_S = 60.0


@dataclass(frozen=True, slots=True)
class SweepPoint:
    """One simulation of a sweep. `swept` is what was varied, and its values here."""

    swept: dict[str, object]
    results: SimulationResults

    @property
    def label(self) -> str:
        """Its values, for a table or a picture."""
        return ", ".join(f"{name}={value}" for name, value in self.swept.items())

    @property
    def has_answers(self) -> bool:
        """Whether any request was answered to its end."""
        return self.results.num_finished > 0

    @property
    def tokens_per_gpu_s(self) -> float:
        """Output tokens a second for each GPU: what it costs."""
        throughput: float = self.results.metrics["output_token_throughput"]["avg"]
        return throughput / self.results.num_gpus

    @property
    def tokens_per_user_s(self) -> float:
        """Output tokens a second that one user sees: how it feels. 0 where no request had two tokens."""
        per_user = self.results.metrics.get("output_token_throughput_per_user")
        return per_user["avg"] if per_user else 0.0


def pareto_front(points: Sequence[SweepPoint]) -> list[SweepPoint]:
    """The points than which no other is better for the GPU and not worse for the user, or the reverse."""
    answered = [point for point in points if point.has_answers]
    places = [(point.tokens_per_user_s, point.tokens_per_gpu_s) for point in answered]
    return [answered[index] for index in sorted(front(places))]


def front(places: Sequence[tuple[float, float]]) -> list[int]:
    """
    Indices of the places than which none is higher in one figure and not lower in the other, by the first figure.

    Figures that agree in three digits count as equal: what differs beyond is the seed's doing.
    """
    places = [(float(f"{x:.3g}"), float(f"{y:.3g}")) for x, y in places]
    on_front: list[int] = []
    best = -math.inf
    for index in sorted(range(len(places)), key=lambda index: places[index], reverse=True):
        x, y = places[index]
        if y > best or (on_front and places[on_front[-1]] == (x, y)):
            on_front.append(index)
            best = y
    return on_front[::-1]


@dataclass(frozen=True, slots=True)
class RateTried:
    """A request rate, and how many of the requests met the objectives."""

    request_rate: float
    attainment: float
    results: SimulationResults

    def is_met(self, attainment: float) -> bool:
        """Whether enough requests were good, and the queue did not just grow."""
        return self.attainment >= attainment and self.results.keeps_up


@dataclass(frozen=True, slots=True)
class MaxRate:
    """The highest rate that meets the objectives (None: none does), and all that were tried, in order of rate."""

    best: RateTried | None
    tried: list[RateTried]

    def to_json(self) -> dict[str, Any]:
        """For `--json`: AIPerf's metrics at the best rate, and the figures of the search."""
        return {
            "max_request_rate": self.best.request_rate if self.best else None,
            "tried": [
                {
                    "request_rate": each.request_rate,
                    "attainment": each.attainment,
                    "answered_rate": each.results.answered_rate,
                    "keeps_up": each.results.keeps_up,
                }
                for each in self.tried
            ],
            "results": self.best.results.to_json() if self.best else None,
        }


def find_max_rate(settings: SimulationSettings, attainment: float, pool: Pool, on_done: OnDone) -> MaxRate:
    """
    The highest request rate at which the share `attainment` of all requests sent meets the objectives, within 1 %,
    and at which requests are answered as fast as they are sent.

    Where the user sets no end, each rate is sent for 60 times as long as one request alone takes, and for a minute at
    least: shorter runs are over before a queue has grown. All rates are tried with the same seeds, so what differs
    is the rate. Raises `ConfigError` without objectives.
    """
    if not settings.slos:
        raise ConfigError("--find-max needs --goodput, such as 'time_to_first_token:200ms inter_token_latency:20ms'")
    if not 0 < attainment <= 1:
        raise ConfigError(f"--slo-attainment-fraction is {attainment:g}; it must be above 0 and at most 1")
    for name in ("fixed_schedule", "request_rate", "concurrency"):
        if getattr(settings.workload, name):
            raise ConfigError(
                f"--find-max chooses the request rate, and any number under way; leave out {flag_of(name)}"
            )
    settings = _long_enough(settings, pool)
    tried: list[RateTried] = []

    def is_met(rates: list[float]) -> list[bool]:
        changed = [
            dataclasses.replace(settings, workload=dataclasses.replace(settings.workload, request_rate=rate))
            for rate in rates
        ]
        for rate, results in zip(rates, pool.run(changed, on_done), strict=True):
            good = results.metrics.get("good_request_count", {"avg": 0.0})["avg"]
            tried.append(RateTried(rate, good / results.num_sent, results))
        return [each.is_met(attainment) for each in tried[-len(rates) :]]

    low, high = _bracket(is_met, min(max(2, pool.num_processes), _AT_ONCE))
    while low and high / low > _PRECISION:
        step = (high / low) ** (1 / (pool.num_processes + 1))
        rates = [low * step**number for number in range(1, pool.num_processes + 1)]
        low, high = _narrow(low, high, rates, is_met(rates))
    tried.sort(key=lambda each: each.request_rate)
    return MaxRate(next((each for each in tried if each.request_rate == low), None), tried)


def _long_enough(settings: SimulationSettings, pool: Pool) -> SimulationSettings:
    """The same, with an end that suits what a request takes, unless it has one."""
    workload = settings.workload
    if workload.request_count or workload.num_requests is None:
        return settings
    alone = dataclasses.replace(settings, workload=dataclasses.replace(workload, concurrency=1, request_count=20))
    (results,) = pool.run([alone], lambda: None)
    if not results.num_finished:
        return settings  # and every rate will miss
    latency_s = results.metrics["request_latency"]["avg"] / 1e3
    duration_s = max(_SHORTEST_S, _LATENCIES * latency_s)
    return dataclasses.replace(settings, workload=dataclasses.replace(workload, benchmark_duration=duration_s))


def _bracket(is_met: Callable[[list[float]], list[bool]], num_rates: int) -> tuple[float, float]:
    """A rate that meets the objectives (0: none does), and a higher one that does not."""
    low, high = 0.0, 0.0
    rate = _FIRST_RATE
    while not high:
        if rate > _HIGHEST_RATE:
            raise ConfigError(
                f"any rate meets these objectives, even {rate / 2:g} requests a second. Name stricter ones, or let it "
                f"send for longer (--benchmark-duration)."
            )
        rates = [rate * 2**number for number in range(num_rates)]
        low, high = _narrow(low, 0.0, rates, is_met(rates))
        rate = rates[-1] * 2
    rate = _FIRST_RATE
    while not low and rate > _LOWEST_RATE:
        rates = [rate / 2**number for number in range(num_rates, 0, -1)]
        low, high = _narrow(low, high, rates, is_met(rates))
        rate = rates[0]
    return low, high


def _narrow(low: float, high: float, rates: list[float], are_met: list[bool]) -> tuple[float, float]:
    """The bracket after ascending `rates` within it were tried; high is 0 while none has missed."""
    for rate, met in zip(rates, are_met, strict=True):
        if not met:
            return low, rate
        low = rate
    return low, high
