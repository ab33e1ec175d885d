"""
Models as importing and measuring need them, from the config.json that comes with every checkpoint.

    read_config(Path("my/Qwen3-8B"))            a folder with config.json, or that file
    model_of_config(keys, name, hub_name)       the same from its keys, already read

Only plain transformers are taken: full attention in every layer, dense or with
experts in every layer. Others cost differently, and are refused by name. The
parameters are counted: embedding and LM head, norms, projections, MLP or experts.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from mock_engine.errors import ProfileError
from mock_engine.profile import as_name
from mock_engine.roofline import ModelShape


class ModelConfig(NamedTuple):
    """What of a model decides which kernels run, and on what sizes."""

    name: str  # for the profile
    hub_name: str  # its name on the model hub, by which sources know it
    shape: ModelShape
    intermediate_size: int  # of the MLP, or of one expert
    max_model_len: int
    has_qkv_bias: bool
    has_head_norms: bool  # of each query and key head

    @property
    def query_size(self) -> int:
        """Numbers in the queries of one token."""
        return self.shape.num_heads * self.shape.head_dim

    @property
    def kv_size(self) -> int:
        """Numbers in the keys of one token in one layer; as many are in the values."""
        return self.shape.num_kv_heads * self.shape.head_dim


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


def read_config(path: Path, max_model_len: int | None = None) -> ModelConfig:
    """
    The model of a config.json, or of the folder that holds it; its name is the folder's or the file's own.

    `max_model_len` is the longest context that matters (the model's own). Raises `ProfileError`.
    """
    keys, file = read_keys(path), config_file(path)
    folder_name = file.parent.resolve().name
    name = as_name(folder_name if file.name == "config.json" else file.stem) or "model"
    try:
        return model_of_config(keys, name, str(keys.get("_name_or_path") or folder_name), max_model_len)
    except ProfileError as error:
        raise ProfileError(f"{file}: {error}") from None


def config_file(path: Path) -> Path:
    """The file itself, where `path` may be its folder."""
    return path / "config.json" if path.is_dir() else path


def read_keys(path: Path) -> dict[str, Any]:
    """What a config.json says. Raises `ProfileError` for what is none."""
    file = config_file(path)
    try:
        keys = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ProfileError(f"{file}: the file is missing. Name a config.json, or the folder it is in.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ProfileError(f"{file}: cannot be read as JSON: {error}. Name a model's config.json.") from None
    if not isinstance(keys, dict):
        raise ProfileError(f"{file}: found {type(keys).__name__}; needed is an object with the keys of a model.")
    return keys


def model_of_config(keys: dict[str, Any], name: str, hub_name: str, max_model_len: int | None = None) -> ModelConfig:
    """The model that has these keys. Raises `ProfileError` for one that is incomplete or of another kind."""
    _check_is_plain(keys)
    for key in _NEEDED:
        if key not in keys:
            raise ProfileError(f"{key} is missing; needed are {', '.join(_NEEDED)}. Name a model's own config.json.")
    longest = _count(keys, "max_position_embeddings")
    _check_window(keys, min(max_model_len or longest, longest))
    hidden_size, num_heads = _count(keys, "hidden_size"), _count(keys, "num_attention_heads")
    num_kv_heads = _count(keys, "num_key_value_heads", default=num_heads)
    if num_heads % num_kv_heads:
        raise ProfileError(
            f"num_attention_heads is {num_heads}; allowed is a multiple of num_key_value_heads, {num_kv_heads}. "
            "Name a model's own config.json."
        )
    num_experts = _count(keys, "num_local_experts", default=_count(keys, "num_experts", default=1))
    intermediate_size = _count(keys, "intermediate_size")
    if num_experts > 1:
        intermediate_size = _count(keys, "moe_intermediate_size", default=intermediate_size)
    shape = ModelShape(
        num_params=0,  # counted below
        num_layers=_count(keys, "num_hidden_layers"),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=_count(keys, "head_dim", default=hidden_size // num_heads),
        vocab_size=_count(keys, "vocab_size"),
        tie_word_embeddings=bool(keys.get("tie_word_embeddings", False)),
    )
    if num_experts > 1:
        shape = replace(
            shape,
            num_experts=num_experts,
            num_experts_per_tok=_count(keys, "num_experts_per_tok"),
            num_expert_params=shape.num_layers * num_experts * 3 * hidden_size * intermediate_size,
        )
    if shape.num_experts_per_tok > num_experts:
        raise ProfileError(f"num_experts_per_tok is {shape.num_experts_per_tok}; allowed is up to {num_experts}.")
    kind = str(keys.get("model_type"))
    model = ModelConfig(
        name,
        hub_name,
        shape,
        intermediate_size,
        longest,
        has_qkv_bias=bool(keys.get("attention_bias")) or kind == "qwen2",
        has_head_norms=kind.startswith("qwen3"),
    )
    return model._replace(shape=replace(shape, num_params=_num_params(model)))


def _num_params(model: ModelConfig) -> int:
    """All that the model's shape and kind imply, each counted once."""
    shape, query_size, kv_size = model.shape, model.query_size, model.kv_size
    layer_params = 2 * shape.hidden_size * (query_size + kv_size) + 2 * shape.hidden_size
    layer_params += query_size + 2 * kv_size if model.has_qkv_bias else 0
    layer_params += 2 * shape.head_dim if model.has_head_norms else 0
    layer_params += (
        shape.num_experts * shape.hidden_size  # the router
        if shape.num_expert_params
        else 3 * shape.hidden_size * model.intermediate_size
    )
    num_tables = 1 if shape.tie_word_embeddings else 2
    outside = shape.hidden_size + num_tables * shape.vocab_size * shape.hidden_size
    return shape.num_layers * layer_params + shape.num_expert_params + outside


def hub_config(model: ModelConfig) -> dict[str, Any]:
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


def _count(keys: dict[str, Any], key: str, default: int | None = None) -> int:
    """A key's value as a count; absent or null gives the default, if there is one."""
    value = keys.get(key)
    if value is None:
        value = default
    if type(value) is not int or value < 1:
        raise ProfileError(
            f"{key} is {value!r}; allowed is a whole number of at least 1. Name a model's own config.json."
        )
    return value


def _check_is_plain(keys: dict[str, Any]) -> None:
    for key, kind in _FOREIGN_KEYS.items():
        if keys.get(key):
            raise ProfileError(f"{key} says the model has {kind}; plain transformers only. Name another model.")
    layer_types = set(keys.get("layer_types") or ()) - {"full_attention"}
    if layer_types:
        raise ProfileError(
            f"layer_types has {', '.join(sorted(map(str, layer_types)))}; full_attention only. Name another model."
        )
    if keys.get("mlp_only_layers") or keys.get("decoder_sparse_step", 1) != 1:
        raise ProfileError("experts are in some layers only; all or none are taken. Name another model.")


def _check_window(keys: dict[str, Any], longest: int) -> None:
    """A window that no context exceeds is full attention."""
    if not keys.get("sliding_window") or not keys.get("use_sliding_window", True):
        return
    window = _count(keys, "sliding_window")
    if window < longest:
        raise ProfileError(
            f"sliding_window is {window}, less than a context of {longest}; full attention only. Name another model, "
            f"or use 'mock-engine profiles measure' with --max-model-len {window} or less."
        )
