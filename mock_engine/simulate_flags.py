"""
The flags of `mock-engine simulate`: what is deployed, what is sent, and what to make of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from mock_engine.deployment import DeploymentSettings, WorkerGroup
from mock_engine.engine_settings import EngineSettings
from mock_engine.errors import ConfigError
from mock_engine.flags import (
    add_bandwidth_flag,
    add_data_parallel_flag,
    add_engine_flags,
    add_role_flags,
    add_router_flags,
    add_shared_load_flags,
)
from mock_engine.kv_transfer import TRANSFER_MODES
from mock_engine.roles import num_workers_by_role
from mock_engine.router_settings import RouterSettings
from mock_engine.simulation import SimulationSettings
from mock_engine.slos import parse_slos
from mock_engine.workload import Workload

T = TypeVar("T")

# What `--sweep` can vary, and what a value of it is.
SWEPT: dict[str, Callable[[str], object]] = {
    **dict.fromkeys(("concurrency", "workers", "prefill-workers", "decode-workers"), int),
    **dict.fromkeys(("isl", "osl", "max-num-seqs", "max-num-batched-tokens"), int),
    "request-rate": float,
    "profile": str,
    "router-mode": str,
}


# These have a value even where the user gives none.
_WITH_DEFAULTS = ("profile", "router-mode")


def add_simulate_flags(parser: argparse.ArgumentParser) -> None:
    """Add all of them but `--json`."""
    add_workload_flags(parser)
    group = parser.add_argument_group("clients")
    group.add_argument(
        "--client-turnaround",
        type=float,
        default=0.0,
        metavar="MS",
        help="mean time from the end of an answer until its client sends again (%(default)s)",
    )
    add_simulated_deployment_flags(parser)
    add_engine_flags(parser, is_live=False)
    group = parser.add_argument_group("goals and searches")
    group.add_argument("--goodput", metavar="SLOS", help="e.g. 'time_to_first_token:200ms inter_token_latency:20ms'")
    group.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="NAME=A,B,C",
        help=f"simulate each value, NAME being one of {', '.join(SWEPT)}; repeated: each combination",
    )
    group.add_argument("--find-max", action="store_true", help="find the highest --request-rate that meets --goodput")
    group.add_argument(
        "--slo-attainment-fraction",
        type=float,
        default=0.95,
        metavar="SHARE",
        help="of requests that must be good for that (%(default)s)",
    )
    group.add_argument("--processes", type=int, metavar="N", help="of a sweep or search (default: one a core)")
    group.add_argument("--ray", action="store_true", help="run them on the Ray cluster that is already there instead")
    group = parser.add_argument_group("output")
    group.add_argument("--requests-out", type=Path, metavar="FILE", help="one JSON line a request, as AIPerf's records")
    group.add_argument("--timeline", type=Path, metavar="FILE", help="a trace for ui.perfetto.dev (.json or .json.gz)")
    group.add_argument("--plots", type=Path, metavar="DIR", help="write pictures there")


def add_workload_flags(parser: argparse.ArgumentParser) -> None:
    """Add one flag for each field of `Workload`, spelled as AIPerf spells them."""
    group = parser.add_argument_group("load", "spelled as in 'aiperf profile'")
    dataset_type = "one of mooncake_trace, inputs_json, profile_export, azure_trace and csv"
    add_shared_load_flags(group, request_count="1000; of a trace: all", dataset_type=dataset_type)
    group.add_argument("--random-range-ratio", type=float, help="spread lengths evenly within this share of the mean")
    group.add_argument(
        "--concurrency-ramp-duration", type=float, metavar="S", help="reach the concurrency in that time"
    )
    group.add_argument(
        "--arrival-pattern",
        metavar="PATTERN",
        help="of a request rate: constant, poisson (default) or gamma; of a concurrency: concurrency_burst",
    )
    group.add_argument(
        "--arrival-smoothness", type=float, help="of gamma arrivals; below 1: in bursts, as vLLM's burstiness"
    )
    group.add_argument("--benchmark-duration", type=float, metavar="S", help="send no more after that time")
    group.add_argument("--random-seed", type=int, help="seed of lengths, arrivals and waits (0)")

    group = parser.add_argument_group("conversations")
    group.add_argument("--conversation-num", type=int, help="conversations in all, instead of --request-count")
    group.add_argument("--conversation-turn-mean", type=int, help="requests of a conversation (1)")
    group.add_argument("--conversation-turn-stddev", type=float, help="their spread (0)")
    group.add_argument("--conversation-turn-delay-mean", type=float, metavar="MS", help="wait before a later turn (0)")
    group.add_argument("--conversation-turn-delay-stddev", type=float, metavar="MS", help="its spread (0)")
    group.add_argument("--shared-system-prompt-length", type=int, help="tokens that all prompts begin with (0)")
    group.add_argument(
        "--num-prefix-prompts", type=int, help="prefixes, one of which each conversation begins with (0)"
    )
    group.add_argument("--prefix-prompt-length", type=int, help="tokens of such a prefix (0)")

    group = parser.add_argument_group("trace")
    group.add_argument("--fixed-schedule-start-offset", type=int, metavar="MS", help="leave out what is before")
    group.add_argument("--fixed-schedule-end-offset", type=int, metavar="MS", help="leave out what is after")
    group.add_argument("--synthesis-speedup-ratio", type=float, help="send that many times as fast (1)")
    group.add_argument("--synthesis-max-isl", type=int, help="leave out requests with a longer input")
    group.add_argument("--synthesis-max-osl", type=int, help="cut longer outputs to this")

    group = parser.add_argument_group("cancellation")
    group.add_argument(
        "--request-cancellation-rate", type=float, metavar="PERCENT", help="requests that are cancelled (0)"
    )
    group.add_argument(
        "--request-cancellation-delay", type=float, metavar="S", help="how long after they were sent (0)"
    )


def add_simulated_deployment_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what is deployed in a simulation, spelled as Dynamo spells them where it has them."""
    defaults = DeploymentSettings((WorkerGroup(EngineSettings()),))
    group = parser.add_argument_group("deployment")
    add_role_flags(group)
    group.add_argument(
        "--add-workers",
        action="append",
        default=[],
        type=_numbered(str),
        metavar="N:PROFILE",
        help="so many more, of another profile; repeatable",
    )
    group.add_argument("--decode-profile", metavar="PROFILE", help="of the decode workers (default: --profile)")
    add_data_parallel_flag(group)
    add_bandwidth_flag(group)
    group.add_argument(
        "--kv-transfer-timing-mode",
        default=defaults.kv_transfer_timing_mode,
        metavar="MODE",
        help=f"what is transferred: {' or '.join(TRANSFER_MODES)} (%(default)s)",
    )
    group.add_argument("--startup-time", type=float, default=0.0, metavar="S", help="until workers serve (%(default)s)")
    for flag, text in (("--start-worker", "that worker serves from then on"), ("--lose-worker", "that one dies then")):
        group.add_argument(
            flag,
            action="append",
            default=[],
            type=_numbered(float),
            metavar="WORKER:S",
            help=f"{text}; may be repeated",
        )
    group.add_argument(
        "--migration-limit",
        type=int,
        default=defaults.migration_limit,
        metavar="N",
        help="how often a request of a lost worker is sent to another (%(default)s)",
    )
    add_router_flags(parser)


