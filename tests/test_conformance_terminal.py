"""The terminal says what the files say, in the width there is, and a stranger can act on what it prints."""

from __future__ import annotations

import io
import re
import shlex
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from conformance.deviations import Deviation, read_deviations
from conformance.terminal_summary import format_finding, print_capabilities, print_summary
from conformance.verdict import Finding, Outcome, Subject
from conformance.verdict_text import BROKEN, COUNT_TITLES, TITLES, message_of, one_line, printable, verdict_line
from tests.helpers.verdicts import FINDINGS, HOSTILE, RUNS, all_texts, counts_of, example_run, verdicts

QUICK = settings(max_examples=60)
RUN = example_run()
WIDTHS = st.sampled_from([80, 100, 120])
SUBJECT = Subject(
    engine="my_pkg.engine:Engine",
    engine_args="--model Qwen/Qwen3-0.6B --max-num-seqs 16 --block-size 16 --speedup-ratio 10",
    driver="bridge",
    role="agg",
    clock="virtual",
    dynamo_version="1.6.1",
    suite_version="0.1.0",
    capabilities={"KV events": "yes, 1 push source", "abort": "yes", "logprobs": "no: none in any chunk", "n": "max 4"},
)


def printed(show, thing, width, **terminal):
    out = io.StringIO()
    show(thing, Console(file=out, width=width, legacy_windows=False, _environ={}, **terminal))
    return out.getvalue()


def without_space(text):
    return "".join(text.split())


@given(run=RUNS, width=WIDTHS)
@QUICK
def test_no_line_is_wider_than_the_terminal_and_nothing_moves_its_cursor(run, width):
    text = printed(print_summary, run, width) + printed(print_capabilities, run.subject, width)
    assert all(cell_len(line) <= width for line in text.split("\n"))
    assert all(char.isprintable() for char in text.replace("\n", ""))


@given(run=RUNS, width=WIDTHS)
@QUICK
def test_colour_adds_nothing_to_the_text(run, width):
    coloured = printed(print_summary, run, width, force_terminal=True, color_system="truecolor")
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == printed(print_summary, run, width)


@given(run=RUNS, width=WIDTHS)
@QUICK
def test_the_counts_are_the_run_s_area_by_area_and_in_all(run, width):
    rows = [line.split() for line in printed(print_summary, run, width).splitlines()]
    table = [row for row in rows if len(row) == 1 + len(Outcome) and all(re.fullmatch(r"-|\d+", n) for n in row[1:])]
    areas = list(dict.fromkeys(verdict.rule.area for verdict in run.verdicts))
    by_area = [replace(run, verdicts=tuple(v for v in run.verdicts if v.rule.area == area)) for area in areas]
    expected = [[area, *map(str, counts_of(part))] for area, part in zip([*areas, "all"], [*by_area, run], strict=True)]
    assert [[cell.replace("-", "0") for cell in row] for row in table[-len(expected) :]] == expected


@given(run=RUNS, width=WIDTHS)
@QUICK
def test_each_broken_rule_has_its_message_below_its_own_column_as_far_as_four_lines_go(run, width):
    lines = printed(print_summary, run, width).splitlines()
    for verdict in run.verdicts:
        start = re.compile(rf"({TITLES[verdict.outcome]} +{verdict.rule.level} +{verdict.rule.id} *)(.*)")
        found = [(i, match) for i, line in enumerate(lines) if (match := start.fullmatch(line))]
        if verdict.outcome not in BROKEN:
            assert found == []
            continue
        ((i, match),) = found
        shown = [match[2]]
        for line in lines[i + 1 :]:
            if not line.startswith("    "):
                break
            shown.append(line)
        shown = [line for line in shown if line.strip()]
        assert len(shown) <= (1 if verdict.outcome is Outcome.DEVIATES else 4)
        message, text = without_space(one_line(message_of(verdict))), without_space("".join(shown))
        assert text == message or (text.endswith("…") and message.startswith(text[:-1]))


def warned_run(message, rule_id="gen.usage_present"):
    run = example_run(**{rule_id.replace(".", "_"): Outcome.WARNED})
    finding = Finding(message)
    kept = (replace(v, finding=finding) if v.outcome is Outcome.WARNED else v for v in run.verdicts)
    return replace(run, verdicts=tuple(kept))


def test_a_message_is_wrapped_below_itself_and_cut_after_the_fourth_line():
    lines = printed(print_summary, warned_run("twelve chars " * 8), 80).splitlines()
    (first,) = (i for i, line in enumerate(lines) if line.startswith("warning"))
    assert lines[first] == "warning  SHOULD  gen.usage_present  twelve chars twelve chars twelve chars"
    assert lines[first + 1].rstrip() == " " * 36 + "twelve chars twelve chars twelve chars"
    assert "…" not in "".join(lines)
    lines = printed(print_summary, warned_run("twelve chars " * 80), 80).splitlines()
    assert [line.rstrip().endswith("…") for line in lines[first : first + 5]] == [False, False, False, True, False]


