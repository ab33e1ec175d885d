"""
The fit: those parameters under which replays of the runs come out as the runs did.

    fit = fit_profile(start, runs)
    fit.profile                  a Profile in memory; `writing` makes a folder of it
    fit.step_sd(loads)           how sure the step times are, as shares

Maximum a posteriori, by Gauss-Newton: residuals are differences of log TTFT and log ITL of groups of requests
(`observations`), the prior pulls what the data do not say towards the start profile (`parameters`). Everything
is deterministic; no jitter is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mock_engine.profile import Profile
from mock_engine.profile_fit.observations import Group, compare, group_requests, observed_values
from mock_engine.profile_fit.observed import ObservedRun
from mock_engine.profile_fit.parameters import Parameters, parameters_of
from mock_engine.profile_fit.replay import MAX_REQUESTS, Plan, plan_replay, replay, visited
from mock_engine.profile_fit.sensitivity import request_slopes, step_slopes, step_times
from mock_engine.step import StepLoad
from mock_engine.timing import TimingModel

FloatArray = NDArray[np.float64]

_MAX_ROUNDS = 12
_MAX_CHANGE = 1.5  # of a logarithm in one round
_LITTLE = 0.5  # of the objective: the next round would follow how one replay differs from another
_ROBUST_SDS = 3.0  # residuals beyond count linearly
_DAMPINGS = (0.0, 0.01, 0.1, 1.0, 10.0)


@dataclass(frozen=True, slots=True)
class RunErrors:
    """How far replays of one run are from it: relative errors of the means, before the fit and after."""

    run: ObservedRun
    num_compared: int
    ttft_before: float
    ttft_after: float
    itl_before: float | None
    itl_after: float | None


@dataclass(frozen=True, slots=True)
class Fit:
    """What came out. `covariance` is the posterior's, of `values`."""

    parameters: Parameters
    profile: Profile
    values: FloatArray
    covariance: FloatArray
    runs: tuple[RunErrors, ...]
    loads: dict[StepLoad, int]  # of the passes that the replayed runs visit, and how many had each
    num_rounds: int
    badness: float  # minus twice the logarithm of the posterior, but for a constant
    other_badness: float | None  # the same with asynchronous scheduling the other way; None if that was not tried

    @property
    def start(self) -> Profile:
        return self.parameters.profile

    @property
    def sd(self) -> FloatArray:
        """Posterior standard deviation of each value."""
        return np.asarray(np.sqrt(np.diag(self.covariance)))

    def step_sd(self, loads: Sequence[StepLoad]) -> FloatArray:
        """Posterior standard deviation of the time of a pass of each load, as a share of it."""
        slopes = step_slopes(self.parameters, self.values, loads)
        shares = slopes / step_times(TimingModel(self.profile), loads)[:, np.newaxis]
        return np.asarray(np.sqrt(np.maximum(np.einsum("ij,jk,ik->i", shares, self.covariance, shares), 0.0)))


class _State:
    """The runs, replayed with some values of the parameters."""

    def __init__(self, problem: _Problem, latents: FloatArray) -> None:
        self.latents = latents
        parameters = problem.parameters
        self.values = np.maximum(parameters.start + parameters.prior @ latents, parameters.at_least)
        self.profile = problem.parameters.apply(self.values)
        timing = TimingModel(self.profile)
        self.replays = [
            replay(self.profile, run, timing=timing, plan=plan)
            for run, plan in zip(problem.runs, problem.plans, strict=True)
        ]
        residuals: list[float] = []
        sds: list[float] = []
        for replayed, observed, groups in zip(self.replays, problem.observed, problem.groups, strict=True):
            own_residuals, own_sds = compare(groups, observed, replayed.values)
            residuals += own_residuals
            sds += own_sds
        self.residuals = np.array(residuals)
        self.sds = np.array(sds)

    @property
    def badness(self) -> float:
        """Of different problems with the same runs, the one with the least of it explains them best."""
        return self.objective(self.sds) + 2 * float(np.log(self.sds).sum())

    def objective(self, sds: FloatArray) -> float:
        """Robust sum of squares, with these standard deviations, and the prior's."""
        scaled = np.abs(self.residuals / sds)
        robust = np.where(scaled <= _ROBUST_SDS, scaled**2, 2 * _ROBUST_SDS * scaled - _ROBUST_SDS**2)
        return float(robust.sum() + self.latents @ self.latents)


