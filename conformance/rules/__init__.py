"""
The checks: one function for every rule of the catalogue that can be checked from Python.

    @check("cancel.mid")
    async def mid(bench, draw):
        stream = await bench.open(draw(requests(...)), stop_after=draw(st.integers(1, 8)))
        ...
        expect(transcript.is_cancelled, "...", transcript)
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

AREAS = (
    "args",
    "sig",
    "start",
    "gen",
    "err",
    "cancel",
    "abort",
    "drop",
    "life",
    "drain",
    "disagg",
    "encode",
    "kv",
    "metrics",
    "health",
    "logp",
    "ctl",
    "hook",
    "log",
    "ctx",
)

# Rules that no Python code can look at, and why.
UNCHECKABLE = {
    "gen.no_backpressure": "tells authors what the bridge does; it asks nothing of an engine that could be seen",
}

CheckFunction = Callable[..., Coroutine[Any, Any, None]]


@dataclass(frozen=True, slots=True)
class Check:
    """How one rule is checked."""

    rule_id: str
    function: Any  # async (bench, draw) -> None; or, of a machine, (bench) -> a RuleBasedStateMachine class
    is_machine: bool = False
    in_process: bool = False  # looks at the engine object, which the worker driver has in another process
    needs_engine: bool = True  # a started engine on the bench; else the check makes its own
    max_examples: int | None = None  # at most so many: what is drawn has no more to it, or each takes long
    needs: tuple[str, ...] = ()  # capabilities (see facts) beyond those in the catalogue's "applies"


_CHECKS: dict[str, Check] = {}


def check(
    rule_id: str,
    *,
    is_machine: bool = False,
    in_process: bool = False,
    needs_engine: bool = True,
    max_examples: int | None = None,
    needs: tuple[str, ...] = (),
) -> Callable[[CheckFunction], CheckFunction]:
    """Register the check of a rule. An engine of the check's own (`needs_engine=False`) means `in_process`."""

    def register(function: CheckFunction) -> CheckFunction:
        assert rule_id not in _CHECKS, f"{rule_id} has two checks"
        _CHECKS[rule_id] = Check(
            rule_id, function, is_machine, in_process or not needs_engine, needs_engine, max_examples, needs
        )
        return function

    return register


@cache
def checks() -> dict[str, Check]:
    """All checks by rule id."""
    for area in AREAS:
        if find_spec(f"conformance.rules.{area}"):
            import_module(f"conformance.rules.{area}")
    return dict(_CHECKS)
