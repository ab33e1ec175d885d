"""
What engines do when no flag is given, and KV capacities that they reported.

    engine_defaults("vllm", "0.24.0", "h100-sxm", memory_bytes).max_num_batched_tokens
    default_kv_cache_dtype("trtllm", "fp8")
"""

from __future__ import annotations

import re
from typing import NamedTuple

# KV blocks of 16 tokens that vLLM reported at a gpu_memory_utilization of 0.9, the first with 8,192 batched tokens:
# read off published runs (inference-sim/inference-sim, branch stepml-experiments 9293b222, Apache-2.0).
REPORTED_KV_BLOCKS = {
    ("h100-sxm", "llama-3.1-70b", "vllm", 4, "bf16", "bf16"): 30_251,
    ("h100-sxm", "llama-2-70b", "vllm", 4, "bf16", "bf16"): 31_356,
    ("h100-sxm", "codellama-34b", "vllm", 2, "bf16", "bf16"): 26_602,
}
REPORTED_AT_UTILIZATION = 0.9


class EngineDefaults(NamedTuple):
    """What an engine does when no flag is given."""

    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    async_scheduling: bool


def default_kv_cache_dtype(engine: str, dtype: str) -> str:
    """
    What an engine's KV cache is made of if nobody says: "fp8" or "bf16".

    TensorRT-LLM takes fp8 weights from checkpoints of NVIDIA's ModelOpt, and these ask for an fp8 KV cache too
    (kv_cache_quant_algo), which it heeds. vLLM and SGLang also quantize as they load, and take checkpoints
    that say nothing of the KV cache: their "auto" then is the model's own 16 bit. (Given one of ModelOpt's, newer
    versions of them heed it as well: say fp8.)
    """
    return "fp8" if (engine, dtype) == ("trtllm", "fp8") else "bf16"


def engine_defaults(engine: str, engine_version: str, gpu: str, memory_bytes: float) -> EngineDefaults:
    """
    Defaults of an engine on a GPU; those of vLLM for an engine that is not known.

    vLLM 0.24, EngineArgs.get_batch_defaults, API server: cards of 70 GiB or more, but not the A100, get larger
    batches. TensorRT-LLM 1.3, KvCacheConfig and BuildConfig. SGLang 0.5, ServerArgs: chunks grow with memory, and
    2,048 is the least that it allows to run at once; a block is 16 tokens, as Dynamo's examples set it, not SGLang's 1.

    Scheduling is asynchronous in vLLM from 0.14 on, in TensorRT-LLM's PyTorch backend (overlap scheduler) and in
    SGLang (overlap schedule).
    """
    if engine == "trtllm":
        return EngineDefaults(32, 2048, 8192, True)
    if engine == "splitwise":
        return EngineDefaults(16, 256, 4096, False)
    if engine == "sglang":
        gib = memory_bytes / 2**30
        return EngineDefaults(16, 2048, 2048 if gib < 35 else 4096 if gib < 60 else 8192 if gib < 160 else 16_384, True)
    is_async = _is_at_least(engine_version, 0, 14)
    is_large = memory_bytes >= 70 * 2**30 and "a100" not in gpu
    return EngineDefaults(16, 1024, 8192, is_async) if is_large else EngineDefaults(16, 256, 2048, is_async)


def _is_at_least(version: str, *wanted: int) -> bool:
    """Whether a version such as 0.10.1.1 or 1.3.0rc20 is that one or later; one without numbers is not."""
    numbers = tuple(int(number) for number in re.findall(r"\d+", version))
    return numbers >= wanted
