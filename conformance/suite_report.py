"""
A suite run as files, for machines and for people.

    write_report(run, folder)      conformance.json, junit.xml, conformance.md, conformance.html, badge.svg, reproduce/
    write_matrix(runs, path)       one page, a column a run
    run_from_json(json.loads(...)) the run again, out of conformance.json
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from conformance.catalogue import Rule
from conformance.html_report import html_page
from conformance.verdict import Finding, Outcome, Subject, SuiteRun, Verdict
from conformance.verdict_text import (
    BROKEN,
    CHECKED,
    COUNT_TITLES,
    TITLES,
    count_noun,
    count_outcomes,
    describe_subject,
    finding_sections,
    group_by_area,
    message_of,
    one_line,
    overall_outcome,
    printable,
    sort_broken,
    verdict_line,
)

SCHEMA = 1


def write_report(run: SuiteRun, folder: Path) -> list[Path]:
    """
    Write the five files into `folder`, which is made if need be; returns their paths.

    Below it, `reproduce/` has the script of each broken rule, and no other.
    """
    texts = {
        "conformance.json": json.dumps(run_to_json(run), indent=2, sort_keys=True) + "\n",
        "junit.xml": _junit(run),
        "conformance.md": _markdown(run),
        "conformance.html": html_page([run]),
        "badge.svg": _badge(run),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    _write_scripts(run, folder / "reproduce")
    return [folder / name for name in texts]


def _write_scripts(run: SuiteRun, folder: Path) -> None:
    for old in folder.glob("*.py"):
        old.unlink()
    for verdict in run.verdicts:
        if verdict.finding is not None and verdict.finding.script:
            folder.mkdir(exist_ok=True)
            name = re.sub(r"[^A-Za-z0-9_.-]", "_", verdict.rule.id)[:100]
            (folder / f"{name}.py").write_text(verdict.finding.script, encoding="utf-8", errors="backslashreplace")


def write_matrix(runs: Sequence[SuiteRun], path: Path) -> None:
    """Write one HTML page with a column for each of `runs`, at least one, in their order."""
    path.write_text(html_page(runs), encoding="utf-8")


# JSON


def run_to_json(run: SuiteRun) -> dict[str, Any]:
    """
    The run as conformance.json has it: the values of `verdict.py`, field by field.

        schema    1; another number means that fields changed their meaning or went
        conforms  false if a rule failed
        counts    outcome: how many rules
        seconds   of the whole run
        subject   engine, engine_args, driver, role, clock, dynamo_version, suite_version, capabilities {name: text}
        verdicts  a list in the catalogue's order of
            rule      id, level, sentence, source, ... as in the catalogue; applies is a sorted list
            outcome   passed, failed, warned, deviates, skipped or unchecked
            reason, num_examples, seconds
            is_out_of_date  true if it failed only because its entry in the deviations file says what is not so
            finding   null, or message, sent [text], transcript [text], script, example
    """
    counts = count_outcomes(run.verdicts)
    return {
        "schema": SCHEMA,
        "conforms": counts[Outcome.FAILED] == 0,
        "counts": {outcome.value: count for outcome, count in counts.items()},
        **_plain(run),
    }


def run_from_json(data: Mapping[str, Any]) -> SuiteRun:
    """The run that `run_to_json` made `data` of. Anything else is a ValueError of one line."""
    if not isinstance(data, Mapping) or data.get("schema") != SCHEMA:
        found = data.get("schema") if isinstance(data, Mapping) else type(data).__name__
        raise ValueError(
            f'not a conformance.json that this release reads: "schema" is {found!r}, and {SCHEMA} is read. '
            "Write it anew with this release."
        )
    try:
        return SuiteRun(
            subject=Subject(**data["subject"]),
            verdicts=tuple(_read_verdict(**verdict) for verdict in data["verdicts"]),
            seconds=data["seconds"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"a broken conformance.json: {one_line(str(error))}. Write it anew.") from error


def _read_verdict(rule: Mapping[str, Any], outcome: str, finding: Mapping[str, Any] | None, **rest: Any) -> Verdict:
    return Verdict(
        rule=Rule(**{**rule, "applies": frozenset(rule["applies"])}),
        outcome=Outcome(outcome),
        finding=None if finding is None else _read_finding(**finding),
        **rest,
    )


def _read_finding(sent: Sequence[str], transcript: Sequence[str], **rest: Any) -> Finding:
    return Finding(sent=tuple(sent), transcript=tuple(transcript), **rest)


def _plain(value: Any) -> Any:
    """Dataclasses as dicts, tuples as lists, sets sorted, members of an enum as their text."""
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Outcome):
        return value.value
    if isinstance(value, frozenset):
        return sorted(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


# JUnit XML


def _junit(run: SuiteRun) -> str:
    counts = count_outcomes(run.verdicts)
    subject = run.subject
    totals = {
        "name": printable(f"conformance of {subject.engine} ({subject.driver}, {subject.role})"),
        "tests": str(len(run.verdicts)),
        "failures": str(counts[Outcome.FAILED]),
        "errors": "0",
        "skipped": str(len(run.verdicts) - counts[Outcome.PASSED] - counts[Outcome.FAILED]),
        "time": f"{run.seconds:.3f}",
    }
    root = ElementTree.Element("testsuites", {key: value for key, value in totals.items() if key != "skipped"})
    suite = ElementTree.SubElement(root, "testsuite", totals)
    properties = ElementTree.SubElement(suite, "properties")
    for name, text in describe_subject(subject) + list(subject.capabilities.items()):
        ElementTree.SubElement(properties, "property", {"name": printable(name), "value": printable(text)})
    for verdict in run.verdicts:
        case = ElementTree.SubElement(
            suite,
            "testcase",
            {
                "classname": printable(f"conformance.{verdict.rule.area}"),
                "name": printable(verdict.rule.id),
                "time": f"{verdict.seconds:.3f}",
            },
        )
        text = "\n\n".join(f"{title}:\n{body}" for title, body in finding_sections(verdict))
        if verdict.outcome is Outcome.FAILED:
            failure = {"message": one_line(message_of(verdict)), "type": printable(verdict.rule.level)}
            ElementTree.SubElement(case, "failure", failure).text = f"{printable(verdict.rule.sentence)}\n\n{text}"
        elif verdict.outcome is not Outcome.PASSED:
            message = f"{TITLES[verdict.outcome]}: {one_line(verdict.reason or message_of(verdict))}"
            ElementTree.SubElement(case, "skipped", {"message": message})
            if verdict.outcome in BROKEN:
                ElementTree.SubElement(case, "system-out").text = f"{printable(verdict.rule.sentence)}\n\n{text}"
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


# Markdown


def _markdown(run: SuiteRun) -> str:
    broken = sort_broken(run.verdicts)
    not_checked = [verdict for verdict in run.verdicts if verdict.outcome not in CHECKED]
    head = [*describe_subject(run.subject), ("time", f"{run.seconds:.1f} s")]
    lines = [f"# Dynamo conformance: {_md(run.subject.engine)}", "", f"**{_md(verdict_line(run))}**", ""]
    lines += _md_table(["", ""], [[_md(name), _md(text)] for name, text in head])
    if run.subject.capabilities:
        rows = [[_md(name), _md(text)] for name, text in run.subject.capabilities.items()]
        lines += ["## Capabilities", "", *_md_table(["capability", "found"], rows)]
    rows = [
        [_md(area), *(str(count) for count in count_outcomes(verdicts).values())]
        for area, verdicts in group_by_area(run.verdicts).items()
    ]
    rows.append(["**all**", *(f"**{count}**" for count in count_outcomes(run.verdicts).values())])
    lines += ["## Rules by area", "", *_md_table(["area", *COUNT_TITLES.values()], rows, ":-" + "|-:" * len(Outcome))]
    if broken:
        lines += ["## Broken rules", ""]
    for verdict in broken:
        lines += [f"### {_md(verdict.rule.id)} ({_md(verdict.rule.level)}): {TITLES[verdict.outcome]}", ""]
        lines += [f"Rule: {_md(verdict.rule.sentence)}", ""]
        for title, text in finding_sections(verdict):
            lines += [f"{title}:", "", *_md_fence(text, "python" if title == "Script" else "text"), ""]
    if not_checked:
        rows = [[_md(v.rule.id), TITLES[v.outcome], _md(v.reason)] for v in not_checked]
        lines += ["## Not checked", "", *_md_table(["rule", "", "reason"], rows)]
    return "\n".join(lines).rstrip("\n") + "\n"


def _md(text: str) -> str:
    """Any text as itself, on one line, also inside a table. An underscore inside a word needs no backslash."""
    return re.sub(r"[\\`*\[\]<>|~&#$]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", one_line(text))


def _md_table(header: Sequence[str], rows: Iterable[Sequence[str]], rule: str = "") -> list[str]:
    rule = rule or "|".join(":-" for _ in header)
    return [f"| {' | '.join(header)} |", f"|{rule.strip('|')}|", *(f"| {' | '.join(row)} |" for row in rows), ""]


def _md_fence(text: str, language: str) -> list[str]:
    fence = "`" * max([3, *(len(ticks) + 1 for ticks in re.findall("`+", text))])
    return [fence + language, text.rstrip("\n"), fence]


# Badge

_BADGE_COLOURS = {  # dark enough for white text
    Outcome.PASSED: "#2f7d32",
    Outcome.FAILED: "#b3261e",
    Outcome.WARNED: "#946300",
    Outcome.DEVIATES: "#946300",
    Outcome.SKIPPED: "#6b6b6b",
}
_NARROW, _WIDE = frozenset("fijlrt.,:;!|'()[] "), frozenset("mwMW%@")


def _badge(run: SuiteRun) -> str:
    counts = count_outcomes(run.verdicts)
    num_checked = sum(counts[outcome] for outcome in CHECKED)
    left, right = "dynamo conformance", f"{counts[Outcome.PASSED]} of {count_noun(num_checked, 'rule')}"
    left_px, right_px = _text_px(left), _text_px(right)
    label_px, width_px = left_px + 12, left_px + right_px + 24
    return f"""\
<svg xmlns="http://www.w3.org/2000/svg" width="{width_px}" height="20" role="img" aria-label="{left}: {right}">
  <title>{html.escape(printable(f"{run.subject.engine} {verdict_line(run)}"))}</title>
  <clipPath id="round"><rect width="{width_px}" height="20" rx="3"/></clipPath>
  <g clip-path="url(#round)">
    <rect width="{label_px}" height="20" fill="#444"/>
    <rect x="{label_px}" width="{width_px - label_px}" height="20" fill="{_BADGE_COLOURS[overall_outcome(run)]}"/>
  </g>
  <g fill="#fff" font-family="Verdana,DejaVu Sans,Geneva,sans-serif" font-size="11">
    <text x="6" y="14" textLength="{left_px}">{left}</text>
    <text x="{label_px + 6}" y="14" textLength="{right_px}">{right}</text>
  </g>
</svg>
"""


def _text_px(text: str) -> int:
    """Width of `text` in Verdana at 11 px, near enough; `textLength` does the rest."""
    return round(sum(4.1 if char in _NARROW else 10.2 if char in _WIDE else 6.8 for char in text))
