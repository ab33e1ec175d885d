"""
Profiles from a CSV file like Splitwise's perf_model.csv: whole passes, one setting at a time.

    import_splitwise(csv_path, out_dir=Path("profiles"))                 Llama-2-70B on eight A100s
    import_splitwise(csv_path, out_dir, system="h100_sxm", tp=4)

Columns: model, hardware, tensor_parallel, prompt_size, batch_size, token_size,
prompt_time and token_time (ms). In Splitwise's own file (Mutinifni/splitwise-sim,
data/perf_model.csv, MIT) each setting was repeated five times. We take medians, single
prompts for prefill, and the jitter from how much the repeats differ.
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
from mock_engine.gpu_datasheets import find_datasheet
from mock_engine.latency_table import LatencyTable, make_table
from mock_engine.profile import TABLE_COLUMNS, Profile
from mock_engine.profile_import.known_models import find_model
from mock_engine.profile_import.overhead import H100_VLLM
from mock_engine.profile_import.writing import NO_OVERHEAD, write_profile
from mock_engine.profile_writing import Origin, Target, make_document

SPLITWISE = ("Mutinifni/splitwise-sim, data/perf_model.csv", "8f99e7d", "MIT")
ENGINE = "splitwise"
OUTPUT_TOKENS = 128  # longer outputs are in the file, but do not add up there
FILE_NAMES = {"llama-2-70b": "llama2-70b", "a100-sxm": "a100-80gb", "h100-sxm": "h100-80gb"}

Setting = tuple[int, int]  # prompt tokens of each, batch size


def import_splitwise(
    csv_path: Path,
    out_dir: Path,
    *,
    system: str = "a100_sxm",
    model: str = "llama-2-70b",
    tp: int = 8,
    file_model: str | None = None,
    file_hardware: str | None = None,
    engine: str = ENGINE,
    engine_version: str | None = None,
    origin: tuple[str, str, str] | None = None,
) -> Profile:
    """
    Write the profile of `model` on `tp` GPUs and return it as loaded. Raises `ProfileError`.

    `file_model` and `file_hardware` are what the file calls the two, where that differs from Splitwise's names.
    Without `origin` (source, its version, licence), the file is taken to be Splitwise's own.
    """
    gpu = system.replace("_", "-")
    known = find_model(model)
    where = (file_model or FILE_NAMES.get(known.name, known.name), file_hardware or FILE_NAMES.get(gpu, gpu))
    prompt_ms, token_ms = _read(csv_path, *where, tp)
    prefill = {(prompt,): statistics.median(ms) for (prompt, batch), ms in prompt_ms.items() if batch == 1}
    decode = {(batch, prompt + OUTPUT_TOKENS // 2): statistics.median(ms) for (prompt, batch), ms in token_ms.items()}
    if len(prefill) < 2:
        raise ProfileError(
            f"{csv_path}: found {len(prefill)} prompt lengths with batch_size 1 for {where[0]} on {where[1]}; needed "
            "are 2. Measure more of them."
        )
    variation = [statistics.stdev(ms) / statistics.mean(ms) for ms in prompt_ms.values() if len(ms) > 1]
    num_repeats = statistics.mode(len(ms) for ms in prompt_ms.values())
    version = engine_version or (f"data {SPLITWISE[1]} (2023)" if origin is None else "not stated")
    target = Target(gpu, known, engine, version, tp, "fp16", find_datasheet(gpu, "fp16"))
    is_splitwise = origin is None
    source, source_version, licence = origin or SPLITWISE
    file_name = "perf_model.csv" if is_splitwise else csv_path.name
    flags = f"--system {system} --model {model} --tp {tp}"
    flags += f" --file-model {file_model}" if file_model else ""
    flags += f" --file-hardware {file_hardware}" if file_hardware else ""
    flags += f" --backend {engine}" if engine != ENGINE else ""
    made = Origin(
        how_measured=(
            f"A running engine{' of 2023' * is_splitwise} on {where[1].upper()}, one setting at a time, medians of "
            f"{num_repeats} repeats: prompt time of one prompt; token time over {OUTPUT_TOKENS} tokens of output, "
            "entered at the context half way. Batched prompts, slower there than one prompt of as many tokens, are "
            f"left out.{' A slow engine today.' * is_splitwise}"
        ),
        source=source,
        source_version=source_version,
        licence=licence,
        build_command=f"mock-engine profiles import splitwise {file_name} {flags}",
    )
    timing: dict[str, float | str] = {
        **NO_OVERHEAD,
        "jitter_cv": H100_VLLM.jitter_cv,
        "jitter_source": f"No repeats in this source; assumed. {H100_VLLM.jitter_source}",
    }
    if variation:
        timing["jitter_cv"] = round(statistics.mean(variation), 4)
        timing["jitter_source"] = (
            f"The {num_repeats} repeats of each prompt time, mean coefficient of variation over all settings."
        )
    document = make_document(target, made, "steps", timing)
    return write_profile(out_dir, document, {"prefill": _table("prefill", prefill), "decode": _table("decode", decode)})


def _read(path: Path, model: str, hardware: str, tp: int) -> tuple[dict[Setting, list[float]], ...]:
    """Prompt and token times (ms) of all repeats, by setting."""
    prompt_ms: dict[Setting, list[float]] = defaultdict(list)
    token_ms: dict[Setting, list[float]] = defaultdict(list)
    found = set()
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                found.add((row["model"], row["hardware"], int(row["tensor_parallel"])))
                if (row["model"], row["hardware"], int(row["tensor_parallel"])) != (model, hardware, tp):
                    continue
                if int(row["token_size"]) == OUTPUT_TOKENS:
                    setting = (int(row["prompt_size"]), int(row["batch_size"]))
                    prompt_ms[setting].append(float(row["prompt_time"]))
                    token_ms[setting].append(float(row["token_time"]))
    except (OSError, KeyError, ValueError) as error:
        raise ProfileError(f"{path}: cannot be read as Splitwise's perf_model.csv: {error!r}") from None
    if not prompt_ms:
        there = "; ".join(f"{m} on {h} with {n}" for m, h, n in sorted(found)) or "none at all"
        raise ProfileError(
            f"{path} has no rows for {model} on {hardware} with tensor_parallel {tp} and token_size {OUTPUT_TOKENS}; "
            f"it has {there}. Use --tp, --file-model and --file-hardware."
        )
    return prompt_ms, token_ms


def _table(name: str, milliseconds: Mapping[Any, float]) -> LatencyTable:
    points = np.asarray(list(milliseconds), dtype=np.float64)
    return make_table(name, TABLE_COLUMNS["steps"][name], points, np.asarray(list(milliseconds.values())) / 1e3)
