"""
What a worker is told besides its engine's settings: which model it pretends to be, and where it records.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path

from mock_engine.engine_settings import DEFAULT_TOKENIZER, EngineSettings


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """The settings of one worker. Raises `ConfigError` for a value out of range."""

    engine: EngineSettings = field(default_factory=EngineSettings)
    model_path: Path = DEFAULT_TOKENIZER
    model_name: str | None = None  # default: the profile's model
    record_folder: Path | None = None
    status_path: Path | None = None

    @classmethod
    def from_flags(cls, flags: argparse.Namespace) -> WorkerSettings:
        """The settings in what `llm_engine`'s parser has parsed."""
        return cls(
            engine=EngineSettings.from_flags(flags),
            model_path=flags.model_path,
            model_name=flags.model_name,
            record_folder=flags.record,
            status_path=flags.status,
        )
