"""The files of a suite run: each tells the whole run, alike, whatever an engine puts into its texts."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conformance.suite_report import run_from_json, run_to_json, write_matrix, write_report
from conformance.transcript import Event, Transcript
from conformance.verdict import Finding, Outcome
from conformance.verdict_text import (
    BROKEN,
    COUNT_TITLES,
    SYMBOLS,
    TITLES,
    finding_sections,
    one_line,
    printable,
    verdict_line,
)
from tests.helpers.verdicts import QUICK, RUNS, TEXTS, all_texts, counts_of, example_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("report")


class Page(HTMLParser):
    """The page as a browser has it: text, tags and attributes, rows of the table of rules as lists of classes."""

    def __init__(self, path):
        super().__init__()
        self.text, self.tags, self.attributes, self.rows = "", set(), set(), []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes.update(name for name, _ in attrs)
        if tag == "tr":
            self.rows.append((dict(attrs).get("class"), []))
        if tag in ("td", "th") and self.rows:
            self.rows[-1][1].append(dict(attrs).get("class"))

    def handle_data(self, data):
        self.text += data


# Text


@given(text=TEXTS)
def test_printable_text_is_legal_everywhere_and_hides_nothing(text):
    shown = printable(text)
    assert all(char.isprintable() or char in "\n\t" for char in shown)
    plain = [char for char in text if char.isprintable() or char in "\n\t"]
    assert len(shown) >= len(text)
    assert not Counter(plain) - Counter(shown)
    assert printable(shown) == shown


@given(text=TEXTS)
def test_one_line_has_no_break_and_no_double_blank(text):
    assert one_line(text) == " ".join(one_line(text).split())
    assert one_line(text).isprintable()


@given(numbers=st.lists(st.integers(0, 60), min_size=1, max_size=3))
def test_of_each_request_the_first_and_last_events_are_shown_and_the_rest_is_counted(numbers):
    lines, expected = [], []
    for i, number in enumerate(numbers):
        events = Transcript(f"r{i}", {}, [Event(k / 100, "chunk", {"index": k}) for k in range(number)]).lines()
        lines += [f"r{i}:", *events]
        between = [f"   … {number - 20} more event{'s' * (number > 21)} …"]
        expected += [f"r{i}:", *(events if number <= 20 else [*events[:12], *between, *events[-8:]])]
    verdict = replace(example_run().verdicts[0], outcome=Outcome.FAILED, finding=Finding("x", transcript=tuple(lines)))
    assert dict(finding_sections(verdict))["Transcript"].splitlines() == expected


def test_what_is_long_is_cut_in_every_form_but_json(folder):
    request = json.dumps({"token_ids": list(range(1000))})
    events = Transcript("r0", {}, [Event(0.0, "chunk", {"index": k}) for k in range(1000)]).lines()
    finding = Finding("too much", sent=(request,), transcript=("r0:", *events))
    run = example_run(cancel_mid=Outcome.FAILED)
    run = replace(
        run, verdicts=tuple(replace(v, finding=finding) if v.outcome is Outcome.FAILED else v for v in run.verdicts)
    )
    write_report(run, folder)
    for name in ("junit.xml", "conformance.md", "conformance.html"):
        text = (folder / name).read_text(encoding="utf-8")
        assert "… 980 more events …" in text
        assert f"… {len(request) - 1500:,} of {len(request):,} characters left out …" in text
        assert "'index': 500" not in text
    assert run_from_json(json.loads((folder / "conformance.json").read_text(encoding="utf-8"))) == run


# JSON


@given(run=RUNS)
@QUICK
def test_a_run_comes_back_from_its_json(run, folder):
    write_report(run, folder)
    text = (folder / "conformance.json").read_text(encoding="utf-8")
    assert run_from_json(json.loads(text)) == run_from_json(run_to_json(run)) == run
    assert json.dumps(json.loads(text), indent=2, sort_keys=True) == text.rstrip("\n")


@given(run=RUNS)
@QUICK
def test_json_says_itself_what_it_counts(run):
    data = run_to_json(run)
    assert data["schema"] == 1
    assert list(data["counts"].values()) == counts_of(run)
    assert data["conforms"] == (not data["counts"]["failed"])
    assert all(verdict["rule"]["applies"] == sorted(verdict["rule"]["applies"]) for verdict in data["verdicts"])


@pytest.mark.parametrize(
    ("data", "said"),
    [
        pytest.param({"schema": 2}, '"schema" is 2, and 1 is read', id="another schema"),
        pytest.param({}, '"schema" is None', id="no schema"),
        pytest.param([], "\"schema\" is 'list'", id="no object"),
        pytest.param({"schema": 1}, "broken conformance.json: 'subject'", id="no subject"),
        pytest.param({"schema": 1, "subject": {}}, "broken conformance.json: ", id="empty subject"),
    ],
)
def test_json_of_something_else_is_refused_in_one_line(data, said):
    with pytest.raises(ValueError) as caught:
        run_from_json(data)
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


# JUnit XML


@given(run=RUNS)
@QUICK
def test_junit_xml_parses_and_its_counts_are_those_of_its_elements_and_of_the_run(run, folder):
    write_report(run, folder)
    root = ElementTree.parse(folder / "junit.xml").getroot()
    (suite,) = root
    counts = dict(zip(Outcome, counts_of(run), strict=True))
    for element, keys in ((root, ("tests", "failures", "errors")), (suite, ("tests", "failures", "errors", "skipped"))):
        found = {key: int(element.attrib[key]) for key in keys}
        expected = {
            "tests": len(suite.findall("testcase")),
            "failures": len(suite.findall("testcase/failure")),
            "errors": 0,
            "skipped": len(suite.findall("testcase/skipped")),
        }
        assert found == {key: expected[key] for key in keys}
    assert expected["tests"] == len(run.verdicts)
    assert expected["failures"] == counts[Outcome.FAILED]
    assert expected["skipped"] == len(run.verdicts) - counts[Outcome.FAILED] - counts[Outcome.PASSED]
    assert len(suite.findall("testcase/system-out")) == counts[Outcome.WARNED] + counts[Outcome.DEVIATES]
    assert float(suite.attrib["time"]) == pytest.approx(run.seconds, abs=1e-3)


@given(run=RUNS)
@QUICK
def test_junit_xml_has_a_case_a_rule_with_all_that_was_found(run, folder):
    write_report(run, folder)
    suite = ElementTree.parse(folder / "junit.xml").getroot()[0]
    for case, verdict in zip(suite.findall("testcase"), run.verdicts, strict=True):
        assert case.attrib["name"] == verdict.rule.id
        assert case.attrib["classname"] == f"conformance.{verdict.rule.area}"
        assert [child.tag for child in case] == {
            Outcome.PASSED: [],
            Outcome.FAILED: ["failure"],
            Outcome.WARNED: ["skipped", "system-out"],
            Outcome.DEVIATES: ["skipped", "system-out"],
        }.get(verdict.outcome, ["skipped"])
        for child in case:
            if child.tag == "skipped":
                assert child.attrib["message"].startswith(f"{TITLES[verdict.outcome]}: {one_line(verdict.reason)}")
            else:
                assert all(text in child.text for text in all_texts(verdict))


# HTML

TAGS = (
    "html head meta title style body h1 h2 h4 table thead tbody tr th td ul li b p br small div label input"
    " details summary pre code"
)
ATTRIBUTES = "lang charset name content class scope colspan title id type aria-hidden"


@given(run=RUNS)
@QUICK
def test_html_shows_every_text_and_has_no_tag_of_an_engine_s_making(run, folder):
    write_report(run, folder)
    page = Page(folder / "conformance.html")
    assert page.tags <= set(TAGS.split())
    assert page.attributes <= set(ATTRIBUTES.split())
    for text in (run.subject.engine, run.subject.engine_args, *run.subject.capabilities.values(), verdict_line(run)):
        assert printable(text) in page.text
    for verdict in run.verdicts:
        assert verdict.rule.id in page.text
        assert printable(verdict.reason) in page.text
        if verdict.outcome in BROKEN:
            assert all(text in page.text for text in all_texts(verdict))
    source = (folder / "conformance.html").read_text(encoding="utf-8")
    assert not re.search(r"<(script|link|img|iframe)|@import|url\(", source)


@given(run=RUNS)
@QUICK
def test_html_has_a_cell_a_rule_and_a_row_a_finding_and_tiles_that_count_them(run, folder):
    write_report(run, folder)
    page = Page(folder / "conformance.html")
    cells = [cells[-1] for kind, cells in page.rows if kind in ("broken", "fine")]
    found = Counter(cells)
    assert [found[outcome.value] for outcome in Outcome] == counts_of(run)
    broken = sum(verdict.outcome in BROKEN for verdict in run.verdicts)
    assert sum(kind == "finding" for kind, _ in page.rows) == sum(kind == "broken" for kind, _ in page.rows) == broken
    tiles = "".join(
        f"{count} {SYMBOLS[outcome]} {COUNT_TITLES[outcome]}"
        for outcome, count in zip(Outcome, counts_of(run), strict=True)
    )
    assert tiles in page.text


@given(runs=st.lists(RUNS, min_size=2, max_size=4))
@QUICK
def test_a_matrix_has_a_row_a_rule_and_in_it_a_cell_a_run(runs, folder):
    write_matrix(runs, folder / "matrix.html")
    page = Page(folder / "matrix.html")
    rows = [cells[3:] for kind, cells in page.rows if kind in ("broken", "fine")]
    assert len(rows) == len({verdict.rule.id for run in runs for verdict in run.verdicts})
    for number, run in enumerate(runs):
        assert all(len(row) == len(runs) for row in rows)
        found = Counter(row[number] for row in rows)
        assert [found[outcome.value] for outcome in Outcome] == counts_of(run)
        assert found["absent"] == len(rows) - len(run.verdicts)
        assert printable(verdict_line(run)) in page.text


def test_every_outcome_has_a_sign_of_its_own_besides_its_colour():
    assert len(set(SYMBOLS.values())) == len(set(TITLES.values())) == len(Outcome)


# Markdown


def unescape(text):
    return re.sub(r"\\([\\`*_\[\]<>|~&#$])", r"\1", text)


@given(run=RUNS)
@QUICK
def test_markdown_counts_the_run_and_keeps_every_finding_in_its_fence(run, folder):
    write_report(run, folder)
    lines = (folder / "conformance.md").read_text(encoding="utf-8").split("\n")
    assert ["**all**", *(f"**{count}**" for count in counts_of(run))] == [
        cell.strip() for cell in next(line for line in lines if line.startswith("| **all**")).split("|")[1:-1]
    ]
    assert f"| engine | {one_line(run.subject.engine)} |" in map(unescape, lines)
    assert f"**{verdict_line(run)}**" in map(unescape, lines)
    blocks = list(fenced_blocks(lines))
    expected = [
        text.rstrip("\n")
        for outcome in BROKEN
        for verdict in run.verdicts
        if verdict.outcome is outcome
        for _, text in finding_sections(verdict)
    ]
    assert blocks == expected


def fenced_blocks(lines):
    """As CommonMark reads them: a block ends at a line of at least as many backticks as began it, and no more."""
    lines = iter(lines)
    for line in lines:
        if opening := re.match(r"(`{3,})[a-z]*$", line):
            block = []
            for inner in lines:
                if re.match(rf" {{0,3}}`{{{len(opening[1])},}}\s*$", inner):
                    break
                block.append(inner)
            yield "\n".join(block)


@given(run=RUNS)
@QUICK
def test_markdown_lists_what_was_not_checked_and_why(run, folder):
    write_report(run, folder)
    _, _, text = (folder / "conformance.md").read_text(encoding="utf-8").partition("\n## Not checked\n")
    rows = text.strip().split("\n")[2:]
    assert all(len(re.sub(r"\\.", "", row).split("|")) == 5 for row in rows)
    rows = list(map(unescape, rows))
    assert rows == [
        f"| {verdict.rule.id} | {TITLES[verdict.outcome]} | {one_line(verdict.reason)} |"
        for verdict in run.verdicts
        if verdict.outcome in (Outcome.SKIPPED, Outcome.UNCHECKED)
    ]


# Badge


@given(run=RUNS)
@QUICK
def test_the_badge_has_the_count_the_colour_and_room_for_its_text(run, folder):
    write_report(run, folder)
    root = ElementTree.parse(folder / "badge.svg").getroot()
    name = "{http://www.w3.org/2000/svg}"
    left, right = root.findall(f".//{name}text")
    passed, failed, warned, deviates, _, _ = counts_of(run)
    checked = passed + failed + warned + deviates
    assert (left.text, right.text) == ("dynamo conformance", f"{passed} of {checked} rule{'s' * (checked != 1)}")
    assert printable(verdict_line(run)) in root.find(f"{name}title").text
    label, value = root.findall(f"{name}g/{name}rect")
    for text, box in ((left, label), (right, value)):
        start, end = float(box.get("x", 0)), float(box.get("x", 0)) + float(box.get("width"))
        assert start < float(text.get("x"))
        assert float(text.get("x")) + float(text.get("textLength")) < end
        assert 4.5 < float(text.get("textLength")) / len(text.text) < 8.5
    red, green, blue = (int(value.get("fill")[i : i + 2], 16) for i in (1, 3, 5))
    if failed:
        assert red > 2 * green
    elif warned or deviates:
        assert red > green > 2 * blue
    elif passed:
        assert green > 2 * red
    else:
        assert red == green == blue


# The line


def test_the_line_of_a_run():
    run = example_run()
    found = Counter(verdict.rule.level for verdict in run.verdicts)
    must, should, rest = found["MUST"], found["SHOULD"], "2 MAY, 1 WARN and 1 INFO rules hold"
    assert must + should + 4 == len(run.verdicts)
    assert verdict_line(run) == f"conforms: {must} MUST, {should} SHOULD, {rest}"
    run = example_run(cancel_mid=Outcome.FAILED, gen_usage_arith=Outcome.FAILED)
    assert verdict_line(run) == "does not conform: 2 MUST rules broken (gen.usage_arith, cancel.mid)"
    run = example_run(cancel_mid=Outcome.FAILED, gen_empty_prompt=Outcome.FAILED, gen_n=Outcome.WARNED)
    assert verdict_line(run) == (
        "does not conform: 1 MUST and 1 SHOULD rules broken (gen.empty_prompt, cancel.mid); 1 warning (gen.n)"
    )
    run = example_run(gen_n=Outcome.DEVIATES, gen_empty_prompt=Outcome.DEVIATES)
    assert verdict_line(run) == (
        f"conforms: {must} MUST, {should - 2} SHOULD, {rest}; 2 known deviations (gen.n, gen.empty_prompt)"
    )
    run = example_run(**dict.fromkeys((v.rule.id.replace(".", "_") for v in run.verdicts), Outcome.SKIPPED))
    assert verdict_line(run) == "nothing was checked: no rule was selected that applies here"


def test_the_line_counts_entries_of_the_deviations_file_that_are_out_of_date_apart():
    def with_old(run, *ids):
        kept = (
            replace(v, outcome=Outcome.FAILED, is_out_of_date=True) if v.rule.id in ids else v for v in run.verdicts
        )
        return replace(run, verdicts=tuple(kept))

    assert verdict_line(with_old(example_run(), "gen.max_tokens")) == (
        "does not conform: 1 entry of the deviations file is out of date (gen.max_tokens)"
    )
    assert verdict_line(with_old(example_run(cancel_mid=Outcome.FAILED), "gen.n", "gen.index")) == (
        "does not conform: 1 MUST rule broken (cancel.mid); "
        "2 entries of the deviations file are out of date (gen.index, gen.n)"
    )


@given(run=RUNS)
@QUICK
def test_the_line_says_conforms_only_where_something_was_checked_and_nothing_failed(run):
    passed, failed, warned, deviates, _, _ = counts_of(run)
    line = verdict_line(run)
    assert line.startswith("does not conform: ") == bool(failed)
    assert line.startswith("conforms: ") == (not failed and passed + warned + deviates > 0)
    assert len(line.splitlines()) == 1
