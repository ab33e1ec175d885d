"""
Profiles from measured kernels: NVIDIA's tables in the aiconfigurator-core wheel (Apache-2.0).

    import_kernel_tables("h100_sxm", "llama-3.1-8b", tp=1, dtype="bf16", engine="vllm", out_dir=Path("profiles"))

The wheel holds times of single kernels as an engine runs them (matrix products,
attention, all-reduce), and works without network and GPU. We ask it for whole
passes, keep the parts apart, and ask only where it measured: token counts from
its matrix tables, prompt lengths, batch sizes and contexts from its attention
tables. Two parts are its own arithmetic: element-wise kernels (memory traffic),
and prefill attention over past tokens (the causal area, at the measured rate of
the whole length).
"""

from __future__ import annotations

import importlib
import json
import logging
import tempfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from mock_engine.errors import ProfileError
from mock_engine.latency_table import LatencyTable, make_table
from mock_engine.profile import TABLE_COLUMNS, Profile
from mock_engine.profile_import.facts import VLLM_DEFAULTS, Model, find_model
from mock_engine.profile_import.overhead import H100_VLLM
from mock_engine.profile_import.writing import make_document, write_profile

PAST_TOKENS = (0, 256, 1024, 4096, 16_384, 65_536, 114_688)
MAX_PROMPT_TOKENS = 131_072
# Smaller contexts cost what these do; listing them would only make the files longer.
MIN_CONTEXT_TOKENS = 16
MAX_DECODE_BATCH_SIZE = 1024
QUANT_MODES = {"bf16": "bfloat16", "fp8": "fp8"}

Parts = dict[str, float]


