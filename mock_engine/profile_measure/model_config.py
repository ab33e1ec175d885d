"""
The model's config.json, as the Hugging Face hub has them.

    config = read_config(Path("llama-3.1-8b"))      a config.json or the folder that holds one
    config.shape, config.intermediate_size, ...

Dense decoders of Llama's build alone: RMS norm, rotary positions, grouped-query attention, SwiGLU.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mock_engine.errors import ConfigError
from mock_engine.roofline import ModelShape

# Model types, and whether their projections to queries, keys and values have a bias, and their heads a norm.
_KINDS = {
    "llama": (False, False),
    "mistral": (False, False),
    "qwen2": (True, False),
    "qwen3": (False, True),
}
_COUNTS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What of a model decides which kernels run, and on what sizes."""

    name: str  # for the profile; of lower-case letters, digits, dots and dashes
    shape: ModelShape
    intermediate_size: int
    max_position_embeddings: int
    has_qkv_bias: bool
    has_head_norms: bool  # of each query and key head
    rope_theta: float
    rms_norm_eps: float

    @property
    def query_size(self) -> int:
        """Numbers in the queries of one token."""
        return self.shape.num_heads * self.shape.head_dim

    @property
    def kv_size(self) -> int:
        """Numbers in the keys of one token in one layer; as many are in the values."""
        return self.shape.num_kv_heads * self.shape.head_dim


def read_config(path: Path, max_model_len: int | None = None) -> ModelConfig:
    """The model in that file or folder. Raises `ConfigError` for what is no such model."""
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{file} does not exist. --model must be a config.json, or a folder that holds one."
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{file} cannot be read as JSON: {error}. --model must be a model's config.json.") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{file} holds no JSON object. --model must be a model's config.json.")
    _check_kind(file, config)
    for key in _COUNTS:
        _count(file, config, key)
    num_heads = config["num_attention_heads"]
    head_dim = _count(file, config, "head_dim", config["hidden_size"] // num_heads)
    num_kv_heads = _count(file, config, "num_key_value_heads", num_heads)
    if num_heads % num_kv_heads or head_dim % 2:
        raise ConfigError(
            f"{file}: {num_heads} heads share {num_kv_heads} KV heads of size {head_dim}; "
            "the first must be a multiple of the second, and the size even. Name another config.json."
        )
    _check_window(
        file, config, min(max_model_len or config["max_position_embeddings"], config["max_position_embeddings"])
    )
    has_qkv_bias, has_head_norms = _KINDS[config["model_type"]]
    has_qkv_bias = bool(config.get("attention_bias", has_qkv_bias))
    return ModelConfig(
        name=_name(file, config),
        shape=ModelShape(
            num_params=_num_params(config, num_kv_heads, head_dim, has_qkv_bias, has_head_norms),
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            vocab_size=config["vocab_size"],
        ),
        intermediate_size=config["intermediate_size"],
        max_position_embeddings=config["max_position_embeddings"],
        has_qkv_bias=has_qkv_bias,
        has_head_norms=has_head_norms,
        rope_theta=float(config.get("rope_theta") or 10_000.0),
        rms_norm_eps=float(config.get("rms_norm_eps") or 1e-6),
    )


def _check_kind(file: Path, config: dict[str, Any]) -> None:
    kind = config.get("model_type")
    if kind not in _KINDS:
        raise ConfigError(
            f"{file}: model_type is {kind!r}; measured are dense decoders of Llama's build: {', '.join(_KINDS)}. "
            "Name one of those, or use a shipped profile."
        )
    if config.get("quantization_config"):
        raise ConfigError(
            f"{file} is a quantized model; only bf16 and fp16 weights are measured. "
            "Name the config.json it was made from."
        )
    if config.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"{file}: hidden_act is {config['hidden_act']!r}; only silu is measured. Name another model.")


def _check_window(file: Path, config: dict[str, Any], max_model_len: int) -> None:
    """Attention is measured over all of a context; a window that no context exceeds is fine."""
    window = config.get("sliding_window")
    if window and config.get("use_sliding_window", True) and window < max_model_len:
        raise ConfigError(
            f"{file}: attention sees {window} tokens at a time, but all of a context is measured. "
            f"Use --max-model-len {window} or less."
        )


def _count(file: Path, config: dict[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None and default is not None:
        value = default
    if type(value) is not int or value < 1:
        raise ConfigError(f"{file}: {key} is {value!r}; it must be a whole number of at least 1. Mend the file.")
    return value


def _num_params(
    config: dict[str, Any], num_kv_heads: int, head_dim: int, has_qkv_bias: bool, has_head_norms: bool
) -> int:
    """
    All parameters, the LM head counted apart from the embedding even where they are one.

    `ModelShape.num_layer_params` takes both off; of a GPU's memory it is a fraction of a per cent.
    """
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    qkv = (heads + 2 * num_kv_heads) * head_dim
    layer = hidden * qkv + heads * head_dim * hidden + 3 * hidden * config["intermediate_size"] + 2 * hidden
    layer += qkv if has_qkv_bias else 0
    layer += 2 * head_dim if has_head_norms else 0
    return int(config["num_hidden_layers"] * layer + 2 * config["vocab_size"] * hidden + hidden)


def _name(file: Path, config: dict[str, Any]) -> str:
    """The folder's or the file's own name; of a bare config.json, what it calls itself, or its model type."""
    resolved = file.resolve()
    if resolved.name != "config.json":
        found = resolved.stem
    else:
        found = Path(str(config.get("_name_or_path") or "")).name or resolved.parent.name
    return as_name(found) or str(config["model_type"])


def as_name(text: str) -> str:
    """`text` as a part of a profile's name: lower case, dashes for what is no letter, digit or dot."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")
