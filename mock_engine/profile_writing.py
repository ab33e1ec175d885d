"""
A profile on its way to disk.

    document = make_document(target, origin, "steps", timing)
    write_folder(folder, document, tables)        writes the folder and reads it back

`Target` is what a profile is of, `Origin` where its figures come from.
"""

from __future__ import annotations

import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from mock_engine.engine_defaults import (
    REPORTED_AT_UTILIZATION,
    REPORTED_KV_BLOCKS,
    default_kv_cache_dtype,
    engine_defaults,
)
from mock_engine.latency_table import LatencyTable, write_table
from mock_engine.model_config import ModelConfig
from mock_engine.profile import Profile, load_profile
from mock_engine.roofline import GpuDatasheet, ModelShape

Document = dict[str, Any]  # profile.toml, its sections as dictionaries


class Target(NamedTuple):
    """What a profile is of."""

    gpu: str
    model: ModelConfig
    engine: str
    engine_version: str
    tp: int
    dtype: str
    datasheet: GpuDatasheet
    kv_cache_dtype: str = "bf16"

    @property
    def key(self) -> tuple[str, str, str, int, str, str]:
        """By which facts about a deployment are looked up."""
        return self.gpu, self.model.name, self.engine, self.tp, self.dtype, self.kv_cache_dtype

    @property
    def kv_cache_flag(self) -> str:
        """What a build command needs to say of the KV cache: nothing, if it is the engine's usual one."""
        if self.kv_cache_dtype == default_kv_cache_dtype(self.engine, self.dtype):
            return ""
        return f" --kv-cache-dtype {self.kv_cache_dtype}"


class Origin(NamedTuple):
    """Where a profile's figures come from; a person reads it."""

    how_measured: str
    source: str
    source_version: str
    licence: str
    build_command: str


def make_document(
    target: Target,
    origin: Origin,
    tables: str,
    timing: dict[str, float | str],
    *,
    is_measured: bool = True,
    kv_blocks: int | None = None,
) -> Document:
    """
    profile.toml as nested dictionaries. `kv_blocks` is what the engine itself reported at its default
    utilization; without it, what `engine_defaults` knows.
    """
    defaults = engine_defaults(target.engine, target.engine_version, target.gpu, target.datasheet.memory_bytes)
    document: Document = {
        "gpu": target.gpu,
        "model": target.model.name,
        "engine": target.engine,
        "engine_version": target.engine_version,
        "tp": target.tp,
        "dtype": target.dtype,
        **({"kv_cache_dtype": target.kv_cache_dtype} if target.kv_cache_dtype != "bf16" else {}),
        "tables": tables,
        "is_measured": is_measured,
        "source": origin._asdict(),
        "engine_defaults": {
            "block_size": defaults.block_size,
            "max_model_len": target.model.max_model_len,
            "max_num_seqs": defaults.max_num_seqs,
            "max_num_batched_tokens": defaults.max_num_batched_tokens,
            "async_scheduling": defaults.async_scheduling,
        },
        "timing": timing,
    }
    kv_blocks = kv_blocks or REPORTED_KV_BLOCKS.get(target.key)
    if kv_blocks:
        document["kv_cache"] = {
            "measured_kv_blocks": kv_blocks,
            "measured_gpu_memory_utilization": REPORTED_AT_UTILIZATION,
        }
    return document | {"model_shape": _shape(target.model.shape), "gpu_datasheet": asdict(target.datasheet)}


def write_folder(folder: Path, document: Document, tables: dict[str, LatencyTable]) -> Profile:
    """Write profile.toml and the tables into `folder`, made if need be, and load it. Raises `ProfileError`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "profile.toml").write_text(_toml(document), encoding="utf-8")
    for name, table in tables.items():
        write_table(folder / f"{name}.csv", table)
    return load_profile(folder)


def _shape(shape: ModelShape) -> dict[str, int]:
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
