"""
The sequences that decode when draft tokens are verified: each gets as many tokens in a step as it gets.

    batch = SpeculativeBatch(speculation, block_size, max_model_len)
    batch.add(sequence)                          it has made its first token
    batch.grow(blocks)                           KV blocks for the next step of all
    finished = batch.advance(1)                  it is over: who has made its last token
    batch.remove(sequence)                       it leaves, finished or not

The same as `decode_batch.DecodeBatch` for a scheduler; but what a sequence has made is known only when it is looked at:
each is visited in every step, and no two steps are alike.

In a step, a sequence computes its last token and its draft tokens, so it needs KV blocks for all of these, and
`num_lookahead_tokens` beyond. What is rejected is computed again over the same blocks, which stay. No position beyond
`max_model_len` is computed, so a sequence near it has fewer draft tokens.

Source: vllm 0.10 to 0.14, vllm/v1/core/sched/scheduler.py, `schedule` and `update_from_output`;
vllm/v1/core/kv_cache_manager.py, `allocate_slots`.
"""

from __future__ import annotations

from bisect import bisect_left

from mock_engine.kv_blocks import KvBlocks
from mock_engine.request import Request
from mock_engine.sequence import SequenceState
from mock_engine.speculation import Speculation, SpeculationCounts


class SpeculativeBatch:
    """Sequences in the order in which they began to decode."""

    def __init__(self, speculation: Speculation, block_size: int, max_model_len: int) -> None:
        self.sequences: dict[SequenceState, None] = {}
        self.num_steps = 0  # decode steps completed
        self.num_extra_tokens = 0  # made in the last one, beyond one of each sequence
        self.counts = SpeculationCounts(speculation.num_tokens)
        self._speculation = speculation
        self._block_size = block_size
        self._max_model_len = max_model_len
        self._ahead_tokens = speculation.num_tokens + speculation.num_lookahead_tokens  # that blocks are taken for
        self._num_tokens = 0  # prompt and output tokens that exist so far, of all together
        self._rejected: dict[SequenceState, list[int]] = {}  # in the same order
        self._long: dict[SequenceState, None] = {}  # those that may have fewer draft tokens near their end

    @property
    def num_draft_tokens(self) -> int:
        """Draft tokens that the next step verifies, of all sequences."""
        num_tokens = self._speculation.num_tokens
        return num_tokens * len(self.sequences) - sum(num_tokens - self._num_drafts(each) for each in self._long)

    @property
    def num_tokens(self) -> int:
        """Tokens that the next step computes."""
        return len(self.sequences) + self.num_draft_tokens

    @property
    def context_tokens(self) -> int:
        """KV length in the next decode step, draft tokens included, summed over the sequences."""
        return self._num_tokens + self.num_draft_tokens

    def grow(self, blocks: KvBlocks, num_steps: int = 1) -> bool:
        """Take the KV blocks for the next step of all sequences. False, and nothing changes, if there are too few."""
        assert num_steps == 1, "what a step makes is known when it is over"
        ahead_tokens, max_tokens, block_size = self._ahead_tokens, self._max_model_len, self._block_size
        growing = []
        num_taken = 0
        for sequence in self.sequences:
            num_tokens = min(sequence.request.isl_tokens + sequence._num_output_tokens + ahead_tokens, max_tokens)
            num_blocks = -(-num_tokens // block_size)
            missing = num_blocks - sequence.table.num_blocks
            if missing > 0:
                growing.append((sequence.table, num_blocks))
                num_taken += missing
        if num_taken > blocks.num_available:
            return False
        for table, num_blocks in growing:
            blocks.grow(table, num_blocks)
        return True

    def grow_one(self, sequence: SequenceState, blocks: KvBlocks) -> bool:
        """The same for one of them."""
        num_tokens = min(sequence.num_tokens + self._ahead_tokens, self._max_model_len)
        return blocks.grow(sequence.table, -(-num_tokens // self._block_size))

    def settle(self, sequence: SequenceState, is_in_step: bool) -> None:
        """A sequence's table is always up to date."""

    def num_steady_steps(self, num_available: int) -> int:
        """No step is like the one before."""
        del num_available
        return 0

    def num_blocks_for_steps(self, num_steps: int) -> int:
        """Of steps that are alike there are none."""
        assert num_steps == 0, "no step is like the one before"
        return 0

    def num_tokens_to_make(self, max_each: int) -> int:
        """Tokens that the sequences still make, summed; of each, `max_each` count at most."""
        return sum(min(each.request.osl_tokens - each.num_output_tokens, max_each) for each in self.sequences)

    def num_blocks_to_finish(self) -> int:
        """KV blocks that the sequences still take after the next decode step, for which each has them."""
        return sum(self.num_blocks_in_all(each.request) - each.table.num_blocks for each in self.sequences)

    def num_blocks_in_all(self, request: Request) -> int:
        """The most KV blocks that a sequence ever holds."""
        num_tokens = min(request.isl_tokens + request.osl_tokens + self._ahead_tokens, self._max_model_len)
        return -(-num_tokens // self._block_size)

    def add(self, sequence: SequenceState) -> None:
        """It decodes from the next step on."""
        request = sequence.request
        self.sequences[sequence] = None
        self._rejected[sequence] = self._speculation.rejected(request)
        self._num_tokens += sequence.num_tokens
        if request.isl_tokens + request.osl_tokens + self._speculation.num_tokens > self._max_model_len:
            self._long[sequence] = None

    def remove(self, sequence: SequenceState) -> None:
        """It leaves."""
        del self.sequences[sequence]
        del self._rejected[sequence]
        self._long.pop(sequence, None)
        self._num_tokens -= sequence.num_tokens

    def advance(self, num_steps: int) -> list[SequenceState]:
        """A decode step is over. Those that end now are still to be removed."""
        assert num_steps == 1, "no two steps are alike"
        self.num_steps += 1
        self.num_extra_tokens = 0
        finished = []
        num_tokens = self._speculation.num_tokens
        for sequence, rejected in self._rejected.items():
            made_tokens = sequence._num_output_tokens
            num_drafts = self._num_drafts(sequence) if sequence in self._long else num_tokens
            num_accepted = min(rejected[bisect_left(rejected, made_tokens)] - made_tokens, num_drafts)
            self.counts.add(num_drafts, num_accepted)
            num_left = sequence.request.osl_tokens - made_tokens
            num_extra = min(num_accepted, num_left - 1)
            sequence._num_output_tokens += 1 + num_extra
            sequence._num_computed_tokens += 1 + num_extra
            sequence.num_draft_tokens += num_drafts
            sequence.num_accepted_tokens += num_extra
            self.num_extra_tokens += num_extra
            if 1 + num_extra == num_left:
                finished.append(sequence)
        self._num_tokens += len(self.sequences) + self.num_extra_tokens
        return finished

    def _num_drafts(self, sequence: SequenceState) -> int:
        """Draft tokens that the next step verifies: none at the last position that the model has."""
        return min(self._speculation.num_tokens, self._max_model_len - 1 - sequence.num_tokens)
