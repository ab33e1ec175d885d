"""
What fits: weights, KV cache and working space in the memory that is free.

    plan = plan_memory(config, limits, free_bytes, "GPU memory")
    plan.kv_tokens      tokens of KV cache, over all layers
"""

from __future__ import annotations

from dataclasses import dataclass

from mock_engine.errors import ConfigError
from mock_engine.model_config import ModelConfig
from mock_engine.profile import WEIGHT_BYTES

_ELEMENT_BYTES = WEIGHT_BYTES["bf16"]  # fp16 has as many, and no other dtype is measured
USABLE_SHARE = 0.9  # of what is free; the rest is the allocator's and the graphs'
_LOGIT_BYTES = _ELEMENT_BYTES + 4  # and as float32, to choose a token


@dataclass(frozen=True, slots=True)
class Limits:
    """How far the grid may reach."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Where the bytes go."""

    weights_bytes: int
    workspace_bytes: int
    kv_tokens: int


def plan_memory(config: ModelConfig, limits: Limits, free_bytes: int, what: str) -> MemoryPlan:
    """
    As much KV cache as fits and the largest batch of the longest contexts could fill.

    Raises `ConfigError` if there is no room for a single sequence of `max_model_len` tokens, or for a step's tokens.
    """
    weights_bytes = config.shape.num_params * _ELEMENT_BYTES
    per_token = 6 * config.shape.hidden_size + 3 * (config.query_size + 2 * config.kv_size)
    per_token += 4 * config.intermediate_size
    workspace_bytes = limits.max_num_batched_tokens * per_token * _ELEMENT_BYTES
    workspace_bytes += limits.max_num_seqs * config.shape.vocab_size * _LOGIT_BYTES
    usable_bytes = int(free_bytes * USABLE_SHARE)
    token_bytes = config.shape.kv_bytes_per_token("bf16")
    least_tokens = max(limits.max_model_len, limits.max_num_batched_tokens, limits.max_num_seqs)
    needed_bytes = weights_bytes + workspace_bytes + least_tokens * token_bytes
    if needed_bytes > usable_bytes:
        raise ConfigError(
            f"{config.name} needs {_gb(needed_bytes)}: weights {_gb(weights_bytes)}, working space "
            f"{_gb(workspace_bytes)}, KV cache of {least_tokens:,} tokens {_gb(least_tokens * token_bytes)}; of "
            f"{_gb(free_bytes)} free {what} {USABLE_SHARE:.0%} are used, {_gb(usable_bytes)}. "
            "Lower --max-model-len, --max-num-batched-tokens and --max-num-seqs, or name a smaller model."
        )
    fitting_tokens = (usable_bytes - weights_bytes - workspace_bytes) // token_bytes
    wanted_tokens = max(limits.max_num_seqs * limits.max_model_len, least_tokens)
    return MemoryPlan(weights_bytes, workspace_bytes, min(fitting_tokens, wanted_tokens))


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB"
