"""
A suite run on a terminal.

    print_summary(run, console)            after the tests: head, a row an area, each broken rule, the verdict
    print_capabilities(subject, console)   what the engine can do, in full
    format_finding(verdict, engine, flags) what pytest prints for one broken rule, plain

Nothing is told by colour alone.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.table import Table
from rich.text import Text

from conformance.deviations import format_deviation, parse_example
from conformance.verdict import Outcome, Subject, SuiteRun, Verdict
from conformance.verdict_text import (
    COUNT_TITLES,
    TITLES,
    count_outcomes,
    describe_subject,
    finding_sections,
    group_by_area,
    message_of,
    one_line,
    printable,
    sort_broken,
    verdict_line,
)

_STYLES = {
    Outcome.PASSED: "green",
    Outcome.FAILED: "bold red",
    Outcome.WARNED: "yellow",
    Outcome.DEVIATES: "cyan",
    Outcome.SKIPPED: "dim",
    Outcome.UNCHECKED: "dim",
}
_RULER = "-" * 72
_MAX_MESSAGE_LINES = 4
_LEAST_COLUMNS, _NARROW_INDENT = 20, 4  # where a message would have less room, it begins on a line of its own
_YES_OR_NO = re.compile(r"(yes|no)\b[\s,:;]*(.*)", re.DOTALL | re.IGNORECASE)


def print_summary(run: SuiteRun, console: Console) -> None:
    """Print the run in at most the console's width; the last paragraph is `verdict_line`."""
    _print_head(run.subject, console)
    console.print()
    console.print(_area_table(run))
    console.print()
    broken = sort_broken(run.verdicts)
    if broken:
        for line in _broken_lines(broken, console):
            console.print(line, no_wrap=True)
        warned = [verdict for verdict in broken if verdict.outcome is Outcome.WARNED]
        if warned:
            console.print(Text(_how_to_see(warned), overflow="fold"))
        console.print()
    failed = any(verdict.outcome is Outcome.FAILED for verdict in broken)
    passed = any(verdict.outcome is Outcome.PASSED for verdict in run.verdicts)
    style = "bold red" if failed else "bold green" if passed else "bold"
    console.print(Text(printable(verdict_line(run)), style, overflow="fold"))


def print_capabilities(subject: Subject, console: Console) -> None:
    """Print all that was found of what the engine can do, one capability a row."""
    if not subject.capabilities:
        console.print("No capabilities were looked for.")
        return
    grid = _grid()
    for name, text in subject.capabilities.items():
        grid.add_row(_cell(name), _cell(text, "dim" if _split_answer(text)[0] == "no" else ""))
    console.print(grid)


def format_finding(verdict: Verdict, engine: str, flags: Sequence[str] = ()) -> str:
    """
    A broken rule as plain text for somebody who never saw this suite.

    `engine` is "my_pkg:Engine"; `flags` are what else its run was given, such as "--engine-role=decode".
    """
    rule = verdict.rule
    finding = verdict.finding
    lines = [printable(f"{rule.id} ({rule.level}): {rule.sentence}"), f"Engine: {printable(engine)}"]
    for title, text in finding_sections(verdict):
        if title not in ("Script", "Example"):
            lines += ["", title, *(f"    {line}" for line in text.splitlines())]
    script = finding.script if finding else ""
    example = finding.example if finding else ""
    if script.strip() or example:
        lines += ["", "To reproduce"]
    if example:
        words = ["pytest", f"--engine={engine}", *flags, f"--rule={rule.id}", f"--example={example}"]
        lines += ["    With the suite:", f"        {shlex.join(map(printable, words))}"]
    if script.strip():
        # Not indented, so that it can be copied as it stands.
        lines += ["    Without it, save what is between the lines as reproduce.py and run: python reproduce.py"]
        lines += [_RULER, *printable(script).strip("\n").split("\n"), _RULER]
    reason = "Say here why, and until when."
    lines += ["", "To keep as a known deviation", "    Put these lines into a file and name it with --deviations:", ""]
    lines += format_deviation(rule.id, reason, parse_example(example)).splitlines()
    return "\n".join(lines) + "\n"


def _grid() -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="dim", overflow="fold")
    grid.add_column(overflow="fold")
    return grid


def _cell(text: str, style: str = "") -> Text:
    return Text(one_line(text), style, overflow="fold")


