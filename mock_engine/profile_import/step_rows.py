"""
Profiles from a plain CSV file of steps, as logged by a running engine.

    import_step_rows(csv_path, out_dir, system="h100_sxm", model="llama-3.1-8b", tp=1, dtype="bf16", engine="vllm")

One row a step, with the columns of `COLUMNS`: prompt tokens computed, sequences that
decoded one token each, the KV length summed over those, and milliseconds; other columns
are ignored. Steps that only prefill are taken to be one prompt with nothing cached.
Steps of the same load become their median, and their spread the jitter. Steps that do
both are left out: how they are composed of the two is the timing model's business.
"""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from pathlib import Path

import numpy as np

from mock_engine.engine_defaults import default_kv_cache_dtype
from mock_engine.errors import ProfileError
from mock_engine.gpu_datasheets import find_datasheet
from mock_engine.latency_table import make_table
from mock_engine.profile import TABLE_COLUMNS, Profile
from mock_engine.profile_import.known_models import find_model
from mock_engine.profile_import.overhead import H100_VLLM
from mock_engine.profile_import.writing import NO_OVERHEAD, write_profile
from mock_engine.profile_writing import Origin, Target, make_document

COLUMNS = ("prefill_tokens", "decode_batch_size", "context_tokens", "ms")

Repeats = dict[tuple[int, ...], list[float]]  # ms of the steps at each place of a table


def import_step_rows(
    csv_path: Path,
    out_dir: Path,
    *,
    system: str,
    model: str,
    tp: int,
    dtype: str,
    engine: str,
    engine_version: str | None = None,
    kv_cache_dtype: str | None = None,
    origin: tuple[str, str, str] | None = None,
) -> Profile:
    """
    Write the profile and return it as loaded. Raises `ProfileError`. `origin` is (source, its version, licence);
    without `kv_cache_dtype` the KV cache is what `default_kv_cache_dtype` says.
    """
    gpu = system.replace("_", "-")
    known = find_model(model)
    datasheet = find_datasheet(gpu, dtype)
    prefill, decode, num_mixed = _read(csv_path)
    for name, repeats in (("prefill", prefill), ("decode", decode)):
        if len(repeats) < 2:
            raise ProfileError(
                f"{csv_path}: found {len(repeats)} different steps that only {name}; needed are 2. Measure more."
            )
    tables = {
        name: make_table(
            name,
            TABLE_COLUMNS["steps"][name],
            np.asarray(list(repeats), dtype=np.float64),
            np.asarray([np.median(ms) for ms in repeats.values()]) / 1e3,
        )
        for name, repeats in (("prefill", prefill), ("decode", decode))
    }
    num_steps = sum(len(ms) for repeats in (prefill, decode) for ms in repeats.values())
    kv_cache_dtype = kv_cache_dtype or default_kv_cache_dtype(engine, dtype)
    target = Target(gpu, known, engine, engine_version or "not stated", tp, dtype, datasheet, kv_cache_dtype)
    command = f"mock-engine profiles import steps {csv_path.name} --system {system} --model {model} --tp {tp}"
    document = make_document(
        target,
        Origin(
            f"{num_steps:,} steps of a running engine that only prefill or only decode, medians where the load was the "
            f"same. Steps left out because they do both: {num_mixed:,}.",
            *(origin or (csv_path.name, "not stated", "not stated")),
            f"{command} --dtype {dtype} --backend {engine}{target.kv_cache_flag}",
        ),
        "steps",
        {**NO_OVERHEAD, **_jitter([*prefill.values(), *decode.values()])},
    )
    return write_profile(out_dir, document, tables)


def _jitter(repeated_ms: list[list[float]]) -> dict[str, float | str]:
    variations = [float(np.std(ms, ddof=1) / np.mean(ms)) for ms in repeated_ms if len(ms) > 1]
    if not variations:
        return {
            "jitter_cv": H100_VLLM.jitter_cv,
            "jitter_source": f"No load was repeated in this source; assumed. {H100_VLLM.jitter_source}",
        }
    return {
        "jitter_cv": round(float(np.mean(variations)), 4),
        "jitter_source": f"Repeated steps of {len(variations):,} loads, mean coefficient of variation.",
    }


def _read(path: Path) -> tuple[Repeats, Repeats, int]:
    """Steps that prefill, by prompt tokens; that decode, by batch size and context of each; how many do both."""
    prefill: Repeats = defaultdict(list)
    decode: Repeats = defaultdict(list)
    num_mixed = 0
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = [column for column in COLUMNS if column not in (reader.fieldnames or ())]
            if missing:
                raise ProfileError(
                    f"{path}, line 1: the columns {', '.join(missing)} are missing; needed are {', '.join(COLUMNS)}. "
                    "Rename or add them."
                )
            for row in reader:
                tokens, batch_size, context_tokens, ms = (
                    _number(path, reader.line_num, column, row[column]) for column in COLUMNS
                )
                if tokens and batch_size:
                    num_mixed += 1
                elif tokens:
                    prefill[(int(tokens),)].append(ms)
                elif batch_size:
                    decode[(int(batch_size), max(1, round(context_tokens / batch_size)))].append(ms)
                else:
                    raise ProfileError(
                        f"{path}, line {reader.line_num}: neither prefill_tokens nor decode_batch_size is above 0. "
                        "Leave the row out."
                    )
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ProfileError(f"{path}: cannot be read as CSV: {error}. Name a file of steps.") from None
    return prefill, decode, num_mixed


def _number(path: Path, line: int, column: str, cell: str | None) -> float:
    try:
        value = float(cell or "")
    except ValueError:
        value = math.nan
    is_time = column == "ms"
    if not (math.isfinite(value) and (value > 0 if is_time else value >= 0 and value.is_integer())):
        allowed = "a number above 0" if is_time else "a whole number, 0 or more"
        raise ProfileError(f"{path}, line {line}, column {column}: found {cell!r}; allowed is {allowed}. Correct it.")
    return value
