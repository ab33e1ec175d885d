"""
The scheduler's policy in its plainest form: every sequence is looked at in every step.

The one in `mock_engine.vllm_scheduler` keeps next to nothing per step; held against this one,
it must schedule the same in every step. Slow, short, and without shortcuts.
"""

from __future__ import annotations

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
    table: BlockTable = field(default_factory=BlockTable)

    @property
    def num_tokens(self) -> int:
        return self.request.isl_tokens + self.num_output


class PlainScheduler:
    def __init__(self, config: SchedulerConfig, blocks: KvBlocks) -> None:
        self.config = config
        self.blocks = blocks
        self.waiting: deque[PlainSequence] = deque()
        self.running: list[PlainSequence] = []
        self.scheduled: list[tuple[PlainSequence, int]] = []
        self.is_head_blocked = False

    def cancel(self, sequence: PlainSequence) -> None:
        if sequence in self.waiting:
            self.waiting.remove(sequence)
            self.is_head_blocked = False
        elif sequence in self.running:
            self._leave(sequence)

    def schedule(self) -> StepLoad:
        budget = self.config.max_num_batched_tokens
        self.scheduled = []
        has_preempted = False
        index = 0
        while index < len(self.running):
            sequence = self.running[index]
            num_new = min(sequence.num_tokens - sequence.num_computed, budget)
            while not self._grow(sequence, num_new):
                has_preempted = True
                newest = self.running[-1]
                self._leave(newest)
                newest.num_computed = newest.num_published = 0
                newest.is_decoding = False
                self.waiting.appendleft(newest)
                if newest is sequence:
                    break
            else:
                self.scheduled.append((sequence, num_new))
                budget -= num_new
                index += 1
        if not has_preempted and not self.is_head_blocked:
            self._admit(budget)
        chunks, batch_size, context_tokens = [], 0, 0
        for sequence, num_new in self.scheduled:
            if num_new == 1 and sequence.num_computed > 0:
                batch_size += 1
                context_tokens += sequence.num_computed + 1
            else:
                chunks.append(PrefillChunk(num_new, sequence.num_computed))
        return StepLoad(tuple(chunks), batch_size, context_tokens)

    def complete(self) -> list[PlainSequence]:
        emitted = []
        scheduled, self.scheduled = self.scheduled, []
        for sequence, num_new in scheduled:
            if sequence not in self.running:
                continue
            sequence.num_computed += num_new
            if sequence.num_computed < sequence.num_tokens:
                continue
            sequence.num_output += 1
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
            needed = -(-(num_cached + num_new) // self.blocks.block_size) - len(hits)
            if needed + self.blocks.num_unheld(hits) > self.blocks.num_available:
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
        if not self.blocks.grow(sequence.table, -(-num_tokens // self.blocks.block_size)):
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

    def _leave(self, sequence: PlainSequence) -> None:
        self._publish(sequence)
        self.running.remove(sequence)
        self.blocks.release(sequence.table)
        self.is_head_blocked = False
