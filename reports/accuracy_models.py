"""
Step times of one deployment by different models, each as a profile folder that a simulation can load.

    models = Models(folder, data)
    models.paths(deployment)       {"ours": folder, "data sheet": folder, ...}

Only step times differ: scheduler, KV cache and clients are ours in all of them. What others are:

- data sheet: arithmetic and memory traffic at the GPU's data-sheet rates, nothing fitted;
- mocker: the polynomials that Dynamo's mocker takes without profile data (lib/mocker, perf_model.rs, Dynamo 1.4),
  of the batch's prompt tokens and of the share of KV blocks in use, the same for each model and GPU;
- kernel sum: the kernels of aiconfigurator's tables, summed, with no engine around them;
- Splitwise: its measured passes of Llama-2-70B, linear between points (as splitwise-sim's perf_model).
"""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
from accuracy_rows import Deployment
from numpy.typing import NDArray

from mock_engine.latency_table import LatencyTable, make_table
from mock_engine.profile import TABLE_COLUMNS, Profile, load_profile, to_document
from mock_engine.profile_import.kernel_tables import import_kernel_tables
from mock_engine.profile_writing import write_folder

FloatArray = NDArray[np.float64]

OURS, DATASHEET, MOCKER, KERNEL_SUM, SPLITWISE = "ours", "data sheet", "mocker", "kernel sum", "Splitwise"
NAMES = (OURS, KERNEL_SUM, DATASHEET, MOCKER, SPLITWISE)

# No profile of it ships; the figures are its config.json's.
LLAMA_2_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "intermediate_size": 11_008,
    "vocab_size": 32_000,
    "max_position_embeddings": 4096,
}
_TOKENS = np.unique(np.round(np.geomspace(1, 131_072, 86)))
_BATCH_SIZES = np.unique(np.round(np.geomspace(1, 1024, 21)))
_CONTEXTS = np.unique(np.round(np.geomspace(16, 131_072, 27)))


class Models:
    """Profiles are made below `folder` as they are asked for, and kept."""

    def __init__(self, folder: Path, data: Path) -> None:
        self._folder = folder
        self._data = data
        self._found: dict[Deployment, dict[str, str]] = {}

    def profile(self, deployment: Deployment) -> Profile:
        """Ours: the one that ships, or the same importer's."""
        return load_profile(self.paths(deployment)[OURS])

    def paths(self, deployment: Deployment) -> dict[str, str]:
        """By name of the model, as far as it has something to say of this deployment."""
        if deployment not in self._found:
            ours = self._ours(deployment)
            profile = load_profile(ours)
            paths = {OURS: ours}
            changed = {
                KERNEL_SUM: replace(profile, overhead_step_s=0.0, overhead_per_seq_s=0.0),
                DATASHEET: _of_whole_passes(profile, profile.roofline.prefill_s, profile.roofline.decode_s),
                MOCKER: _mocker(profile),
                SPLITWISE: _splitwise(profile, self._data),
            }
            for name, other in changed.items():
                if other is not None:
                    paths[name] = self.write(f"{name} {len(self._found)}", other)
            self._found[deployment] = paths
        return self._found[deployment]

    def write(self, name: str, profile: Profile) -> str:
        """A profile in memory, as a folder."""
        folder = self._folder / name.replace(" ", "-")
        write_folder(folder, to_document(profile), profile.latency)
        return str(folder)

    def _ours(self, deployment: Deployment) -> str:
        engine, tp, dtype = deployment.engine, deployment.tp, deployment.dtype
        for kv in ("", f"-kv-{deployment.kv_cache_dtype}"):
            name = f"{deployment.gpu}/{deployment.model}/{engine}-tp{tp}-{dtype}{kv}"
            try:
                if load_profile(name).kv_cache_dtype == deployment.kv_cache_dtype:
                    return name
            except Exception:  # none that ships
                continue
        model = deployment.model
        if model == "llama-2-7b":
            config = self._folder / model / "config.json"
            config.parent.mkdir(exist_ok=True)
            config.write_text(json.dumps(LLAMA_2_7B), encoding="utf-8")
            model = str(config.parent)
        made = import_kernel_tables(
            deployment.gpu.replace("-", "_"),
            model,
            tp,
            dtype,
            engine,
            self._folder / "imported",
            kv_cache_dtype=deployment.kv_cache_dtype,
        )
        return str(self._folder / "imported" / made.name)


def _of_whole_passes(
    profile: Profile,
    prefill_s: Callable[[FloatArray], FloatArray],
    decode_s: Callable[[FloatArray, FloatArray], FloatArray],
) -> Profile:
    """The same deployment with passes by formula, laid out densely enough that what is between does not matter."""
    batch, context = (axis.ravel() for axis in np.meshgrid(_BATCH_SIZES, _CONTEXTS, indexing="ij"))
    columns = TABLE_COLUMNS["steps"]
    latency: dict[str, LatencyTable] = {
        "prefill": make_table("prefill", columns["prefill"], _TOKENS[:, np.newaxis], prefill_s(_TOKENS)),
        "decode": make_table("decode", columns["decode"], np.column_stack([batch, context]), decode_s(batch, context)),
    }
    none = {"overhead_step_s": 0.0, "overhead_per_seq_s": 0.0}
    return replace(profile, tables="steps", latency=latency, expected_error={}, **none)  # type: ignore[arg-type]


def _mocker(profile: Profile) -> Profile:
    capacity = profile.total_kv_blocks() * profile.block_size

    def prefill_s(tokens: FloatArray) -> FloatArray:
        return np.asarray((4.209989e-07 * tokens**2 + 1.518344e-02 * tokens + 16.50142) / 1e3)

    def decode_s(batch_size: FloatArray, context_tokens: FloatArray) -> FloatArray:
        used = np.minimum(batch_size * context_tokens / capacity, 1.0)
        return np.asarray((-25.74 * used**2 + 54.01 * used + 5.74) / 1e3)

    return _of_whole_passes(profile, prefill_s, decode_s)


def _splitwise(profile: Profile, data: Path) -> Profile | None:
    """Llama-2-70B on H100 with the same number of GPUs; for other models it has nothing."""
    if profile.shape.num_layers != 80 or profile.dtype != "bf16" or profile.gpu != "h100-sxm":
        return None
    prompts: dict[int, list[float]] = defaultdict(list)
    tokens: dict[int, list[float]] = defaultdict(list)
    with (data / "splitwise_perf_model.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if (row["model"], row["hardware"], row["tensor_parallel"]) != ("llama2-70b", "h100-80gb", str(profile.tp)):
                continue
            prompts[int(row["prompt_size"]) * int(row["batch_size"])].append(float(row["prompt_time"]))
            tokens[int(row["batch_size"])].append(float(row["token_time"]))
    if not prompts:
        return None

    def between(found: dict[int, list[float]], x: FloatArray) -> FloatArray:
        known = sorted(found)
        values = np.array([median(found[key]) for key in known]) / 1e3
        slope = (values[-1] - values[-2]) / (known[-1] - known[-2])
        return np.asarray(np.interp(x, known, values) + np.maximum(x - known[-1], 0.0) * max(slope, 0.0))

    return _of_whole_passes(
        profile, lambda prompt: between(prompts, prompt), lambda batch, _context: between(tokens, batch)
    )
