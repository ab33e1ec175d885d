"""
What a worker is told besides its engine's settings: which model it pretends to be, how many engines it has, its role,
what it publishes, and where it records.
"""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass, field, fields
from pathlib import Path

from mock_engine.content import ContentSettings
from mock_engine.engine_settings import DEFAULT_TOKENIZER, EngineSettings, argv_of
from mock_engine.errors import ConfigError
from mock_engine.faults import Fault, of_worker
from mock_engine.kv_transfer import DEFAULT_BANDWIDTH, DEFAULT_TIMEOUT_S, check_bandwidth
from mock_engine.lora import parse_lora_modules
from mock_engine.output_tokens import find_tokenizer
from mock_engine.roles import ROLES


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """The settings of one worker; field names are the flags' names. Raises `ConfigError` for a value out of range."""

    engine: EngineSettings = field(default_factory=EngineSettings)
    model_path: Path = DEFAULT_TOKENIZER
    model_name: str | None = None  # default: the profile's model
    data_parallel_size: int = 1  # engines in it, each with its own KV cache and GPUs
    disaggregation_mode: str = "agg"
    kv_transfer_bandwidth: float = DEFAULT_BANDWIDTH  # GB/s, each way
    kv_transfer_host: str = "127.0.0.1"  # where decode workers reach it
    kv_transfer_timeout: float = DEFAULT_TIMEOUT_S  # real seconds
    enable_kv_events: bool | None = None  # default: yes; in a fleet, if its router goes by them
    enable_kv_routing: bool | None = None  # these and loads are published at all; the same default
    record: Path | None = None  # folder of a recording
    status: Path | None = None  # file that has the latest state
    dcgm_port: int | None = None  # of an endpoint with the GPUs' metrics; 0: any free one
    dcgm_host: str = "127.0.0.1"
    faults: tuple[Fault, ...] = ()  # what is to go wrong on purpose
    tool_call_ratio: float = 0.5
    reasoning_ratio: float = 0.0
    reasoning_osl: int = 128
    dyn_tool_call_parser: str = "hermes"
    dyn_reasoning_parser: str | None = None  # default: qwen3 where answers have thoughts, none otherwise
    lora_modules: tuple[str, ...] = ()
    max_loras: int = 1

    def __post_init__(self) -> None:
        if self.dcgm_port is not None and not 0 <= self.dcgm_port <= 65_535:
            raise ConfigError(f"--dcgm-port is {self.dcgm_port}; it must be 1 to 65535, or 0 for any free one")
        find_tokenizer(self.model_path)
        check_data_parallel_size(self.data_parallel_size)
        if self.disaggregation_mode not in ROLES:
            raise ConfigError(
                f"--disaggregation-mode is {self.disaggregation_mode!r}; allowed is {', '.join(ROLES)}. "
                f"Leave it out for a worker that does all of a request."
            )
        check_bandwidth(self.kv_transfer_bandwidth)
        if not 0 < self.kv_transfer_timeout < float("inf"):
            raise ConfigError(f"--kv-transfer-timeout is {self.kv_transfer_timeout:g}; it must be above 0, in seconds")
        _ = self.content
        parse_lora_modules(self.lora_modules)
        if self.lora_modules and self.disaggregation_mode != "agg":
            raise ConfigError(
                f"--lora-modules goes with workers that do all of a request, and --disaggregation-mode is "
                f"{self.disaggregation_mode}. Leave one of them out."
            )
        if self.max_loras < 1:
            raise ConfigError(f"--max-loras is {self.max_loras}; it must be at least 1")

    @property
    def content(self) -> ContentSettings:
        """What answers contain."""
        return ContentSettings(self.tool_call_ratio, self.reasoning_ratio, self.reasoning_osl)

    @property
    def tool_call_parser(self) -> str | None:
        """Dynamo's name of it; None where it is turned off."""
        return None if self.dyn_tool_call_parser == "none" else self.dyn_tool_call_parser

    @property
    def reasoning_parser(self) -> str | None:
        """Dynamo's name of it; None where it is turned off, or has nothing to do."""
        parser = self.dyn_reasoning_parser or ("qwen3" if self.reasoning_ratio else "none")
        return None if parser == "none" else parser

    @classmethod
    def from_flags(cls, flags: argparse.Namespace) -> WorkerSettings:
        """The settings in what a parser with `flags.add_engine_flags` and `add_worker_flags` has parsed."""
        own = {each.name: getattr(flags, each.name) for each in fields(cls) if each.name in flags}
        return cls(EngineSettings.from_flags(flags), **own)

    def to_argv(self) -> list[str]:
        """Flags of `mock-engine worker` that give these settings again."""
        own = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in ("engine", "faults")}
        faults = [word for fault in self.faults for word in ("--fault", fault.to_text())]
        return self.engine.to_argv() + argv_of(own) + faults

    def of_worker(self, worker: int) -> WorkerSettings:
        """Those of one worker of several: without the faults of the others."""
        return dataclasses.replace(self, faults=tuple(of_worker(self.faults, worker)))


def check_data_parallel_size(size: int) -> None:
    """Raise `ConfigError` for what `--data-parallel-size` cannot be."""
    if size < 1:
        raise ConfigError(f"--data-parallel-size is {size}; it must be at least 1")
