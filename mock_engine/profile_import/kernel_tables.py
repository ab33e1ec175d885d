"""
Profiles from measured kernels: NVIDIA's tables in the aiconfigurator-core wheel (Apache-2.0).

    import_kernel_tables("h100_sxm", "llama-3.1-8b", tp=1, dtype="bf16", engine="vllm", out_dir=Path("profiles"))

The wheel holds times of single kernels as an engine runs them (matrix products,
attention, experts, all-reduce), and works without network and GPU. We ask it for whole
passes, keep the parts apart, and ask only where it measured: token counts from
its matrix and expert tables, prompt lengths, batch sizes and contexts from its attention
tables. Two parts are its own arithmetic: element-wise kernels (memory traffic),
and prefill attention over past tokens (the causal area, at the measured rate of
the whole length).

Attention over an fp8 KV cache has rows of its own, `kv_cache_dtype="fp8"`. Prefill attention
then computes in fp8 where that was measured (TensorRT-LLM and SGLang on H100), as
these engines do, and in bf16 where it was not (vLLM).
"""

from __future__ import annotations

import importlib
import json
import logging
import tempfile
from collections.abc import Iterable
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from mock_engine.engine_defaults import default_kv_cache_dtype
from mock_engine.errors import ProfileError
from mock_engine.gpu_datasheets import DATASHEETS
from mock_engine.latency_table import LatencyTable, make_table
from mock_engine.model_config import ModelConfig, hub_config
from mock_engine.profile import TABLE_COLUMNS, Profile
from mock_engine.profile_import.known_models import find_model
from mock_engine.profile_import.outliers import without_outliers
from mock_engine.profile_import.overhead import H100_VLLM
from mock_engine.profile_import.writing import write_profile
from mock_engine.profile_writing import Origin, Target, make_document
from mock_engine.roofline import KV_CACHE_BYTES, GpuDatasheet

PAST_TOKENS = (0, 256, 1024, 4096, 16_384, 65_536, 114_688)
MAX_PROMPT_TOKENS = 131_072
# Smaller contexts cost what these do; listing them would only make the files longer.
MIN_CONTEXT_TOKENS = 16
MAX_DECODE_BATCH_SIZE = 1024
QUANT_MODES = {"bf16": "bfloat16", "fp8": "fp8", "fp8_block": "fp8_block"}
ENGINES = ("vllm", "trtllm", "sglang")
# Of the memory on the box, CUDA reports this share (H100 SXM: 79.10 of 80 GiB).
REPORTED_MEMORY = 0.9887

# Besides all-reduces by name; around experts that are cut, and not spread, over the GPUs, dispatch is an all-reduce.
COMMUNICATION = ("p2p", "moe_pre_dispatch", "moe_post_dispatch")

Parts = dict[str, float]


