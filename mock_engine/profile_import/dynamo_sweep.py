"""
Profiles from Dynamo's profiler: whole passes of a running engine.

    import_dynamo_sweep(source, out_dir, system="h100_sxm", model="llama-3.3-70b", tp=4, dtype="fp8")

`source` is what `dynamo.mocker --planner-profile-data` takes, or what Dynamo published:

    a folder    selected_prefill_interpolation/raw_data.npz and selected_decode_interpolation/raw_data.npz,
                or prefill_raw_data.json and decode_raw_data.json: one engine's measured passes
    an .npz     with decode_active_kv_tokens: the grid that the mocker replays, a regression through such passes
    a folder    prefill.npz and decode.npz, one row for each tp: pre-swept results, as in the ai-dynamo 1.2.1 wheel
                under planner/core/throughput/pre_swept_results/<gpu>/<engine>/<model> (Apache-2.0)
    a .csv      the pre-swept figures with the columns hw, model, kind, tp, ver, isl, ms, ctx, batch

What is known to be wrong in the published H100 sweep is left out: `KNOWN_DEFECTS`.
"""

from __future__ import annotations

import csv
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mock_engine.engine_defaults import default_kv_cache_dtype, engine_defaults
from mock_engine.errors import ProfileError
from mock_engine.gpu_datasheets import find_datasheet
from mock_engine.latency_table import make_table
from mock_engine.profile import TABLE_COLUMNS, Profile
from mock_engine.profile_import.known_models import find_model
from mock_engine.profile_import.overhead import H100_VLLM
from mock_engine.profile_import.writing import NO_OVERHEAD, write_profile
from mock_engine.profile_writing import Origin, Target, make_document
from mock_engine.roofline import KV_CACHE_BYTES

PUBLISHED_VERSION = "ai-dynamo 1.2.1"
MAX_BATCH_SIZE = 256
PREFILL_OUTLIERS = {(8, 6205)}  # (tp, prompt tokens)
KNOWN_DEFECTS = (
    f"Left out: decode above batch size {MAX_BATCH_SIZE} (times jump by half there), "
    "and the tp 8 prefill of 6,205 tokens (slower than one of 12,310)."
)
SWEPT = (
    "A running engine, swept by Dynamo's profiler: time to first token of one prompt, and inter-token "
    "latency over KV usage and context length."
)
# Of the mocker's grid, which is linear and fine, we keep places that lie evenly on logarithmic axes.
GRID_BATCH_SIZES = 12
MAX_GRID_BATCH_SIZE = 1024
GRID_CONTEXTS = 12


class Sweep(NamedTuple):
    """Passes: rows of (prompt tokens, ms) and of (batch size, context tokens of each, ms)."""

    prefill: list[tuple[int, float]]
    decode: list[tuple[int, int, float]]
    how_measured: str = SWEPT
    engine_version: str = ""
    kv_tokens: int | None = None  # capacity of the KV cache, as the engine reported it
    is_measured: bool = True
    is_published: bool = False


