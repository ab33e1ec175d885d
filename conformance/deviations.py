"""
The adopter's list of rules that are known to be broken.

    ["gen.empty_prompt"]                         one table a rule, the id in quotes
    reason = "The kernel wants one token."       why it stays broken
    example = "6.100.0:AXicY2BgZGAAAAAVAAM="     optional: the example that shows it, tried first
    role = "decode"                              optional: only in this role
    driver = "bridge"                            optional: only under this driver

A listed rule that is broken does not fail the run. A listed rule that holds
does, as does one that does not apply: the list shrinks as the engine is mended,
and says nothing that is not so.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Collection
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis.core import decode_failure
from hypothesis.errors import InvalidArgument

from conformance.settings import DRIVERS, ROLES

_CHOICES = {"role": ROLES, "driver": DRIVERS}
_KEYS = ("reason", "example", *_CHOICES)
_EXAMPLE = re.compile(r"(\d+(?:\.\w+)+):([A-Za-z0-9+/=_-]+)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Deviation:
    """One table of the file."""

    rule_id: str
    reason: str
    example: tuple[str, str] | None = None  # Hypothesis' release and blob
    role: str | None = None
    driver: str | None = None

    def is_for(self, driver: str, role: str) -> bool:
        """Whether it speaks of a run under `driver` in `role`; where not, the run takes no notice of it."""
        return self.driver in (None, driver) and self.role in (None, role)


def read_deviations(path: Path, known_ids: Collection[str]) -> dict[str, Deviation]:
    """The tables of the file at `path` by rule id, in its order. Any fault is a ValueError of one line."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}. Give --deviations a TOML file.") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}). Save it as UTF-8.") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(
            f'{path} is not TOML: {error}. Write a table ["rule.id"] with a line reason = "..." for each rule.'
        ) from None
    deviations = {}
    for rule_id, table in tables.items():
        where = f"{path}: [{_quote(rule_id)}]"
        if rule_id not in known_ids:
            raise ValueError(f"{where} is no rule of this suite. {_advise(rule_id, table, known_ids)}")
        deviations[rule_id] = _read_table(rule_id, table, where)
    return deviations


def format_deviation(rule_id: str, reason: str, example: tuple[str, str] | None = None) -> str:
    """Lines of TOML that `read_deviations` takes; `reason` may be any text that is not blank."""
    lines = [f"[{_quote(rule_id)}]", f"reason = {_quote(reason)}"]
    if example is not None:
        lines.append(f"example = {_quote(':'.join(example))}")
    return "\n".join(lines) + "\n"


def judge(deviation: Deviation, *, is_broken: bool, was_run: bool) -> str:
    """
    What is wrong with an entry after its rule was checked, in one line; "" if nothing is.

    The caller has checked `deviation.is_for`, and that the rule was selected.
    An entry is wrong if its rule was checked and holds, or was not checked.
    """
    if was_run and not is_broken:
        return f"{deviation.rule_id} holds, but the deviations file says it is broken. Take the entry out."
    if not was_run:
        return (
            f"{deviation.rule_id} was not checked in this run, so its entry in the deviations file matches nothing. "
            'Take the entry out, or say with role = "..." or driver = "..." which runs it is for.'
        )
    return ""


def parse_example(text: str) -> tuple[str, str] | None:
    """Hypothesis' release and blob out of "6.100.0:AXic...", or None if `text` is not such a thing."""
    match = _EXAMPLE.fullmatch(text)
    return (match[1], match[2]) if match else None


def why_unreadable(example: tuple[str, str]) -> str:
    """Why no example comes out of a blob of this Hypothesis; "" if one does, or if another release made it."""
    release, blob = example
    if release != hypothesis.__version__:
        return ""
    try:
        decode_failure(blob.encode())
    except InvalidArgument:
        return f"Hypothesis {release} cannot read the part after the colon. Copy all of it from the failure."
    return ""


def _read_table(rule_id: str, table: Any, where: str) -> Deviation:
    if not isinstance(table, dict):
        raise ValueError(f'{where} is {_name(table)}, not a table. Write ["{rule_id}"] and below it reason = "...".')
    for key, value in table.items():
        if key not in _KEYS:
            hint = "".join(f"Did you mean {match}? " for match in get_close_matches(key, _KEYS, 1))
            raise ValueError(f"{where} has a key {_quote(key)}. {hint}Allowed are {', '.join(_KEYS)}.")
        if not isinstance(value, str):
            raise ValueError(f'{where}: {key} is {_name(value)}, not a text. Write {key} = "...".')
        if key in _CHOICES and value not in _CHOICES[key]:
            raise ValueError(f"{where}: {key} is {_quote(value)}. Allowed are {', '.join(_CHOICES[key])}.")
    if not table.get("reason", "").strip():
        found = "a blank reason" if "reason" in table else "no reason"
        raise ValueError(f'{where} has {found}. Say in reason = "..." why this rule stays broken.')
    example = None
    if "example" in table:
        example = parse_example(table["example"])
        if example is None:
            raise ValueError(
                f"{where}: example is {_quote(table['example'])}, but it is Hypothesis' release and a blob, as in "
                '"6.100.0:AXicY2BgZGAAAAAVAAM=". Copy it from the failure, or take the line out.'
            )
        if fault := why_unreadable(example):
            raise ValueError(f"{where}: example is {_quote(table['example'])}; {fault}")
    return Deviation(rule_id, table["reason"], example, table.get("role"), table.get("driver"))


def _advise(rule_id: str, table: Any, known_ids: Collection[str]) -> str:
    nested = [f"{rule_id}.{key}" for key in table] if isinstance(table, dict) else []
    unquoted = [name for name in nested if name in known_ids]
    if unquoted:
        return f'The id needs quotes: ["{unquoted[0]}"].'
    matches = get_close_matches(rule_id, sorted(known_ids), 3)
    if matches:
        return f"Did you mean {' or '.join(matches)}?"
    return "Take the id from the line of the failure, such as gen.usage_arith."


def _name(value: Any) -> str:
    names = {bool: "a boolean", int: "an integer", float: "a float", list: "an array", dict: "a table", str: "a text"}
    return names.get(type(value), "a date or time")


def _quote(text: str) -> str:
    """A TOML basic string on one line: JSON's, whatever does not print escaped, lone surrogates "?"."""
    quoted = json.dumps(text.encode("utf-8", "replace").decode("utf-8"), ensure_ascii=False)
    return "".join(char if char.isprintable() else f"\\U{ord(char):08X}" for char in quoted)
