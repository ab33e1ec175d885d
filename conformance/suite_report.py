"""
A suite run as files, for machines and for people.

    write_report(run, folder)      conformance.json, junit.xml, conformance.md, conformance.html, badge.svg
    write_matrix(runs, path)       one page, a column a run
    run_from_json(json.loads(...)) the run again, out of conformance.json

Every figure comes from `count_outcomes` and every text goes through
`printable`, so no two files can disagree and none can be broken by what an
engine says. The terminal uses the same (`terminal_summary`).
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from string import Template
from typing import Any
from xml.etree import ElementTree

from conformance.catalogue import Rule
from conformance.verdict import Finding, Outcome, Subject, SuiteRun, Verdict

SCHEMA = 1
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
_CHECKED = (Outcome.PASSED, *BROKEN)
_BINDING = ("MUST", "SHOULD")  # the other levels are reported only
_MAX_NAMED = 5  # rules that a verdict line names before it says "and 3 more"


def write_report(run: SuiteRun, folder: Path) -> list[Path]:
    """Write the five files into `folder`, which is made if need be; returns their paths."""
    texts = {
        "conformance.json": json.dumps(run_to_json(run), indent=2, sort_keys=True) + "\n",
        "junit.xml": _junit(run),
        "conformance.md": _markdown(run),
        "conformance.html": _page([run]),
        "badge.svg": _badge(run),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in texts]


def write_matrix(runs: Sequence[SuiteRun], path: Path) -> None:
    """Write one HTML page with a column for each of `runs`, at least one, in their order."""
    path.write_text(_page(runs), encoding="utf-8")


# What all files say alike


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
    """The run in one sentence, such as "conforms: 70 MUST and 30 SHOULD rules hold"."""
    counts = count_outcomes(run.verdicts)
    if not any(counts[outcome] for outcome in _CHECKED):
        return "nothing was checked: no rule was selected that applies here"
    by_outcome = {outcome: [v for v in run.verdicts if v.outcome is outcome] for outcome in _CHECKED}
    if by_outcome[Outcome.FAILED]:
        failed = by_outcome[Outcome.FAILED]
        line = f"does not conform: {_count_levels(failed)} broken ({_name_rules(failed)})"
    else:
        passed = [v for v in by_outcome[Outcome.PASSED] if v.rule.level in _BINDING]
        line = f"conforms: {_count_levels(passed)} {'holds' if len(passed) == 1 else 'hold'}"
    for outcome, one, many in (
        (Outcome.WARNED, "warning", "warnings"),
        (Outcome.DEVIATES, "known deviation", "known deviations"),
    ):
        if found := by_outcome[outcome]:
            line += f"; {len(found)} {one if len(found) == 1 else many} ({_name_rules(found)})"
    return line


def message_of(verdict: Verdict) -> str:
    """What was found, or else why there is nothing."""
    return verdict.finding.message if verdict.finding else verdict.reason


def finding_sections(verdict: Verdict) -> list[tuple[str, str]]:
    """All that is known of a broken rule, as headed blocks of text without empty ones."""
    finding = verdict.finding or Finding(message=verdict.reason)
    sections = [
        ("Found", finding.message),
        (TITLES[verdict.outcome].capitalize() + " because", verdict.reason if verdict.finding else ""),
        ("Sent", "\n".join(finding.sent)),
        ("Transcript", "\n".join(finding.transcript)),
        ("Why", "\n".join(verdict.rule.sources)),
        ("Script", finding.script),
        ("Example", finding.example),
    ]
    return [(title, printable(text)) for title, text in sections if text.strip()]


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
    counts = dict.fromkeys(_BINDING, 0)
    for verdict in verdicts:
        counts[verdict.rule.level] = counts.get(verdict.rule.level, 0) + 1
    words = [f"{count} {one_line(level)}" for level, count in counts.items() if count] or ["0"]
    listed = " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))
    return f"{listed} rule{'' if len(verdicts) == 1 else 's'}"


def _name_rules(verdicts: Sequence[Verdict]) -> str:
    names = [one_line(verdict.rule.id) for verdict in verdicts]
    more = [f"and {len(names) - _MAX_NAMED} more"] if len(names) > _MAX_NAMED else []
    return ", ".join(names[:_MAX_NAMED] + more)


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


# Markdown


def _markdown(run: SuiteRun) -> str:
    broken = sort_broken(run.verdicts)
    not_checked = [verdict for verdict in run.verdicts if verdict.outcome not in _CHECKED]
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


# HTML

_LEGEND = "".join(f'<li class="{outcome}"><b>{SYMBOLS[outcome]}</b> {TITLES[outcome]}</li>' for outcome in Outcome)


def _page(runs: Sequence[SuiteRun]) -> str:
    is_one = len(runs) == 1
    title = f"Dynamo conformance: {runs[0].subject.engine}" if is_one else "Dynamo conformance matrix"
    return _PAGE.substitute(
        title=_html(title),
        runs=_html_runs(runs),
        tally=_html_tally(runs[0]) if is_one else _LEGEND,
        run_px=240 if is_one else 118,
        head="".join(f'<th scope="col" class="run">{_html_run_name(run, is_one)}</th>' for run in runs),
        body="\n".join(_html_areas(runs)),
        capabilities=_html_across([run.subject.capabilities for run in runs]),
    )


def _html(text: str) -> str:
    return html.escape(printable(text))


def _html_run_name(run: SuiteRun, is_one: bool) -> str:
    if is_one:
        return "verdict"
    subject = run.subject
    return f"{_html(subject.driver)}<br>{_html(subject.role)}<br><small>{_html(subject.dynamo_version)}</small>"


def _html_runs(runs: Sequence[SuiteRun]) -> str:
    """What was run, and what came of it: attributes down, runs across."""
    outcomes = [_overall(run) for run in runs]
    verdicts = "".join(
        f'<td class="{outcome}"><b aria-hidden="true">{SYMBOLS[outcome]}</b> {_html(verdict_line(run))}</td>'
        for outcome, run in zip(outcomes, runs, strict=True)
    )
    columns = [dict([*describe_subject(run.subject), ("time", f"{run.seconds:.1f} s")]) for run in runs]
    return f'<tr class="overall"><th scope="row">verdict</th>{verdicts}</tr>\n{_html_across(columns)}'


def _html_across(columns: Sequence[Mapping[str, str]]) -> str:
    """A row for each key, in the order they first come."""
    return "\n".join(
        f'<tr><th scope="row">{_html(name)}</th>'
        + "".join(f"<td>{_html(column.get(name, ''))}</td>" for column in columns)
        + "</tr>"
        for name in dict.fromkeys(name for column in columns for name in column)
    )


def _html_tally(run: SuiteRun) -> str:
    counts = count_outcomes(run.verdicts)
    return "".join(
        f'<li class="{outcome}"><b>{count}</b> {SYMBOLS[outcome]} {COUNT_TITLES[outcome]}</li>'
        for outcome, count in counts.items()
    )


def _html_areas(runs: Sequence[SuiteRun]) -> Iterable[str]:
    """A table body for each area, a row for each rule, and below it what was found, run by run."""
    rules = {verdict.rule.id: verdict.rule for run in runs for verdict in run.verdicts}
    verdicts = [{verdict.rule.id: verdict for verdict in run.verdicts} for run in runs]
    areas: dict[str, list[Rule]] = {}
    for rule in rules.values():
        areas.setdefault(rule.area, []).append(rule)
    for area, members in areas.items():
        yield f'<tbody><tr class="area"><th scope="rowgroup" colspan="{3 + len(runs)}">{_html(area)}</th></tr>'
        for rule in members:
            found = [by_id.get(rule.id) for by_id in verdicts]
            is_broken = any(verdict is not None and verdict.outcome in BROKEN for verdict in found)
            source = "<br>".join(_html(text) for text in rule.sources)
            cells = "".join(_html_cell(verdict, len(runs) == 1) for verdict in found)
            yield (
                f'<tr class="{"broken" if is_broken else "fine"}"><th scope="row">{_html(rule.id)}</th>'
                f"<td>{_html(rule.level)}</td>"
                f"<td><details><summary>{_html(rule.sentence)}</summary><small>{source}</small></details></td>{cells}</tr>"
            )
            for run, verdict in zip(runs, found, strict=True):
                if verdict is not None and verdict.outcome in BROKEN:
                    yield _html_finding(run, verdict, len(runs))
        yield "</tbody>"


def _html_cell(verdict: Verdict | None, is_one: bool) -> str:
    if verdict is None:
        return '<td class="absent">not in this run</td>'
    reason = _html(verdict.reason)
    small = f"<small>{reason}</small>" if is_one and reason else ""
    return (
        f'<td class="{verdict.outcome}" title="{"" if is_one else reason}">'
        f'<b aria-hidden="true">{SYMBOLS[verdict.outcome]}</b> {TITLES[verdict.outcome]}{small}</td>'
    )


def _html_finding(run: SuiteRun, verdict: Verdict, num_runs: int) -> str:
    subject = run.subject
    where = "" if num_runs == 1 else f"{subject.driver}, {subject.role}, {subject.dynamo_version}: "
    blocks = [f"<h4>Rule</h4><p>{_html(verdict.rule.sentence)}</p>"]
    for title, text in finding_sections(verdict):
        blocks.append(f"<h4>{title}</h4><pre><code>{_html(text)}</code></pre>")
    return (
        f'<tr class="finding"><td colspan="{3 + num_runs}"><details><summary><b aria-hidden="true">'
        f"{SYMBOLS[verdict.outcome]}</b> {_html(where + one_line(message_of(verdict)))}</summary>"
        f"{''.join(blocks)}</details></td></tr>"
    )


def _overall(run: SuiteRun) -> Outcome:
    """The outcome whose colour the whole run gets."""
    counts = count_outcomes(run.verdicts)
    for outcome in (*BROKEN, Outcome.PASSED):
        if counts[outcome]:
            return outcome
    return Outcome.SKIPPED


_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
:root {
  color-scheme: light dark;
  --page: #fff; --ink: #1b1f24; --soft: #59636e; --line: #d5dae0; --band: #f3f5f7;
  --passed: #d7f0e6; --failed: #ffd9c7; --warned: #fdebb9; --deviates: #d6e6f8; --skipped: #eceff2; --unchecked: #fff;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #12161b; --ink: #e4e8ec; --soft: #9aa5b1; --line: #323a43; --band: #1c2229;
    --passed: #0e4435; --failed: #7a2c0b; --warned: #5c4607; --deviates: #173f68; --skipped: #262d35;
    --unchecked: #12161b;
  }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 24px 32px 48px; max-width: 1360px; background: var(--page); color: var(--ink);
  font: 14px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 24px; margin: 0 0 16px; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: 5px 10px; border: 1px solid var(--line);
  overflow-wrap: anywhere; }
small { display: block; color: var(--soft); font-size: 12px; }
h2 { font-size: 18px; margin: 28px 0 10px; }
.runs { margin-bottom: 16px; table-layout: fixed; }
.runs th { width: 190px; font-weight: 500; color: var(--soft); background: var(--band); }
.overall td { font-weight: 600; }
.tally { display: flex; flex-wrap: wrap; gap: 8px; margin: 0; padding: 0; list-style: none; }
.tally li { padding: 6px 14px; border: 1px solid var(--line); border-radius: 6px; }
.tally b { font-size: 18px; margin-right: 4px; }
.bar { display: flex; flex-wrap: wrap; gap: 8px 24px; justify-content: space-between; align-items: end;
  margin: 0 0 10px; }
.rules { table-layout: fixed; }
.rules thead th { position: sticky; top: 0; background: var(--band); z-index: 1; }
.rules .id { width: 215px; } .rules .level { width: 90px; } .rules .run { width: ${run_px}px; }
.rules th[scope=row] { font: 13px/1.5 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
.area th { background: var(--band); font-size: 15px; padding-top: 14px; }
.passed { background: var(--passed); } .failed { background: var(--failed); } .warned { background: var(--warned); }
.deviates { background: var(--deviates); } .skipped { background: var(--skipped); }
.unchecked { background: var(--unchecked); color: var(--soft); border-style: dashed; }
.absent { color: var(--soft); font-style: italic; }
.failed b, .warned b { font-weight: 800; }
td small { color: inherit; opacity: .85; }
summary { cursor: pointer; }
.finding > td { padding-left: 28px; }
.finding summary { font-weight: 600; }
h4 { margin: 12px 0 4px; font-size: 13px; color: var(--soft); }
p { margin: 0; }
pre { margin: 0; padding: 8px 12px; background: var(--band); border: 1px solid var(--line); border-radius: 4px;
  overflow-x: auto; font: 12px/1.5 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
body:has(#only:checked) :is(tr.fine, tbody:not(:has(.broken))) { display: none; }
@media print {
  body { padding: 0; max-width: none; }
  * { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
  .rules thead th { position: static; }
  .finding details::details-content { content-visibility: visible; block-size: auto; }
  tr { break-inside: avoid; } .finding { break-inside: auto; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; }
  label { display: none; }
}
</style>
</head>
<body>
<h1>$title</h1>
<table class="runs">
$runs
</table>
<div class="bar"><ul class="tally">$tally</ul>
<label><input type="checkbox" id="only"> broken rules only</label></div>
<table class="rules">
<thead><tr><th scope="col" class="id">rule</th><th scope="col" class="level">level</th>
<th scope="col">what it asks for</th>$head</tr></thead>
$body
</table>
<h2>Capabilities</h2>
<table class="runs">
$capabilities
</table>
</body>
</html>
""")


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
    num_checked = sum(counts[outcome] for outcome in _CHECKED)
    left, right = "dynamo conformance", f"{counts[Outcome.PASSED]} of {count_noun(num_checked, 'rule')}"
    left_px, right_px = _text_px(left), _text_px(right)
    label_px, width_px = left_px + 12, left_px + right_px + 24
    return f"""\
<svg xmlns="http://www.w3.org/2000/svg" width="{width_px}" height="20" role="img" aria-label="{left}: {right}">
  <title>{html.escape(printable(f"{run.subject.engine} {verdict_line(run)}"))}</title>
  <clipPath id="round"><rect width="{width_px}" height="20" rx="3"/></clipPath>
  <g clip-path="url(#round)">
    <rect width="{label_px}" height="20" fill="#444"/>
    <rect x="{label_px}" width="{width_px - label_px}" height="20" fill="{_BADGE_COLOURS[_overall(run)]}"/>
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
