"""The rule catalogue: complete, well-formed, and quoting its sources word for word."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from dataclasses import FrozenInstanceError, replace
from importlib.metadata import distribution, version
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conformance.catalogue import APPLIES, COLUMNS, LEVELS, Rule, explain, load_catalogue, parse_catalogue, select

RULES = load_catalogue()
NUM_RULES_BY_AREA = {
    "args": 6,
    "sig": 2,
    "start": 9,
    "gen": 29,
    "err": 4,
    "cancel": 8,
    "abort": 4,
    "drop": 5,
    "life": 10,
    "drain": 3,
    "disagg": 6,
    "encode": 2,
    "kv": 6,
    "metrics": 4,
    "health": 1,
    "logp": 4,
    "ctl": 3,
    "hook": 2,
    "log": 1,
    "ctx": 1,
}
QUOTING_SOURCE = re.compile(r'ai-dynamo (\d+\.\d+\.\d+), (dynamo/\S+), ([^":]+): "([^"]+)"')
GOOD = {
    "id": "gen.nonempty",
    "level": "MUST",
    "sentence": "A stream has at least one chunk, or raises.",
    "source": "a file | another file",
    "since": "1.3",
    "until": "",
    "applies": "agg decode",
    "check": "Read it.",
    "remark": "",
    "entered": "0.1",
}


def to_csv(*rows: dict[str, str], columns: list[str] = COLUMNS) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([columns, *(row.values() for row in rows)])
    return text.getvalue()


def one_line(text: str) -> str:
    return " ".join(text.split())


def quotes_of(release: str) -> list[tuple[str, str, str]]:
    """Rule id, file and quote of every quotation from this release of ai-dynamo."""
    matches = [(rule.id, QUOTING_SOURCE.fullmatch(source)) for rule in RULES.values() for source in rule.sources]
    return [(rule_id, match[2], match[4]) for rule_id, match in matches if match and match[1] == release]


# ---- what the file holds


def test_all_110_rules_are_there_in_their_areas() -> None:
    assert len(RULES) == 110
    assert Counter(rule.area for rule in RULES.values()) == NUM_RULES_BY_AREA
    assert list(dict.fromkeys(rule.area for rule in RULES.values())) == list(NUM_RULES_BY_AREA)  # areas in one piece
    assert all(rule_id == rule.id for rule_id, rule in RULES.items())


def test_no_two_rules_say_the_same() -> None:
    assert len({rule.sentence for rule in RULES.values()}) == len(RULES)


def test_levels_are_the_known_ones_and_each_is_used() -> None:
    assert {rule.level for rule in RULES.values()} == LEVELS.keys()
    assert {part for rule in RULES.values() for part in rule.applies} == APPLIES.keys()


def test_a_sentence_begins_and_ends_as_one() -> None:
    names = re.compile(r"[A-Z]|[a-z_]+[ (,]")  # a sentence may begin with the name of a hook
    assert not [rule.id for rule in RULES.values() if not names.match(rule.sentence) or "  " in rule.sentence]


def test_the_catalogue_is_read_once_and_a_rule_cannot_change() -> None:
    assert load_catalogue() is RULES
    with pytest.raises(FrozenInstanceError):
        RULES["gen.nonempty"].level = "MAY"  # type: ignore[misc]


# ---- sources


def test_a_source_that_names_a_release_quotes_it() -> None:
    sources = [(rule.id, source) for rule in RULES.values() for source in rule.sources]
    unquoted = [at for at in sources if re.match(r"ai-dynamo \d", at[1]) and not QUOTING_SOURCE.fullmatch(at[1])]
    assert not unquoted


def test_every_quote_from_the_installed_release_is_in_its_file_word_for_word() -> None:
    installed = version("ai-dynamo")
    quotes = quotes_of(installed)
    if not quotes:
        pytest.skip(f"nothing is quoted from ai-dynamo {installed}")
    texts: dict[str, str] = {}
    for _, path, _ in quotes:
        if path not in texts:
            texts[path] = one_line(Path(str(distribution("ai-dynamo").locate_file(path))).read_text(encoding="utf-8"))
    assert not [(rule_id, path, quote) for rule_id, path, quote in quotes if one_line(quote) not in texts[path]]


def test_most_quotes_are_from_1_4_2_so_that_they_are_checked_there() -> None:
    assert len(quotes_of("1.4.2")) >= 70


# ---- releases


@pytest.mark.parametrize(
    ("since", "until", "release", "expected"),
    [
        ("", "", "0.1", True),
        ("1.3", "", "1.2.1", False),
        ("1.3", "", "1.3.0", True),
        ("1.3", "", "1.3", True),
        ("1.3", "", "1.10.0", True),
        ("1.3", "", "1.7.0.dev1", True),
        ("1.3.1", "", "1.3.0", False),
        ("1.3.1", "", "1.3.1rc1", True),
        ("1.3.1", "", "1.3", False),
        ("", "1.2", "1.2.1", True),
        ("", "1.2.1", "1.2.1+local", True),
        ("", "1.2.1", "1.2.2", False),
        ("1.2.1", "1.2.1", "1.2.1.post1", True),
        ("1.2.1", "1.2.1", "1.2.0", False),
    ],
)
def test_a_rule_holds_from_its_first_release_to_its_last(since: str, until: str, release: str, expected: bool) -> None:
    rule = replace(RULES["gen.nonempty"], since=since, until=until)
    assert rule.is_in_release(release) is expected


@given(st.tuples(*[st.integers(0, 30)] * 3), st.tuples(*[st.integers(0, 30)] * 3))
def test_releases_compare_by_number(since: tuple[int, ...], release: tuple[int, ...]) -> None:
    first, asked = (".".join(map(str, numbers)) for numbers in (since, release))
    rule = RULES["gen.nonempty"]
    assert replace(rule, since=first).is_in_release(asked) == (release >= since)
    assert replace(rule, until=first).is_in_release(asked) == (release <= since)


def test_drain_belongs_to_1_2_1_and_is_dead_code_after_it() -> None:
    asked = ("1.2.1", "1.3.1", "1.6.1")
    assert [RULES["drain.v12"].is_in_release(release) for release in asked] == [True, False, False]
    assert [RULES["drain.dead_code"].is_in_release(release) for release in asked] == [False, True, True]


def test_a_version_without_numbers_is_refused() -> None:
    with pytest.raises(ValueError, match=r'"main".*"1\.4\.2"'):
        RULES["gen.nonempty"].is_in_release("main")


# ---- patterns


@given(st.sampled_from(list(RULES)))
def test_any_id_selects_itself(rule_id: str) -> None:
    assert select(RULES, [rule_id]) == [RULES[rule_id]]


@given(st.sampled_from(list(NUM_RULES_BY_AREA)))
def test_an_area_with_a_star_selects_exactly_that_area(area: str) -> None:
    assert select(RULES, [f"{area}.*"]) == [rule for rule in RULES.values() if rule.area == area]


@given(st.lists(st.sampled_from(list(RULES)), min_size=1, max_size=8))
def test_commas_and_several_patterns_mean_the_same(rule_ids: list[str]) -> None:
    expected = [rule for rule_id, rule in RULES.items() if rule_id in rule_ids]  # each once, in the file's order
    assert select(RULES, rule_ids) == select(RULES, [",".join(rule_ids)]) == select(RULES, [" , ".join(rule_ids)])
    assert select(RULES, rule_ids) == expected


def test_a_star_selects_all_and_no_pattern_selects_none() -> None:
    assert select(RULES, ["*"]) == list(RULES.values())
    assert select(RULES, []) == []


@pytest.mark.parametrize(
    ("pattern", "advice"),
    [
        ("cancel.midd", "Did you mean cancel.mid"),
        ("cancel", "Did you mean cancel.*"),
        ("Gen.nonempty", "Did you mean gen.nonempty"),
        ("gen.nonempty,abrt.twice", "Did you mean abort.twice"),
        ("zzz", "Use an id such as gen.nonempty"),
        ("", "Use an id such as gen.nonempty"),
        ("gen.nonempty,", "Use an id such as gen.nonempty"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused_with_what_is_near(pattern: str, advice: str) -> None:
    with pytest.raises(ValueError) as raised:
        select(RULES, [pattern])
    message = str(raised.value)
    assert f'No rule matches "{pattern.split(",")[-1]}"; the 110 rules are in the areas args, sig, ' in message
    assert advice in message
    assert "\n" not in message


# ---- explanations


@pytest.mark.parametrize("rule", RULES.values(), ids=list(RULES))
def test_an_explanation_says_all_and_fits_a_terminal(rule: Rule) -> None:
    text = explain(rule)
    assert max(map(len, text.splitlines())) <= 100
    flat = one_line(text)
    for part in (rule.id, rule.level, LEVELS[rule.level], rule.sentence, rule.check, *rule.sources, rule.remark):
        assert one_line(part) in flat


def test_an_explanation_reads_like_this() -> None:
    assert explain(parse_catalogue(to_csv(GOOD | {"remark": "So it is."}))["gen.nonempty"]).splitlines() == [
        "gen.nonempty  MUST: failing it breaks serving",
        "",
        "A stream has at least one chunk, or raises.",
        "",
        "applies to   aggregated workers, decode workers",
        "releases     ai-dynamo 1.3 and later",
        "checked by   Read it.",
        "source       a file",
        "             another file",
        "remark       So it is.",
        "entered      suite version 0.1",
    ]


@pytest.mark.parametrize(
    ("since", "until", "expected"),
    [
        ("", "", "every one of ai-dynamo"),
        ("1.6", "", "ai-dynamo 1.6 and later"),
        ("", "1.2.1", "ai-dynamo up to 1.2.1"),
        ("1.2.1", "1.2.1", "ai-dynamo 1.2.1 only"),
        ("1.3", "1.5", "ai-dynamo 1.3 to 1.5"),
    ],
)
def test_an_explanation_says_for_which_releases(since: str, until: str, expected: str) -> None:
    assert f"releases     {expected}\n" in explain(replace(RULES["gen.nonempty"], since=since, until=until))


# ---- defects of the file


def test_a_good_line_becomes_a_rule() -> None:
    assert parse_catalogue(to_csv(GOOD)) == {
        "gen.nonempty": Rule(**GOOD | {"applies": frozenset({"agg", "decode"})})  # type: ignore[arg-type]
    }


@pytest.mark.parametrize(
    ("defect", "message"),
    [
        ({"id": "gen"}, "area.name"),
        ({"id": "Gen.nonempty"}, "area.name"),
        ({"id": ""}, "id is empty"),
        ({"level": "must"}, "MUST, SHOULD, MAY, WARN, INFO"),
        ({"level": "MUST/SHOULD"}, "MUST, SHOULD, MAY, WARN, INFO"),
        ({"sentence": ""}, "sentence is empty"),
        ({"sentence": "has chunks"}, "full stop"),
        ({"sentence": "It has\nchunks."}, "line break"),
        ({"source": ""}, "source is empty"),
        ({"source": "a file |"}, "an empty one in it"),
        ({"since": ">=1.3"}, "such as 1.3 or 1.2.1"),
        ({"until": "1"}, "such as 1.3 or 1.2.1"),
        ({"since": "1.3", "until": "1.2.1"}, "before it begins"),
        ({"applies": "all"}, "Write any"),
        ({"applies": "any agg"}, "Write any"),
        ({"applies": "agg agg"}, "each once"),
        ({"applies": "agg  decode"}, "Write any"),
        ({"check": ""}, "check is empty"),
        ({"check": " Read it."}, "space around it"),
        ({"entered": ""}, "entered is empty"),
        ({"entered": "soon"}, "such as 1.3 or 1.2.1"),
        ({}, "there already"),
    ],
)
def test_a_defect_in_a_line_is_refused_with_its_number(defect: dict[str, str], message: str) -> None:
    second = GOOD | ({"id": "gen.index"} if defect else {}) | defect
    with pytest.raises(ValueError) as raised:
        parse_catalogue(to_csv(GOOD, second))
    line = 4 if any("\n" in cell for cell in second.values()) else 3  # where the record ends
    assert str(raised.value).startswith(f"catalogue.csv, line {line}: ")
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("", "line 0: there are no rules", id="nothing at all"),
        pytest.param(to_csv(), "line 1: there are no rules", id="no rule"),
        pytest.param(to_csv(GOOD, columns=COLUMNS[::-1]), "line 1: the columns are", id="columns in another order"),
        pytest.param(to_csv(GOOD) + "gen.index,MUST\n", "line 3: 2 cells, not 10", id="a short line"),
        pytest.param(to_csv(GOOD) + "\n", "line 3: 0 cells, not 10", id="an empty line"),
        pytest.param(to_csv(GOOD) + ",".join("x" * 11) + "\n", "line 3: 11 cells, not 10", id="a comma too many"),
        pytest.param(to_csv(GOOD) + 'gen.index,"MUST', "line 3: unexpected end of data", id="an open quote"),
    ],
)
def test_a_file_that_is_no_table_of_rules_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError) as raised:
        parse_catalogue(text)
    assert str(raised.value).startswith(f"catalogue.csv, {message}")
