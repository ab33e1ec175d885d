"""
One step: a forward pass of the whole batch.

The scheduler says what runs (`StepLoad`), the timing model how long that
takes. Nothing else passes between the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class PrefillChunk(NamedTuple):
    """Prompt tokens of one sequence that are computed in this pass."""

    new_tokens: int  # prompt tokens computed in this pass, >= 1
    past_tokens: int  # tokens of the same sequence whose KV is in the cache already, >= 0


@dataclass(frozen=True, slots=True)
class StepLoad:
    """What the timing model needs to know about a pass, and nothing else."""

    prefill_chunks: tuple[PrefillChunk, ...]  # one per sequence in prefill
    decode_batch_size: int  # sequences computing one output token each
    context_tokens: int  # KV length summed over the decoding sequences
    num_draft_tokens: int = 0  # that are verified beside these output tokens, of all decoding sequences

    @property
    def num_tokens(self) -> int:
        """Tokens that go through the linear layers: prompt tokens, one per decoding sequence, draft tokens."""
        return sum(chunk.new_tokens for chunk in self.prefill_chunks) + self.decode_batch_size + self.num_draft_tokens
