"""
The settings of one engine, and the core that they make.

Names are those of vLLM and of Dynamo's mocker. A setting that is None takes the
profile's value: what the engine of that profile would use.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from mock_engine.core import Core
from mock_engine.drafting import DraftedTiming
from mock_engine.errors import ConfigError
from mock_engine.kv_blocks import KvBlocks
from mock_engine.profile import Profile, find_folder, load_profile
from mock_engine.scheduler import Scheduler
from mock_engine.scheduler_config import SchedulerConfig
from mock_engine.sglang_scheduler import SglangScheduler
from mock_engine.speculation import Speculation
from mock_engine.step import StepLoad
from mock_engine.step_times import StepTimes
from mock_engine.timing import StepJitter, TimingModel
from mock_engine.trtllm_scheduler import TrtllmScheduler
from mock_engine.vllm_scheduler import VllmScheduler
from mock_engine.waiting_queue import SCHEDULING_POLICIES

DEFAULT_PROFILE = "h100-sxm/llama-3.1-8b/vllm-tp1-bf16"
# Whose scheduling policy an engine may follow, as Dynamo's mocker spells it.
ENGINE_TYPES: dict[str, type[Scheduler]] = {
    "vllm": VllmScheduler,
    "sglang": SglangScheduler,
    "trtllm": TrtllmScheduler,
}
DEFAULT_TOKENIZER = Path(__file__).parent / "tokenizer"


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What the user chose. Field names are the flags' names. Raises `ConfigError` for a value out of range."""

    profile: str = DEFAULT_PROFILE
    engine_type: str | None = None  # whose scheduler it has; of a profile's engine that is not known, vLLM's
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    block_size: int | None = None
    num_gpu_blocks_override: int | None = None
    max_model_len: int | None = None
    gpu_memory_utilization: float = 0.9
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    async_scheduling: bool | None = None
    scheduling_policy: str = "fcfs"
    num_speculative_tokens: int = 0
    speculative_acceptance_rate: float = 0.7
    speculative_draft_cost: float = 0.1
    speedup_ratio: float = 1.0
    seed: int = 0
    jitter: float | None = None
    default_osl: int = 256

    def __post_init__(self) -> None:
        if self.engine_type is not None and self.engine_type not in ENGINE_TYPES:
            allowed = ", ".join(ENGINE_TYPES)
            raise ConfigError(
                f"--engine-type is {self.engine_type!r}; allowed is {allowed}. Leave it out for that of the profile."
            )
        for name in (
            "max_num_seqs",
            "max_num_batched_tokens",
            "block_size",
            "num_gpu_blocks_override",
            "max_model_len",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{flag_of(name)} is {value}; it must be at least 1")
        Speculation(self.num_speculative_tokens or 1, self.speculative_acceptance_rate, self.speculative_draft_cost)
        if self.scheduling_policy not in SCHEDULING_POLICIES:
            allowed = ", ".join(SCHEDULING_POLICIES)
            raise ConfigError(f"--scheduling-policy is {self.scheduling_policy!r}; allowed is {allowed}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(
                f"--gpu-memory-utilization is {self.gpu_memory_utilization:g}; it must be above 0 and at most 1"
            )
        if not 0 <= self.speedup_ratio < float("inf"):
            raise ConfigError(
                f"--speedup-ratio is {self.speedup_ratio:g}; it must be 0 (as fast as possible) or a positive number"
            )
        if self.jitter is not None and not 0 <= self.jitter <= 1:
            raise ConfigError(f"--jitter is {self.jitter:g}; it is a coefficient of variation from 0 (none) to 1")
        if self.seed < 0:
            raise ConfigError(f"--seed is {self.seed}; it must be 0 or more")
        if self.default_osl < 1:
            raise ConfigError(f"--default-osl is {self.default_osl}; it must be at least 1")

    @property
    def speculation(self) -> Speculation | None:
        """How it speculates, the same on all engines; None if it does not."""
        if not self.num_speculative_tokens:
            return None
        return Speculation(
            self.num_speculative_tokens, self.speculative_acceptance_rate, self.speculative_draft_cost, self.seed
        )

    @classmethod
    def from_flags(cls, flags: argparse.Namespace) -> EngineSettings:
        """The settings in what a parser with `flags.add_engine_flags` has parsed."""
        return cls(**{field.name: getattr(flags, field.name) for field in fields(cls)})

    def to_argv(self) -> list[str]:
        """Flags that give these settings again, for another process."""
        return argv_of({field.name: getattr(self, field.name) for field in fields(self)})


@dataclass(frozen=True, slots=True)
class Engine:
    """A core that is ready to be driven, and the numbers that describe it."""

    core: Core
    profile: Profile
    scheduler: SchedulerConfig
    block_size: int
    num_blocks: int
    engine_type: str = "vllm"  # whose scheduler it has, and whose names its metrics


def build_engine(settings: EngineSettings, on_unmeasured: Callable[[StepLoad], None] = lambda _: None) -> Engine:
    """
    The engine that `settings` describe. Raises `ProfileError` or `ConfigError`.

    `on_unmeasured` is called for the first step whose load lies outside what the profile measured.
    """
    (engine,) = build_engines(settings, [settings.seed], on_unmeasured)
    return engine


def build_engines(
    settings: EngineSettings, seeds: Iterable[int], on_unmeasured: Callable[[StepLoad], None] = lambda _: None
) -> list[Engine]:
    """The same for engines that differ in their seeds alone; the profile is read once for all of them."""
    folder = find_folder(settings.profile)
    paths = [path for path in folder.iterdir() if path.suffix in (".toml", ".csv") and path.exists()]
    files = [(path.name, path.stat()) for path in paths]
    profile, measured = _load(folder, tuple(sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in files)))
    timing = measured if settings.speculation is None else DraftedTiming(measured, settings.speculation)
    jitter_cv = profile.jitter_cv if settings.jitter is None else settings.jitter
    return [
        make_engine(settings, profile, StepTimes(timing, StepJitter(jitter_cv, seed), on_unmeasured)) for seed in seeds
    ]


