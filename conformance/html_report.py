"""
Verdicts as one self-contained HTML page: rule by run, what was found under each broken rule.

Without JavaScript and without anything from elsewhere; verdicts are told by word and sign, not by colour alone.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from string import Template

from conformance.catalogue import Rule
from conformance.verdict import Outcome, SuiteRun, Verdict
from conformance.verdict_text import (
    BROKEN,
    COUNT_TITLES,
    SYMBOLS,
    TITLES,
    count_outcomes,
    describe_subject,
    finding_sections,
    message_of,
    one_line,
    overall_outcome,
    printable,
    verdict_line,
)

_LEGEND = "".join(f'<li class="{outcome}"><b>{SYMBOLS[outcome]}</b> {TITLES[outcome]}</li>' for outcome in Outcome)


def html_page(runs: Sequence[SuiteRun]) -> str:
    """One page with a column for each of `runs`, at least one, in their order."""
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
    outcomes = [overall_outcome(run) for run in runs]
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
