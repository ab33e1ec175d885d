"""
What a pass does on each GPU: arithmetic, memory traffic, messages between GPUs.

    work = GpuWork(profile.roofline)
    flops, dram_bytes, nvlink_bytes = work.of(load)

The same counts that the roofline turns into times, for one pass at a time and without arrays (about a microsecond).
Divided by what the data sheet allows in the pass's time they are DCGM's PIPE_TENSOR_ACTIVE and DRAM_ACTIVE.
"""

from __future__ import annotations

from typing import NamedTuple

from mock_engine.roofline import ACTIVATION_BYTES, Roofline
from mock_engine.step import StepLoad


class Work(NamedTuple):
    """Of one pass, on each GPU."""

    flops: float
    dram_bytes: float
    nvlink_bytes: float  # sent


class GpuWork:
    """Counts for one model on GPUs of one kind."""

    def __init__(self, roofline: Roofline) -> None:
        shape, tp = roofline.shape, roofline.tp
        share = shape.num_experts_per_tok / shape.num_experts
        shared_params = shape.num_layer_params - shape.num_expert_params
        head_params = shape.vocab_size * shape.hidden_size
        self._flops_per_token = 2.0 * (shared_params + share * shape.num_expert_params) / tp
        self._flops_per_sequence = 2.0 * head_params / tp
        self._flops_per_pair = 4.0 * shape.num_layers * shape.num_heads * shape.head_dim / tp
        self._dense_bytes = (shared_params + head_params) * roofline.weight_bytes / tp
        self._expert_bytes = shape.num_expert_params * roofline.weight_bytes / tp
        self._untouched_per_token = 1 - share
        self._kv_bytes = shape.kv_bytes_per_token_on_each(tp, roofline.kv_cache_dtype)
        self._nvlink_bytes_per_token = 4.0 * shape.num_layers * shape.hidden_size * ACTIVATION_BYTES * (tp - 1) / tp

    def of(self, load: StepLoad) -> Work:
        """The work of a pass with that load."""
        prompt_tokens = kv_tokens = 0
        pairs = 0.0
        for new_tokens, past_tokens in load.prefill_chunks:
            prompt_tokens += new_tokens
            kv_tokens += new_tokens + past_tokens
            pairs += new_tokens * past_tokens + new_tokens * (new_tokens + 1) / 2
        verified = load.decode_batch_size + load.num_draft_tokens  # the model looks at draft tokens as at its own
        tokens = prompt_tokens + verified
        sequences = len(load.prefill_chunks) + verified
        if load.num_draft_tokens:
            pairs += load.context_tokens * load.num_draft_tokens / load.decode_batch_size
        dram_bytes = self._dense_bytes + (kv_tokens + load.context_tokens) * self._kv_bytes
        if self._expert_bytes:
            dram_bytes += self._expert_bytes * (1 - self._untouched_per_token**tokens)
        return Work(
            self._flops_per_token * tokens
            + self._flops_per_sequence * sequences
            + self._flops_per_pair * (pairs + load.context_tokens),
            dram_bytes,
            self._nvlink_bytes_per_token * tokens,
        )
