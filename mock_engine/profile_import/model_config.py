"""
Models as importers need them, from the config.json that comes with every checkpoint.

    read_config("my/Qwen3-8B")                  a folder with config.json, or that file
    model_of_config(config, hub_name)           the same from its keys, already read

Only plain transformers are taken: full attention in every layer, dense or with
experts in every layer. Others cost differently, and are refused by name. The
parameters are counted: embedding and LM head, norms, projections, MLP or experts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from mock_engine.errors import ProfileError
from mock_engine.roofline import ModelShape


class Model(NamedTuple):
    """A model as importers need it."""

    shape: ModelShape
    intermediate_size: int  # of the MLP, or of one expert
    max_model_len: int
    hub_name: str  # its name on the model hub, by which sources know it


# Keys that only models of another kind have, where their value says something.
_FOREIGN_KEYS = {
    "kv_lora_rank": "latent attention",
    "linear_num_value_heads": "linear attention",
    "ssm_cfg": "state-space layers",
    "mamba_d_state": "state-space layers",
    "n_shared_experts": "shared experts",
    "shared_expert_intermediate_size": "shared experts",
    "hybrid_override_pattern": "layers of several kinds",
    "vision_config": "a vision part",
    "text_config": "a part that is not text",
}
_NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings")


def read_config(path: Path) -> Model:
    """The model of a config.json, or of the folder that holds it. Raises `ProfileError`."""
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ProfileError(f"{file}: the file is missing. Name a config.json, or the folder it is in.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ProfileError(f"{file}: cannot be read as JSON: {error}. Name a model's config.json.") from None
    if not isinstance(config, dict):
        raise ProfileError(f"{file}: found {type(config).__name__}; needed is an object with the keys of a model.")
    try:
        return model_of_config(config, str(config.get("_name_or_path") or file.resolve().parent.name))
    except ProfileError as error:
        raise ProfileError(f"{file}: {error}") from None


def model_of_config(config: dict[str, Any], hub_name: str) -> Model:
    """The model that has these keys. Raises `ProfileError` for one that is incomplete or of another kind."""
    _check_is_plain(config)
    for key in _NEEDED:
        if key not in config:
            raise ProfileError(f"{key} is missing; needed are {', '.join(_NEEDED)}. Name a model's own config.json.")
    hidden_size, num_layers = _count(config, "hidden_size"), _count(config, "num_hidden_layers")
    num_heads = _count(config, "num_attention_heads")
    num_kv_heads = _count(config, "num_key_value_heads", default=num_heads)
    head_dim = _count(config, "head_dim", default=hidden_size // num_heads)
    vocab_size = _count(config, "vocab_size")
    num_experts = _count(config, "num_local_experts", default=_count(config, "num_experts", default=1))
    intermediate_size = _count(config, "intermediate_size", default=None)
    if num_experts > 1:
        intermediate_size = _count(config, "moe_intermediate_size", default=intermediate_size)
    is_tied = bool(config.get("tie_word_embeddings", False))

    query_size, kv_size = num_heads * head_dim, num_kv_heads * head_dim
    attention_params = 2 * hidden_size * query_size + 2 * hidden_size * kv_size
    if config.get("attention_bias") or config.get("model_type") == "qwen2":
        attention_params += query_size + 2 * kv_size
    if str(config.get("model_type")).startswith("qwen3"):
        attention_params += 2 * head_dim  # norms of queries and keys
    expert_params = num_experts * 3 * hidden_size * intermediate_size
    router_params = num_experts * hidden_size if num_experts > 1 else 0
    layer_params = attention_params + expert_params + router_params + 2 * hidden_size
    num_params = num_layers * layer_params + hidden_size + (1 if is_tied else 2) * vocab_size * hidden_size
    experts = (
        {
            "num_experts": num_experts,
            "num_experts_per_tok": _count(config, "num_experts_per_tok"),
            "num_expert_params": num_layers * expert_params,
        }
        if num_experts > 1
        else {}
    )
    shape = ModelShape(
        num_params, num_layers, hidden_size, num_heads, num_kv_heads, head_dim, vocab_size, is_tied, **experts
    )
    if shape.num_experts_per_tok > num_experts:
        raise ProfileError(f"num_experts_per_tok is {shape.num_experts_per_tok}; allowed is up to {num_experts}.")
    return Model(shape, intermediate_size, _count(config, "max_position_embeddings"), hub_name)


def hub_config(model: Model) -> dict[str, Any]:
    """The model as a config.json again: a Llama, or with experts a Mixtral, which cost the same as their like."""
    shape = model.shape
    config: dict[str, Any] = {
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
    if shape.num_expert_params:
        config |= {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "num_local_experts": shape.num_experts,
            "num_experts_per_tok": shape.num_experts_per_tok,
        }
    return config


def _count(config: dict[str, Any], key: str, default: int | None = None) -> int:
    """A key's value as a count; absent or null gives the default, if there is one."""
    value = config.get(key)
    if value is None:
        value = default
    if type(value) is not int or value < 1:
        raise ProfileError(
            f"{key} is {value!r}; allowed is a whole number of at least 1. Name a model's own config.json."
        )
    return value


def _check_is_plain(config: dict[str, Any]) -> None:
    for key, kind in _FOREIGN_KEYS.items():
        if config.get(key):
            raise ProfileError(f"{key} says the model has {kind}; plain transformers only. Name another model.")
    layer_types = set(config.get("layer_types") or ()) - {"full_attention"}
    if layer_types:
        raise ProfileError(
            f"layer_types has {', '.join(sorted(map(str, layer_types)))}; full_attention only. Name another model."
        )
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        raise ProfileError(f"sliding_window is {config['sliding_window']!r}; full attention only. Name another model.")
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        raise ProfileError("experts are in some layers only; all or none are taken. Name another model.")
