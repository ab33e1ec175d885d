"""
Deployments that are looked at from inside, and random ones.

    watched = watch(SimulationSettings(...))             `simulate`, and all it was made of
    watched = send(deployment_settings, sessions)        the same without a `Workload`: the sessions are given
    check_that_nothing_is_left(watched)

Engines are those of a shipped profile, with few and small KV blocks, so that they fill up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
from hypothesis import strategies as st

from mock_engine import simulation
from mock_engine.clients import Clients, ClientSettings
from mock_engine.deployment import Deployment, DeploymentSettings, WorkerGroup
from mock_engine.drive_virtual import VirtualClock
from mock_engine.engine_settings import EngineSettings
from mock_engine.kv_transfer import TRANSFER_MODES
from mock_engine.profile import load_profile
from mock_engine.roles import ROLES
from mock_engine.router_settings import ROUTER_MODES, RouterSettings
from mock_engine.session import Session, Turn, chain_turns
from mock_engine.simulation import SimulationResults, SimulationSettings
from mock_engine.step import PrefillChunk, StepLoad
from mock_engine.timing import TimingModel
from mock_engine.workload import Workload

H100, A100 = "h100-sxm/llama-3.1-8b/vllm-tp1-bf16", "a100-sxm/llama-3.1-8b/vllm-tp1-bf16"
BLOCK_SIZE = 4
MAX_MODEL_LEN = 96
KV_BYTES_PER_TOKEN = load_profile(H100).kv_bytes_per_token
GB = 1e9


def small_engine(**changes) -> EngineSettings:
    """Holds two requests of the longest kind, or a few more short ones; no jitter."""
    defaults = {
        "profile": H100,
        "block_size": BLOCK_SIZE,
        "num_gpu_blocks_override": 2 * MAX_MODEL_LEN // BLOCK_SIZE,
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "async_scheduling": False,
        "jitter": 0.0,
    }
    return EngineSettings(**{**defaults, **changes})


def aggregated(num_workers: int = 1, engine: EngineSettings | None = None, **options) -> DeploymentSettings:
    return DeploymentSettings((WorkerGroup(engine or small_engine(), num_workers),), **options)


def disaggregated(
    num_prefill: int = 1,
    num_decode: int = 1,
    prefill: EngineSettings | None = None,
    decode: EngineSettings | None = None,
    **options,
) -> DeploymentSettings:
    return DeploymentSettings(
        (
            WorkerGroup(prefill or small_engine(), num_prefill, "prefill"),
            WorkerGroup(decode or small_engine(), num_decode, "decode"),
        ),
        **options,
    )


def transfer_bandwidth(seconds: float, num_tokens: int) -> float:
    """GB/s at which the KV cache of so many tokens takes so long."""
    return num_tokens * KV_BYTES_PER_TOKEN / seconds / GB


@cache
def timing(profile: str = H100) -> TimingModel:
    return TimingModel(load_profile(profile))


def prefill_s(*isl_tokens: int, past_tokens: int = 0, profile: str = H100) -> float:
    """A step that computes these prompts whole, or what comes after `past_tokens`."""
    chunks = tuple(PrefillChunk(each, past_tokens) for each in isl_tokens)
    return timing(profile).step_s(StepLoad(chunks, 0, 0))


def decode_s(*context_tokens: int, profile: str = H100) -> float:
    """A step in which sequences of these lengths, the new token included, get a token each."""
    return timing(profile).step_s(StepLoad((), len(context_tokens), sum(context_tokens)))


@dataclass(frozen=True)
class Sent:
    """A request that a router has placed, and what it saw."""

    role: str
    worker: int
    num_active: int  # requests that were on the rank it chose ...
    all_active: list[int]  # ... and on each that was up


class WatchedDeployment(Deployment):
    """Keeps all jobs and when they ended, and does not let any end twice."""

    def __init__(self, settings, clock, gaps, usage, on_end, *others):
        self.jobs = []
        self.ended_s = {}
        self.sent = []
        self.clock = clock

        def end(job):
            assert job not in self.ended_s, "it ends once"
            self.ended_s[job] = clock.now
            on_end(job)

        super().__init__(settings, clock, gaps, usage, end, *others)

    def submit(self, job):
        self.jobs.append(job)
        super().submit(job)

    def _enqueue(self, rank, flight, job):
        self._note_sent(rank)
        super()._enqueue(rank, flight, job)

    def _prepare(self, rank, request, job):
        flight = super()._prepare(rank, request, job)
        if flight is None:
            self._note_sent(rank)
        return flight

    def _note_sent(self, rank):
        up = self._pools[rank.role].up
        self.sent.append(Sent(rank.role, rank.worker, rank.num_active, [other.num_active for other in up]))


@dataclass(frozen=True)
class Watched:
    """A run that is over."""

    deployment: WatchedDeployment
    clients: Clients
    results: SimulationResults | None = None

    @property
    def jobs(self):
        return self.deployment.jobs

    @property
    def finished(self):
        return [job for job in self.jobs if job.last_token_s is not None]

    def latency_s(self, job) -> float:
        """From when it was sent to when it ended, however that was."""
        return self.deployment.ended_s[job] - job.sent_s


def watch(settings: SimulationSettings, **options) -> Watched:
    """`simulate`, and what it was made of."""
    made = []

    def keep(kind):
        def make(*args):
            made.append(kind(*args))
            return made[-1]

        return make

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulation, "Deployment", keep(WatchedDeployment))
        patch.setattr(simulation, "Clients", keep(Clients))
        results = simulation.simulate(settings, **options)
    return Watched(*made, results)


class Silence:
    """A log that keeps nothing."""

    def add_gaps(self, *_):
        pass

    def add(self, *_):
        pass


def send(
    settings: DeploymentSettings,
    sessions: Iterable[Session],
    client_settings: ClientSettings | None = None,
    probes: dict[float, Callable[[WatchedDeployment], None]] | None = None,
    until_s: float | None = None,
) -> Watched:
    """Run the sessions to their end; `probes` are called with the deployment at their times."""
    clock = VirtualClock()
    deployment = WatchedDeployment(
        settings, clock, Silence(), lambda _role: Silence(), lambda job: clients.job_ended(job)
    )
    clients = Clients(
        clock,
        iter(sessions),
        deployment.submit,
        deployment.cancel,
        client_settings or ClientSettings(),
        np.random.default_rng(0),
    )
    for time_s, probe in (probes or {}).items():
        clock.call_at(time_s, lambda _, probe=probe: probe(deployment))
    clients.start()
    clock.run(until_s)
    if until_s is None:
        clients.stop()
        deployment.close()
    return Watched(deployment, clients)


def single(isl_tokens: int, osl_tokens: int, arrival_s: float | None = 0.0, block_hashes=()) -> Session:
    """A client with one request."""
    return Session(arrival_s, (Turn(isl_tokens, osl_tokens, block_hashes),))


def conversation(*lengths: tuple[int, int, float], arrival_s: float | None = 0.0, first_own_id: int = 1) -> Session:
    """Turns of new prompt tokens, output tokens and think time, each with all before it in its prompt."""
    return Session(arrival_s, chain_turns(lengths, BLOCK_SIZE, first_own_id))


def check_that_nothing_is_left(watched: Watched) -> None:
    """Every request has ended, and no worker, link or router remembers one."""
    deployment, clients = watched.deployment, watched.clients
    assert set(deployment.ended_s) == set(deployment.jobs)
    assert clients.num_sent == len(deployment.jobs)
    assert clients.num_under_way == 0
    assert not deployment._waiting
    for rank in deployment.ranks:
        assert not rank.drive.flights
        assert (rank.num_active, rank.active_blocks, rank.active_prefill_tokens) == (0, 0, 0)
        for link in (rank.sends, rank.receives):
            assert link.count == 0
            assert not link.queue
        scheduler = rank.engine.core.scheduler
        assert not scheduler.num_running
        assert not scheduler.waiting
        assert not rank.drive.wanting
        if rank.worker not in deployment.settings.losses_s:  # else its blocks are gone with it
            assert scheduler.num_kept_blocks == 0
            assert scheduler.blocks.num_used == 0


times_s = st.just(0.0) | st.sampled_from([0.05, 0.1]) | st.floats(0, 0.6)


@st.composite
def deployments(draw: st.DrawFn) -> DeploymentSettings:
    """Of a few engines that are soon full, started late, lost, and linked slowly."""
    engine = small_engine(
        num_gpu_blocks_override=draw(st.integers(MAX_MODEL_LEN // BLOCK_SIZE, 48)),
        max_num_seqs=draw(st.integers(1, 8)),
        max_num_batched_tokens=draw(st.integers(8, 128)),
        enable_prefix_caching=draw(st.booleans()),
        jitter=draw(st.sampled_from([0.0, 0.1])),
        seed=draw(st.integers(0, 3)),
    )
    roles = draw(st.sampled_from([ROLES[:1], ROLES[:1] * 2, ROLES[1:]]))
    profiles = st.sampled_from([H100, A100])
    groups = tuple(
        WorkerGroup(small_engine(**{**_fields(engine), "profile": draw(profiles)}), draw(st.integers(1, 3)), role)
        for role in roles
    )
    workers = st.integers(0, sum(group.num_workers for group in groups) - 1)
    starts_s = draw(st.just({}) | st.dictionaries(workers, times_s, min_size=1, max_size=2))
    lives_s = draw(st.just({}) | st.dictionaries(workers, times_s, min_size=1, max_size=2))
    startup_time = draw(st.sampled_from([0.0, 0.0, 0.1]))
    return DeploymentSettings(
        groups,
        data_parallel_size=draw(st.sampled_from([1, 1, 2])),
        router=RouterSettings(draw(st.sampled_from(ROUTER_MODES)), router_temperature=draw(st.sampled_from([0, 0.5]))),
        kv_transfer_bandwidth=draw(st.sampled_from([64.0, 0.1])),
        kv_transfer_timing_mode=draw(st.sampled_from(TRANSFER_MODES)),
        startup_time=startup_time,
        starts_s=starts_s,
        losses_s={worker: starts_s.get(worker, startup_time) + life_s for worker, life_s in lives_s.items()},
        migration_limit=draw(st.integers(0, 2)),
    )


@st.composite
def loads(draw: st.DrawFn) -> Workload:
    """Made-up requests of all kinds that `deployments` can serve, most of them; a few are too long."""
    is_open = draw(st.booleans())
    concurrency = draw(st.integers(1, 12)) if not is_open or draw(st.booleans()) else None
    num_turns = draw(st.integers(1, 3))
    longest = (MAX_MODEL_LEN - 16) // (2 * num_turns)
    delay_ms = draw(st.sampled_from([None, 30.0])) if num_turns > 1 else None
    cancellation_rate = draw(st.sampled_from([None, 30.0]))
    prefix_tokens = draw(st.sampled_from([None, 16]))
    return Workload(
        isl=draw(st.integers(1, longest)),
        osl=draw(st.integers(1, longest)),
        isl_stddev=draw(st.sampled_from([None, 4.0])),
        osl_stddev=draw(st.sampled_from([None, 8.0])),
        concurrency=concurrency,
        request_rate=draw(st.sampled_from([20.0, 200.0])) if is_open else None,
        request_count=draw(st.integers(1, 40)),
        concurrency_ramp_duration=draw(st.sampled_from([None, 0.2])) if concurrency else None,
        benchmark_duration=draw(st.sampled_from([None, None, 0.3])),
        conversation_turn_mean=num_turns,
        conversation_turn_delay_mean=delay_ms,
        shared_system_prompt_length=prefix_tokens,
        request_cancellation_rate=cancellation_rate,
        request_cancellation_delay=draw(st.sampled_from([None, 0.04])) if cancellation_rate else None,
        random_seed=draw(st.integers(0, 1000)),
    )


@st.composite
def simulations(draw: st.DrawFn) -> SimulationSettings:
    turnaround_s = draw(st.sampled_from([0.0, 0.0, 0.02]))
    return SimulationSettings(draw(deployments()), draw(loads()), client_turnaround_s=turnaround_s)


def _fields(settings: EngineSettings) -> dict[str, object]:
    return {name: getattr(settings, name) for name in EngineSettings.__dataclass_fields__}
