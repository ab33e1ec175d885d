"""
Who runs in the next step: vLLM v1's policy.

One budget of `max_num_batched_tokens` a step. Running sequences are served
first, then waiting ones first-come-first-served while at most `max_num_seqs`
run; a prompt longer than what is left of the budget is computed in chunks.
When a running sequence cannot get a KV block, the newest running one is
preempted: its blocks go back and it is computed again later. In a step that
preempted, nobody is admitted. Source: vllm 0.10 to 0.14,
vllm/v1/core/sched/scheduler.py, `Scheduler.schedule`.

Every sequence that decodes gets one token in every step, so nothing is kept up
to date for it: what it has made follows from the number of steps since it began,
when it ends is known, and the blocks that all of them need follow from a count by
`tokens % block_size`. A step costs what changes in it, whatever the batch; and
while nothing changes (`num_steady_steps`), any number of steps is one `advance`.

Two liberties that make this possible, and that no measured figure shows: blocks filled
by decoding are offered for sharing when somebody looks for blocks (an admission) or
their sequence leaves, and a waiting sequence that found too few blocks is looked at
again when blocks have come back.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

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
        "_num_computed_tokens",
        "_num_output_tokens",
        "_scheduler",
        "num_cached_tokens",
        "num_preemptions",
        "num_published_blocks",
        "request",
        "status",
        "table",
    )

    def __init__(self, request: Request) -> None:
        self.request = request
        self.status = Status.NEW
        self.num_cached_tokens: int | None = None  # prompt tokens found in the prefix cache; None until first scheduled
        self.num_preemptions = 0
        self.num_published_blocks = 0  # full blocks of this sequence that were offered for sharing
        self.table = BlockTable()  # without the private blocks that decoding has added since it began
        # While it decodes (and has a scheduler), both are less the number of steps the scheduler has completed.
        self._scheduler: Scheduler | None = None
        self._num_computed_tokens = 0
        self._num_output_tokens = 0

    @property
    def num_output_tokens(self) -> int:
        """Output tokens made so far."""
        return self._num_output_tokens + (self._scheduler.num_steps if self._scheduler else 0)

    @property
    def num_computed_tokens(self) -> int:
        """Tokens whose KV is in the cache."""
        return self._num_computed_tokens + (self._scheduler.num_steps if self._scheduler else 0)

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens that exist so far."""
        return self.request.isl_tokens + self.num_output_tokens

    @property
    def is_final(self) -> bool:
        return self.status is Status.FINISHED or self.status is Status.CANCELLED


class ScheduledPrefill(NamedTuple):
    """A sequence that computes `num_new` tokens of its prompt (or, once preempted, of all it had) in this step."""

    sequence: SequenceState
    num_new: int


@dataclass(frozen=True, slots=True)
class Schedule:
    """What runs in this step: these prefills, all decoding sequences, and the load that makes."""

    prefills: list[ScheduledPrefill]
    load: StepLoad


