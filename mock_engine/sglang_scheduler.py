"""
Who runs in the next step: SGLang's policy, with its default flags.

Prefill comes first. While a waiting sequence can be admitted, or a prompt is computed in part, a step only prefills, up
to `max_num_batched_tokens` (SGLang's chunked_prefill_size), and those that decode wait. When there is nothing to
prefill, all of them get a token.

Who is admitted may fill the KV cache later: beside its prompt, all output that it may still make must fit, and of those
that decode, a share of what each may still make (`new_token_ratio`; of 4,096 tokens at most). The share begins at 0.7
and sinks to a seventh of that in 600 decode steps, on the experience that answers end early. When it was too small and
blocks run out, those with the fewest output tokens are retracted (of these the longest prompts, then the newest), wait
at the end of the queue, and are computed again; the share then becomes what the others have made, and 20 tokens more.

Source: sglang 0.5.9, python/sglang/srt/managers: scheduler.py, `get_next_batch_to_run` and `update_running_batch`;
schedule_policy.py, `PrefillAdder`; schedule_batch.py, `retract_decode`. Left out: max_prefill_tokens (16,384, more than
a chunk), chunks cut at page ends, and other orders than the default, first come, first served; that the share sinks
while somebody waits for it (who found too few blocks is looked at again when somebody has left: in a full cache ITL
comes out up to 6 % lower). In a decode worker, sequences whose prompt has come from a prefill worker join those that
decode without a pass of their own. A retracted sequence finds the blocks it filled, if they are still there; SGLang
keeps only those of its prompt.
"""

from __future__ import annotations

from math import ceil

from mock_engine.kv_blocks import KvBlocks
from mock_engine.scheduler import Schedule, ScheduledPrefill, Scheduler
from mock_engine.scheduler_config import SchedulerConfig
from mock_engine.sequence import SequenceState

# Defaults of environ.py.
INIT_NEW_TOKEN_RATIO = 0.7
MIN_NEW_TOKEN_RATIO = 0.7 * 0.14
RATIO_DECAY = (INIT_NEW_TOKEN_RATIO - MIN_NEW_TOKEN_RATIO) / 600
RETRACT_DECODE_STEPS = 20
CLIP_MAX_NEW_TOKENS = 4096


class SglangScheduler(Scheduler):
    """Prefill first, and nothing beside it."""

    def __init__(self, config: SchedulerConfig, blocks: KvBlocks) -> None:
        super().__init__(config, blocks)
        self._ratio = INIT_NEW_TOKEN_RATIO
        self._ratio_since = 0  # the count of decode steps from which on it sinks

    def schedule(self) -> Schedule:
        self.preempted = []
        if not self.num_running:
            self._ratio, self._ratio_since = INIT_NEW_TOKEN_RATIO, self._decodes.num_steps
        prefills: list[ScheduledPrefill] = []
        budget = self._continue_prefills(prefills, self.config.max_num_batched_tokens)
        assert len(prefills) == len(self.prefilling), "who is admitted has blocks for all its prompt"
        self._admit(prefills, budget)
        if prefills:
            are_handed_over = all(each.num_remote_tokens for each, _ in prefills)
            return self._schedule_of(prefills, has_decodes=are_handed_over and self._grow_decoding())
        if not self._grow_decoding():
            self._retract()
            if self._is_up_to_reserved:
                self._admit(prefills, budget)
        return self._schedule_of(prefills, has_decodes=True)

    @property
    def new_token_ratio(self) -> float:
        """The share of what sequences may still make that is held back for them."""
        num_steps = self._decodes.num_steps - self._ratio_since
        return max(MIN_NEW_TOKEN_RATIO, self._ratio - RATIO_DECAY * num_steps)

    def _num_blocks_to_admit(self, sequence: SequenceState, num_tokens: int) -> int:
        del num_tokens  # of a prompt that is begun, all is computed before anything else is
        left_tokens = sequence.request.osl_tokens - sequence.num_output_tokens
        return self._num_blocks(sequence.num_tokens + min(left_tokens, CLIP_MAX_NEW_TOKENS))

    def _num_reserved_blocks(self) -> int:
        tokens = ceil(self.new_token_ratio * self._decodes.num_tokens_to_make(CLIP_MAX_NEW_TOKENS))
        prefilling = sum(self._num_blocks_to_admit(each, 0) - each.table.num_blocks for each in self.prefilling)
        return self._num_blocks(tokens) + prefilling

    def _retract(self) -> None:
        while not self._grow_decoding():
            sequence = min(reversed(self.decoding), key=lambda each: (each.num_output_tokens, -each.request.isl_tokens))
            self._preempt(sequence)
            self.waiting.append(sequence)
        made_tokens = sum(each.num_output_tokens for each in self.decoding)
        asked_tokens = sum(each.request.osl_tokens for each in self.decoding)
        self._ratio = min(1.0, (made_tokens + RETRACT_DECODE_STEPS * len(self.decoding)) / (asked_tokens + 1))
        self._ratio_since = self._decodes.num_steps + 1
