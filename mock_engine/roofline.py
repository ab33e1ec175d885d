"""
How long a pass takes if the GPU reaches its data sheet: arithmetic or memory, whichever is slower.

    roofline = Roofline(model_shape, gpu_datasheet, tp, weight_bytes)
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

KV_AND_ACTIVATION_BYTES = 2  # bf16 or fp16, also where the weights are fp8
SMOOTHNESS = 4.0  # how sharply arithmetic-bound turns into memory-bound


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What of a dense transformer decides its cost."""

    num_params: int
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token over all layers and all GPUs."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * KV_AND_ACTIVATION_BYTES

    @property
    def num_layer_params(self) -> int:
        """Parameters that every token meets: all but the embedding and the LM head."""
        return self.num_params - 2 * self.vocab_size * self.hidden_size


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

    def linear_s(self, tokens: FloatArray) -> FloatArray:
        """All matrices in the layers."""
        return self._matrices_s(self.shape.num_layer_params, tokens)

    def head_s(self, sequences: FloatArray) -> FloatArray:
        """The LM head, which sees one token of each sequence."""
        return self._matrices_s(self.shape.vocab_size * self.shape.hidden_size, sequences)

    def communication_s(self, tokens: FloatArray) -> FloatArray:
        """Two all-reduces a layer."""
        message_bytes = tokens * self.shape.hidden_size * KV_AND_ACTIVATION_BYTES
        sent_bytes = 2 * self.shape.num_layers * message_bytes * 2 * (self.tp - 1) / self.tp
        return np.asarray(sent_bytes / self.gpu.nvlink_bytes_per_s)

    def prefill_attention_s(self, new_tokens: FloatArray, past_tokens: FloatArray) -> FloatArray:
        """Causal attention of one sequence: new tokens over the past and over each other."""
        kv_bytes = (new_tokens + past_tokens) * self.shape.kv_bytes_per_token / self.tp
        compute_s = self._attention_flops(new_tokens, past_tokens) / self.gpu.flops_per_s
        return smooth_max(compute_s, kv_bytes / self.gpu.memory_bytes_per_s)

    def decode_attention_s(self, batch_size: FloatArray, context_tokens: FloatArray) -> FloatArray:
        """Attention of one token each over `context_tokens` each."""
        kv_bytes = batch_size * context_tokens * self.shape.kv_bytes_per_token / self.tp
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

    def _matrices_s(self, num_params: int, tokens: FloatArray) -> FloatArray:
        compute_s = 2.0 * num_params / self.tp * tokens / self.gpu.flops_per_s
        weights_s = np.full_like(tokens, num_params * self.weight_bytes / self.tp / self.gpu.memory_bytes_per_s)
        return smooth_max(compute_s, weights_s)

    def _attention_flops(self, new_tokens: FloatArray, past_tokens: FloatArray) -> FloatArray:
        pairs = new_tokens * past_tokens + new_tokens * (new_tokens + 1) / 2
        return np.asarray(4.0 * self.shape.num_layers * self.shape.num_heads * self.shape.head_dim / self.tp * pairs)
