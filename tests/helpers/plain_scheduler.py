"""
The schedulers' policies in their plainest form: every sequence is looked at in every step.

Those of `mock_engine` keep next to nothing per step; held against these, they must schedule
the same in every step. Slow, short, and without shortcuts. Of draft tokens it knows which positions of an output are
rejected, and of priorities that `came` says in which order sequences with the same one are served.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

from mock_engine.kv_blocks import BlockTable, KvBlocks
from mock_engine.request import Request
from mock_engine.scheduler_config import SchedulerConfig
from mock_engine.step import PrefillChunk, StepLoad


@dataclass(eq=False)
class PlainSequence:
    request: Request
    num_computed: int = 0
    num_output: int = 0
    num_published: int = 0
    is_decoding: bool = False
    came: int = 0
    table: BlockTable = field(default_factory=BlockTable)

    @property
    def num_tokens(self) -> int:
        return self.request.isl_tokens + self.num_output


class PlainScheduler:
    """vLLM's."""

    def __init__(self, config: SchedulerConfig, blocks: KvBlocks) -> None:
        self.config = config
        self.blocks = blocks
        self.waiting: deque[PlainSequence] = deque()
        self.running: list[PlainSequence] = []
        self.scheduled: list[tuple[PlainSequence, int]] = []
        self.is_head_blocked = False
        self.is_by_priority = config.scheduling_policy == "priority"
        self.num_came = 0

    def add(self, sequence: PlainSequence) -> None:
        self.num_came += 1
        sequence.came = self.num_came
        self.waiting.append(sequence)
        self._sort_waiting()
        if self.waiting[0] is sequence:
            self.is_head_blocked = False

    def cancel(self, sequence: PlainSequence) -> None:
        if sequence in self.waiting:
            if sequence is self.waiting[0]:
                self.is_head_blocked = False
            self.waiting.remove(sequence)
        elif sequence in self.running:
            self._leave(sequence)

    def schedule(self) -> StepLoad:
        self.scheduled = []
        self._choose()
        return self._load()

    def _choose(self) -> None:
        budget = self.config.max_num_batched_tokens
        has_preempted = False
        index = 0
        while index < len(self.running):
            sequence = self.running[index]
            num_new = min(sequence.num_tokens - sequence.num_computed, budget)
            while not self._grow(sequence, num_new):
                has_preempted = True
                last = max(self.running, key=self._rank) if self.is_by_priority else self.running[-1]
                if (last, 1) in self.scheduled:  # it had its turn before, so it decodes
                    self.scheduled.remove((last, 1))
                    budget += 1 + self._num_drafts(last)
                    index -= 1
                self._preempt(last)
                self.waiting.appendleft(last)
                self._sort_waiting()
                if last is sequence:
                    break
            else:
                self.scheduled.append((sequence, num_new))
                budget -= num_new + self._num_drafts(sequence)
                index += 1
        if not has_preempted and not self.is_head_blocked:
            self._admit(budget)

    def _load(self) -> StepLoad:
        chunks, batch_size, context_tokens, num_drafts = [], 0, 0, 0
        for sequence, num_new in self.scheduled:
            if num_new == 1 and sequence.num_computed > 0:
                batch_size += 1
                num_drafts += self._num_drafts(sequence)
                context_tokens += sequence.num_computed + 1 + self._num_drafts(sequence)
            else:
                chunks.append(PrefillChunk(num_new, sequence.num_computed))
        return StepLoad(tuple(chunks), batch_size, context_tokens, num_drafts)

    def complete(self) -> list[PlainSequence]:
        emitted = []
        scheduled, self.scheduled = self.scheduled, []
        for sequence, num_new in scheduled:
            if sequence not in self.running:
                continue
            num_accepted = self._num_accepted(sequence)
            sequence.num_computed += num_new
            if sequence.num_computed < sequence.num_tokens:
                continue
            sequence.num_output += 1
            while num_accepted and sequence.num_output < sequence.request.osl_tokens:
                sequence.num_computed += 1
                sequence.num_output += 1
                num_accepted -= 1
            sequence.is_decoding = True
            emitted.append(sequence)
        for sequence in emitted:
            if sequence.num_output == sequence.request.osl_tokens:
                self._leave(sequence)
        return emitted

    def _admit(self, budget: int) -> None:
        if self.waiting and len(self.running) < self.config.max_num_seqs:
            for sequence in self.running:
                self._publish(sequence)
        while self.waiting and budget > 0 and len(self.running) < self.config.max_num_seqs:
            sequence = self.waiting[0]
            num_full = (sequence.num_tokens - 1) // self.blocks.block_size
            hashes = sequence.request.block_hashes[:num_full]
            hits = hashes[: self.blocks.num_prefix_blocks(hashes)]
            num_cached = len(hits) * self.blocks.block_size
            num_new = sequence.num_tokens - num_cached
            if num_new > budget:
                if not self.config.enable_chunked_prefill:
                    return
                num_new = budget
            needed = self._num_blocks(self._num_tokens_to_admit(sequence, num_cached + num_new)) - len(hits)
            if needed + self.blocks.num_unheld(hits) > self.blocks.num_available - self._num_reserved_blocks():
                self.is_head_blocked = True
                return
            self.waiting.popleft()
            self.blocks.claim_prefix(sequence.table, hits)
            sequence.num_computed, sequence.num_published = num_cached, len(hits)
            self.running.append(sequence)
            assert self._grow(sequence, num_new)
            self.scheduled.append((sequence, num_new))
            budget -= num_new

    def _grow(self, sequence: PlainSequence, num_new: int) -> bool:
        num_tokens = sequence.num_computed + num_new
        if not self.blocks.grow(sequence.table, self._num_blocks_to_hold(sequence, num_tokens)):
            return False
        if not sequence.is_decoding:
            self._publish_up_to(sequence, num_tokens)
        return True

    def _publish(self, sequence: PlainSequence) -> None:
        """What decoding has filled is offered when somebody looks for blocks, or when it leaves."""
        if sequence.is_decoding:
            in_step = any(scheduled is sequence for scheduled, _ in self.scheduled)
            self._publish_up_to(sequence, sequence.num_computed + in_step)

    def _publish_up_to(self, sequence: PlainSequence, num_tokens: int) -> None:
        num_full = num_tokens // self.blocks.block_size
        self.blocks.publish(sequence.table, sequence.request.block_hashes[sequence.num_published : num_full])
        sequence.num_published = max(sequence.num_published, num_full)

    def _num_blocks_to_hold(self, sequence: PlainSequence, num_tokens: int) -> int:
        ahead = self._num_drafts(sequence)
        if sequence.is_decoding and self.config.speculation is not None and self.config.speculation.draft_cost:
            ahead += self.config.speculation.num_tokens
        return max(sequence.table.num_blocks, self._num_blocks(min(num_tokens + ahead, self.config.max_model_len)))

    def _num_drafts(self, sequence: PlainSequence) -> int:
        if not sequence.is_decoding or self.config.speculation is None:
            return 0
        return min(self.config.speculation.num_tokens, self.config.max_model_len - 1 - sequence.num_tokens)

    def _num_accepted(self, sequence: PlainSequence) -> int:
        if self.config.speculation is None:
            return 0
        rejected = self.config.speculation.rejected(sequence.request)
        num_accepted = 0
        while num_accepted < self._num_drafts(sequence) and sequence.num_output + num_accepted not in rejected:
            num_accepted += 1
        return num_accepted

    def _rank(self, sequence: PlainSequence) -> tuple[int, int]:
        return sequence.request.priority, sequence.came

    def _sort_waiting(self) -> None:
        if self.is_by_priority:
            self.waiting = deque(sorted(self.waiting, key=self._rank))

    def _num_tokens_to_admit(self, _: PlainSequence, num_tokens: int) -> int:
        return num_tokens

    def _num_reserved_blocks(self) -> int:
        return 0

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.blocks.block_size)

    def _preempt(self, sequence: PlainSequence) -> None:
        self._leave(sequence)
        sequence.num_computed = sequence.num_published = 0
        sequence.is_decoding = False

    def _leave(self, sequence: PlainSequence) -> None:
        self._publish(sequence)
        self.running.remove(sequence)
        self.blocks.release(sequence.table)
        self.is_head_blocked = False