def import_dynamo_sweep(
    source: Path,
    out_dir: Path,
    *,
    system: str = "h100_sxm",
    model: str = "llama-3.3-70b",
    tp: int,
    dtype: str = "fp8",
    engine: str = "vllm",
    engine_version: str | None = None,
    kv_cache_dtype: str | None = None,
    origin: tuple[str, str, str] = ("Dynamo's profiler", "not stated", "not stated"),
) -> Profile:
    """
    Write the profile and return it as loaded. Raises `ProfileError`.

    `origin` is (source, its version, licence) of results that are not the published ones, which say it themselves;
    without `kv_cache_dtype` the KV cache is what `default_kv_cache_dtype` says.
    """
    gpu = system.replace("_", "-")
    known = find_model(model)
    datasheet = find_datasheet(gpu, dtype)
    sweep = _read(source, gpu.replace("-", "_"), known.hub_name, tp)
    if sweep.is_published:
        origin = (f"NVIDIA Dynamo, pre-swept results for {known.hub_name}", PUBLISHED_VERSION, "Apache-2.0")
        sweep = sweep._replace(
            prefill=[row for row in sweep.prefill if (tp, row[0]) not in PREFILL_OUTLIERS],
            decode=[row for row in sweep.decode if row[0] <= MAX_BATCH_SIZE],
        )
    if len(sweep.prefill) < 2 or len(sweep.decode) < 2:
        raise ProfileError(
            f"{source}: found {len(sweep.prefill)} prefill and {len(sweep.decode)} decode passes for {known.name} on "
            f"{gpu} with tp {tp}; needed are 2 of each. Use another --tp, --model or source."
        )
    tables = {
        name: make_table(name, TABLE_COLUMNS["steps"][name], values[:, :-1], values[:, -1] / 1e3)
        for name, values in (("prefill", _median(sweep.prefill)), ("decode", _median(sweep.decode)))
    }
    version = engine_version or sweep.engine_version or "not stated"
    kv_cache_dtype = kv_cache_dtype or default_kv_cache_dtype(engine, dtype)
    target = Target(gpu, known, engine, version, tp, dtype, datasheet, kv_cache_dtype)
    block_size = engine_defaults(engine, version, gpu, datasheet.memory_bytes).block_size
    command = f"mock-engine profiles import dynamo {source.name} --system {system} --model {model} --tp {tp}"
    document = make_document(
        target,
        Origin(
            f"{sweep.how_measured} The KV cache is taken to be {8 * KV_CACHE_BYTES[kv_cache_dtype]} bit.",
            *origin,
            f"{command} --dtype {dtype} --backend {engine}{target.kv_cache_flag}",
        ),
        "steps",
        {
            **NO_OVERHEAD,
            "jitter_cv": H100_VLLM.jitter_cv,
            "jitter_source": f"Not in this source; assumed as for vLLM with 16 bit weights. {H100_VLLM.jitter_source}",
        },
        is_measured=sweep.is_measured,
        kv_blocks=sweep.kv_tokens // block_size if sweep.kv_tokens else None,
    )
    return write_profile(out_dir, document, tables)


def _read(source: Path, system: str, hub_name: str, tp: int) -> Sweep:
    """The sweep in a file or folder of any of the four forms."""
    if not source.exists():
        raise ProfileError(f"{source}: no such file or folder. Name a Dynamo profiler's results.")
    prefill, decode = (_find_results(source, phase) for phase in ("prefill", "decode"))
    if prefill and decode:
        return _parse(source, lambda: _read_results(_load(prefill), _load(decode)))
    if (source / "prefill.npz").is_file() and (source / "decode.npz").is_file():
        return _parse(source, lambda: _read_pre_swept(source, tp), f" with tp {tp}")
    if source.suffix == ".npz" and source.is_file():
        return _parse(source, lambda: _read_grid(_load(source)))
    if source.suffix == ".csv" and source.is_file():
        return _parse(source, lambda: _read_csv(source, system, hub_name, tp))
    raise ProfileError(
        f"{source}: found none of Dynamo's results; allowed are a folder with selected_X_interpolation/raw_data.npz or "
        "X_raw_data.json for X prefill and decode, or with prefill.npz and decode.npz; the mocker's .npz; a .csv. "
        "Name one of them."
    )


def _parse(source: Path, read: Callable[[], Sweep], which: str = "") -> Sweep:
    """What `read` returns; whatever is wrong with the content, said in one line."""
    try:
        sweep = read()
    except (OSError, LookupError, TypeError, ValueError, ArithmeticError, AttributeError, zipfile.BadZipFile) as error:
        raise ProfileError(f"{source}: cannot be read as a Dynamo sweep{which}: {error!r}") from None
    for row in (*sweep.prefill, *sweep.decode):
        if not (np.isfinite(row).all() and min(row) > 0):
            raise ProfileError(f"{source}: found a pass of {row}; allowed are numbers above 0. Leave that pass out.")
    return sweep


def _find_results(folder: Path, phase: str) -> Path | None:
    """The profiler's file for a phase; as Dynamo does, an .npz before a .json."""
    for name in (f"selected_{phase}_interpolation/raw_data.npz", f"{phase}_raw_data.json"):
        if (folder / name).is_file():
            return folder / name
    return None


def _load(path: Path) -> dict[str, Any]:
    if path.suffix == ".json":
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return {key: np.asarray(value) for key, value in content.items()}
    with np.load(path) as arrays:
        return {key: arrays[key] for key in arrays.files}


def _read_results(prefill: Mapping[str, Any], decode: Mapping[str, Any]) -> Sweep:
    """One engine's measured passes. KV usage times capacity over the context is the batch size."""
    kv_tokens = int(np.atleast_1d(decode["max_kv_tokens"])[0])
    usages, contexts, itls = decode["x_kv_usage"], decode["y_context_length"], decode["z_itl"]
    return Sweep(
        [(int(isl), float(ms)) for isl, ms in zip(prefill["prefill_isl"], prefill["prefill_ttft"], strict=True)],
        [
            (max(1, round(float(usage) * kv_tokens / float(context))), int(context), float(ms))
            for usage, context, ms in zip(usages, contexts, itls, strict=True)
        ],
        f"{SWEPT} Its KV cache held {kv_tokens:,} tokens, taken to be at the engine's default memory utilization.",
        kv_tokens=kv_tokens,
    )


