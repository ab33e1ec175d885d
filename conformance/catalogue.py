"""
The rules, read from `catalogue.csv`: one line for each, with where it comes from.

    rules = load_catalogue()
    for rule in select(rules, ["cancel.*,drop.*", "gen.nonempty"]):
        print(explain(rule))

An id stays what it is for ever: it is in reports, deviations files and test
ids. A source that quotes a file of ai-dynamo quotes it word for word.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cache
from importlib.resources import files
from textwrap import wrap

LEVELS = {
    "MUST": "failing it breaks serving",
    "SHOULD": "it works, but hurts somebody",
    "MAY": "reported only",
    "WARN": "reported only",
    "INFO": "reported only",
}
APPLIES = {
    "any": "every engine",
    "agg": "aggregated workers",
    "decode": "decode workers",
    "prefill": "prefill workers",
    "encode": "encode workers",
    "abort": "engines with an abort of their own",
    "kv": "engines with KV event sources",
    "metrics": "engines that publish component metrics",
    "logprobs": "engines that give logprobs",
    "controls": "engines with controls or updates",
    "logits": "engines with a logits-processor spec",
    "dp": "engines with several data-parallel ranks",
}
COLUMNS = ["id", "level", "sentence", "source", "since", "until", "applies", "check", "remark", "entered"]
MAY_BE_EMPTY = {"since", "until", "remark"}
SOURCE_SEPARATOR = " | "
WIDTH = 100
INDENT = 13

_ID = re.compile(r"[a-z]+\.[a-z0-9_]+")
_RELEASE = re.compile(r"\d+(\.\d+){1,2}")
_VERSION = re.compile(r"(\d+)\.(\d+)(?:\.(\d+))?")


@dataclass(frozen=True, slots=True)
class Rule:
    """One sentence that an engine is held against, and why."""

    id: str  # "cancel.mid"
    level: str  # a key of LEVELS
    sentence: str
    source: str  # one or more, with " | " between them
    since: str  # first release of Dynamo that it holds for, "1.3"; "" for every one before `until`
    until: str  # last such release, "1.2.1"; "" for every one after `since`
    applies: frozenset[str]  # keys of APPLIES: it applies where any of them does
    check: str  # how it is checked
    remark: str
    entered: str  # version of the suite that brought it

    @property
    def area(self) -> str:
        """What it is about: the id's part before the dot."""
        return self.id.partition(".")[0]

    @property
    def sources(self) -> tuple[str, ...]:
        """The sources one by one."""
        return tuple(self.source.split(SOURCE_SEPARATOR))

    def is_in_release(self, version: str) -> bool:
        """
        Whether it holds for this version of ai-dynamo, "1.4.2" or "1.7.0.dev1".

        A bound with two numbers covers all patch releases: 1.2.1 is not after 1.2.
        """
        release = _numbers(version)
        since, until = _bound(self.since), _bound(self.until)
        return release[: len(since)] >= since and (not until or release[: len(until)] <= until)


def _numbers(version: str) -> tuple[int, int, int]:
    match = _VERSION.match(version)
    if match is None:
        raise ValueError(
            f'The version of ai-dynamo is "{version}", which does not start with two numbers. '
            'Give one such as "1.4.2" or "1.7.0.dev1".'
        )
    major, minor, patch = match.groups()
    return int(major), int(minor), int(patch or 0)


def _bound(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.split(".")) if release else ()


@cache
def load_catalogue() -> dict[str, Rule]:
    """All rules by id, in the file's order. The dict is shared: do not change it."""
    return parse_catalogue(files("conformance").joinpath("catalogue.csv").read_text(encoding="utf-8"))


def parse_catalogue(text: str) -> dict[str, Rule]:
    """The rules in a CSV text, by id and in its order. Raises ValueError, with the line, for any defect."""
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    rules: dict[str, Rule] = {}
    try:
        for cells in lines:
            if lines.line_num == 1:
                if cells != COLUMNS:
                    raise ValueError(f"the columns are {cells}. Name them {','.join(COLUMNS)}.")
                continue
            rule = _parse_rule(cells)
            if rule.id in rules:
                raise ValueError(f"the id {rule.id} is there already. Give each rule an id of its own.")
            rules[rule.id] = rule
    except (ValueError, csv.Error) as error:
        raise ValueError(f"catalogue.csv, line {lines.line_num}: {error}") from None
    if not rules:
        raise ValueError(
            f"catalogue.csv, line {lines.line_num}: there are no rules. Put one on each line after the first."
        )
    return rules


