"""
Who runs in the next step: vLLM v1's policy.

One budget of `max_num_batched_tokens` a step. Running sequences are served first, then waiting ones
first-come-first-served while at most `max_num_seqs` run; a prompt longer than what is left of the budget is computed in
chunks. When a running sequence cannot get a KV block, the newest running one is preempted: its blocks go back and it is
computed again later, before all others that wait. In a step that preempted, nobody is admitted.

With `--scheduling-policy priority`, the most important go first, and the newest of the least important is preempted,
also if it has its blocks for this step already. (vLLM leaves those that run behind one that preempted itself out of
that step; here all that decode get a token.)

Source: vllm 0.10 to 0.14, vllm/v1/core/sched/scheduler.py, `Scheduler.schedule`.
"""

from __future__ import annotations

from mock_engine.scheduler import Schedule, ScheduledPrefill, Scheduler
from mock_engine.sequence import SequenceState, Status
from mock_engine.waiting_queue import rank


class VllmScheduler(Scheduler):
    """Decodes first, and prefill beside them."""

    def schedule(self) -> Schedule:
        self.preempted = []
        if not self._grow_decoding():
            self._preempt_until_decoding_grows()
        prefills: list[ScheduledPrefill] = []
        budget = self._continue_prefills(prefills, self.config.max_num_batched_tokens - self._decodes.num_tokens)
        while len(prefills) < len(self.prefilling):
            self._preempt_last()
            budget = self._continue_prefills(prefills, budget)
        if not self.preempted or self._is_up_to_reserved:
            self._admit(prefills, budget)
        return self._schedule_of(prefills, has_decodes=True)

    def _preempt_until_decoding_grows(self) -> None:
        """Give those that decode their blocks one by one, and take them from the newest where there are none."""
        for sequence in list(self.decoding):
            if sequence.status is not Status.RUNNING:
                continue
            while not self._decodes.grow_one(sequence, self.blocks):
                if self._preempt_last() is sequence:
                    break
            else:
                self._have_grown.add(sequence)
        self._have_grown.clear()
        self._is_in_decode_step = True

    def _preempt_last(self) -> SequenceState:
        """Preempt the newest running sequence; where priorities count, the newest of the least important."""
        if self.is_by_priority:
            sequence = max((*self.decoding, *self.prefilling), key=rank)
        else:
            sequence = next(reversed(self.prefilling or self.decoding))
        self._preempt(sequence)
        self._queue_first(sequence)
        return sequence
