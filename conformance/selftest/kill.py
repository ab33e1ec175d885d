"""
One rule against one engine, without pytest.

    verdict_of("my_pkg:Engine", "gen.max_tokens", seed=1)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from conformance.bench import Bench
from conformance.catalogue import Rule, load_catalogue
from conformance.facts import find_facts
from conformance.runner import judge_rule
from conformance.selftest.mutants import Mutant
from conformance.settings import Role, SuiteSettings
from conformance.streams import DriverName
from conformance.verdict import Verdict


def verdicts_of(settings: SuiteSettings, rules: Iterable[Rule], *, shrinks: bool = True) -> Iterator[Verdict]:
    """The verdict of each rule, one bench for all. `shrinks`: see `judge_rule`."""
    bench = Bench(settings, find_facts(settings))
    try:
        for rule in rules:
            yield judge_rule(bench, rule, shrinks=shrinks)
    finally:
        bench.close()


def verdict_on(mutant: Mutant, *, seed: int, driver: DriverName = "bridge", shrinks: bool = True) -> Verdict:
    """What the rule that names it says of a broken engine."""
    role: Role | None = mutant.role if mutant.role != "agg" else None
    settings = SuiteSettings(mutant.engine, mutant.engine_args, driver, role, seed=seed)
    (verdict,) = verdicts_of(settings, [load_catalogue()[mutant.rule_id]], shrinks=shrinks)
    return verdict
