"""
Who runs in the next step: TensorRT-LLM's policy, with the capacity scheduler that is its default, GUARANTEED_NO_EVICT.

As in vLLM, prefill runs beside decodes, within one budget of `max_num_batched_tokens`. But a waiting sequence is
admitted only when the KV cache has blocks for all its prompt and all its output, beside those that the running ones
will still take. So nobody is ever preempted; it is the queue that grows.

Source: TensorRT-LLM 1.0 to 1.3, cpp/tensorrt_llm/batch_manager/capacityScheduler.cpp, `GuaranteedNoEvictScheduler`;
scheduledBlocksManager.h; the PyTorch backend uses both. Left out: a request is not held up for a step to find the
blocks that another one is just computing.
"""

from __future__ import annotations

from mock_engine.scheduler import Schedule, ScheduledPrefill, Scheduler
from mock_engine.sequence import SequenceState


class TrtllmScheduler(Scheduler):
    """Decodes first, prefill beside them, and a promise of blocks to whoever is admitted."""

    def schedule(self) -> Schedule:
        has_grown = self._grow_decoding()
        assert has_grown, "who is admitted has blocks for all its output"
        prefills: list[ScheduledPrefill] = []
        budget = self._continue_prefills(prefills, self.config.max_num_batched_tokens - self._decodes.num_tokens)
        assert len(prefills) == len(self.prefilling), "who is admitted has blocks for all its prompt"
        self._admit(prefills, budget)
        return self._schedule_of(prefills, has_decodes=True)

    def _num_blocks_to_admit(self, sequence: SequenceState, num_tokens: int) -> int:
        del num_tokens
        return self._decodes.num_blocks_in_all(sequence.request)

    def _num_reserved_blocks(self) -> int:
        prefilling = sum(self._num_blocks_to_admit(each, 0) - each.table.num_blocks for each in self.prefilling)
        return self._decodes.num_blocks_to_finish() + prefilling
