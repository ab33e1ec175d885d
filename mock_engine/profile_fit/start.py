"""
Where a fit starts: a shipped profile, chosen or found, with the names and limits of the server at hand.

    candidates = nearest_profiles(runs, names)        best first
    start = as_server(load_profile(name), server)

A profile is near if its replay of the runs has the right shape: one factor on all times is left free.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mock_engine.errors import ConfigError
from mock_engine.gpu_datasheets import DATASHEETS
from mock_engine.profile import WEIGHT_BYTES, Profile, list_profiles, load_profile
from mock_engine.profile_fit.observations import compare, group_requests, observed_values
from mock_engine.profile_fit.observed import ObservedRun
from mock_engine.profile_fit.replay import plan_replay, replay
from mock_engine.timing import TimingModel

_MAX_REQUESTS = 64  # of each run that is tried
_COST_OF_SCALE = 0.1  # a profile of the right speed is preferred to one of the same shape


@dataclass(frozen=True, slots=True)
class Candidate:
    """A shipped profile, and how near it is."""

    name: str
    scale: float  # of all its times
    error: float  # what remains: root mean square of the logarithms

    @property
    def distance(self) -> float:
        return self.error + _COST_OF_SCALE * abs(float(np.log(self.scale)))


@dataclass(frozen=True, slots=True)
class Server:
    """What the user knows of the server; None is as in the start profile."""

    name: str | None = None  # gpu/model/engine-tpN-dtype, pieces may be empty
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    num_gpu_blocks_override: int | None = None

    def __post_init__(self) -> None:
        for flag in ("max_num_seqs", "max_num_batched_tokens", "num_gpu_blocks_override"):
            value = getattr(self, flag)
            if value is not None and value < 1:
                raise ConfigError(f"--{flag.replace('_', '-')} is {value}; it must be at least 1")


def choose_names(
    gpu: str | None = None, model: str | None = None, engine: str | None = None, tp: int | None = None
) -> list[str]:
    """Shipped profiles of that GPU, model, engine and number of GPUs; None: any. Raises `ConfigError` if none is."""
    chosen = []
    for name in list_profiles():
        its_gpu, its_model, last = name.split("/")
        its_engine, its_tp, _ = last.rsplit("-", 2)
        wanted = ((gpu, its_gpu), (model, its_model), (engine, its_engine), (tp, int(its_tp.removeprefix("tp"))))
        if all(want is None or want == have for want, have in wanted):
            chosen.append(name)
    if not chosen:
        raise ConfigError(
            "no shipped profile is of that --gpu, --model, --engine and --tp together. Leave one out, "
            "or see 'mock-engine profiles list' and name one with --from."
        )
    return chosen


def nearest_profiles(
    runs: Sequence[ObservedRun],
    names: Sequence[str],
    server: Server,
    on_profile: Callable[[int, int], None] = lambda _done, _of: None,
) -> list[Candidate]:
    """All candidates, nearest first, by the runs of the lowest and the highest concurrency. Raises `ConfigError`."""
    ordered = sorted(runs, key=lambda run: run.concurrency)
    tried = ordered[:1] if len(ordered) == 1 else [ordered[0], ordered[-1]]
    candidates, problem = [], None
    for number, name in enumerate(names, 1):
        limits = replace(server, name=None)
        try:
            candidates.append(_candidate(name, as_server(load_profile(name), limits), tried))
        except ConfigError as error:  # the requests do not fit its context or its memory
            problem = error
        on_profile(number, len(names))
    if not candidates:
        raise ConfigError(f"none of {len(names)} profiles can serve these requests: {problem}")
    return sorted(candidates, key=lambda candidate: candidate.distance)


def _candidate(name: str, profile: Profile, runs: Sequence[ObservedRun]) -> Candidate:
    timing = TimingModel(profile)
    residuals: list[float] = []
    sds: list[float] = []
    for run in runs:
        plan = plan_replay(run, _MAX_REQUESTS)
        replayed = replay(profile, run, timing=timing, plan=plan)
        observed, groups = observed_values(run, plan.num_requests), group_requests(run, plan.is_compared)
        own_residuals, own_sds = compare(groups, observed, replayed.values)
        residuals += own_residuals
        sds += own_sds
    weights = 1 / np.square(sds)
    scale = float(np.average(residuals, weights=weights))
    error = float(np.sqrt(np.average(np.square(np.array(residuals) - scale), weights=weights)))
    return Candidate(name, float(np.exp(scale)), error)


def as_server(profile: Profile, server: Server) -> Profile:
    """The profile with the server's names and limits. Raises `ConfigError` for a name that cannot be one."""
    changes: dict[str, object] = _names(profile, server.name) if server.name else {}
    if server.max_num_seqs is not None:
        changes["max_num_seqs"] = server.max_num_seqs
    if server.max_num_batched_tokens is not None:
        changes["max_num_batched_tokens"] = server.max_num_batched_tokens
    if server.num_gpu_blocks_override is not None:
        changes["measured_kv_blocks"] = server.num_gpu_blocks_override
        changes["measured_gpu_memory_utilization"] = _DEFAULT_UTILIZATION
    return replace(profile, **changes)  # type: ignore[arg-type]


_DEFAULT_UTILIZATION = 0.9


def _names(profile: Profile, name: str) -> dict[str, object]:
    """What another name changes: with another GPU its data sheet, and the KV blocks that were reported of this one."""
    gpu, model, last = [*name.split("/"), "", ""][:3]
    found = re.fullmatch(r"(.+)-tp([1-9][0-9]*)-([a-z0-9_]+)", last) if last else None
    if name.count("/") > 2 or (last and found is None) or (found and found[3] not in WEIGHT_BYTES):
        raise ConfigError(
            f"--name is {name!r}; it must be GPU/MODEL/ENGINE-tpN-DTYPE, with DTYPE one of {', '.join(WEIGHT_BYTES)}; "
            f"what is as in the start profile may be left empty, as in 'my-gpu//'"
        )
    engine, tp, dtype = (found[1], int(found[2]), found[3]) if found else (profile.engine, profile.tp, profile.dtype)
    renamed = replace(profile, gpu=gpu or profile.gpu, model=model or profile.model, engine=engine, tp=tp, dtype=dtype)
    changes: dict[str, object] = {
        "gpu": renamed.gpu,
        "model": renamed.model,
        "engine": engine,
        "tp": tp,
        "dtype": dtype,
        "datasheet": DATASHEETS.get((renamed.gpu, dtype), profile.datasheet),
    }
    if engine != profile.engine:
        changes["engine_version"] = "not stated"
    if renamed.name != profile.name:
        changes |= {"measured_kv_blocks": None, "measured_gpu_memory_utilization": None}
    if (tp > 1) != (profile.tp > 1) and profile.tables == "kernels":
        raise ConfigError(
            f"--name has tp{tp}, and the start profile {profile.name} is of tp{profile.tp}: a profile of one GPU has "
            "no table of communication, one of several needs it. Start --from a profile that is like yours in that."
        )
    return changes
