"""
What is known without measuring: models, engine defaults, KV capacities that engines reported.

Models are figures of their public config.json. Data sheets are in `gpu_datasheets`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from mock_engine.errors import ProfileError
from mock_engine.gpu_datasheets import DATASHEETS
from mock_engine.model_config import ModelConfig, model_of_config, read_config
from mock_engine.roofline import GpuDatasheet


class EngineDefaults(NamedTuple):
    """What an engine does when no flag is given."""

    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int


def _known(
    name: str,
    hub_name: str,
    num_hidden_layers: int,
    hidden_size: int,
    num_attention_heads: int,
    intermediate_size: int,
    vocab_size: int,
    max_position_embeddings: int,
    **more: Any,
) -> ModelConfig:
    """A model with 8 KV heads of 128."""
    figures = {key: value for key, value in locals().items() if key not in ("name", "hub_name", "more")}
    return model_of_config({**figures, "num_key_value_heads": 8, "head_dim": 128, **more}, name, hub_name)


_MIXTRAL = {"num_local_experts": 8, "num_experts_per_tok": 2}
_QWEN3 = {"model_type": "qwen3"}
_KNOWN = (
    _known("llama-3.1-8b", "meta-llama/Meta-Llama-3.1-8B", 32, 4096, 32, 14_336, 128_256, 131_072),
    _known("llama-3.1-70b", "meta-llama/Meta-Llama-3.1-70B", 80, 8192, 64, 28_672, 128_256, 131_072),
    _known("llama-3.3-70b", "nvidia/Llama-3.3-70B-Instruct-FP8", 80, 8192, 64, 28_672, 128_256, 131_072),
    _known("llama-2-70b", "meta-llama/Llama-2-70b", 80, 8192, 64, 28_672, 32_000, 4_096),
    _known("codellama-34b", "codellama/CodeLlama-34b", 48, 8192, 64, 22_016, 32_000, 16_384),
    _known("qwen3-14b", "Qwen/Qwen3-14B", 40, 5120, 40, 17_408, 151_936, 40_960, **_QWEN3),
    _known("qwen3-32b", "Qwen/Qwen3-32B", 64, 5120, 64, 25_600, 151_936, 40_960, **_QWEN3),
    _known("mixtral-8x7b", "mistralai/Mixtral-8x7B-v0.1", 32, 4096, 32, 14_336, 32_000, 32_768, **_MIXTRAL),
)
MODELS = {model.name: model for model in _KNOWN}

# KV blocks of 16 tokens that vLLM reported at a gpu_memory_utilization of 0.9, the first with 8,192 batched tokens:
# read off published runs (inference-sim/inference-sim, branch stepml-experiments 9293b222, Apache-2.0).
REPORTED_KV_BLOCKS = {
    ("h100-sxm", "llama-3.1-70b", "vllm", 4, "bf16"): 30_251,
    ("h100-sxm", "llama-2-70b", "vllm", 4, "bf16"): 31_356,
    ("h100-sxm", "codellama-34b", "vllm", 2, "bf16"): 26_602,
}
REPORTED_AT_UTILIZATION = 0.9


def engine_defaults(engine: str, gpu: str, memory_bytes: float) -> EngineDefaults:
    """
    Defaults of an engine on a GPU; those of vLLM for an engine that is not known.

    vLLM 0.24, EngineArgs.get_batch_defaults, API server: cards of 70 GiB or more, but not the A100, get larger
    batches. TensorRT-LLM 1.3, KvCacheConfig and BuildConfig. SGLang 0.5, ServerArgs: chunks grow with memory, and
    2,048 is the least that it allows to run at once; a block is 16 tokens, as Dynamo's examples set it, not SGLang's 1.
    """
    if engine == "trtllm":
        return EngineDefaults(32, 2048, 8192)
    if engine == "splitwise":
        return EngineDefaults(16, 256, 4096)
    if engine == "sglang":
        gib = memory_bytes / 2**30
        return EngineDefaults(16, 2048, 2048 if gib < 35 else 4096 if gib < 60 else 8192 if gib < 160 else 16_384)
    is_large = memory_bytes >= 70 * 2**30 and not gpu.startswith("a100")
    return EngineDefaults(16, 1024, 8192) if is_large else EngineDefaults(16, 256, 2048)


def find_model(name: str) -> ModelConfig:
    """The model of that name, or in that file or folder. Raises `ProfileError`."""
    if name in MODELS:
        return MODELS[name]
    if not Path(name).exists():
        raise ProfileError(
            f"no model {name!r} is known to the importer, nor is there such a file; known are {', '.join(MODELS)}. "
            "Name one of them, or a config.json."
        )
    return read_config(Path(name))


def find_datasheet(gpu: str, dtype: str) -> GpuDatasheet:
    """The GPU's figures for arithmetic in that dtype. Raises `ProfileError`."""
    if (gpu, dtype) not in DATASHEETS:
        known = ", ".join(f"{gpu} {dtype}" for gpu, dtype in DATASHEETS)
        raise ProfileError(f"no data sheet for {gpu} in {dtype}; known are {known}. Use one of them.")
    return DATASHEETS[gpu, dtype]
