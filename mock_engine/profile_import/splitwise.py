"""
Profiles from Splitwise's perf_model.csv: whole passes of a 2023 engine on A100 (MIT).

    import_splitwise(csv_path, out_dir=Path("profiles"))

The file has prompt and token times (ms) of Llama-2-70B, one setting at a time,
five repeats each (Mutinifni/splitwise-sim, data/perf_model.csv). We take medians,
single prompts for prefill, and the jitter from how much the repeats differ.
"""

from __future__ import annotations

import csv
import statistics
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mock_engine.errors import ProfileError
from mock_engine.latency_table import LatencyTable, make_table
from mock_engine.profile import TABLE_COLUMNS, Profile
from mock_engine.profile_import.facts import EngineDefaults
from mock_engine.profile_import.writing import make_document, write_profile

SOURCE_VERSION = "8f99e7d"
TP = 8
OUTPUT_TOKENS = 128  # longer outputs are in the file, but do not add up there

Setting = tuple[int, int]  # prompt tokens of each, batch size


def import_splitwise(csv_path: Path, out_dir: Path) -> Profile:
    """Write the profile of Llama-2-70B on eight A100s, and return it as loaded. Raises `ProfileError`."""
    prompt_ms, token_ms = _read(csv_path)
    prefill = {(prompt,): statistics.median(ms) for (prompt, batch), ms in prompt_ms.items() if batch == 1}
    decode = {(batch, prompt + OUTPUT_TOKENS // 2): statistics.median(ms) for (prompt, batch), ms in token_ms.items()}
    variation = [statistics.stdev(ms) / statistics.mean(ms) for ms in prompt_ms.values()]
    document = make_document(
        gpu="a100-sxm",
        model="llama-2-70b",
        engine="splitwise",
        engine_version=f"data {SOURCE_VERSION} (2023)",
        tp=TP,
        dtype="fp16",
        tables="steps",
        defaults=EngineDefaults(block_size=16, max_num_seqs=256, max_num_batched_tokens=4096),
        source={
            "how_measured": (
                "A running engine of 2023 on A100-80GB, one setting at a time, medians of 5 repeats: prompt time of "
                f"one prompt; token time over {OUTPUT_TOKENS} tokens of output, entered at the context half way. "
                "Batched prompts, slower there than one prompt of as many tokens, are left out. A slow engine today."
            ),
            "source": "Mutinifni/splitwise-sim, data/perf_model.csv",
            "source_version": SOURCE_VERSION,
            "licence": "MIT",
        },
        timing={
            "overhead_step_s": 0.0,
            "overhead_per_seq_s": 0.0,
            "overhead_source": "None added: whole passes were measured.",
            "jitter_cv": round(statistics.mean(variation), 4),
            "jitter_source": "The 5 repeats of each prompt time, mean coefficient of variation over all settings.",
        },
    )
    return write_profile(out_dir, document, {"prefill": _table("prefill", prefill), "decode": _table("decode", decode)})


def _read(path: Path) -> tuple[dict[Setting, list[float]], dict[Setting, list[float]]]:
    """Prompt and token times (ms) of all repeats, by setting."""
    prompt_ms: dict[Setting, list[float]] = defaultdict(list)
    token_ms: dict[Setting, list[float]] = defaultdict(list)
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                where = (row["model"], row["hardware"], int(row["tensor_parallel"]), int(row["token_size"]))
                if where == ("llama2-70b", "a100-80gb", TP, OUTPUT_TOKENS):
                    setting = (int(row["prompt_size"]), int(row["batch_size"]))
                    prompt_ms[setting].append(float(row["prompt_time"]))
                    token_ms[setting].append(float(row["token_time"]))
    except (OSError, KeyError, ValueError) as error:
        raise ProfileError(f"{path}: cannot be read as Splitwise's perf_model.csv: {error!r}") from None
    if not prompt_ms:
        raise ProfileError(f"{path} has no rows for llama2-70b on a100-80gb with tensor_parallel {TP}")
    return prompt_ms, token_ms


def _table(name: str, milliseconds: Mapping[Any, float]) -> LatencyTable:
    points = np.asarray(list(milliseconds), dtype=np.float64)
    return make_table(name, TABLE_COLUMNS["steps"][name], points, np.asarray(list(milliseconds.values())) / 1e3)