def test_after_the_warnings_it_is_said_once_how_to_see_all_of_them():
    hint = "All that was found for a warning: --fail-on should, or --engine-report DIR"
    assert printed(print_summary, warned_run("none"), 80).splitlines().count(hint) == 1
    assert "--fail-on" not in printed(print_summary, warned_run("none", "gen.determinism"), 80)
    assert "All that was found" not in printed(print_summary, example_run(cancel_mid=Outcome.FAILED), 80)


@given(run=RUNS, width=WIDTHS)
@QUICK
def test_the_last_words_are_the_verdict(run, width):
    text = printed(print_summary, run, width)
    assert without_space(text.split("\n\n")[-1]) == without_space(verdict_line(run))


@pytest.mark.parametrize("width", [80, 120])
def test_the_head_tells_what_was_run(width):
    text = printed(print_summary, replace(RUN, subject=SUBJECT), width)
    head = text.split("\n\n")[0]
    for part in ("my_pkg.engine:Engine", "--speedup-ratio 10", "driver bridge, role agg, virtual clock"):
        assert part in head
    assert "ai-dynamo 1.6.1, suite 0.1.0" in head
    assert "has       KV events (1 push source), abort, n: max 4" in head
    assert "has no    logprobs" in head
    assert all(title in text for title in COUNT_TITLES.values())


def test_capabilities_are_told_in_full():
    rows = printed(print_capabilities, SUBJECT, 80).splitlines()
    assert [row.rstrip() for row in rows] == [
        "KV events  yes, 1 push source",
        "abort      yes",
        "logprobs   no: none in any chunk",
        "n          max 4",
    ]
    assert printed(print_capabilities, replace(SUBJECT, capabilities={}), 80) == "No capabilities were looked for.\n"


@pytest.mark.parametrize("text", HOSTILE)
def test_a_capability_is_text_and_no_markup(text):
    for capabilities in ({text: "yes"}, {"n": text}):
        subject = replace(SUBJECT, capabilities=capabilities)
        for show, thing in ((print_capabilities, subject), (print_summary, replace(RUN, subject=subject))):
            assert without_space(one_line(text)) in without_space(printed(show, thing, 80))


@given(verdict=verdicts(), finding=st.none() | FINDINGS)
@QUICK
def test_a_finding_says_all_that_is_known(verdict, finding):
    verdict = replace(verdict, outcome=Outcome.FAILED, finding=finding)
    text = format_finding(verdict, "my_pkg:Engine")
    assert text.startswith(f"{verdict.rule.id} ({verdict.rule.level}): {printable(verdict.rule.sentence)}")
    assert "my_pkg:Engine" in text
    shown = without_space(text)
    assert all(without_space(part) in shown for part in all_texts(verdict))
    assert all(char.isprintable() or char in "\n\t" for char in text)


@given(verdict=verdicts(), finding=FINDINGS)
@QUICK
def test_the_lines_for_the_deviations_file_can_be_pasted_into_it(verdict, finding, tmp_path_factory):
    text = format_finding(replace(verdict, outcome=Outcome.FAILED, finding=finding), "my_pkg:Engine")
    path = tmp_path_factory.getbasetemp() / "pasted.toml"
    path.write_text(text[text.rindex('["') :], encoding="utf-8")
    example = tuple(finding.example.split(":")) if finding.example else None
    rule_id = verdict.rule.id
    assert read_deviations(path, {rule_id}) == {rule_id: Deviation(rule_id, "Say here why, and until when.", example)}


def test_the_script_can_be_copied_as_it_stands():
    script = 'async def main():\n    print("x")\n\n\n# end\n'
    verdict = next(v for v in example_run(cancel_mid=Outcome.FAILED).verdicts if v.outcome is Outcome.FAILED)
    text = format_finding(replace(verdict, finding=Finding("It went on.", script=script)), "my_pkg:Engine")
    assert re.split(r"^-{72}\n", text, flags=re.MULTILINE)[1] == script
    assert "python reproduce.py" in text


def test_the_example_comes_with_the_command_that_tries_it_again():
    verdict = next(v for v in example_run(cancel_mid=Outcome.FAILED).verdicts if v.outcome is Outcome.FAILED)
    finding = Finding("It went on.", example="6.100.0:AXicY2BgZGAAAAAVAAM=")
    text = format_finding(replace(verdict, finding=finding), "my_pkg:Engine")
    assert "pytest --engine=my_pkg:Engine --rule=cancel.mid --example=6.100.0:AXicY2BgZGAAAAAVAAM=\n" in text
    text = format_finding(replace(verdict, finding=finding), "my_pkg:Engine", ["--engine-args=--model 'a b'"])
    (command,) = (line for line in text.splitlines() if line.lstrip().startswith("pytest "))
    assert shlex.split(command)[1:3] == ["--engine=my_pkg:Engine", "--engine-args=--model 'a b'"]
    assert "To reproduce" not in format_finding(replace(verdict, finding=Finding("It went on.")), "my_pkg:Engine")
