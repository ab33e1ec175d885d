"""
Published measurements of running servers, one row a load: what `accuracy` holds simulations against.

    rows = read_rows(Path("../shared/data"))
    row.engine_settings(profile), row.workload      the same in a simulation

Where a table does not say how the server was set, it is said here what is taken, and why.
"""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean

from mock_engine.engine_settings import EngineSettings
from mock_engine.workload import Workload

ROUNDS = 10  # requests of a closed loop, as a multiple of its concurrency


@dataclass(frozen=True)
class Deployment:
    """What ran: by which a profile is found. Rows of one deployment and table are a group."""

    table: str
    gpu: str
    model: str
    engine: str
    version: str
    tp: int
    dtype: str
    kv_cache_dtype: str

    @property
    def text(self) -> str:
        kv = f", KV {self.kv_cache_dtype}" if self.kv_cache_dtype != "bf16" else ""
        return f"{self.model} tp{self.tp} {self.dtype}{kv}, {self.engine} {self.version}"


@dataclass(frozen=True)
class Row:
    """One load, and what was measured under it; milliseconds and tokens a second, None where it cannot be used."""

    deployment: Deployment
    isl: int
    osl: int
    concurrency: int | None
    request_rate: float | None
    ttft_ms: float | None
    itl_ms: float
    tokens_per_s: float | None
    settings: tuple[tuple[str, object], ...] = ()  # of the engine, as far as they are known
    cached_tokens: int = 0  # of the prompt, in the prefix cache

    @property
    def load(self) -> float:
        return self.concurrency or self.request_rate or 0.0

    @property
    def num_requests(self) -> int:
        """Sent in a simulation."""
        return max(ROUNDS * self.concurrency, 16) if self.concurrency else int(120 * (self.request_rate or 0.0))

    def engine_settings(self, profile: str) -> EngineSettings:
        return EngineSettings(profile=profile, jitter=0.0, **dict(self.settings))  # type: ignore[arg-type]

    def workload(self) -> Workload:
        values: dict[str, object] = {field.name: None for field in fields(Workload)}
        values |= {"isl": self.isl - self.cached_tokens, "osl": self.osl, "fixed_schedule": False}
        values |= {"request_count": self.num_requests}
        if self.concurrency:
            values |= {"concurrency": self.concurrency}
        else:
            assert self.request_rate
            values |= {"request_rate": self.request_rate, "arrival_pattern": "constant"}
        if self.cached_tokens:
            values |= {"num_prefix_prompts": 45, "prefix_prompt_length": self.cached_tokens}
        return Workload(**values)  # type: ignore[arg-type]


def read_rows(data: Path) -> list[Row]:
    """All that can be held against, in the order of the tables."""
    return [*_nim(data), *_trtllm_and_sglang(data), *_vllm(data)]


# What is left out, and why; the page says it.
LEFT_OUT = (
    "Qwen3-235B-A22B and gpt-oss-120b (models that no profile can be imported for); four rows of TensorRT-LLM 1.2.0rc6 "
    "and six of SGLang 0.5.8 for Qwen3-32B (singles with other settings, which are not stated: a TTFT of 7 to 89 s "
    "at a concurrency of 16 is no scheduler's doing); TTFT of Llama-3.1-8B under TensorRT-LLM (its source says that "
    "warm-up is in it); runs of vLLM in which requests failed (reasoning)."
)