class KernelTables:
    """Measured kernels of one model under one engine; times in milliseconds, as the wheel gives them."""

    def __init__(
        self,
        system: str,
        model: ModelConfig,
        tp: int,
        dtype: str,
        engine: str,
        engine_version: str | None = None,
        kv_cache_dtype: str = "bf16",
    ) -> None:
        sdk = _import("aiconfigurator_core.sdk")
        logging.getLogger("aiconfigurator_core").setLevel(logging.ERROR)
        self.version = str(metadata.version("aiconfigurator-core"))
        self._systems_dir = Path(str(sdk.__file__)).parents[1] / "systems"
        self._system, self._engine_name = system, engine
        if dtype not in QUANT_MODES:
            raise ProfileError(
                f"no kernel tables for dtype {dtype!r}; there are tables for {', '.join(QUANT_MODES)}. Use one of them."
            )
        if kv_cache_dtype not in KV_CACHE_BYTES:
            raise ProfileError(
                f"no kernel tables for a KV cache in {kv_cache_dtype!r}; there are tables for "
                f"{', '.join(KV_CACHE_BYTES)}. Use one of them."
            )
        self._quant_mode, self._kv_mode = QUANT_MODES[dtype], QUANT_MODES[kv_cache_dtype]
        self.engine_version = self._find_version(engine_version)
        self._check_model(model, tp)
        shape = model.shape
        self._attention_shape = (shape.num_heads // tp, -(-shape.num_kv_heads // tp), shape.head_dim)
        self._experts = (
            {
                "moe_dtype": self._quant_mode,
                "hidden_size": shape.hidden_size,
                "inter_size": model.intermediate_size,
                "topk": shape.num_experts_per_tok,
                "num_experts": shape.num_experts,
                "moe_tp_size": tp,
                "moe_ep_size": 1,
            }
            if shape.num_expert_params
            else None
        )
        self._check_is_measured(tp)
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(hub_config(model)), encoding="utf-8")
            try:
                self._engine: Any = sdk.EngineHandle.compile(
                    folder,
                    system,
                    engine,
                    backend_version=self.engine_version,
                    tp_size=tp,
                    gemm_quant_mode=_matrix_mode(engine, self._quant_mode),
                    kvcache_quant_mode=self._kv_mode,
                    fmha_quant_mode=self.prefill_attention_mode,
                    **({"moe_tp_size": tp, "moe_quant_mode": self._quant_mode} if self._experts else {}),
                )
                self.prefill_parts(1)
            except Exception as error:  # the wheel raises all sorts
                raise ProfileError(
                    f"aiconfigurator-core {self.version} has no tables for {system}, {engine} {self.engine_version}, "
                    f"tp {tp}, {dtype}: {' '.join(str(error).split())[:200]}. Use another engine, version or system."
                ) from None

    def datasheet(self, gpu: str, dtype: str) -> GpuDatasheet:
        """The GPU's data sheet: ours, or for one that we do not have, the wheel's."""
        if (gpu, dtype) in DATASHEETS:
            return DATASHEETS[gpu, dtype]
        text = (self._systems_dir / f"{self._system}.yaml").read_text(encoding="utf-8")
        figures = importlib.import_module("yaml").safe_load(text)
        flops = figures["gpu"][f"{self._quant_mode.removesuffix('_block')}_tc_flops"]  # blocks: the same arithmetic
        return GpuDatasheet(
            float(flops),
            float(figures["gpu"]["mem_bw"]),
            REPORTED_MEMORY * figures["gpu"]["mem_capacity"],
            float(figures["node"]["intra_node_bw"]),
        )

    @property
    def prefill_attention_mode(self) -> str:
        """What prefill attention computes in: fp8 if that was measured with the model's heads, or nothing else was."""
        heads, kv_heads, head_dim = self._attention_shape
        kind = {"head_dim": head_dim, "kv_cache_dtype": self._kv_mode, "window_size": 0}
        modes = set(self._rows("context_attention", kind)["attn_dtype"])
        own = self._rows("context_attention", {**kind, "num_heads": heads, "num_key_value_heads": kv_heads})
        return "fp8" if modes == {"fp8"} or "fp8" in set(own["attn_dtype"]) else "bfloat16"

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
        """Rows for which matrix products were measured, and with experts those too."""
        counts = {int(m) for m in self._rows("gemm", {"gemm_dtype": self._quant_mode})["m"]}
        if self._experts:
            counts &= {int(tokens) for tokens in self._rows("moe", self._experts)["num_tokens"]}
        return sorted(counts)

    def prompt_lengths(self) -> list[int]:
        """Lengths for which the attention of a single prompt was measured."""
        rows = self._attention_rows("context_attention", {"batch_size": 1})
        return sorted({int(isl) for isl in rows["isl"]})

    def decode_points(self) -> list[tuple[int, int]]:
        """(batch size, context tokens of each) for which decode attention was measured."""
        rows = self._attention_rows("generation_attention", {})
        return sorted({(int(b), int(step) + 1) for b, step in zip(rows["batch_size"], rows["step"], strict=True)})

    def interpolated(self) -> str:
        """What of the attention the source takes from neighbours, as a sentence; nothing if it measured it all."""
        heads, kv_heads, _ = self._attention_shape
        missing = [
            f"{kernel.split('_')[0]} attention (nearest: {found[0]} and {found[1]})"
            for kernel in ("context_attention", "generation_attention")
            if (found := self._measured_shape(kernel)) != (heads, kv_heads)
        ]
        if not missing:
            return ""
        shape = f"{heads} heads and {kv_heads} KV heads"
        return f" With {shape} on a GPU not measured, but interpolated: {', '.join(missing)}."

    def _find_version(self, wanted: str | None) -> str:
        """The engine version whose tables to ask."""
        data = self._systems_dir / "data"
        systems = sorted(path.name for path in data.iterdir() if (self._systems_dir / f"{path.name}.yaml").is_file())
        if self._system not in systems:
            raise ProfileError(
                f"aiconfigurator-core {self.version} has no tables for {self._system}; it has tables for "
                f"{', '.join(systems)}. Use one of them."
            )
        engines = [engine for engine in ENGINES if (data / self._system / "attention" / engine).is_dir()]
        if self._engine_name not in engines:
            raise ProfileError(
                f"aiconfigurator-core {self.version} has no tables for {self._engine_name} on {self._system}; it has "
                f"tables for {', '.join(engines)}. Use one of them."
            )
        slots = _import("aiconfigurator_core.sdk.perf_database").get_version_slots(self._system, self._engine_name)
        versions = {name: version for name, version in slots.items() if self._has_tables(str(version))}
        if wanted is None and "current" in versions:
            return str(versions["current"])
        if wanted not in versions.values():
            raise ProfileError(
                f"aiconfigurator-core {self.version} has no tables for {self._engine_name} {wanted} on {self._system}; "
                f"it has tables for {', '.join(versions.values())}. Use one of them, or leave the version out."
            )
        return str(wanted)

    def _has_tables(self, version: str) -> bool:
        folder = self._systems_dir / "data" / self._system
        return all((folder / family / self._engine_name / version).is_dir() for family in ("gemm", "attention"))

    def _check_model(self, model: ModelConfig, tp: int) -> None:
        shape = model.shape
        if shape.num_heads % tp or (shape.num_kv_heads % tp and tp % shape.num_kv_heads):
            raise ProfileError(
                f"tp {tp} does not divide {shape.num_heads} attention heads and {shape.num_kv_heads} KV heads. "
                f"Use a tp that does."
            )

    def _check_is_measured(self, tp: int) -> None:
        """Say plainly what would come back as an error from deep inside the wheel."""
        where = f"for {self._engine_name} {self.engine_version} on {self._system}"
        dtypes = sorted(set(self._rows("gemm", {})["gemm_dtype"]))
        if self._quant_mode not in dtypes:
            known = ", ".join(name for name, mode in QUANT_MODES.items() if mode in dtypes)
            raise ProfileError(
                f"no matrix products in {self._quant_mode} {where}; there are tables for {known}. Use it."
            )
        head_dim = self._attention_shape[2]
        for kernel in ("context_attention", "generation_attention"):
            head_dims = {int(value) for value in self._rows(kernel, {"window_size": 0})["head_dim"]}
            if head_dim not in head_dims:
                known = ", ".join(map(str, sorted(head_dims)))
                raise ProfileError(
                    f"no attention with a head_dim of {head_dim} {where}; there are tables for {known}. Use a model "
                    "with one of them, or measure steps ('profiles import steps')."
                )
            kv_modes = set(self._rows(kernel, {"head_dim": head_dim, "window_size": 0})["kv_cache_dtype"])
            if self._kv_mode not in kv_modes:
                known = ", ".join(name for name in KV_CACHE_BYTES if QUANT_MODES[name] in kv_modes)
                raise ProfileError(
                    f"no attention over a KV cache in {self._kv_mode} {where}; there are tables for {known}. Use it."
                )
        sizes = sorted({1} | {int(size) for size in self._rows("custom_allreduce", {})["num_gpus"]})
        if tp not in sizes:
            raise ProfileError(
                f"no all-reduce over {tp} GPUs {where}; there are tables for {', '.join(map(str, sizes))}. Use one."
            )
        if self._experts and not len(self._rows("moe", self._experts)):
            wanted = ", ".join(f"{key} {value}" for key, value in self._experts.items())
            raise ProfileError(f"no experts like these {where}: {wanted}. Use another tp, dtype, engine or model.")

    def _attention_rows(self, kernel: str, values: dict[str, Any]) -> Any:
        """The rows of the shape that is in the table and nearest to the model's."""
        heads, kv_heads = self._measured_shape(kernel)
        shape = {"num_heads": heads, "num_key_value_heads": kv_heads}
        return self._rows(kernel, {**shape, **self._attention_kind(kernel), **values})

    def _measured_shape(self, kernel: str) -> tuple[int, int]:
        """(heads, KV heads) in the table: the model's, or those most like them."""
        heads, kv_heads, _ = self._attention_shape
        rows = self._rows(kernel, self._attention_kind(kernel))
        found = sorted({(int(h), int(k)) for h, k in zip(rows["num_heads"], rows["num_key_value_heads"], strict=True)})
        return min(found, key=lambda pair: (abs(np.log(pair[1] / kv_heads)), abs(np.log(pair[0] / heads))))

    def _attention_kind(self, kernel: str) -> dict[str, Any]:
        """What the rows of the model's kind of attention have, but for its heads."""
        kind = {"head_dim": self._attention_shape[2], "kv_cache_dtype": self._kv_mode, "window_size": 0}
        return kind | ({"attn_dtype": self.prefill_attention_mode} if kernel == "context_attention" else {})

    def _rows(self, kernel: str, values: dict[str, Any]) -> Any:
        """The rows of one kernel's table that have these values; a column the table lacks is ignored."""
        family = {"gemm": "gemm", "moe": "moe", "custom_allreduce": "comm"}.get(kernel, "attention")
        folder = self._systems_dir / "data" / self._system / family / self._engine_name / self.engine_version
        path = folder / f"{kernel}_perf.parquet"
        if not path.is_file():
            raise ProfileError(
                f"aiconfigurator-core {self.version} has no {kernel} table for {self._engine_name} "
                f"{self.engine_version} on {self._system}. Use another engine or system."
            )
        rows = _read_parquet(path)
        for column, value in values.items():
            if column in rows:
                rows = rows[rows[column] == value]
        return rows


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ProfileError(
            f"importing kernel tables needs the package {error.name}. Run: pip install aiconfigurator-core==0.12.0"
        ) from None


