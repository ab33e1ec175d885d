"""
Broken engines, each a small change to the toy engine, each with the rule that must notice it.

    @mutant("gen.terminal_once", "the last chunk has no finish_reason", seen_in="dynamo#1856, dynamo#10513")
    class NoFinishReason(ToyEngine): ...

At least one for every rule that is checked, and one for every real bug in the list that the suite was made from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import TypeVar

from conformance.rules import AREAS
from conformance.settings import Role

T = TypeVar("T", bound=type)


@dataclass(frozen=True, slots=True)
class Mutant:
    """One broken engine."""

    engine: str  # "conformance.selftest.mutants.gen:NoFinishReason"
    rule_id: str  # the rule that names it
    what: str  # what is broken, in a few words
    seen_in: str = ""  # issues in which engines had this bug
    engine_args: str = ""
    role: Role = "agg"

    @property
    def name(self) -> str:
        return self.engine.rpartition(":")[2]


_MUTANTS: list[Mutant] = []


def mutant(
    rule_id: str, what: str, *, seen_in: str = "", engine_args: str = "", role: Role = "agg"
) -> Callable[[T], T]:
    """Register a broken engine. Several on one class if several rules must notice it."""

    def register(engine_class: T) -> T:
        engine = f"{engine_class.__module__}:{engine_class.__name__}"
        _MUTANTS.append(Mutant(engine, rule_id, what, seen_in, engine_args, role))
        return engine_class

    return register


@cache
def mutants() -> tuple[Mutant, ...]:
    """All of them, by area."""
    for area in AREAS:
        name = f"{__name__}.{area}"
        if find_spec(name):
            import_module(name)
    return tuple(_MUTANTS)
