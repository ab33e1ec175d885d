"""
Who runs in the next step: vLLM v1's policy.

One budget of `max_num_batched_tokens` a step. Running sequences are served
first, then waiting ones first-come-first-served while at most `max_num_seqs`
run; a prompt longer than what is left of the budget is computed in chunks.
When a running sequence cannot get a KV block, the newest running one is
preempted: its blocks go back and it is computed again later. In a step that
preempted, nobody is admitted. Source: vllm 0.10 to 0.14,
vllm/v1/core/sched/scheduler.py, `Scheduler.schedule`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import Enum

from mock_engine.errors import ConfigError, RequestError
from mock_engine.kv_blocks import BlockTable, KvBlocks
from mock_engine.request import Request
from mock_engine.step import PrefillChunk, StepLoad


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits of the engine, spelled as vLLM spells them. Raises `ConfigError` when they do not go together."""

    max_num_seqs: int  # sequences running at once
    max_num_batched_tokens: int  # tokens computed in one step
    max_model_len: int  # prompt plus output tokens of one sequence
    enable_chunked_prefill: bool = True

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"--max-num-batched-tokens is {self.max_num_batched_tokens}, less than --max-num-seqs "
                f"{self.max_num_seqs}: every running sequence needs one token a step. "
                f"Raise the first or lower the second."
            )
        if not self.enable_chunked_prefill and self.max_num_batched_tokens < self.max_model_len:
            raise ConfigError(
                f"without chunked prefill --max-num-batched-tokens ({self.max_num_batched_tokens}) must be at least "
                f"--max-model-len ({self.max_model_len}). Raise the first, lower the second, or enable chunked prefill."
            )


class Status(Enum):
    """Where a sequence is. FINISHED and CANCELLED are final."""

    NEW = "new"  # not queued yet
    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"  # waits again, at the head of the queue
    FINISHED = "finished"
    CANCELLED = "cancelled"


