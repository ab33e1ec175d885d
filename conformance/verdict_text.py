"""
How verdicts are counted and put into words, the same everywhere.

Every figure comes from `count_outcomes` and every text goes through
`printable`, so no two reports can disagree and none can be broken by what an
engine says.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from conformance.catalogue import LEVELS
from conformance.verdict import Finding, Outcome, Subject, SuiteRun, Verdict

TITLES = {outcome: outcome.value for outcome in Outcome} | {
    Outcome.WARNED: "warning",
    Outcome.UNCHECKED: "not checkable",
}
COUNT_TITLES = TITLES | {Outcome.WARNED: "warnings"}
SYMBOLS = {
    Outcome.PASSED: "✓",
    Outcome.FAILED: "✗",
    Outcome.WARNED: "!",
    Outcome.DEVIATES: "≈",
    Outcome.SKIPPED: "–",
    Outcome.UNCHECKED: "?",
}
BROKEN = (Outcome.FAILED, Outcome.WARNED, Outcome.DEVIATES)
CHECKED = (Outcome.PASSED, *BROKEN)
_FIRST_EVENTS, _LAST_EVENTS = 12, 8  # of a request, that are shown
_EVENT = re.compile(r" *\d+\.\d+ s  ")
_MAX_SENT = 1500  # characters of a request that are shown
_MAX_NAMED = 5  # rules that a verdict line names before it says "and 3 more"


def count_outcomes(verdicts: Iterable[Verdict]) -> dict[Outcome, int]:
    """How many verdicts there are of each outcome; all outcomes, in their order."""
    counts = dict.fromkeys(Outcome, 0)
    for verdict in verdicts:
        counts[verdict.outcome] += 1
    return counts


def group_by_area(verdicts: Iterable[Verdict]) -> dict[str, list[Verdict]]:
    """The verdicts by area of their rule, areas in the order they first come."""
    areas: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        areas.setdefault(verdict.rule.area, []).append(verdict)
    return areas


def sort_broken(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """The broken rules: those that fail the run first, then warnings, then known deviations."""
    return sorted((v for v in verdicts if v.outcome in BROKEN), key=lambda v: BROKEN.index(v.outcome))


def verdict_line(run: SuiteRun) -> str:
    """The run in one sentence, such as "conforms: 50 MUST, 26 SHOULD and 2 MAY rules hold"."""
    counts = count_outcomes(run.verdicts)
    if not any(counts[outcome] for outcome in CHECKED):
        return "nothing was checked: no rule was selected that applies here"
    by_outcome = {outcome: [v for v in run.verdicts if v.outcome is outcome] for outcome in CHECKED}
    if by_outcome[Outcome.FAILED]:
        line = f"does not conform: {'; '.join(_name_failed(by_outcome[Outcome.FAILED]))}"
    else:
        passed = by_outcome[Outcome.PASSED]
        line = f"conforms: {_count_levels(passed)} {'holds' if len(passed) == 1 else 'hold'}"
    for outcome, one, many in (
        (Outcome.WARNED, "warning", "warnings"),
        (Outcome.DEVIATES, "known deviation", "known deviations"),
    ):
        if found := by_outcome[outcome]:
            line += f"; {len(found)} {one if len(found) == 1 else many} ({_name_rules(found)})"
    return line


def _name_failed(failed: Sequence[Verdict]) -> Iterator[str]:
    broken = [verdict for verdict in failed if not verdict.is_out_of_date]
    old = [verdict for verdict in failed if verdict.is_out_of_date]
    if broken:
        yield f"{_count_levels(broken)} broken ({_name_rules(broken)})"
    if old:
        entries, are = ("1 entry", "is") if len(old) == 1 else (f"{len(old)} entries", "are")
        yield f"{entries} of the deviations file {are} out of date ({_name_rules(old)})"


def message_of(verdict: Verdict) -> str:
    """What was found, or else why there is nothing."""
    return verdict.finding.message if verdict.finding else verdict.reason


def finding_sections(verdict: Verdict) -> list[tuple[str, str]]:
    """What is known of a broken rule, as headed blocks of text without empty ones; only JSON has long ones uncut."""
    finding = verdict.finding or Finding(message=verdict.reason)
    sections = [
        ("Found", finding.message),
        (TITLES[verdict.outcome].capitalize() + " because", verdict.reason if verdict.finding else ""),
        ("Sent", "\n".join(map(_cut_request, finding.sent))),
        ("Transcript", "\n".join(_cut_transcript(finding.transcript))),
        ("Why", "\n".join(verdict.rule.sources)),
        ("Script", finding.script),
        ("Example", finding.example),
    ]
    return [(title, printable(text)) for title, text in sections if text.strip()]


def _cut_request(text: str) -> str:
    """Its beginning and end, with a remark on how long it is."""
    if len(text) <= _MAX_SENT:
        return text
    half = _MAX_SENT // 2
    return f"{text[:half]} … {len(text) - 2 * half:,} of {len(text):,} characters left out … {text[-half:]}"


def _cut_transcript(lines: Sequence[str]) -> list[str]:
    """The first and the last events of each request, and how many are between. Any other line begins a request."""
    shown: list[str] = []
    for is_event, group in groupby(lines, key=lambda line: bool(_EVENT.match(line))):
        members = list(group)
        num_hidden = len(members) - _FIRST_EVENTS - _LAST_EVENTS
        if is_event and num_hidden > 0:
            indent = " " * (len(members[0]) - len(members[0].lstrip()))
            remark = f"{indent}… {count_noun(num_hidden, 'more event')} …"
            members = [*members[:_FIRST_EVENTS], remark, *members[-_LAST_EVENTS:]]
        shown += members
    return shown


def printable(text: str) -> str:
    r"""`text` with what does not print, line breaks and tabs apart, as Python would write it: "\x1b"."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in "\n\t" else char.encode("unicode_escape").decode("ascii") for char in text
    )


def one_line(text: str) -> str:
    """`printable` text with each run of white space as one blank."""
    return " ".join(printable(" ".join(text.split())).split())


def count_noun(count: int, noun: str) -> str:
    """Such as "1 rule" and "2 rules"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _count_levels(verdicts: Sequence[Verdict]) -> str:
    counts = dict.fromkeys(LEVELS, 0)
    for verdict in verdicts:
        counts[verdict.rule.level] = counts.get(verdict.rule.level, 0) + 1
    words = [f"{count} {one_line(level)}" for level, count in counts.items() if count] or ["0"]
    listed = " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))
    return f"{listed} rule{'' if len(verdicts) == 1 else 's'}"


def _name_rules(verdicts: Sequence[Verdict]) -> str:
    names = [one_line(verdict.rule.id) for verdict in verdicts]
    more = [f"and {len(names) - _MAX_NAMED} more"] if len(names) > _MAX_NAMED else []
    return ", ".join(names[:_MAX_NAMED] + more)


def describe_subject(subject: Subject) -> list[tuple[str, str]]:
    """What was checked, and how, as names and texts; without the capabilities."""
    return [
        ("engine", subject.engine),
        ("engine args", subject.engine_args or "none"),
        ("driver", subject.driver),
        ("role", subject.role),
        ("clock", subject.clock),
        ("ai-dynamo", subject.dynamo_version),
        ("suite", subject.suite_version),
    ]


def overall_outcome(run: SuiteRun) -> Outcome:
    """The outcome whose colour the whole run gets."""
    counts = count_outcomes(run.verdicts)
    for outcome in (*BROKEN, Outcome.PASSED):
        if counts[outcome]:
            return outcome
    return Outcome.SKIPPED
