"""
What every scheduler keeps, whatever its policy: the queue, the running batch, and the KV blocks.

    scheduler = VllmScheduler(config, blocks)     or another policy: a class with a `schedule` of its own
    scheduler.add(sequence)
    schedule = scheduler.schedule()               who runs in this step; their blocks are taken
    progress = scheduler.complete(schedule)       it is over
    scheduler.advance(scheduler.num_steady_steps())    decode steps in which nothing changes, all at once

Who decodes is kept by `decode_batch`, or by `speculative_batch` where draft tokens are verified; who waits, by
`waiting_queue`. Policies are in `vllm_scheduler`, `sglang_scheduler` and `trtllm_scheduler`. Each puts together in
`schedule` who runs, and may ask for more blocks at an admission than the step itself takes. What a policy may not do:
let some of those that decode go on without the others. All get a token in a step or none, which is what `decode_batch`
rests on; and while nobody can be admitted, all do, which is what `num_steady_steps` rests on.

Two liberties that make runs of steps possible, and that no measured figure shows: blocks filled by decoding are offered
for sharing when somebody looks for blocks (an admission) or their sequence leaves, and a waiting sequence that found
too few blocks is looked at again when somebody has left.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

from mock_engine.decode_batch import DecodeBatch
from mock_engine.errors import ConfigError, RequestError
from mock_engine.kv_blocks import BlockTable, KvBlocks
from mock_engine.request import Request
from mock_engine.scheduler_config import SchedulerConfig
from mock_engine.sequence import SequenceState, Status
from mock_engine.speculation import SpeculationCounts
from mock_engine.speculative_batch import SpeculativeBatch
from mock_engine.step import PrefillChunk, StepLoad
from mock_engine.waiting_queue import make_queue


class ScheduledPrefill(NamedTuple):
    """A sequence that computes `num_new` tokens of its prompt (or, once preempted, of all it had) in this step."""

    sequence: SequenceState
    num_new: int


@dataclass(frozen=True, slots=True)
class Schedule:
    """What runs in this step: these prefills, all decoding sequences or none of them, and the load that makes."""

    prefills: list[ScheduledPrefill]
    has_decodes: bool  # whether those that decode get a token, or several
    load: StepLoad


class Progress(NamedTuple):
    """What has happened to sequences in one step, or at the end of several: each in batch order."""

    prefilled: list[SequenceState]  # computed all their prompt and made a token
    finished: list[SequenceState]  # made their last token
    num_extra_tokens: int = 0  # draft tokens that came out, beside one token of each that decodes


class Scheduler(ABC):
    """Owns the queue, the running batch and the KV blocks. A policy is a subclass."""

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
        self.waiting = make_queue(config.scheduling_policy)
        self.is_by_priority = config.scheduling_policy == "priority"
        # Both in order of admission; all that decode were admitted before any that does not yet.
        self._decodes: DecodeBatch | SpeculativeBatch = (
            DecodeBatch(blocks.block_size)
            if config.speculation is None
            else SpeculativeBatch(config.speculation, blocks.block_size, config.max_model_len)
        )
        self.decoding = self._decodes.sequences
        self.prefilling: dict[SequenceState, None] = {}
        self.num_steps = 0  # completed
        self.preempted: list[SequenceState] = []  # in the last `schedule`
        self.num_preemptions = 0
        self.num_prefix_queries_tokens = 0  # prompt tokens looked up in the prefix cache
        self.num_prefix_hits_tokens = 0  # ... and found there
        self.num_kept_blocks = 0  # of finished sequences whose requests keep them, and of `hold`
        self._held = BlockTable()
        self.reserved: dict[SequenceState, None] = {}  # those that have blocks and have not been in the batch
        self._is_in_decode_step = False  # the blocks of those that decode are taken, their tokens not counted
        self._have_grown: set[SequenceState] = set()  # while blocks are taken one by one: those that have theirs
        self._is_head_blocked = False  # the first that waits found too few blocks, and nobody has left since
        self._is_reserve_blocked = False  # the same for the last that wanted blocks before it is queued
        self._publishers: dict[SequenceState, None] = {}  # those that decode and have blocks to offer for sharing

    @property
    def num_running(self) -> int:
        """Sequences in the batch."""
        return len(self.decoding) + len(self.prefilling)

    @property
    def has_room(self) -> bool:
        """Whether the next step may try to take one more sequence into the batch, should it come."""
        is_passable = self.is_by_priority or not self._is_head_blocked  # who comes may be the first of those that wait
        return is_passable and self.num_running < self.config.max_num_seqs

    @property
    def is_admitting(self) -> bool:
        """Whether the next step tries to take a waiting sequence into the batch."""
        return bool(self.waiting) and not self._is_head_blocked and self.num_running < self.config.max_num_seqs

    @property
    def speculation_counts(self) -> SpeculationCounts | None:
        """What became of draft tokens; None if there are none."""
        return self._decodes.counts if isinstance(self._decodes, SpeculativeBatch) else None

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
        """Queue a new sequence, whose request the caller has checked: at the end, or first if it has its blocks."""
        assert sequence.status is Status.NEW, "a sequence is queued once"
        sequence.status = Status.WAITING
        if sequence in self.reserved:
            self._is_head_blocked = False
        if sequence in self.reserved and not self.is_by_priority:
            self._queue_first(sequence)
        else:
            self.waiting.append(sequence)
            if self.waiting[0] is sequence:
                self._is_head_blocked = False

    def reserve(self, sequence: SequenceState) -> bool:
        """
        Take the blocks for the prompt of a new sequence, into which another worker will send its KV cache.

        It is queued with `add` when that is there. False, and nothing changes, as long as there are too few, the
        batch is full, or somebody waits who has none: first come, first served, as in vLLM. Whoever has been given
        blocks so can run without another one, and those that wait before it can too. So somebody always runs.
        """
        assert sequence.status is Status.NEW, "who is queued takes blocks when its turn comes"
        if self._is_reserve_blocked or self.num_running >= self.config.max_num_seqs:
            return False
        if any(each not in self.reserved for each in self.waiting):
            return False
        self._offer_decoded()
        hits = self._prefix_hits(sequence)
        num_taken = self._num_blocks_to_admit(sequence, sequence.num_tokens) - len(hits) + self.blocks.num_unheld(hits)
        if num_taken > self.blocks.num_available - self._num_reserved_blocks() - self._num_blocks_to_come():
            self._is_reserve_blocked = True
            return False
        self._claim(sequence, hits)
        has_grown = self.blocks.grow(sequence.table, self._num_blocks(sequence.num_tokens))
        assert has_grown, "availability was checked"
        self.reserved[sequence] = None
        return True

    def cancel(self, sequence: SequenceState) -> None:
        """Drop a sequence and take its blocks back, whatever it was doing. A no-op once it is final."""
        if sequence.is_final:
            return
        if sequence.status is Status.RUNNING:
            self._leave(sequence)
        elif sequence.status is not Status.NEW:
            self._is_head_blocked = self._is_head_blocked and sequence is not self.waiting[0]
            self.waiting.remove(sequence)
        if sequence in self.reserved:
            del self.reserved[sequence]
            self.blocks.release(sequence.table)
            self._note_room()
        sequence.status = Status.CANCELLED

    def give_back(self, sequence: SequenceState) -> None:
        """Take the blocks back of a finished sequence whose request keeps them."""
        self.num_kept_blocks -= sequence.table.num_blocks
        self.blocks.release(sequence.table)
        self._note_room()

    @property
    def num_held_blocks(self) -> int:
        """What `hold` keeps from everybody."""
        return self._held.num_blocks

    def hold(self, num_blocks: int) -> None:
        """
        Between two steps: keep so many blocks from everybody, as if a sequence held them, or as many as can be had now.

        No running sequence loses any by that, nor those that it takes in the next step or was promised.
        """
        held = self._held.num_blocks
        if num_blocks > held:
            promised = self._num_reserved_blocks() + self._num_blocks_to_come()
            if isinstance(self._decodes, DecodeBatch):  # the other one counts those of the next step among the promised
                promised += self._decodes.num_blocks_for_steps(1)
            num_blocks = min(num_blocks, held + max(0, self.blocks.num_available - promised))
            self.blocks.grow(self._held, num_blocks)
        elif num_blocks < held:
            given_back = BlockTable()
            given_back.num_private = held - num_blocks
            self._held.num_private = num_blocks
            self.blocks.release(given_back)
            self._note_room()
        self.num_kept_blocks += num_blocks - held

    def preempt_all(self) -> None:
        """Between two steps: take all blocks back from those that run. They wait before all others, in their order."""
        for sequence in reversed([*self.decoding, *self.prefilling]):
            self._preempt(sequence)
            self._queue_first(sequence)

    @abstractmethod
    def schedule(self) -> Schedule:
        """Choose who runs now, take the blocks that this needs, and say what load it makes."""

    def complete(self, schedule: Schedule) -> Progress:
        """The step is over: count what it computed. Finished sequences have given their blocks back."""
        self._is_in_decode_step = False
        self.num_steps += 1
        finished, num_extra_tokens = self._advance_decodes(1) if schedule.has_decodes else ([], 0)
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
        return Progress(prefilled, finished, num_extra_tokens)

    def num_steady_steps(self) -> int:
        """
        How many steps from now on only decode, with the same sequences: none is admitted or preempted, and none ends
        before the last of them. 0 if the next step is not like that.
        """
        if self.prefilling or not self.decoding or self.is_admitting:
            return 0
        return self._decodes.num_steady_steps(self.blocks.num_available)

    def advance(self, num_steps: int) -> Progress:
        """Do that many steps at once, at most `num_steady_steps`: the same as `schedule` and `complete` in turns."""
        has_blocks = self._decodes.grow(self.blocks, num_steps)
        assert has_blocks, "there are as many steady steps as there are blocks for"
        self.num_steps += num_steps
        return Progress([], *self._advance_decodes(num_steps))

    def num_blocks_for_steps(self, num_steps: int) -> int:
        """Blocks that all that decode take in the next `num_steps` decode steps together."""
        return self._decodes.num_blocks_for_steps(num_steps)

    @property
    def decode_load(self) -> StepLoad:
        """The load of the next step if it only decodes."""
        return StepLoad((), len(self.decoding), self._decodes.context_tokens, self._decodes.num_draft_tokens)

    # What a policy can say about admission.

    def _num_blocks_to_admit(self, sequence: SequenceState, num_tokens: int) -> int:
        """Blocks that a waiting sequence must be able to have; this step computes it up to `num_tokens`."""
        del sequence
        return self._num_blocks(num_tokens)

    def _num_reserved_blocks(self) -> int:
        """Blocks that are available and that nobody may be admitted to, since those that run will need them."""
        return 0

    # What a policy's `schedule` is made of.

    @property
    def _is_up_to_reserved(self) -> bool:
        """Whether nobody is left in the batch, and whoever is first in the queue has its blocks and can run."""
        return not self.num_running and bool(self.waiting) and self.waiting[0] in self.reserved

    def _grow_decoding(self) -> bool:
        """Take the blocks for a token of all that decode. False, and nothing changes, if there are too few."""
        if not self._decodes.grow(self.blocks):
            return False
        self._is_in_decode_step = True
        return True

    def _continue_prefills(self, prefills: list[ScheduledPrefill], budget: int) -> int:
        """Go on with prompts that are computed in part, as far as the blocks go. Returns what is left of the budget."""
        for sequence in self.prefilling:  # at most one: its prompt took all that was left of a step
            num_new = min(sequence.num_tokens - sequence.num_computed_tokens, budget)
            if not self._grow(sequence, num_new):
                break
            prefills.append(ScheduledPrefill(sequence, num_new))
            budget -= num_new
        return budget

    def _admit(self, prefills: list[ScheduledPrefill], budget: int) -> None:
        """Take waiting sequences into the batch, first come, first served, while budget, limits and blocks allow."""
        if not self.is_admitting:
            return
        self._offer_decoded()
        num_reserved = self._num_reserved_blocks() + self._num_blocks_to_come()
        while self.waiting and budget > 0 and self.num_running < self.config.max_num_seqs:
            sequence = self.waiting[0]
            has_blocks = sequence in self.reserved
            hits = tuple(sequence.table.hashes) if has_blocks else self._prefix_hits(sequence)
            num_computed_tokens = max(len(hits) * self.blocks.block_size, sequence.num_remote_tokens)
            num_new = sequence.num_tokens - num_computed_tokens
            if num_new > budget:
                if not self.config.enable_chunked_prefill:
                    return
                num_new = budget
            num_blocks = self._num_blocks_to_admit(sequence, num_computed_tokens + num_new)
            if has_blocks:
                del self.reserved[sequence]
            else:
                num_taken = num_blocks - len(hits) + self.blocks.num_unheld(hits)
                if num_taken > self.blocks.num_available - num_reserved:
                    self._is_head_blocked = True
                    return
                self._claim(sequence, hits)
            sequence._num_computed_tokens = num_computed_tokens
            self.waiting.popleft()
            sequence.status = Status.RUNNING
            self.prefilling[sequence] = None
            has_grown = self._grow(sequence, num_new)
            assert has_grown, "availability was checked"
            num_reserved += num_blocks - sequence.table.num_blocks
            prefills.append(ScheduledPrefill(sequence, num_new))
            budget -= num_new

    def _preempt(self, sequence: SequenceState) -> None:
        """Take the blocks of a running sequence back. The policy queues it again."""
        self._leave(sequence, is_step_lost=True)
        sequence._num_computed_tokens = 0
        sequence.num_remote_tokens = 0  # what another worker has sent is gone: it is computed here
        sequence.num_published_blocks = 0
        sequence.num_preemptions += 1
        sequence.status = Status.PREEMPTED
        self.num_preemptions += 1
        self.preempted.append(sequence)

    def _schedule_of(self, prefills: list[ScheduledPrefill], has_decodes: bool) -> Schedule:
        """With its load. One new token on top of a cached context is a decode, whatever phase the sequence is in."""
        decode_batch_size = len(self.decoding) if has_decodes else 0
        context_tokens = self._decodes.context_tokens if has_decodes else 0
        num_draft_tokens = self._decodes.num_draft_tokens if has_decodes else 0
        chunks = []
        for sequence, num_new in prefills:
            past = sequence.num_computed_tokens
            if num_new == 1 and past > 0:
                decode_batch_size += 1
                context_tokens += past + 1
            else:
                chunks.append(PrefillChunk(num_new, past))
        return Schedule(
            prefills, has_decodes, StepLoad(tuple(chunks), decode_batch_size, context_tokens, num_draft_tokens)
        )

    def _queue_first(self, sequence: SequenceState) -> None:
        """Before all that wait but those with blocks, whom it could otherwise keep from running, and they it."""
        if self.is_by_priority:
            self.waiting.appendleft(sequence)
            return
        place = next((n for n, each in enumerate(self.waiting) if each not in self.reserved), len(self.waiting))
        self.waiting.insert(place, sequence)

    # Book-keeping.

    def _num_blocks_to_come(self) -> int:
        """Blocks that those who have the blocks of their prompt were promised beside them."""
        return sum(self._num_blocks_to_admit(each, each.num_tokens) - each.table.num_blocks for each in self.reserved)

    def _claim(self, sequence: SequenceState, hits: tuple[int, ...]) -> None:
        """Let it hold the blocks at its start that are in the cache, and count them."""
        self.blocks.claim_prefix(sequence.table, hits)
        sequence.num_published_blocks = len(hits)
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = len(hits) * self.blocks.block_size
            self.num_prefix_queries_tokens += sequence.request.isl_tokens
            self.num_prefix_hits_tokens += sequence.num_cached_tokens

    def _offer_decoded(self) -> None:
        """Somebody looks for blocks: offer all that decoding has filled for sharing."""
        for publisher in list(self._publishers):
            self._publish_decoded(publisher)

    def _advance_decodes(self, num_steps: int) -> tuple[list[SequenceState], int]:
        """So many decode steps are over: end those that have made their last token. Returns them, and extra tokens."""
        finished = self._decodes.advance(num_steps)
        for sequence in finished:
            self._leave(sequence, sequence.request.keeps_blocks)
            sequence.status = Status.FINISHED
        return finished, self._decodes.num_extra_tokens

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

    def _start_decoding(self, sequence: SequenceState) -> None:
        del self.prefilling[sequence]
        self._decodes.add(sequence)
        if len(sequence.request.block_hashes) > sequence.num_published_blocks:
            self._publishers[sequence] = None

    def _leave(self, sequence: SequenceState, keeps_blocks: bool = False, is_step_lost: bool = False) -> None:
        """Take a sequence out of the batch, and its blocks back; also out of a step that is not to compute it."""
        if sequence in self.decoding:
            self._publish_decoded(sequence, is_step_lost)
            self._publishers.pop(sequence, None)
            self._settle_table(sequence)
            self._decodes.remove(sequence)
        else:
            del self.prefilling[sequence]
        if keeps_blocks:
            self.num_kept_blocks += sequence.table.num_blocks
        else:
            self.blocks.release(sequence.table)
        self._note_room()

    def _note_room(self) -> None:
        """Somebody has left: who found too few blocks may look again."""
        self._is_head_blocked = self._is_reserve_blocked = False

    def _settle_table(self, sequence: SequenceState) -> None:
        """Enter the blocks that a sequence took while it decoded into its table."""
        self._decodes.settle(sequence, self._is_in_decode_step or sequence in self._have_grown)

    def _publish_decoded(self, sequence: SequenceState, is_step_lost: bool = False) -> None:
        """Offer the blocks that a sequence has filled while it decoded for sharing."""
        if sequence in self._publishers:
            self._settle_table(sequence)
            is_computing = self._is_in_decode_step and not is_step_lost
            self._publish(sequence, sequence.num_computed_tokens + is_computing)
            if sequence.num_published_blocks >= len(sequence.request.block_hashes):
                del self._publishers[sequence]

    def _publish(self, sequence: SequenceState, num_tokens: int) -> None:
        num_full = num_tokens // self.blocks.block_size
        if num_full > sequence.num_published_blocks:
            hashes = sequence.request.block_hashes[sequence.num_published_blocks : num_full]
            if hashes:
                fresh = self.blocks.publish(sequence.table, hashes)
                if fresh and self.blocks.observer is not None:
                    self.blocks.observer.stored(sequence.request, fresh)
            sequence.num_published_blocks = num_full

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.blocks.block_size)