class PlainSglangScheduler(PlainScheduler):
    """SGLang's. What is held back sinks by the same amount in each decode step."""

    def __init__(self, config: SchedulerConfig, blocks: KvBlocks) -> None:
        super().__init__(config, blocks)
        self.decode_steps_since: int = 0
        self.start_ratio = 0.7

    def _choose(self) -> None:
        if not self.running:
            self.start_ratio, self.decode_steps_since = 0.7, 0
        budget = self.config.max_num_batched_tokens
        for sequence in self.running:
            if not sequence.is_decoding:
                num_new = min(sequence.num_tokens - sequence.num_computed, budget)
                assert self._grow(sequence, num_new)
                self.scheduled.append((sequence, num_new))
                budget -= num_new
        if not self.is_head_blocked:
            self._admit(budget)
        if self.scheduled:
            return
        self.decode_steps_since += 1
        self._retract()
        for sequence in self.running:
            assert self._grow(sequence, 1)
            self.scheduled.append((sequence, 1))

    def _retract(self) -> None:
        has_retracted = False
        while (
            sum(self._num_blocks_to_hold(each, each.num_computed + 1) - each.table.num_blocks for each in self.running)
            > self.blocks.num_available
        ):
            has_retracted = True
            ranked = sorted(self.running, key=lambda each: (each.num_output, -each.request.isl_tokens), reverse=True)
            self._preempt(ranked[-1])
            self.num_came += 1
            ranked[-1].came = self.num_came
            self.waiting.append(ranked[-1])
            self._sort_waiting()
        if has_retracted:
            made = sum(each.num_output + 20 for each in self.running)
            self.start_ratio = min(1.0, made / (sum(each.request.osl_tokens for each in self.running) + 1))
            self.decode_steps_since = 0

    def _num_tokens_to_admit(self, sequence: PlainSequence, _: int) -> int:
        return sequence.num_tokens + min(sequence.request.osl_tokens - sequence.num_output, 4096)

    def _num_reserved_blocks(self) -> int:
        ratio = max(0.7 * 0.14, self.start_ratio - (0.7 - 0.7 * 0.14) / 600 * self.decode_steps_since)
        left = sum(each.request.osl_tokens - each.num_output for each in self.running if each.is_decoding)
        reserved = self._num_blocks(math.ceil(ratio * left))
        for each in self.running:
            if not each.is_decoding:
                reserved += self._num_blocks(self._num_tokens_to_admit(each, 0)) - each.table.num_blocks
        return reserved


class PlainTrtllmScheduler(PlainScheduler):
    """TensorRT-LLM's: vLLM's, but everyone who is admitted is promised all blocks."""

    def _preempt(self, _: PlainSequence) -> None:
        raise AssertionError("nobody is preempted")

    def _num_tokens_to_admit(self, sequence: PlainSequence, _: int) -> int:
        num_tokens = sequence.request.isl_tokens + sequence.request.osl_tokens
        if self.config.speculation is not None:
            num_tokens += self.config.speculation.num_tokens + self.config.speculation.num_lookahead_tokens
        return min(num_tokens, self.config.max_model_len)

    def _num_reserved_blocks(self) -> int:
        return sum(
            self._num_blocks(self._num_tokens_to_admit(each, 0)) - each.table.num_blocks for each in self.running
        )