class SequenceState:
    """The progress of one request; written by the scheduler alone."""

    __slots__ = (
        "num_cached_tokens",
        "num_computed_tokens",
        "num_output_tokens",
        "num_preemptions",
        "num_published_blocks",
        "request",
        "status",
        "table",
    )

    def __init__(self, request: Request) -> None:
        self.request = request
        self.status = Status.NEW
        self.num_computed_tokens = 0  # tokens whose KV is in the cache
        self.num_output_tokens = 0
        self.num_cached_tokens: int | None = None  # prompt tokens found in the prefix cache; None until first scheduled
        self.num_preemptions = 0
        self.num_published_blocks = 0  # full blocks of this sequence that were offered for sharing
        self.table = BlockTable()

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens that exist so far."""
        return self.request.isl_tokens + self.num_output_tokens

    @property
    def is_final(self) -> bool:
        return self.status is Status.FINISHED or self.status is Status.CANCELLED


@dataclass(frozen=True, slots=True)
class Schedule:
    """Who computes how many tokens in this step, and the load that makes."""

    sequences: list[tuple[SequenceState, int]]
    load: StepLoad


class Scheduler:
    """Owns the queue, the running batch and the KV blocks."""

    def __init__(self, config: SchedulerConfig, blocks: KvBlocks) -> None:
        tokens_that_fit = blocks.num_blocks * blocks.block_size
        if tokens_that_fit < config.max_model_len:
            raise ConfigError(
                f"the KV cache holds {tokens_that_fit} tokens ({blocks.num_blocks} blocks of {blocks.block_size}), "
                f"fewer than one sequence of --max-model-len {config.max_model_len} needs. "
                f"Use --max-model-len {tokens_that_fit} or less, or give the cache more memory."
            )
        self.config = config
        self.blocks = blocks
        self.waiting: deque[SequenceState] = deque()
        self.running: list[SequenceState] = []
        self.num_preemptions = 0
        self.num_prefix_queries_tokens = 0  # prompt tokens looked up in the prefix cache
        self.num_prefix_hits_tokens = 0  # ... and found there

    def check(self, request: Request) -> None:
        """Raise `RequestError` if `request` can never be served."""
        longest = request.isl_tokens + request.osl_tokens
        if longest > self.config.max_model_len:
            raise RequestError(
                f"the prompt has {request.isl_tokens} tokens and {request.osl_tokens} output tokens were asked for, "
                f"{longest} in all; the context length is {self.config.max_model_len}. "
                f"Shorten the prompt or lower max_tokens."
            )

    def add(self, sequence: SequenceState) -> None:
        """Queue a new sequence, whose request the caller has checked."""
        assert sequence.status is Status.NEW, "a sequence is queued once"
        sequence.status = Status.WAITING
        self.waiting.append(sequence)

    def cancel(self, sequence: SequenceState) -> None:
        """Drop a sequence and take its blocks back, whatever it was doing. A no-op once it is final."""
        if sequence.is_final:
            return
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
        elif sequence.status is not Status.NEW:
            self.waiting.remove(sequence)
        self._end(sequence, Status.CANCELLED)

    def schedule(self) -> Schedule:
        """Choose who runs now, take the blocks that this needs, and say what load it makes."""
        budget = self.config.max_num_batched_tokens
        scheduled: list[tuple[SequenceState, int]] = []
        has_preempted = False
        index = 0
        while index < len(self.running) and budget > 0:
            sequence = self.running[index]
            num_new = min(sequence.num_tokens - sequence.num_computed_tokens, budget)
            while not self._grow(sequence, num_new):
                has_preempted = True
                if self._preempt_newest() is sequence:
                    break
            else:
                scheduled.append((sequence, num_new))
                budget -= num_new
                index += 1
        if not has_preempted:
            self._admit(scheduled, budget)
        return Schedule(scheduled, _load_of(scheduled))

    def complete(self, schedule: Schedule) -> list[SequenceState]:
        """
        The step is over: count what it computed; return the sequences that made an output token, in batch order.

        A sequence that has all its output is FINISHED and its blocks are back.
        """
        emitted = []
        for sequence, num_new in schedule.sequences:
            if sequence.status is not Status.RUNNING:
                continue  # cancelled while the step ran
            sequence.num_computed_tokens += num_new
            if sequence.num_computed_tokens < sequence.num_tokens:
                continue  # more prompt chunks to come
            sequence.num_output_tokens += 1
            emitted.append(sequence)
            if sequence.num_output_tokens == sequence.request.osl_tokens:
                self._end(sequence, Status.FINISHED)
        self.running = [sequence for sequence in self.running if sequence.status is Status.RUNNING]
        return emitted

    def _admit(self, scheduled: list[tuple[SequenceState, int]], budget: int) -> None:
        while self.waiting and budget > 0 and len(self.running) < self.config.max_num_seqs:
            sequence = self.waiting[0]
            hits = self._prefix_hits(sequence)
            num_cached_tokens = len(hits) * self.blocks.block_size
            num_new = sequence.num_tokens - num_cached_tokens
            if num_new > budget:
                if not self.config.enable_chunked_prefill:
                    return
                num_new = budget
            num_blocks = self._num_blocks(num_cached_tokens + num_new)
            if num_blocks - len(hits) + self.blocks.num_unheld(hits) > self.blocks.num_available:
                return
            self.blocks.claim_prefix(sequence.table, hits)
            sequence.num_computed_tokens = num_cached_tokens
            sequence.num_published_blocks = len(hits)
            if sequence.num_cached_tokens is None:
                sequence.num_cached_tokens = num_cached_tokens
                self.num_prefix_queries_tokens += sequence.request.isl_tokens
                self.num_prefix_hits_tokens += num_cached_tokens
            self.waiting.popleft()
            sequence.status = Status.RUNNING
            self.running.append(sequence)
            has_grown = self._grow(sequence, num_new)
            assert has_grown, "availability was checked"
            scheduled.append((sequence, num_new))
            budget -= num_new

    def _prefix_hits(self, sequence: SequenceState) -> tuple[int, ...]:
        """Cached blocks at the start of a waiting sequence; never the last token, which must be computed."""
        num_full = (sequence.num_tokens - 1) // self.blocks.block_size
        hashes = tuple(sequence.request.block_hashes[:num_full])
        return hashes[: self.blocks.num_prefix_blocks(hashes)]

    def _grow(self, sequence: SequenceState, num_new: int) -> bool:
        """Give `sequence` the blocks for `num_new` more tokens, and share those that become full."""
        num_tokens = sequence.num_computed_tokens + num_new
        if not self.blocks.grow(sequence.table, self._num_blocks(num_tokens)):
            return False
        num_full = num_tokens // self.blocks.block_size
        if num_full > sequence.num_published_blocks:
            for block_hash in sequence.request.block_hashes[sequence.num_published_blocks : num_full]:
                self.blocks.publish(sequence.table, block_hash)
            sequence.num_published_blocks = num_full
        return True

    def _preempt_newest(self) -> SequenceState:
        sequence = self.running.pop()
        self.blocks.release(sequence.table)
        sequence.num_computed_tokens = 0
        sequence.num_published_blocks = 0
        sequence.num_preemptions += 1
        sequence.status = Status.PREEMPTED
        self.num_preemptions += 1
        self.waiting.appendleft(sequence)
        return sequence

    def _end(self, sequence: SequenceState, status: Status) -> None:
        self.blocks.release(sequence.table)
        sequence.status = status

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.blocks.block_size)


def _load_of(scheduled: list[tuple[SequenceState, int]]) -> StepLoad:
    """One new token on top of a cached context is a decode, whatever phase the sequence is in."""
    prefill_chunks = []
    decode_batch_size = 0
    context_tokens = 0
    for sequence, num_new in scheduled:
        past = sequence.num_computed_tokens
        if num_new == 1 and past > 0:
            decode_batch_size += 1
            context_tokens += past + 1
        else:
            prefill_chunks.append(PrefillChunk(num_new, past))
    return StepLoad(tuple(prefill_chunks), decode_batch_size, context_tokens)