class Progress(NamedTuple):
    """What has happened to sequences in one step, or at the end of several: each in batch order."""

    prefilled: list[SequenceState]  # computed all their prompt and made a token
    finished: list[SequenceState]  # made their last token


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
        # Both in order of admission; all that decode were admitted before any that does not yet.
        self.decoding: dict[SequenceState, None] = {}
        self.prefilling: dict[SequenceState, None] = {}
        self.num_steps = 0  # completed
        self.num_preemptions = 0
        self.num_prefix_queries_tokens = 0  # prompt tokens looked up in the prefix cache
        self.num_prefix_hits_tokens = 0  # ... and found there
        self.num_kept_blocks = 0  # of finished sequences whose requests keep them
        self._is_in_step = False  # its blocks are taken, its tokens not counted
        self._is_head_blocked = False  # the first that waits found too few blocks, and none have come back since
        self._context_tokens = 0  # of all that decode, together, less num_steps for each
        self._num_by_phase = [0] * blocks.block_size  # how many that decode need a block when -num_steps is at [phase]
        self._finishing: dict[int, list[SequenceState]] = {}  # by the value of num_steps at which they end
        self._finish_steps: list[int] = []  # a heap of its keys, some of them gone
        self._publishers: dict[SequenceState, None] = {}  # those that decode and have blocks to offer for sharing

    @property
    def num_running(self) -> int:
        """Sequences in the batch."""
        return len(self.decoding) + len(self.prefilling)

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
            self._leave(sequence)
        elif sequence.status is not Status.NEW:
            self.waiting.remove(sequence)
            self._is_head_blocked = False
        sequence.status = Status.CANCELLED

    def give_back(self, sequence: SequenceState) -> None:
        """Take the blocks back of a finished sequence whose request keeps them."""
        self.num_kept_blocks -= sequence.table.num_blocks
        self.blocks.release(sequence.table)
        self._is_head_blocked = False

    @property
    def has_room(self) -> bool:
        """Whether the next step would try to take one more sequence into the batch, were it waiting."""
        return not self._is_head_blocked and self.num_running < self.config.max_num_seqs

    @property
    def is_admitting(self) -> bool:
        """Whether the next step tries to take a waiting sequence into the batch."""
        return bool(self.waiting) and self.has_room

    def schedule(self) -> Schedule:
        """Choose who runs now, take the blocks that this needs, and say what load it makes."""
        has_preempted = self._grow_decoding()
        self._is_in_step = True
        budget = self.config.max_num_batched_tokens - len(self.decoding)
        prefills: list[ScheduledPrefill] = []
        for sequence in list(self.prefilling):  # at most one: its prompt took all that was left of a step
            num_new = min(sequence.num_tokens - sequence.num_computed_tokens, budget)
            if self._grow(sequence, num_new):
                prefills.append(ScheduledPrefill(sequence, num_new))
                budget -= num_new
            else:
                self._preempt_newest()
                has_preempted = True
        if not has_preempted and self.is_admitting:
            self._admit(prefills, budget)
        return Schedule(prefills, self._load_with(prefills))

    def complete(self, schedule: Schedule) -> Progress:
        """The step is over: count what it computed. Finished sequences have given their blocks back."""
        self._is_in_step = False
        self.num_steps += 1
        finished = self._finish()
        prefilled = []
        for sequence, num_new in schedule.prefills:
            if sequence.status is not Status.RUNNING:
                continue  # cancelled while the step ran
            sequence._num_computed_tokens += num_new
            if sequence.num_computed_tokens < sequence.num_tokens:
                continue  # more chunks to come
            sequence._num_output_tokens += 1
            prefilled.append(sequence)
            if sequence.num_output_tokens == sequence.request.osl_tokens:
                self._leave(sequence, sequence.request.keeps_blocks)
                sequence.status = Status.FINISHED
                finished.append(sequence)
            else:
                self._start_decoding(sequence)
        return Progress(prefilled, finished)

    def num_steady_steps(self) -> int:
        """
        How many steps from now on only decode, with the same sequences: none is admitted or preempted, and none ends
        before the last of them. 0 if the next step is not like that.
        """
        if self.prefilling or not self.decoding or self.is_admitting:
            return 0
        while self._finish_steps[0] not in self._finishing:  # the last that was to end there has been cancelled
            heapq.heappop(self._finish_steps)
        return self._num_steps_with_blocks(self._finish_steps[0] - self.num_steps)

    def advance(self, num_steps: int) -> Progress:
        """Do that many steps at once, at most `num_steady_steps`: the same as `schedule` and `complete` in turns."""
        has_blocks = self.blocks.take(self.num_blocks_for_steps(num_steps))
        assert has_blocks, "there are as many steady steps as there are blocks for"
        self.num_steps += num_steps
        return Progress([], self._finish())

    @property
    def decode_load(self) -> StepLoad:
        """The load of the next step if it only decodes."""
        return self._load_with([])

    def _finish(self) -> list[SequenceState]:
        """End those that have made their last token."""
        finished = self._finishing.pop(self.num_steps, [])
        for sequence in finished:
            self._leave(sequence, sequence.request.keeps_blocks)
            sequence.status = Status.FINISHED
        while self._finish_steps and self._finish_steps[0] not in self._finishing:
            heapq.heappop(self._finish_steps)
        return finished

    def _admit(self, prefills: list[ScheduledPrefill], budget: int) -> None:
        for publisher in list(self._publishers):
            self._publish_decoded(publisher)
        while self.waiting and budget > 0 and self.num_running < self.config.max_num_seqs:
            sequence = self.waiting[0]
            hits = self._prefix_hits(sequence)
            num_cached_tokens = len(hits) * self.blocks.block_size
            # Blocks that another worker has filled are here once: who is preempted computes them.
            num_remote_tokens = 0 if sequence.num_preemptions else sequence.request.num_remote_tokens
            num_computed_tokens = max(num_cached_tokens, num_remote_tokens)
            num_new = sequence.num_tokens - num_computed_tokens
            if num_new > budget:
                if not self.config.enable_chunked_prefill:
                    return
                num_new = budget
            num_blocks = self._num_blocks(num_computed_tokens + num_new)
            if num_blocks - len(hits) + self.blocks.num_unheld(hits) > self.blocks.num_available:
                self._is_head_blocked = True
                return
            self.blocks.claim_prefix(sequence.table, hits)
            sequence._num_computed_tokens = num_computed_tokens
            sequence.num_published_blocks = len(hits)
            if sequence.num_cached_tokens is None:
                sequence.num_cached_tokens = num_cached_tokens
                self.num_prefix_queries_tokens += sequence.request.isl_tokens
                self.num_prefix_hits_tokens += num_cached_tokens
            self.waiting.popleft()
            sequence.status = Status.RUNNING
            self.prefilling[sequence] = None
            has_grown = self._grow(sequence, num_new)
            assert has_grown, "availability was checked"
            prefills.append(ScheduledPrefill(sequence, num_new))
            budget -= num_new

    def _prefix_hits(self, sequence: SequenceState) -> tuple[int, ...]:
        """Cached blocks at the start of a waiting sequence; never the last token, which must be computed."""
        if not sequence.request.block_hashes:
            return ()
        num_full = (sequence.num_tokens - 1) // self.blocks.block_size
        hashes = tuple(sequence.request.block_hashes[:num_full])
        return hashes[: self.blocks.num_prefix_blocks(hashes)]

    def _grow(self, sequence: SequenceState, num_new: int) -> bool:
        """Give a prefilling sequence the blocks for `num_new` more tokens, and share those that become full."""
        num_tokens = sequence.num_computed_tokens + num_new
        if not self.blocks.grow(sequence.table, self._num_blocks(num_tokens)):
            return False
        self._publish(sequence, num_tokens)
        return True

    def _grow_decoding(self) -> bool:
        """Give all that decode the blocks for their next token. True if that took a preemption."""
        if self.blocks.take(self._num_by_phase[-self.num_steps % self.blocks.block_size]):
            return False
        for sequence in list(self.decoding):
            if sequence.status is not Status.RUNNING or sequence.num_computed_tokens % self.blocks.block_size:
                continue
            while not self.blocks.take(1):
                if self._preempt_newest() is sequence:
                    break
        return True

    def num_blocks_for_steps(self, num_steps: int) -> int:
        """Blocks that all that decode take in the next `num_steps` steps together."""
        block_size, by_phase = self.blocks.block_size, self._num_by_phase
        num_cycles, rest = divmod(num_steps, block_size)
        first = -self.num_steps % block_size  # the phase that needs a block now; then the one below, and so on
        below = first + 1 - rest
        num_blocks = sum(by_phase[max(below, 0) : first + 1]) + (sum(by_phase[below:]) if below < 0 else 0)
        return num_cycles * len(self.decoding) + num_blocks

    def _num_steps_with_blocks(self, num_steps: int) -> int:
        """For how many of the next `num_steps` steps there are blocks."""
        available = self.blocks.num_available
        if self.num_blocks_for_steps(num_steps) <= available:
            return num_steps
        num_cycles = available // len(self.decoding)
        steps = num_cycles * self.blocks.block_size
        left = available - num_cycles * len(self.decoding)
        while left >= (needed := self._num_by_phase[-(self.num_steps + steps) % self.blocks.block_size]):
            left -= needed
            steps += 1
        return steps

    def _preempt_newest(self) -> SequenceState:
        sequence = next(reversed(self.prefilling or self.decoding))
        self._leave(sequence)
        sequence._num_computed_tokens = 0
        sequence.num_published_blocks = 0
        sequence.num_preemptions += 1
        sequence.status = Status.PREEMPTED
        self.num_preemptions += 1
        self.waiting.appendleft(sequence)
        return sequence

    def _start_decoding(self, sequence: SequenceState) -> None:
        """From here on the step count says what it has computed and made."""
        request = sequence.request
        del self.prefilling[sequence]
        self.decoding[sequence] = None
        sequence._scheduler = self
        sequence._num_computed_tokens -= self.num_steps
        sequence._num_output_tokens -= self.num_steps
        self._context_tokens += request.isl_tokens + sequence._num_output_tokens
        self._num_by_phase[sequence._num_computed_tokens % self.blocks.block_size] += 1
        finish_step = request.osl_tokens - sequence._num_output_tokens
        if finish_step not in self._finishing:
            self._finishing[finish_step] = []
            heapq.heappush(self._finish_steps, finish_step)
        self._finishing[finish_step].append(sequence)
        if len(request.block_hashes) > sequence.num_published_blocks:
            self._publishers[sequence] = None

    def _stop_decoding(self, sequence: SequenceState) -> None:
        """Write down what it has computed and made, and the blocks it holds."""
        self._publish_decoded(sequence)
        self._publishers.pop(sequence, None)
        self._settle_table(sequence)
        finish_step = sequence.request.osl_tokens - sequence._num_output_tokens
        if finish_step in self._finishing:  # it leaves early
            self._finishing[finish_step].remove(sequence)
            if not self._finishing[finish_step]:
                del self._finishing[finish_step]
        self._num_by_phase[sequence._num_computed_tokens % self.blocks.block_size] -= 1
        self._context_tokens -= sequence.request.isl_tokens + sequence._num_output_tokens
        sequence._num_computed_tokens += self.num_steps
        sequence._num_output_tokens += self.num_steps
        sequence._scheduler = None
        del self.decoding[sequence]

    def _leave(self, sequence: SequenceState, keeps_blocks: bool = False) -> None:
        """Take a sequence out of the batch, and its blocks back."""
        if sequence in self.decoding:
            self._stop_decoding(sequence)
        else:
            del self.prefilling[sequence]
        if keeps_blocks:
            self.num_kept_blocks += sequence.table.num_blocks
        else:
            self.blocks.release(sequence.table)
        self._is_head_blocked = False

    def _settle_table(self, sequence: SequenceState) -> None:
        """Enter the blocks that a sequence took while it decoded into its table."""
        num_tokens = sequence.num_computed_tokens + self._is_in_step
        sequence.table.num_private = self._num_blocks(num_tokens) - len(sequence.table.hashes)

    def _publish_decoded(self, sequence: SequenceState) -> None:
        """Offer the blocks that a sequence has filled while it decoded for sharing."""
        if sequence in self._publishers:
            self._settle_table(sequence)
            self._publish(sequence, sequence.num_computed_tokens + self._is_in_step)
            if sequence.num_published_blocks >= len(sequence.request.block_hashes):
                del self._publishers[sequence]

    def _publish(self, sequence: SequenceState, num_tokens: int) -> None:
        num_full = num_tokens // self.blocks.block_size
        if num_full > sequence.num_published_blocks:
            hashes = sequence.request.block_hashes[sequence.num_published_blocks : num_full]
            if hashes:
                self.blocks.publish(sequence.table, hashes)
            sequence.num_published_blocks = num_full

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.blocks.block_size)

    def _load_with(self, prefills: list[ScheduledPrefill]) -> StepLoad:
        """One new token on top of a cached context is a decode, whatever phase the sequence is in."""
        decode_batch_size = len(self.decoding)
        context_tokens = self._context_tokens + decode_batch_size * self.num_steps
        chunks = []
        for sequence, num_new in prefills:
            past = sequence.num_computed_tokens
            if num_new == 1 and past > 0:
                decode_batch_size += 1
                context_tokens += past + 1
            else:
                chunks.append(PrefillChunk(num_new, past))
        return StepLoad(tuple(chunks), decode_batch_size, context_tokens)
