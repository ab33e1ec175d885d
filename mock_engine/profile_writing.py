"""
A profile on its way to disk: `write_folder` writes it and reads it back.
"""

from __future__ import annotations

import re
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mock_engine.latency_table import LatencyTable, write_table
from mock_engine.profile import Profile, load_profile
from mock_engine.roofline import ModelShape

Document = dict[str, Any]  # profile.toml, its sections as dictionaries


def write_folder(folder: Path, document: Document, tables: dict[str, LatencyTable]) -> Profile:
    """Write profile.toml and the tables into `folder`, made if need be, and load it. Raises `ProfileError`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "profile.toml").write_text(_toml(document), encoding="utf-8")
    for name, table in tables.items():
        write_table(folder / f"{name}.csv", table)
    return load_profile(folder)


def as_name(text: str) -> str:
    """`text` as a part of a profile's name: lower case, dashes for what is no letter, digit or dot."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")


def shape_section(shape: ModelShape) -> dict[str, int]:
    """A model's shape for profile.toml, without what only others have: experts, a shared embedding."""
    usual = {name: field.default for name, field in ModelShape.__dataclass_fields__.items()}
    return {name: value for name, value in asdict(shape).items() if value != usual[name]}


def _toml(document: Document) -> str:
    lines = ["# Written by the command in build_command; change that, not this file."]
    lines += [f"{key} = {_value(value)}" for key, value in document.items() if not isinstance(value, dict)]
    for section, values in document.items():
        if isinstance(values, dict):
            lines += ["", f"[{section}]", *(f"{key} = {_value(value)}" for key, value in values.items())]
    return "\n".join(lines) + "\n"


def _value(value: bool | int | float | str) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        if len(escaped) <= 90:
            return f'"{escaped}"'
        return (
            '"""\\\n'
            + " \\\n".join(textwrap.wrap(escaped, 100, break_long_words=False, break_on_hyphens=False))
            + '"""'
        )
    return f"{value:_}" if isinstance(value, int) else repr(value)