def _nim(data: Path) -> Iterator[Row]:
    """
    NIM on TensorRT-LLM of 2024. The KV capacity is not stated: it is read off the most loaded row of each server
    (running sequences are throughput times ITL, each holding prompt and answer), and that row is not scored. Nor is
    the token budget: 16,384, as ten prompts of 2,000 tokens take 8 to 10 times as long to a first token as one.
    """
    found: dict[tuple[str, int, str, int, int, int], list[dict[str, str]]] = defaultdict(list)
    with (data / "nim_h100_concurrency_sweep.csv").open(newline="") as file:
        for line in csv.DictReader(file):
            key = (line["model"], int(line["n_gpus"]), line["precision"])
            found[(*key, int(line["isl"]), int(line["osl"]), int(line["conc"]))].append(line)
    for (model, tp, precision, isl, osl, concurrency), lines in found.items():
        if (isl, concurrency) == (7000, 250):
            continue
        full = found[model, tp, precision, 7000, 1000, 250][0]
        kv_tokens = float(full["tps"]) * float(full["itl_ms"]) / 1e3 * 8000
        deployment = Deployment(
            "NIM",
            "h100-sxm",
            "llama-3.1-8b" if "8b" in model else "llama-3.1-70b",
            "trtllm",
            "NIM of 2024",
            tp,
            {"fp16": "bf16", "fp8": "fp8"}[precision],
            {"fp16": "bf16", "fp8": "fp8"}[precision],
        )
        settings = (("num_gpu_blocks_override", int(kv_tokens // 32)), ("max_model_len", 8192))
        settings += (("max_num_batched_tokens", 16_384),)
        ttft, itl, tps = (fmean(float(line[name]) for line in lines) for name in ("ttft_ms", "itl_ms", "tps"))
        yield Row(deployment, isl, osl, concurrency, None, ttft, itl, tps, settings)


def _trtllm_and_sglang(data: Path) -> Iterator[Row]:
    """
    Runs that aiconfigurator checks itself against. Token budgets are not stated: taken are what its generator writes
    (the prompt, the concurrency and 1,500 tokens for TensorRT-LLM, which does not chunk prompts), and
    SGLang's default. Qwen3-32B in fp8 is taken to be Qwen's own, scaled by blocks, over an fp8 KV cache: in 16 bit
    it would not hold the largest loads, which show no queue.
    """
    models = {"Qwen/Qwen3-32B": "qwen3-32b", "meta-llama/Llama-3.1-8B-Instruct": "llama-3.1-8b"}
    with (data / "trtllm_sglang_h100_concurrency.csv").open(newline="") as file:
        for line in csv.DictReader(file):
            model, engine, version = models.get(line["model_path"]), line["backend"], line["backend_version"]
            if model is None or version not in ("1.0.0rc3", "0.5.1.post1"):
                continue
            isl, osl, concurrency = (int(float(line[name])) for name in ("isl", "osl", "conc"))
            is_fp8 = line["precision"] == "fp8"
            deployment = Deployment(
                "TensorRT-LLM and SGLang",
                "h100-sxm",
                model,
                engine,
                version,
                int(float(line["tp_size"])),
                "fp8_block" if is_fp8 else "bf16",
                "fp8" if is_fp8 else "bf16",
            )
            settings: tuple[tuple[str, object], ...] = ()
            if engine == "trtllm":
                budget = isl + concurrency + 1500
                settings = (("max_num_batched_tokens", budget), ("enable_chunked_prefill", False))
                settings += (("max_model_len", isl + osl), ("max_num_seqs", concurrency))
            ttft = None if model == "llama-3.1-8b" else float(line["ttft_ms"])
            yield Row(deployment, isl, osl, concurrency, None, ttft, float(line["tpot_ms"]), None, settings)


def _vllm(data: Path) -> Iterator[Row]:
    """vLLM under a constant rate; prompts are 45 different ones over and over, all but their last block cached."""
    with (data / "vllm_h100_load_stages.csv").open(newline="") as file:
        for line in csv.DictReader(file):
            if int(line["fail"]):
                continue
            model = re.sub(r"^\d+-\d+-|-tp\d.*|-hf|-v0-1", "", line["exp"])
            tp, isl, osl = int(line["tp"]), round(float(line["isl"])), round(float(line["osl"]))
            deployment = Deployment("vLLM", "h100-sxm", model, "vllm", "of 2026-02", tp, "bf16", "bf16")
            settings = (("max_num_seqs", int(line["mns"])), ("max_num_batched_tokens", int(line["mbt"])))
            settings += (("max_model_len", 4096),)
            ttft, e2e, tps = float(line["ttft"]), float(line["e2e"]), float(line["out_tps"])
            itl = (e2e - ttft) / (float(line["osl"]) - 1)
            rate = float(line["rate"])
            yield Row(deployment, isl, osl, None, rate, ttft, itl, tps, settings, cached_tokens=isl // 16 * 16 - 16)
