"""
A profile on its way to disk: what its profile.toml says, and where it goes below the folder of all.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from mock_engine.latency_table import LatencyTable
from mock_engine.profile import Profile
from mock_engine.profile_import.facts import EngineDefaults, find_datasheet, find_model
from mock_engine.profile_writing import Document, write_folder

BUILD_COMMAND = "python -m mock_engine.profile_import --all --data DIR --out profiles"


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
    return write_folder(out_dir / document["gpu"] / document["model"] / variant, document, tables)
