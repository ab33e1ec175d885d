"""
Which worker gets a request: what can be chosen, spelled as Dynamo's frontend spells it.

    settings = RouterSettings(router_mode="kv")
    settings.to_argv()        what to give the frontend

`routing` does the same in virtual time.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, fields

from mock_engine.engine_settings import argv_of
from mock_engine.errors import ConfigError

ROUTER_MODES = ("round-robin", "random", "power-of-two", "least-loaded", "kv")


@dataclass(frozen=True, slots=True)
class RouterSettings:
    """Field names are the flags of `dynamo.frontend` 1.2.1 to 1.6.1. Raises `ConfigError` for a value out of range."""

    router_mode: str = "round-robin"
    router_kv_overlap_score_credit: float = 1.0
    router_prefill_load_scale: float = 1.0
    router_temperature: float = 0.0

    def __post_init__(self) -> None:
        if self.router_mode not in ROUTER_MODES:
            raise ConfigError(f"--router-mode is {self.router_mode!r}; allowed is {', '.join(ROUTER_MODES)}")
        for name in ("router_kv_overlap_score_credit", "router_prefill_load_scale", "router_temperature"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ConfigError(f"--{name.replace('_', '-')} is {value:g}; it must be 0 or more")

    @classmethod
    def from_flags(cls, flags: argparse.Namespace) -> RouterSettings:
        """The settings in what a parser with `flags.add_router_flags` has parsed."""
        return cls(**{field.name: getattr(flags, field.name) for field in fields(cls)})

    def to_argv(self) -> list[str]:
        """The frontend's flags. Those that are its defaults are left out: 1.6 warns of the weights, which it moves."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return argv_of({name: value for name, value in values.items() if value != getattr(_DEFAULTS, name)})


_DEFAULTS = RouterSettings()
