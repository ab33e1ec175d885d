"""
The models that importers know by name: figures of their public config.json.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mock_engine.errors import ProfileError
from mock_engine.model_config import ModelConfig, model_of_config, read_config


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
