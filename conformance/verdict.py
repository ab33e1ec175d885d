"""
What the suite says of one engine: a verdict for every rule.

Plain values, so that everything that prints or writes them needs nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from conformance.catalogue import Rule


class Outcome(StrEnum):
    PASSED = "passed"
    FAILED = "failed"  # a broken rule that fails the run, or one whose entry in the deviations file is out of date
    WARNED = "warned"  # a broken rule below `--fail-on`, or one too new to fail a run
    DEVIATES = "deviates"  # a broken rule that the adopter's deviations file names
    SKIPPED = "skipped"  # does not apply here; `reason` says why
    UNCHECKED = "unchecked"  # cannot be checked from Python; `reason` says why


@dataclass(frozen=True, slots=True)
class Finding:
    """One broken rule, with all that somebody who never saw this suite needs to act on it."""

    message: str  # one or two lines: what was found and what the rule wants
    sent: tuple[str, ...] = ()  # each request that was sent, as JSON text
    transcript: tuple[str, ...] = ()  # lines with times: what was said, in order
    script: str = ""  # a standalone Python program of at most 25 lines that shows it; "" if there is none
    example: str = ""  # Hypothesis' release and blob, "6.100.0:AXic...", which `--deviations` and `--example` take
    is_should: bool = False  # of a MUST rule, only a part is broken that is a SHOULD


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one rule says of the engine."""

    rule: Rule
    outcome: Outcome
    reason: str = ""  # why it was skipped, unchecked, is only a warning, deviates, or is out of date
    finding: Finding | None = None
    num_examples: int = 0
    seconds: float = 0.0  # real time that the check took
    is_out_of_date: bool = False  # nothing is broken but its entry in the deviations file, and that fails the run

    @property
    def is_should(self) -> bool:
        """Whether what was found is a SHOULD: the rule, or the part of a MUST rule that is broken."""
        return self.rule.level == "SHOULD" or (self.finding is not None and self.finding.is_should)


@dataclass(frozen=True, slots=True)
class Subject:
    """What was held against the rules, and how."""

    engine: str  # "my_pkg:Engine"
    engine_args: str
    driver: str  # plain, bridge or worker
    role: str  # agg, prefill, decode or encode
    clock: str  # virtual or real
    dynamo_version: str
    suite_version: str
    capabilities: dict[str, str] = field(default_factory=dict)  # "KV events": "yes, 1 push source" / "no: ..."


@dataclass(frozen=True, slots=True)
class SuiteRun:
    """All verdicts of one run, in the catalogue's order."""

    subject: Subject
    verdicts: tuple[Verdict, ...]
    seconds: float