def _read_grid(arrays: Mapping[str, Any]) -> Sweep:
    """
    The mocker's grid: ITL at (active KV tokens, context of each). The batch is one over the other, so
    the grid's triangle below a batch of one says nothing.
    """
    kv_tokens, contexts = arrays["decode_active_kv_tokens"], arrays["decode_context_length"]
    itl_ms = arrays["decode_itl"]
    if itl_ms.shape != (len(kv_tokens), len(contexts)) or len(kv_tokens) < 2 or len(contexts) < 2:
        raise ValueError(f"decode_itl has the shape {itl_ms.shape}, the axes {len(kv_tokens)} and {len(contexts)}")
    first_context = max(float(contexts[0]), 1.0)
    rows = []
    for context in _log_places(first_context, float(contexts[-1]), GRID_CONTEXTS):
        for batch in _log_places(1, min(MAX_GRID_BATCH_SIZE, kv_tokens[-1] / context), GRID_BATCH_SIZES):
            if batch * context >= kv_tokens[0]:
                ms = _bilinear(kv_tokens, contexts, itl_ms, batch * context, context)
                rows.append((batch, context, ms))
    return Sweep(
        [
            (round(float(isl)), float(ms))
            for isl, ms in zip(arrays["prefill_isl"], arrays["prefill_ttft_ms"], strict=True)
        ],
        rows,
        "Not measured, but a regression through measured passes, as dynamo.mocker replays it.",
        is_measured=False,
    )


def _log_places(low: float, high: float, number: int) -> list[int]:
    """Up to `number` whole numbers from `low` to `high`; none where that is nothing."""
    if high < low:
        return []
    return sorted({round(value) for value in np.geomspace(low, high, number).tolist() if low <= round(value) <= high})


def _bilinear(xs: NDArray[Any], ys: NDArray[Any], values: NDArray[Any], x: float, y: float) -> float:
    at_x = [np.interp(x, xs, values[:, j]) for j in range(len(ys))]
    return float(np.interp(y, ys, at_x))


def _read_pre_swept(folder: Path, tp: int) -> Sweep:
    """Dynamo's own files: one row of each array for each parallelization."""
    prefill, decode = _load(folder / "prefill.npz"), _load(folder / "decode.npz")
    at = int(np.flatnonzero(prefill["tp"][:, 0] == tp)[0])
    version = str(prefill["framework_version"][at, 0])
    lengths, prefill_ms = prefill["prefill_isl"][at], prefill["prefill_ttft"][at]
    at = int(np.flatnonzero(decode["tp"][:, 0] == tp)[0])
    contexts = decode["y_context_length"][at]
    batch_sizes = np.rint(decode["x_kv_usage"][at] * decode["max_kv_tokens"][at, 0] / contexts)
    return Sweep(
        [(int(length), float(ms)) for length, ms in zip(lengths, prefill_ms, strict=True)],
        [(int(b), int(c), float(ms)) for b, c, ms in zip(batch_sizes, contexts, decode["z_itl"][at], strict=True)],
        f"{SWEPT} {KNOWN_DEFECTS}",
        version,
        is_published=True,
    )


def _read_csv(path: Path, system: str, hub_name: str, tp: int) -> Sweep:
    sweep = Sweep([], [], f"{SWEPT} {KNOWN_DEFECTS}", is_published=True)
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if (row["hw"], row["model"], int(row["tp"])) != (system, hub_name, tp):
                continue
            ms = float(row["ms"])
            if row["kind"] == "prefill":
                sweep.prefill.append((round(float(row["isl"])), ms))
                sweep = sweep._replace(engine_version=row["ver"])
            else:
                sweep.decode.append((round(float(row["batch"])), round(float(row["ctx"])), ms))
    return sweep


def _median(rows: list[tuple[int, float]] | list[tuple[int, int, float]]) -> NDArray[np.float64]:
    """Rows with a place each once, in its first order; the ms of repeated ones is their median."""
    repeats: dict[tuple[int, ...], list[float]] = {}
    for *place, ms in rows:
        repeats.setdefault(tuple(int(value) for value in place), []).append(ms)
    return np.asarray([(*place, float(np.median(ms))) for place, ms in repeats.items()], dtype=np.float64)