class _Problem:
    """What does not change from round to round."""

    def __init__(self, start: Profile, runs: Sequence[ObservedRun], max_requests: int, only_overhead: bool) -> None:
        self.parameters = parameters_of(start)
        self.is_free = np.ones(self.parameters.prior.shape[1], dtype=np.bool_)  # of the latents
        if only_overhead:
            self.is_free[: self.parameters.num_corrections + 1] = False
        self.runs = runs
        self.plans: list[Plan] = [plan_replay(run, max_requests) for run in runs]
        self.groups: list[list[Group]] = [
            group_requests(run, plan.is_compared) for run, plan in zip(runs, self.plans, strict=True)
        ]
        self.observed = [observed_values(run, plan.num_requests) for run, plan in zip(runs, self.plans, strict=True)]

    def jacobian(self, state: _State) -> FloatArray:
        """How each group's figure moves with each value, shape (groups, values)."""
        loads = list(visited(state.replays))
        number = {load: index for index, load in enumerate(loads)}
        slopes = step_slopes(self.parameters, state.values, loads)
        rows = []
        for replayed, groups in zip(state.replays, self.groups, strict=True):
            of_steps = slopes[[number[load] for load in replayed.steps.loads]]
            by_metric = dict(zip(("ttft", "itl"), request_slopes(replayed, self.parameters, of_steps), strict=True))
            own = replayed.values
            rows += [group.weights(own[group.metric]) @ by_metric[group.metric][group.requests] for group in groups]
        return np.array(rows)


def fit_profile(
    start: Profile,
    runs: Sequence[ObservedRun],
    *,
    async_scheduling: bool | None = None,
    only_overhead: bool = False,
    max_requests: int = MAX_REQUESTS,
    on_round: Callable[[int, float], None] = lambda _round, _error: None,
) -> Fit:
    """
    Fit `start` to the runs; of each, the first `max_requests` are replayed. Raises `ConfigError` if one cannot be.

    Whether the server schedules asynchronously is tried both ways, unless `async_scheduling` says it. With
    `only_overhead`, the tables stay as they are: for an engine that is slower than the start's by a constant.
    `on_round` is called with the number of a round and the root mean square of the residuals before it.
    """
    ways = (start.async_scheduling, not start.async_scheduling) if async_scheduling is None else (async_scheduling,)
    starts = [replace(start, async_scheduling=way) for way in ways]
    fits = [_fit(_Problem(each, runs, max_requests, only_overhead), on_round) for each in starts]
    best = min(fits, key=lambda fit: fit.badness)
    others = [fit.badness for fit in fits if fit is not best]
    return replace(best, other_badness=others[0] if others else None)


def _fit(problem: _Problem, on_round: Callable[[int, float], None]) -> Fit:
    state = first = _State(problem, np.zeros(problem.parameters.prior.shape[1]))
    num_rounds = 0
    for stage in (_Stage(problem, with_queue=False), _Stage(problem, with_queue=True)):
        while not stage.has_converged and stage.num_rounds < _MAX_ROUNDS:
            num_rounds += 1
            on_round(num_rounds, float(np.sqrt((state.residuals**2).mean())))
            state = stage.improve(state)
    prior = problem.parameters.prior * problem.is_free
    weighted = problem.jacobian(state) @ prior / state.sds[:, np.newaxis]
    of_latents = np.linalg.inv(weighted.T @ weighted + np.eye(prior.shape[1]))
    return Fit(
        problem.parameters,
        state.profile,
        state.values,
        prior @ of_latents @ prior.T,
        tuple(_errors(problem, first, state)),
        visited(state.replays),
        num_rounds,
        state.badness,
        None,
    )


