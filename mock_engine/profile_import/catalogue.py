"""
All that ships, from one small file.

    entries = read_catalogue(PROFILES_DIR / "catalogue.toml")
    for entry in entries:
        build(entry, data_dir, out_dir)

A section of the file is a source: `kernels`, `dynamo` or `splitwise`. It has `tps`, the tensor
parallel sizes by model, and what else its importer takes; kernels lists of systems and backends.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, NamedTuple

from mock_engine.errors import ProfileError
from mock_engine.profile import Profile
from mock_engine.profile_import.dynamo_sweep import import_dynamo_sweep
from mock_engine.profile_import.kernel_tables import import_kernel_tables
from mock_engine.profile_import.splitwise import import_splitwise

KEYS = {
    "kernels": ("systems", "backends", "dtype", "tps"),
    "dynamo": ("source", "system", "dtype", "tps"),
    "splitwise": ("source", "system", "tps"),
}


class Entry(NamedTuple):
    """One profile to build."""

    importer: str  # "kernels", "dynamo" or "splitwise"
    system: str
    model: str
    tp: int
    dtype: str
    backend: str
    source: str  # without suffix, in the data folder; "" for kernels

    @property
    def name(self) -> str:
        """What the profile will be called."""
        return f"{self.system.replace('_', '-')}/{self.model}/{self.backend}-tp{self.tp}-{self.dtype}"


def read_catalogue(path: Path) -> list[Entry]:
    """The profiles that a catalogue asks for, in its order. Raises `ProfileError`."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ProfileError(
            f"{path}: cannot be read as a catalogue: {error}. Name a file like the shipped one."
        ) from None
    entries: list[Entry] = []
    for importer, sections in document.items():
        if importer not in KEYS:
            raise ProfileError(f"{path}: unknown section {importer}; known are {', '.join(KEYS)}. Use one of them.")
        for section in sections:
            if sorted(section) != sorted(KEYS[importer]):
                raise ProfileError(
                    f"{path}, [[{importer}]]: found the keys {', '.join(section)}; needed are "
                    f"{', '.join(KEYS[importer])}. Add or remove some."
                )
            entries += _entries(importer, section)
    return entries


def _entries(importer: str, section: dict[str, Any]) -> list[Entry]:
    backend = {"dynamo": "vllm", "splitwise": "splitwise"}.get(importer)
    return [
        Entry(importer, system, model, tp, section.get("dtype", "fp16"), each, section.get("source", ""))
        for system in section.get("systems") or [section["system"]]
        for model, tps in section["tps"].items()
        for tp in tps
        for each in section.get("backends") or [backend]
    ]


def build(entry: Entry, data_dir: Path, out_dir: Path) -> Profile:
    """Write one profile of the catalogue below `out_dir` and return it as loaded. Raises `ProfileError`."""
    if entry.importer == "kernels":
        return import_kernel_tables(entry.system, entry.model, entry.tp, entry.dtype, entry.backend, out_dir)
    source = data_dir / entry.source
    source = source if source.is_dir() else source.with_suffix(".csv")
    if entry.importer == "dynamo":
        return import_dynamo_sweep(
            source, out_dir, system=entry.system, model=entry.model, tp=entry.tp, dtype=entry.dtype
        )
    return import_splitwise(source, out_dir, system=entry.system, model=entry.model, tp=entry.tp)