@cache
def _read_parquet(path: Path) -> Any:
    return importlib.import_module("pandas").read_parquet(path)


def import_kernel_tables(
    system: str,
    model: str,
    tp: int,
    dtype: str,
    engine: str,
    out_dir: Path,
    *,
    engine_version: str | None = None,
    kv_cache_dtype: str | None = None,
) -> Profile:
    """
    Write a profile below `out_dir`, in the folder that `Profile.name` says, and return it as loaded.

    `system` is the wheel's name of a GPU ("h100_sxm"), `model` a name in `known_models`, a config.json or its folder,
    `engine_version` one that the wheel has tables of (the current one), `kv_cache_dtype` "bf16" or "fp8" (as
    `default_kv_cache_dtype` has it). Raises `ProfileError`.
    """
    gpu = system.replace("_", "-")
    system = system.replace("-", "_")
    known = find_model(model)
    kv_cache_dtype = kv_cache_dtype or default_kv_cache_dtype(engine, dtype)
    kernels = KernelTables(system, known, tp, dtype, engine, engine_version, kv_cache_dtype)
    tables = kernel_latency(kernels)
    if tp == 1:
        del tables["communication"]
    num_left_out = 0
    for name, table in tables.items():
        tables[name], left_out = without_outliers(table)
        num_left_out += left_out
    datasheet = kernels.datasheet(gpu, dtype)
    target = Target(gpu, known, engine, kernels.engine_version, tp, dtype, datasheet, kv_cache_dtype)
    notes = kernels.interpolated()
    if kv_cache_dtype != "bf16":
        computes_in = kernels.prefill_attention_mode.replace("bfloat16", "bf16")
        notes += f" KV cache in {kv_cache_dtype}; prefill attention computes in {computes_in}."
    if known.shape.num_expert_params:
        notes += " Experts: under a load as skewed as a power law of 1.2."
    if num_left_out:
        notes += f" Points left out, slower by more than a quarter than larger ones: {num_left_out}."
    origin = Origin(
        how_measured=(
            f"Kernels as {engine} {kernels.engine_version} runs them, timed one by one by NVIDIA on {gpu}, summed "
            "by part of a pass. Not measured, but computed in the source: element-wise kernels (memory traffic), "
            "prefill attention with past_tokens above 0 (causal area at the measured rate "
            f"of the whole length, and no less than without past tokens).{notes}"
        ),
        source="NVIDIA aiconfigurator-core, measured kernel tables",
        source_version=kernels.version,
        licence="Apache-2.0",
        build_command=(
            f"mock-engine profiles import kernels --system {system} --model {model} --tp {tp} --dtype {dtype} "
            f"--backend {engine} --backend-version {kernels.engine_version}{target.kv_cache_flag}"
        ),
    )
    timing = overhead_timing(gpu, engine, known.shape.num_layers)
    return write_profile(out_dir, make_document(target, origin, "kernels", timing), tables)


def _matrix_mode(engine: str, quant_mode: str) -> str:
    """
    How activations of fp8 matrices are scaled: by figures that are in the checkpoint (static) in those that
    TensorRT-LLM takes, by what each pass finds, with kernels of its own, where vLLM and SGLang quantize on loading.
    """
    return "fp8_static" if (engine, quant_mode) == ("trtllm", "fp8") else quant_mode


def overhead_timing(gpu: str, engine: str, num_layers: int) -> dict[str, float | str]:
    """The [timing] section: engine overhead and jitter as fitted on real runs of vLLM on H100."""
    assumed = ""
    if engine != "vllm":
        assumed = f" No such run is at hand for {engine}: vLLM's overhead on an H100 host is assumed."
    elif not gpu.startswith("h100"):
        assumed = f" No such run is at hand for {gpu}: the H100 host's overhead is assumed."
    return H100_VLLM.timing(num_layers, assumed)


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
        elif operation in COMMUNICATION or operation.startswith("ar_") or operation.endswith("_ar"):
            part = "communication"
        else:
            part = "linear"
        parts[part] += milliseconds
    return parts