def _numbered(value_type: Callable[[str], T]) -> Callable[[str], tuple[int, T]]:
    """The type of a flag whose value is a whole number, a colon, and something else."""

    def parse(text: str) -> tuple[int, T]:
        number, colon, value = text.partition(":")
        try:
            if not colon or not value:
                raise ValueError
            return int(number), value_type(value)
        except ValueError:
            form = "N:PROFILE, such as 2:a100-sxm/llama-3.1-8b/vllm-tp1-bf16" if value_type is str else "WORKER:SECONDS"
            raise argparse.ArgumentTypeError(f"found {text!r}; needed is {form}") from None

    return parse


def settings_from_flags(flags: argparse.Namespace) -> SimulationSettings:
    """The simulation that the flags describe, whatever they search for. Raises `ConfigError` for what cannot be."""
    if not 0 <= flags.client_turnaround < math.inf:
        raise ConfigError(f"--client-turnaround is {flags.client_turnaround:g}; it must be 0 or more, in ms")
    return SimulationSettings(
        deployment=DeploymentSettings(
            groups=_worker_groups(flags),
            data_parallel_size=flags.data_parallel_size,
            router=RouterSettings.from_flags(flags),
            kv_transfer_bandwidth=flags.kv_transfer_bandwidth,
            kv_transfer_timing_mode=flags.kv_transfer_timing_mode,
            startup_time=flags.startup_time,
            starts_s=dict(flags.start_worker),
            losses_s=dict(flags.lose_worker),
            migration_limit=flags.migration_limit,
        ),
        workload=Workload.from_flags(flags),
        slos=parse_slos(flags.goodput) if flags.goodput is not None else (),
        client_turnaround_s=flags.client_turnaround / 1e3,
    )


def _worker_groups(flags: argparse.Namespace) -> tuple[WorkerGroup, ...]:
    engine = EngineSettings.from_flags(flags)
    groups = num_workers_by_role(flags.workers, flags.prefill_workers, flags.decode_workers)
    if groups[0][0] == "agg":
        if flags.decode_profile is not None:
            raise ConfigError("--decode-profile is about disaggregated serving, which needs --decode-workers")
        more = [
            WorkerGroup(dataclasses.replace(engine, profile=profile), number) for number, profile in flags.add_workers
        ]
        return (WorkerGroup(engine, groups[0][1]), *more)
    if flags.add_workers:
        raise ConfigError(
            "--add-workers do all of a request, --prefill-workers and --decode-workers each a part; give the one or "
            "the other"
        )
    decode_engine = dataclasses.replace(engine, profile=flags.decode_profile or engine.profile)
    return tuple(WorkerGroup(decode_engine if role == "decode" else engine, number, role) for role, number in groups)


def swept_flags(flags: argparse.Namespace) -> list[tuple[dict[str, object], argparse.Namespace]]:
    """Each combination of the values to sweep, and the flags that say so. Raises `ConfigError` for a wrong one."""
    axes = [_sweep_axis(text) for text in flags.sweep]
    names = [name for name, _ in axes]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"--sweep names {name} {names.count(name)} times; give all its values in one")
        if name not in _WITH_DEFAULTS and getattr(flags, name.replace("-", "_")) is not None:
            raise ConfigError(f"--{name} and --sweep {name}=... contradict each other; leave one out")
    points = []
    for values in itertools.product(*(values for _, values in axes)):
        swept = dict(zip(names, values, strict=True))
        changed = {name.replace("-", "_"): value for name, value in swept.items()}
        points.append((swept, argparse.Namespace(**{**vars(flags), **changed})))
    return points


def _sweep_axis(text: str) -> tuple[str, list[object]]:
    name, _, values = text.partition("=")
    if name not in SWEPT or not values:
        raise ConfigError(
            f"--sweep is {text!r}; needed is NAME=A,B,C with NAME one of {', '.join(SWEPT)}, "
            f"such as concurrency=1,4,16,64"
        )
    try:
        return name, [SWEPT[name](value) for value in values.split(",")]
    except ValueError:
        raise ConfigError(f"--sweep is {text!r}; the values of {name} are numbers, separated by commas") from None
