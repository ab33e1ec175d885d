"""
Profiles from Dynamo's profiler: whole passes of a running engine (Apache-2.0).

    import_dynamo_sweep(source, tp=4, out_dir=Path("profiles"))

`source` is a folder with prefill.npz and decode.npz, as in the ai-dynamo 1.2.1
wheel under planner/core/throughput/pre_swept_results/<gpu>/<engine>/<model>, or
those figures as one CSV file with the columns hw, model, kind, tp, ver, isl, ms,
ctx, batch. What is known to be wrong in the published H100 sweep is left out: `KNOWN_DEFECTS`.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mock_engine.errors import ProfileError
from mock_engine.latency_table import make_table
from mock_engine.profile import TABLE_COLUMNS, Profile
from mock_engine.profile_import.facts import VLLM_DEFAULTS, find_model
from mock_engine.profile_import.overhead import H100_VLLM
from mock_engine.profile_import.writing import make_document, write_profile

GPU, SYSTEM, MODEL = "h100-sxm", "h100_sxm", "llama-3.3-70b"
SOURCE_VERSION = "ai-dynamo 1.2.1"

MAX_BATCH_SIZE = 256
PREFILL_OUTLIERS = {(8, 6205)}  # (tp, prompt tokens)
KNOWN_DEFECTS = (
    f"Left out: decode above batch size {MAX_BATCH_SIZE} (times jump by half there), "
    "and the tp 8 prefill of 6,205 tokens (slower than one of 12,310)."
)


class Sweep(NamedTuple):
    """Measured passes: rows of (prompt tokens, ms) and of (batch size, context tokens of each, ms)."""

    engine_version: str
    prefill: list[tuple[int, float]]
    decode: list[tuple[int, int, float]]


def import_dynamo_sweep(source: Path, tp: int, out_dir: Path) -> Profile:
    """Write the profile of Llama-3.3-70B in FP8 on `tp` H100s, and return it as loaded. Raises `ProfileError`."""
    sweep = (_read_npz if source.is_dir() else _read_csv)(source, tp)
    prefill = [row for row in sweep.prefill if (tp, row[0]) not in PREFILL_OUTLIERS]
    decode = [row for row in sweep.decode if row[0] <= MAX_BATCH_SIZE]
    if len(prefill) < 2 or len(decode) < 2:
        raise ProfileError(f"{source} has no measured passes for {MODEL} on {GPU} with tp {tp}")
    tables = {
        name: make_table(name, TABLE_COLUMNS["steps"][name], values[:, :-1], values[:, -1] / 1e3)
        for name, values in (("prefill", _array(prefill)), ("decode", _array(decode)))
    }
    document = make_document(
        gpu=GPU,
        model=MODEL,
        engine="vllm",
        engine_version=sweep.engine_version,
        tp=tp,
        dtype="fp8",
        tables="steps",
        defaults=VLLM_DEFAULTS[GPU],
        source={
            "how_measured": (
                "A running engine, swept by Dynamo's profiler: time to first token of one prompt, and inter-token "
                f"latency over KV usage and context length. {KNOWN_DEFECTS} The KV cache is taken to be 16 bit."
            ),
            "source": f"NVIDIA Dynamo, pre-swept results for {find_model(MODEL).hub_name}",
            "source_version": SOURCE_VERSION,
            "licence": "Apache-2.0",
        },
        timing={
            "overhead_step_s": 0.0,
            "overhead_per_seq_s": 0.0,
            "overhead_source": "None added: whole passes were measured.",
            "jitter_cv": H100_VLLM.jitter_cv,
            "jitter_source": f"Not in this source; assumed as for vLLM with 16 bit weights. {H100_VLLM.jitter_source}",
        },
    )
    return write_profile(out_dir, document, tables)


def _read_npz(folder: Path, tp: int) -> Sweep:
    """Dynamo's own files: one row of each array for each parallelization."""
    try:
        with np.load(folder / "prefill.npz") as prefill, np.load(folder / "decode.npz") as decode:
            at = int(np.flatnonzero(prefill["tp"][:, 0] == tp)[0])
            version = str(prefill["framework_version"][at, 0])
            lengths, prefill_ms = prefill["prefill_isl"][at], prefill["prefill_ttft"][at]
            at = int(np.flatnonzero(decode["tp"][:, 0] == tp)[0])
            contexts = decode["y_context_length"][at]
            batch_sizes = np.rint(decode["x_kv_usage"][at] * decode["max_kv_tokens"][at, 0] / contexts)
            decode_ms = decode["z_itl"][at]
    except (OSError, KeyError, IndexError, ValueError) as error:
        raise ProfileError(f"{folder}: cannot be read as a Dynamo sweep with tp {tp}: {error!r}") from None
    return Sweep(
        version,
        [(int(length), float(ms)) for length, ms in zip(lengths, prefill_ms, strict=True)],
        [(int(b), int(c), float(ms)) for b, c, ms in zip(batch_sizes, contexts, decode_ms, strict=True)],
    )


def _read_csv(path: Path, tp: int) -> Sweep:
    hub_name = find_model(MODEL).hub_name
    sweep = Sweep("", [], [])
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if (row["hw"], row["model"], int(row["tp"])) != (SYSTEM, hub_name, tp):
                    continue
                ms = float(row["ms"])
                if row["kind"] == "prefill":
                    sweep.prefill.append((round(float(row["isl"])), ms))
                    sweep = sweep._replace(engine_version=row["ver"])
                else:
                    sweep.decode.append((round(float(row["batch"])), round(float(row["ctx"])), ms))
    except (OSError, KeyError, ValueError) as error:
        raise ProfileError(f"{path}: cannot be read as a Dynamo sweep: {error!r}") from None
    return sweep


def _array(rows: list[tuple[int, float]] | list[tuple[int, int, float]]) -> NDArray[np.float64]:
    return np.asarray(rows, dtype=np.float64)
