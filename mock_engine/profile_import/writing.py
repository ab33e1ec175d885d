"""
An imported profile on its way to disk. What its tables tell is added: by how much a point left out is missed.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from mock_engine.errors import ProfileError
from mock_engine.latency_table import LatencyTable
from mock_engine.profile import Profile
from mock_engine.profile_import.accuracy import leave_one_out
from mock_engine.profile_writing import Document, write_folder

NO_OVERHEAD: dict[str, float | str] = {
    "overhead_step_s": 0.0,
    "overhead_per_seq_s": 0.0,
    "overhead_source": "None added: whole passes were measured.",
}


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
