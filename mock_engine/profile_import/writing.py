"""
A profile on its way to disk.

    document = make_document(target, origin, "steps", timing)
    write_profile(out_dir, document, tables)        writes the folder and reads it back

`Target` is what a profile is of, `Origin` where its figures come from. What can be
told from the tables is added here: by how much a point left out is missed.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from mock_engine.errors import ProfileError
from mock_engine.latency_table import LatencyTable
from mock_engine.model_config import ModelConfig
from mock_engine.profile import Profile
from mock_engine.profile_import.accuracy import leave_one_out
from mock_engine.profile_import.facts import REPORTED_AT_UTILIZATION, REPORTED_KV_BLOCKS, engine_defaults
from mock_engine.profile_writing import Document, shape_section, write_folder
from mock_engine.roofline import GpuDatasheet


class Target(NamedTuple):
    """What a profile is of."""

    gpu: str
    model: ModelConfig
    engine: str
    engine_version: str
    tp: int
    dtype: str
    datasheet: GpuDatasheet

    @property
    def key(self) -> tuple[str, str, str, int, str]:
        """By which facts about a deployment are looked up."""
        return self.gpu, self.model.name, self.engine, self.tp, self.dtype


class Origin(NamedTuple):
    """Where a profile's figures come from; a person reads it."""

    how_measured: str
    source: str
    source_version: str
    licence: str
    build_command: str


NO_OVERHEAD: dict[str, float | str] = {
    "overhead_step_s": 0.0,
    "overhead_per_seq_s": 0.0,
    "overhead_source": "None added: whole passes were measured.",
}


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
    utilization; without it, what `facts` knows.
    """
    defaults = engine_defaults(target.engine, target.gpu, target.datasheet.memory_bytes)
    document: Document = {
        "gpu": target.gpu,
        "model": target.model.name,
        "engine": target.engine,
        "engine_version": target.engine_version,
        "tp": target.tp,
        "dtype": target.dtype,
        "tables": tables,
        "is_measured": is_measured,
        "source": origin._asdict(),
        "engine_defaults": {
            "block_size": defaults.block_size,
            "max_model_len": target.model.max_model_len,
            "max_num_seqs": defaults.max_num_seqs,
            "max_num_batched_tokens": defaults.max_num_batched_tokens,
        },
        "timing": timing,
    }
    kv_blocks = kv_blocks or REPORTED_KV_BLOCKS.get(target.key)
    if kv_blocks:
        document["kv_cache"] = {
            "measured_kv_blocks": kv_blocks,
            "measured_gpu_memory_utilization": REPORTED_AT_UTILIZATION,
        }
    return document | {"model_shape": shape_section(target.model.shape), "gpu_datasheet": asdict(target.datasheet)}


def write_profile(out_dir: Path, document: Document, tables: dict[str, LatencyTable]) -> Profile:
    """
    Write a profile below `out_dir`, in the folder that its name says, and load it. Raises `ProfileError`,
    with nothing written, if the model does not fit the GPUs.

    Where the engine's own context length would not fit the KV cache, its default becomes what does.
    """
    with tempfile.TemporaryDirectory() as scratch:
        built = Path(scratch) / "profile"
        try:
            profile = write_folder(built, document, tables)
        except ProfileError as error:
            raise ProfileError(str(error).replace(f"{built}/", "the profile would be wrong: ")) from None
    kv_tokens = profile.total_kv_blocks() * profile.block_size
    if kv_tokens < profile.max_model_len:
        document["engine_defaults"]["max_model_len"] = kv_tokens // 1024 * 1024 or kv_tokens
    document["expected_error"] = leave_one_out(profile)
    return write_folder(out_dir / profile.name, document, tables)