def _print_head(subject: Subject, console: Console) -> None:
    console.print(Text("Dynamo conformance", "bold"))
    values = {name: one_line(text) for name, text in describe_subject(subject)}
    grid = _grid()
    grid.add_row("engine", _cell(subject.engine))
    if subject.engine_args:
        grid.add_row("args", _cell(subject.engine_args))
    grid.add_row("run", _cell(f"driver {values['driver']}, role {values['role']}, {values['clock']} clock"))
    grid.add_row("versions", _cell(f"ai-dynamo {values['ai-dynamo']}, suite {values['suite']}"))
    for title, text in _compact_capabilities(subject).items():
        grid.add_row(title, _cell(text))
    console.print(grid)


def _compact_capabilities(subject: Subject) -> dict[str, str]:
    """What it has, with particulars, and what it has not, without the reasons."""
    has, lacks = [], []
    for name, text in subject.capabilities.items():
        answer, rest = _split_answer(text)
        if answer == "no":
            lacks.append(name)
        elif answer == "yes":
            has.append(f"{name} ({rest})" if rest else name)
        else:
            has.append(f"{name}: {text}")
    return {title: ", ".join(names) for title, names in (("has", has), ("has no", lacks)) if names}


def _split_answer(text: str) -> tuple[str, str]:
    """ "yes, 1 push source" as "yes" and "1 push source"; what starts otherwise as "" and itself."""
    match = _YES_OR_NO.fullmatch(text.strip())
    return (match[1].lower(), match[2]) if match else ("", text)


def _area_table(run: SuiteRun) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("area", overflow="fold")
    for title in COUNT_TITLES.values():
        table.add_column(title, justify="right", no_wrap=True)
    rows = {one_line(area): verdicts for area, verdicts in group_by_area(run.verdicts).items()}
    for area, verdicts in rows.items():
        table.add_row(Text(area), *_count_cells(count_outcomes(verdicts)))
    table.add_section()
    table.add_row(Text("all", "bold"), *_count_cells(count_outcomes(run.verdicts)))
    return table


def _count_cells(counts: dict[Outcome, int]) -> list[Text]:
    return [Text(str(count), _STYLES[outcome]) if count else Text("-", "dim") for outcome, count in counts.items()]


def _broken_lines(broken: list[Verdict], console: Console) -> list[Text]:
    """Outcome, level and id in columns, then the message: of what deviates one line, of the rest up to four."""
    heads = [(TITLES[v.outcome], one_line(v.rule.level), one_line(v.rule.id)) for v in broken]
    widths = [max(map(cell_len, column)) for column in zip(*heads, strict=True)]
    column = sum(widths) + 2 * len(widths)
    is_narrow = console.width - column < _LEAST_COLUMNS
    if is_narrow:
        column = _NARROW_INDENT
    lines = []
    for verdict, head in zip(broken, heads, strict=True):
        cells = [set_cell_size(text, cells) for text, cells in zip(head, widths, strict=True)]
        start = Text("  ".join(cells) + "  ")
        start.stylize(_STYLES[verdict.outcome], 0, len(cells[0]))
        if is_narrow:
            start.truncate(console.width, overflow="ellipsis")
            lines.append(start)
            start = Text(" " * column)
        most = 1 if verdict.outcome is Outcome.DEVIATES else _MAX_MESSAGE_LINES
        message = _wrap(one_line(message_of(verdict)), console, max(console.width - column, 1), most)
        lines += [(Text(" " * column) if i else start) + line for i, line in enumerate(message)]
    return lines


def _wrap(text: str, console: Console, width: int, most: int) -> list[Text]:
    """`text` in at most so many lines, at least one; the last ends with an ellipsis where there is more."""
    lines = list(Text(text).wrap(console, width, overflow="fold")) or [Text()]
    if len(lines) > most:
        rest = Text(" ".join(line.plain.rstrip() for line in lines[most - 1 :]))
        rest.truncate(width, overflow="ellipsis")
        lines = [*lines[: most - 1], rest]
    for line in lines:
        line.rstrip()
    return lines


def _how_to_see(warned: list[Verdict]) -> str:
    should = "--fail-on should, or " if any(verdict.is_should for verdict in warned) else ""
    return f"All that was found for a warning: {should}--engine-report DIR"