@lru_cache(maxsize=16)
def _load(folder: Path, _stamps: tuple[tuple[str, int, int], ...]) -> tuple[Profile, TimingModel]:
    """A profile and its step times, kept: many simulations of one profile take them to be the same as its files are."""
    profile = load_profile(folder)
    return profile, TimingModel(profile)


def make_engine(settings: EngineSettings, profile: Profile, times: StepTimes) -> Engine:
    """The engine of a profile that is at hand; `settings.profile` is not looked at. Raises `ProfileError`."""
    block_size = settings.block_size or profile.block_size
    num_blocks = settings.num_gpu_blocks_override or (
        profile.total_kv_blocks(settings.gpu_memory_utilization) * profile.block_size // block_size
    )
    max_num_batched_tokens = settings.max_num_batched_tokens or profile.max_num_batched_tokens
    tokens_per_sequence = 1 + settings.num_speculative_tokens
    config = SchedulerConfig(
        max_num_seqs=settings.max_num_seqs or min(profile.max_num_seqs, max_num_batched_tokens // tokens_per_sequence),
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=settings.max_model_len or min(profile.max_model_len, num_blocks * block_size),
        enable_chunked_prefill=settings.enable_chunked_prefill,
        speculation=settings.speculation,
        scheduling_policy=settings.scheduling_policy,
    )
    is_async = profile.async_scheduling if settings.async_scheduling is None else settings.async_scheduling
    engine_type = settings.engine_type or (profile.engine if profile.engine in ENGINE_TYPES else "vllm")
    scheduler = ENGINE_TYPES[engine_type](config, KvBlocks(num_blocks, block_size, settings.enable_prefix_caching))
    return Engine(Core(scheduler, times, is_async), profile, config, block_size, num_blocks, engine_type)


def flag_of(name: str) -> str:
    """The command line's spelling of a setting."""
    return "--" + name.replace("_", "-")


def argv_of(values: Mapping[str, Any]) -> list[str]:
    """Flags that give settings these values: none for None, `--no-...` for False, one for each item of a tuple."""
    argv: list[str] = []
    for name, value in values.items():
        if isinstance(value, bool):
            argv.append(flag_of(name) if value else flag_of(f"no_{name}"))
        elif isinstance(value, tuple):
            for item in value:
                argv += [flag_of(name), str(item)]
        elif value is not None:
            argv += [flag_of(name), str(value)]
    return argv
