"""
Who runs in the next step: vLLM v1's policy.

One budget of `max_num_batched_tokens` a step. Running sequences are served first, then waiting ones
first-come-first-served while at most `max_num_seqs` run; a prompt longer than what is left of the budget is computed in
chunks. When a running sequence cannot get a KV block, the newest running one is preempted: its blocks go back and it is
computed again later, before all others that wait. In a step that preempted, nobody is admitted.

Source: vllm 0.10 to 0.14, vllm/v1/core/sched/scheduler.py, `Scheduler.schedule`.
"""

from __future__ import annotations

from mock_engine.scheduler import Schedule, ScheduledPrefill, Scheduler
from mock_engine.sequence import SequenceState, Status


class VllmScheduler(Scheduler):
    """Decodes first, and prefill beside them."""

    def schedule(self) -> Schedule:
        self.preempted = []
        if not self._grow_decoding():
            self._preempt_until_decoding_grows()
        prefills: list[ScheduledPrefill] = []
        budget = self._continue_prefills(prefills, self.config.max_num_batched_tokens - len(self.decoding))
        if len(prefills) < len(self.prefilling):
            self._preempt_newest()
        if not self.preempted:
            self._admit(prefills, budget)
        return self._schedule_of(prefills, has_decodes=True)

    def _preempt_until_decoding_grows(self) -> None:
        """Give those that decode their blocks one by one, and take them from the newest where there are none."""
        for sequence in list(self.decoding):
            if sequence.status is not Status.RUNNING or sequence.num_computed_tokens % self.blocks.block_size:
                continue
            while not self.blocks.take(1):
                if self._preempt_newest() is sequence:
                    break
        self._is_in_decode_step = True

    def _preempt_newest(self) -> SequenceState:
        sequence = next(reversed(self.prefilling or self.decoding))
        self._preempt(sequence)
        self._queue_first(sequence)
        return sequence