def _parse_rule(cells: list[str]) -> Rule:
    if len(cells) != len(COLUMNS):
        raise ValueError(f"{len(cells)} cells, not {len(COLUMNS)}. Put text with commas in quotes.")
    row = dict(zip(COLUMNS, cells, strict=True))
    for column, cell in row.items():
        if cell != cell.strip() or "\n" in cell:
            raise ValueError(f'{column} is "{cell}", with space around it or a line break. Take that out.')
        if not cell and column not in MAY_BE_EMPTY:
            raise ValueError(f"{column} is empty. Only {', '.join(sorted(MAY_BE_EMPTY))} may be.")
    if not _ID.fullmatch(row["id"]):
        raise ValueError(f'the id is "{row["id"]}". Write it in lower case, as area.name.')
    if row["level"] not in LEVELS:
        raise ValueError(f'the level is "{row["level"]}". Use one of {", ".join(LEVELS)}.')
    if not row["sentence"].endswith("."):
        raise ValueError(f'the sentence is "{row["sentence"]}", without a full stop. Write a whole sentence.')
    if not all(source.strip() for source in row["source"].split("|")):
        raise ValueError(f'the source is "{row["source"]}", with an empty one in it. Take that out.')
    for column in ("since", "until", "entered"):
        if row[column] and not _RELEASE.fullmatch(row[column]):
            raise ValueError(f'{column} is "{row[column]}". Write two or three numbers, such as 1.3 or 1.2.1.')
    since, until = _bound(row["since"]), _bound(row["until"])
    if since and until and until < since[: len(until)]:
        raise ValueError(f"it ends with {row['until']}, before it begins with {row['since']}. Exchange the two.")
    applies = row["applies"].split(" ")
    if (
        not set(applies) <= APPLIES.keys()
        or len(set(applies)) < len(applies)
        or ("any" in applies and applies != ["any"])
    ):
        raise ValueError(
            f'it applies to "{row["applies"]}". Write any, or some of {" ".join(list(APPLIES)[1:])}, each once.'
        )
    return Rule(
        id=row["id"],
        level=row["level"],
        sentence=row["sentence"],
        source=row["source"],
        since=row["since"],
        until=row["until"],
        applies=frozenset(applies),
        check=row["check"],
        remark=row["remark"],
        entered=row["entered"],
    )


def select(rules: Mapping[str, Rule], patterns: Sequence[str]) -> list[Rule]:
    """
    The rules that any pattern matches, each once and in the order of `rules`.

    A pattern is an id or has wildcards ("cancel.*"); one text may hold several,
    with commas between them. Raises ValueError for a pattern that matches none.
    """
    chosen: set[str] = set()
    for pattern in (part.strip() for text in patterns for part in text.split(",")):
        matches = {rule_id for rule_id in rules if fnmatchcase(rule_id, pattern)}
        if not matches:
            raise ValueError(_no_match(rules, pattern))
        chosen |= matches
    return [rule for rule_id, rule in rules.items() if rule_id in chosen]


def _no_match(rules: Mapping[str, Rule], pattern: str) -> str:
    areas = list(dict.fromkeys(rule.area for rule in rules.values()))
    near = get_close_matches(pattern, [*rules, *(f"{area}.*" for area in areas)], n=3)
    advice = (
        f"Did you mean {' or '.join(near)}?"
        if near
        else 'Use an id such as gen.nonempty, or a pattern such as "gen.*".'
    )
    return f'No rule matches "{pattern}"; the {len(rules)} rules are in the areas {", ".join(areas)}. {advice}'


def explain(rule: Rule) -> str:
    """All there is to say about a rule, as lines of at most 100 columns for a terminal."""
    lines = [f"{rule.id}  {rule.level}: {LEVELS[rule.level]}", "", *wrap(rule.sentence, WIDTH), ""]
    lines += _entry("applies to", ", ".join(text for key, text in APPLIES.items() if key in rule.applies))
    lines += _entry("releases", _releases(rule))
    lines += _entry("checked by", rule.check)
    for number, source in enumerate(rule.sources):
        lines += _entry("" if number else "source", source)
    if rule.remark:
        lines += _entry("remark", rule.remark)
    lines += _entry("entered", f"suite version {rule.entered}")
    return "\n".join(lines)


def _entry(name: str, text: str) -> list[str]:
    """A name and its text beside it; quotes are never broken inside a word."""
    start = name.ljust(INDENT)
    return wrap(
        text,
        WIDTH,
        initial_indent=start,
        subsequent_indent=" " * INDENT,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _releases(rule: Rule) -> str:
    if rule.since and rule.since == rule.until:
        return f"ai-dynamo {rule.since} only"
    if rule.since and rule.until:
        return f"ai-dynamo {rule.since} to {rule.until}"
    if rule.since:
        return f"ai-dynamo {rule.since} and later"
    if rule.until:
        return f"ai-dynamo up to {rule.until}"
    return "every one of ai-dynamo"
