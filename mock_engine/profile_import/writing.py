"""
A profile on its way to disk: `write_profile` writes the folder and reads it back.
"""

from __future__ import annotations

import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mock_engine.latency_table import LatencyTable, write_table
from mock_engine.profile import Profile, load_profile
from mock_engine.profile_import.facts import EngineDefaults, find_datasheet, find_model

BUILD_COMMAND = "python -m mock_engine.profile_import --all --data DIR --out profiles"

Document = dict[str, Any]


def make_document(
    *,
    gpu: str,
    model: str,
    engine: str,
    engine_version: str,
    tp: int,
    dtype: str,
    tables: str,
    defaults: EngineDefaults,
    source: dict[str, str],
    timing: dict[str, float | str],
) -> Document:
    """profile.toml as nested dictionaries. Raises `ProfileError` for a model or GPU without known figures."""
    known = find_model(model)
    return {
        "gpu": gpu,
        "model": model,
        "engine": engine,
        "engine_version": engine_version,
        "tp": tp,
        "dtype": dtype,
        "tables": tables,
        "is_measured": True,
        "source": {**source, "build_command": BUILD_COMMAND},
        "engine_defaults": {
            "block_size": defaults.block_size,
            "max_model_len": known.max_model_len,
            "max_num_seqs": defaults.max_num_seqs,
            "max_num_batched_tokens": defaults.max_num_batched_tokens,
        },
        "timing": timing,
        "model_shape": asdict(known.shape),
        "gpu_datasheet": asdict(find_datasheet(gpu, dtype)),
    }


def write_profile(out_dir: Path, document: Document, tables: dict[str, LatencyTable]) -> Profile:
    """Write a profile below `out_dir`, in the folder that its name says, and load it. Raises `ProfileError`."""
    variant = f"{document['engine']}-tp{document['tp']}-{document['dtype']}"
    folder = out_dir / document["gpu"] / document["model"] / variant
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "profile.toml").write_text(_toml(document), encoding="utf-8")
    for name, table in tables.items():
        write_table(folder / f"{name}.csv", table)
    return load_profile(folder)


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
