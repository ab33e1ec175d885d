"""
How long a pass takes if the GPU reaches its data sheet: arithmetic or memory, whichever is slower.

    roofline = Roofline(model_shape, gpu_datasheet, tp, weight_bytes, kv_cache_dtype)
    roofline.linear_s(tokens)        one part of a pass
    roofline.prefill_s(new_tokens)   a whole pass

Nothing is fitted here. On its own this is off by about 40 %; it gives the
measured tables their shape between and beyond the measured points. All functions
take arrays, return seconds of the same shape, and never fall in any argument.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

ACTIVATION_BYTES = 2  # bf16 or fp16, also where the weights are fp8
KV_CACHE_BYTES = {"bf16": 2, "fp8": 1}  # of one number in the KV cache; "bf16" is any 16 bit type
SMOOTHNESS = 4.0  # how sharply arithmetic-bound turns into memory-bound


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What of a transformer decides its cost. A mixture of experts has the last three, a dense one has no experts."""

    num_params: int
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool = False  # the LM head is the embedding, and counts once in `num_params`
    num_experts: int = 1  # in each layer
    num_experts_per_tok: int = 1  # of which each token takes this many
    num_expert_params: int = 0  # in all experts of all layers; part of `num_params`

    def kv_bytes_per_token(self, kv_cache_dtype: str) -> int:
        """Keys and values of one token over all layers and all GPUs; the dtype is one of `KV_CACHE_BYTES`."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * KV_CACHE_BYTES[kv_cache_dtype]

    def kv_bytes_per_token_on_each(self, tp: int, kv_cache_dtype: str) -> float:
        """What each of `tp` GPUs holds of that: its share of the heads, and no less than one head."""
        return self.kv_bytes_per_token(kv_cache_dtype) / min(tp, self.num_kv_heads)

    @property
    def num_layer_params(self) -> int:
        """Parameters in the layers: all but the embedding and the LM head."""
        num_tables = 1 if self.tie_word_embeddings else 2
        return self.num_params - num_tables * self.vocab_size * self.hidden_size


@dataclass(frozen=True, slots=True)
class GpuDatasheet:
    """Figures of one GPU; `memory_bytes` is what CUDA reports as the total."""

    flops_per_s: float  # dense tensor-core arithmetic in the profile's dtype
    memory_bytes_per_s: float
    memory_bytes: float
    nvlink_bytes_per_s: float  # one direction


def smooth_max(a: FloatArray, b: FloatArray | float) -> FloatArray:
    """At least the larger of the two, and never below either; larger where they are about equal."""
    return np.asarray((a**SMOOTHNESS + b**SMOOTHNESS) ** (1 / SMOOTHNESS))


@dataclass(frozen=True, slots=True)
class Roofline:
    """Lower bounds, in seconds on each of `tp` GPUs, for a model of this shape on this GPU."""

    shape: ModelShape
    gpu: GpuDatasheet
    tp: int
    weight_bytes: int  # bytes of one weight
    kv_cache_dtype: str  # one of `KV_CACHE_BYTES`

    def linear_s(self, tokens: FloatArray) -> FloatArray:
        """
        All matrices in the layers. Of the experts, each token computes with its own, and memory is read for
        those that any token takes: as many as are expected if tokens take them at random.
        """
        shape = self.shape
        share = shape.num_experts_per_tok / shape.num_experts
        num_shared_params = shape.num_layer_params - shape.num_expert_params
        touched = 1 - (1 - share) ** np.asarray(tokens, dtype=np.float64)
        return self._matrices_s(
            num_shared_params + share * shape.num_expert_params,
            num_shared_params + touched * shape.num_expert_params,
            tokens,
        )

    def head_s(self, sequences: FloatArray) -> FloatArray:
        """The LM head, which sees one token of each sequence."""
        num_params = self.shape.vocab_size * self.shape.hidden_size
        return self._matrices_s(num_params, num_params, sequences)

    def communication_s(self, tokens: FloatArray) -> FloatArray:
        """Two all-reduces a layer."""
        message_bytes = tokens * self.shape.hidden_size * ACTIVATION_BYTES
        sent_bytes = 2 * self.shape.num_layers * message_bytes * 2 * (self.tp - 1) / self.tp
        return np.asarray(sent_bytes / self.gpu.nvlink_bytes_per_s)

    def prefill_attention_s(self, new_tokens: FloatArray, past_tokens: FloatArray) -> FloatArray:
        """Causal attention of one sequence: new tokens over the past and over each other."""
        kv_bytes = (new_tokens + past_tokens) * self.shape.kv_bytes_per_token_on_each(self.tp, self.kv_cache_dtype)
        compute_s = self._attention_flops(new_tokens, past_tokens) / self.gpu.flops_per_s
        return smooth_max(compute_s, kv_bytes / self.gpu.memory_bytes_per_s)

    def decode_attention_s(self, batch_size: FloatArray, context_tokens: FloatArray) -> FloatArray:
        """Attention of one token each over `context_tokens` each."""
        kv_bytes = batch_size * context_tokens * self.shape.kv_bytes_per_token_on_each(self.tp, self.kv_cache_dtype)
        return np.asarray(kv_bytes / self.gpu.memory_bytes_per_s)

    def prefill_s(self, new_tokens: FloatArray) -> FloatArray:
        """A whole pass over one prompt with nothing cached."""
        nothing = np.zeros_like(new_tokens)
        return np.asarray(
            self.linear_s(new_tokens)
            + self.head_s(np.ones_like(new_tokens))
            + self.communication_s(new_tokens)
            + self.prefill_attention_s(new_tokens, nothing)
        )

    def decode_s(self, batch_size: FloatArray, context_tokens: FloatArray) -> FloatArray:
        """A whole decode pass of `batch_size` sequences with `context_tokens` each."""
        return np.asarray(
            self.linear_s(batch_size)
            + self.head_s(batch_size)
            + self.communication_s(batch_size)
            + self.decode_attention_s(batch_size, context_tokens)
        )

    def _matrices_s(self, params_per_token: float, params_read: float | FloatArray, tokens: FloatArray) -> FloatArray:
        compute_s = 2.0 * params_per_token / self.tp * tokens / self.gpu.flops_per_s
        read_s = params_read * self.weight_bytes / self.tp / self.gpu.memory_bytes_per_s
        return smooth_max(compute_s, read_s)

    def _attention_flops(self, new_tokens: FloatArray, past_tokens: FloatArray) -> FloatArray:
        pairs = new_tokens * past_tokens + new_tokens * (new_tokens + 1) / 2
        return np.asarray(4.0 * self.shape.num_layers * self.shape.num_heads * self.shape.head_dim / self.tp * pairs)
