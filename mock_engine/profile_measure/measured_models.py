"""
The models that can be measured: dense decoders of Llama's build, with RMS norm, rotary positions, grouped-query
attention and SwiGLU.

    config = read_measured(Path("llama-3.1-8b"))      a config.json or the folder that holds one
"""

from __future__ import annotations

from pathlib import Path

from mock_engine.errors import ProfileError
from mock_engine.model_config import ModelConfig, config_file, read_config, read_keys

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


def read_measured(path: Path, max_model_len: int | None = None) -> ModelConfig:
    """The model in that file or folder. Raises `ProfileError` for what is none, or cannot be measured."""
    config = read_config(path, max_model_len)
    keys, file = read_keys(path), config_file(path)
    if keys.get("model_type") not in MODEL_TYPES or config.shape.num_expert_params:
        experts = " with experts" if config.shape.num_expert_params else ""
        raise ProfileError(
            f"{file}: model_type is {keys.get('model_type')!r}{experts}; measured are dense decoders of Llama's build: "
            f"{', '.join(MODEL_TYPES)}. Name one of those, or use a shipped profile."
        )
    if keys.get("quantization_config"):
        raise ProfileError(
            f"{file}: quantization_config says the model is quantized; only bf16 and fp16 weights are measured. "
            "Name the config.json it was made from."
        )
    if keys.get("hidden_act", "silu") != "silu":
        raise ProfileError(f"{file}: hidden_act is {keys['hidden_act']!r}; only silu is measured. Name another model.")
    if config.shape.head_dim % 2:
        raise ProfileError(
            f"{file}: head_dim is {config.shape.head_dim}; rotary positions need an even one. Name another config.json."
        )
    return config
