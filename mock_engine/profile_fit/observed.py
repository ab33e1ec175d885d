"""
What was seen of a server: one run of requests, as a client timed them.

    run = ObservedRun("concurrency 16", requests, concurrency=16)
    run = run_of_means("16", isl_tokens=512, ..., ttft_s=0.05, itl_s=0.012)    where only means are known

Files become runs in `readers`; `replay` sends the same requests to a model of the server.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mock_engine.engine_settings import EngineSettings
from mock_engine.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ObservedRequest:
    """One request that got all its tokens. Times are the client's."""

    isl_tokens: int
    osl_tokens: int
    ttft_s: float
    itl_s: float | None  # mean gap between tokens; None with one token
    start_s: float | None = None  # when it was sent; None: not known, as soon as the concurrency allowed
    cached_tokens: int = 0  # of the prompt, that the server had and did not compute

    @property
    def new_tokens(self) -> int:
        """Prompt tokens that were computed: all that were not cached, the last one always."""
        return max(self.isl_tokens - self.cached_tokens, 1)

    @property
    def latency_s(self) -> float:
        return self.ttft_s + (self.itl_s or 0.0) * (self.osl_tokens - 1)


@dataclass(frozen=True, slots=True)
class ObservedRun:
    """
    Requests that were sent to one server in one go, in the order in which they were sent.

    Either all have a `start_s` or none; without, `concurrency` says how many were under way. If `has_only_means`,
    the times are the run's means, the same in each request. `engine` is what is known of the server's flags in
    this run, where they are not the profile's defaults.
    """

    name: str
    requests: tuple[ObservedRequest, ...]
    concurrency: int
    num_left_out: int = 0  # rows of failed, cancelled and warm-up requests
    has_only_means: bool = False
    engine: EngineSettings = field(default_factory=EngineSettings)

    def __post_init__(self) -> None:
        if not self.requests:
            raise ConfigError(f"{self.name} has no request that was answered. Name a run that has some.")
        if len({request.start_s is None for request in self.requests}) > 1:
            raise ConfigError(f"{self.name}: some requests have a start time and some have none. Give it to all.")


def make_run(name: str, requests: Sequence[ObservedRequest], num_left_out: int = 0) -> ObservedRun:
    """A run of requests that all have a start time, sorted by it; the concurrency is the most that were under way."""
    ordered = sorted(requests, key=lambda request: (request.start_s, request.ttft_s))
    return ObservedRun(name, tuple(ordered), _most_under_way(ordered), num_left_out)


def run_of_means(
    name: str,
    *,
    isl_tokens: int,
    osl_tokens: int,
    concurrency: int,
    num_requests: int,
    ttft_s: float,
    itl_s: float | None,
    engine: EngineSettings | None = None,
) -> ObservedRun:
    """Equal requests of which only the mean times are known; `concurrency` were under way, if there were so many."""
    request = ObservedRequest(isl_tokens, osl_tokens, ttft_s, itl_s)
    return ObservedRun(
        name, (request,) * num_requests, min(concurrency, num_requests), 0, True, engine or EngineSettings()
    )


def _most_under_way(requests: Sequence[ObservedRequest]) -> int:
    """How many requests were under way at once, at most; one that starts as another ends follows it."""
    moments: list[tuple[float, int]] = []
    for request in requests:
        assert request.start_s is not None
        moments.append((request.start_s + SAME_MOMENT_S, +1))
        moments.append((request.start_s + request.latency_s, -1))
    most = under_way = 0
    for _, change in sorted(moments):
        under_way += change
        most = max(most, under_way)
    return max(most, 1)


SAME_MOMENT_S = 1e-6  # clocks that count nanoseconds, and sums of rounded gaps, differ by less