class _Stage:
    """
    Rounds with the same values free. The first stage keeps the time before the queue as it is: of a closed loop without
    any pause, a request is in time for the next pass, and with any such time it is too late for it. That is a jump,
    which no slope foretells; taken early, it hides what else is wrong.
    """

    def __init__(self, problem: _Problem, with_queue: bool) -> None:
        self.num_rounds = 0
        self.has_converged = False
        self._damping = 0  # of `_DAMPINGS`, the first to try
        self._problem = problem
        parameters = problem.parameters
        self._is_free = problem.is_free.copy()
        self._lowest = np.full(parameters.prior.shape[1], -np.inf)
        # An overhead is one latent: number i of the values is latent i + 1.
        for index, overhead in enumerate(parameters.overheads, parameters.num_corrections + 1):
            self._lowest[index] = -parameters.start[index - 1] / overhead.sd
            self._is_free[index] = with_queue or overhead.is_in_steps

    def improve(self, state: _State) -> _State:
        """The state after one more round: at best what a linear model promises, at worst the same."""
        self.num_rounds += 1
        parameters = self._problem.parameters
        design = self._problem.jacobian(state) @ parameters.prior
        before = state.objective(state.sds)
        for damping in _DAMPINGS[self._damping :]:
            change = self._solve(state, design, damping) - state.latents
            largest = float(np.abs((parameters.prior @ change)[: parameters.num_corrections]).max())
            after = _State(self._problem, state.latents + change * min(1.0, _MAX_CHANGE / max(largest, 1e-12)))
            now = after.objective(state.sds)
            if now < before:
                self.has_converged = before - now < _LITTLE
                self._damping = max(0, self._damping - 1)
                return after
            self._damping += 1
        self.has_converged = True  # no further: what is left is how one replay differs from another
        return state

    def _solve(self, state: _State, design: FloatArray, damping: float) -> FloatArray:
        """
        The latents that a linear model finds best; values that would fall below their bound stay on it. `damping`
        (Levenberg-Marquardt's) keeps them near where they are, most where the data say little.
        """
        scaled = np.abs(state.residuals / state.sds)
        weights = np.sqrt(np.minimum(1.0, _ROBUST_SDS / np.maximum(scaled, 1e-12))) / state.sds
        matrix = design * weights[:, np.newaxis]
        right = (state.residuals + design @ state.latents) * weights
        latents = state.latents.copy()
        is_free = self._is_free.copy()
        while True:
            own = matrix[:, is_free]
            rest = right - matrix[:, ~is_free] @ latents[~is_free]
            normal = own.T @ own + np.eye(own.shape[1])
            damped = damping * np.diag(np.diag(normal))
            latents[is_free] = np.linalg.solve(normal + damped, own.T @ rest + damped @ state.latents[is_free])
            too_low = is_free & (latents < self._lowest)
            if not too_low.any():
                return latents
            latents[too_low] = self._lowest[too_low]
            is_free &= ~too_low


def _errors(problem: _Problem, first: _State, last: _State) -> list[RunErrors]:
    found = []
    for run, plan, observed, before, after in zip(
        problem.runs, problem.plans, problem.observed, first.replays, last.replays, strict=True
    ):
        compared = np.flatnonzero(plan.is_compared)
        with_itl = compared[~np.isnan(observed["itl"][compared])]

        def error(values: FloatArray, seen: FloatArray, which: NDArray[np.int64]) -> float:
            return float(values[which].mean() / seen[which].mean() - 1)

        found.append(
            RunErrors(
                run,
                len(compared),
                error(before.ttft_s, observed["ttft"], compared),
                error(after.ttft_s, observed["ttft"], compared),
                error(before.itl_s, observed["itl"], with_itl) if len(with_itl) else None,
                error(after.itl_s, observed["itl"], with_itl) if len(with_itl) else None,
            )
        )
    return found