class KernelTables:
    """Measured kernels of one model under one engine; times in milliseconds, as the wheel gives them."""

    def __init__(self, system: str, model: Model, tp: int, dtype: str, engine: str) -> None:
        try:
            sdk = importlib.import_module("aiconfigurator_core.sdk")
            database = importlib.import_module("aiconfigurator_core.sdk.perf_database")
        except ModuleNotFoundError as error:
            raise ProfileError(
                f"importing kernel tables needs the package {error.name}. Run: pip install aiconfigurator-core==0.12.0"
            ) from None
        if dtype not in QUANT_MODES:
            raise ProfileError(f"no kernel tables for dtype {dtype!r}; there are tables for {', '.join(QUANT_MODES)}")
        self.version = str(metadata.version("aiconfigurator-core"))
        logging.getLogger("aiconfigurator_core").setLevel(logging.ERROR)
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(_hub_config(model)), encoding="utf-8")
            try:
                self._engine: Any = sdk.EngineHandle.compile(
                    folder,
                    system,
                    engine,
                    tp_size=tp,
                    gemm_quant_mode=QUANT_MODES[dtype],
                    kvcache_quant_mode="bfloat16",
                    fmha_quant_mode="bfloat16",
                )
            except Exception as error:  # the wheel raises all sorts
                raise ProfileError(
                    f"aiconfigurator-core has no tables for {system}, {engine}, tp {tp}: {error}"
                ) from None
        self.engine_version = str(database.resolve_query_version(system, engine, "current"))
        self._perf_data = Path(str(sdk.__file__)).parents[1] / "systems" / "data" / system
        self._engine_name = engine
        self._quant_mode = QUANT_MODES[dtype]
        self._attention_shape = {
            "num_heads": model.shape.num_heads // tp,
            "num_key_value_heads": -(-model.shape.num_kv_heads // tp),
            "head_dim": model.shape.head_dim,
            "kv_cache_dtype": "bfloat16",
            "window_size": 0,
        }

    def prefill_parts(self, new_tokens: int, past_tokens: int = 0) -> Parts:
        """ms of each part of a prefill pass over one sequence."""
        length = new_tokens + past_tokens
        context, _ = self._engine.run_static_per_op(
            batch_size=1, isl=length, osl=1, prefix=past_tokens, mode="static_ctx"
        )
        return _parts(context)

    def decode_parts(self, batch_size: int, context_tokens: int) -> Parts:
        """ms of each part of a decode pass; `context_tokens` is that of each sequence."""
        _, generation = self._engine.run_static_per_op(
            batch_size=batch_size, isl=context_tokens, osl=2, mode="static_gen"
        )
        return _parts(generation)

    def token_counts(self) -> list[int]:
        """Rows for which matrix products were measured."""
        rows = self._measured("gemm", {"gemm_dtype": self._quant_mode})
        return sorted({int(m) for m in rows["m"]})

    def prompt_lengths(self) -> list[int]:
        """Lengths for which the attention of a single prompt was measured."""
        rows = self._measured("context_attention", {**self._attention_shape, "batch_size": 1})
        return sorted({int(isl) for isl in rows["isl"]})

    def decode_points(self) -> list[tuple[int, int]]:
        """(batch size, context tokens of each) for which decode attention was measured."""
        rows = self._measured("generation_attention", self._attention_shape)
        return sorted({(int(b), int(step) + 1) for b, step in zip(rows["batch_size"], rows["step"], strict=True)})

    def _measured(self, kernel: str, values: dict[str, Any]) -> Any:
        """The rows of one kernel's table that have these values; a column the table lacks is ignored."""
        family = "gemm" if kernel == "gemm" else "attention"
        path = self._perf_data / family / self._engine_name / self.engine_version / f"{kernel}_perf.parquet"
        rows = importlib.import_module("pandas").read_parquet(path)
        for column, value in values.items():
            if column in rows:
                rows = rows[rows[column] == value]
        return rows


def import_kernel_tables(system: str, model: str, tp: int, dtype: str, engine: str, out_dir: Path) -> Profile:
    """
    Write `<out_dir>/<gpu>/<model>/<engine>-tp<N>-<dtype>` and return it as loaded.

    `system` is the wheel's name of a GPU ("h100_sxm"), `model` one of `facts.MODELS`. Raises `ProfileError`.
    """
    gpu = system.replace("_", "-")
    kernels = KernelTables(system, find_model(model), tp, dtype, engine)
    tables = kernel_latency(kernels)
    if tp == 1:
        del tables["communication"]
    document = make_document(
        gpu=gpu,
        model=model,
        engine=engine,
        engine_version=kernels.engine_version,
        tp=tp,
        dtype=dtype,
        tables="kernels",
        defaults=VLLM_DEFAULTS[gpu],
        source={
            "how_measured": (
                f"Kernels as {engine} {kernels.engine_version} runs them, timed one by one by NVIDIA on {gpu}, summed "
                "by part of a pass. Not measured, but computed in the source: element-wise kernels (memory traffic), "
                "prefill attention with past_tokens above 0 (causal area at the measured rate "
                "of the whole length, and no less than without past tokens)."
            ),
            "source": "NVIDIA aiconfigurator-core, measured kernel tables",
            "source_version": kernels.version,
            "licence": "Apache-2.0",
        },
        timing=overhead_timing(gpu),
    )
    return write_profile(out_dir, document, tables)


def overhead_timing(gpu: str) -> dict[str, float | str]:
    """The [timing] section: engine overhead and jitter as fitted on real runs of vLLM on H100."""
    assumed = (
        "" if gpu.startswith("h100") else f" No such run is at hand for {gpu}: the H100 host's overhead is assumed."
    )
    return {
        "overhead_step_s": H100_VLLM.step_s,
        "overhead_per_seq_s": H100_VLLM.per_seq_s,
        "overhead_source": H100_VLLM.overhead_source + assumed,
        "jitter_cv": H100_VLLM.jitter_cv,
        "jitter_source": H100_VLLM.jitter_source,
    }


def kernel_latency(kernels: KernelTables) -> dict[str, LatencyTable]:
    """The five tables of a `kernels` profile (communication also where it is all zeros)."""
    tokens = [(count,) for count in kernels.token_counts()]
    sequences = [point for point in tokens if point[0] <= MAX_DECODE_BATCH_SIZE]
    by_tokens = {point: kernels.prefill_parts(*point) for point in tokens}
    points = [(b, c) for b, c in kernels.decode_points() if c >= MIN_CONTEXT_TOKENS and b <= MAX_DECODE_BATCH_SIZE]
    return {
        "linear": _table("linear", tokens, (by_tokens[point]["linear"] for point in tokens)),
        "communication": _table("communication", tokens, (by_tokens[point]["communication"] for point in tokens)),
        "head": _table("head", sequences, (kernels.decode_parts(*point, 1024)["head"] for point in sequences)),
        "prefill_attention": _prefill_attention(kernels),
        "decode_attention": _table(
            "decode_attention", points, (kernels.decode_parts(*point)["attention"] for point in points)
        ),
    }


def _prefill_attention(kernels: KernelTables) -> LatencyTable:
    """New x past tokens. The source's arithmetic for past tokens forgets the launch: no less than without them."""
    points, milliseconds = [], []
    for new_tokens in kernels.prompt_lengths():
        alone_ms = kernels.prefill_parts(new_tokens)["attention"]
        for past_tokens in PAST_TOKENS:
            if new_tokens + past_tokens <= MAX_PROMPT_TOKENS:
                points.append((new_tokens, past_tokens))
                milliseconds.append(max(alone_ms, kernels.prefill_parts(new_tokens, past_tokens)["attention"]))
    return _table("prefill_attention", points, milliseconds)


def _table(name: str, points: list[Any], milliseconds: Iterable[float]) -> LatencyTable:
    seconds = np.asarray(list(milliseconds)) / 1e3
    return make_table(name, TABLE_COLUMNS["kernels"][name], np.asarray(points, dtype=np.float64), seconds)


def _parts(operations: list[tuple[str, float, float, str]]) -> Parts:
    """Operations of a pass, added up by part."""
    parts = {"linear": 0.0, "head": 0.0, "attention": 0.0, "communication": 0.0}
    for name, milliseconds, _energy, _origin in operations:
        operation = name.split("_", 1)[1]  # "context_qkv_gemm", "generation_qkv_gemm"
        if operation == "attention":
            part = "attention"
        elif operation == "logits_gemm":
            part = "head"
        elif operation == "p2p" or operation.startswith("ar_") or operation.endswith("_ar"):
            part = "communication"
        else:
            part = "linear"
        parts[part] += milliseconds
    return parts


def _hub_config(model: Model) -> dict[str, object]:
    """config.json of a Llama model, as the wheel reads it."""
    shape = model.shape
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_attention_heads": shape.num_heads,
        "num_hidden_layers": shape.num_layers,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": model.max_model_len,
        "vocab_size": shape.vocab_size,
        "torch_dtype": "bfloat16",
    }
