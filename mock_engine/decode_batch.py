"""
The sequences that decode, and what follows from the number of decode steps they have done together.

    batch.add(sequence)                          it has made its first token
    batch.grow(blocks, n)                        KV blocks for n more decode steps of all
    finished = batch.advance(n)                  they are over: who has made its last token
    batch.remove(sequence)                       it leaves, finished or not

Each of them gets one token in every decode step. So nothing is kept up to date for a sequence: what it has made follows
from the number of decode steps since it began, when it ends is known, and the blocks that all of them need follow from
a count by `tokens % block_size`. A step costs what changes in it, whatever the batch. (Where draft tokens are verified,
that does not hold; `speculative_batch` offers the same and looks at each.)
"""

from __future__ import annotations

import heapq

from mock_engine.kv_blocks import KvBlocks
from mock_engine.request import Request
from mock_engine.sequence import SequenceState


class DecodeBatch:
    """Sequences in the order in which they began to decode, and the clock that they share."""

    num_draft_tokens = 0  # that the next step verifies
    num_extra_tokens = 0  # made in the last step, beyond one of each sequence

    def __init__(self, block_size: int) -> None:
        self.sequences: dict[SequenceState, None] = {}
        self.num_steps = 0  # decode steps completed
        self._block_size = block_size
        self._context_tokens = 0  # of all together, less num_steps for each
        self._total_blocks = 0  # of all together, once each has made its last token
        self._num_by_phase = [0] * block_size  # how many need a block when -num_steps is at [phase]
        self._finishing: dict[int, list[SequenceState]] = {}  # by the value of num_steps at which they end
        self._finish_steps: list[int] = []  # a heap of its keys, some of them gone

    @property
    def context_tokens(self) -> int:
        """KV length in the next decode step, summed over the sequences."""
        return self._context_tokens + len(self.sequences) * self.num_steps

    @property
    def num_tokens(self) -> int:
        """Tokens that the next decode step computes."""
        return len(self.sequences)

    def grow(self, blocks: KvBlocks, num_steps: int = 1) -> bool:
        """Take the KV blocks for the next decode steps of all. False, and nothing changes, if there are too few."""
        if num_steps == 1:
            return blocks.take(self._num_by_phase[-self.num_steps % self._block_size])
        return blocks.take(self.num_blocks_for_steps(num_steps))

    def grow_one(self, sequence: SequenceState, blocks: KvBlocks) -> bool:
        """The same for the next step of one of them."""
        return sequence.num_computed_tokens % self._block_size != 0 or blocks.take(1)

    def settle(self, sequence: SequenceState, is_in_step: bool) -> None:
        """Enter the blocks that a sequence took while it decoded into its table; also those for a step under way."""
        num_blocks = -(-(sequence.num_computed_tokens + is_in_step) // self._block_size)
        sequence.table.num_private = num_blocks - len(sequence.table.hashes)

    def num_steady_steps(self, num_available: int) -> int:
        """Decode steps until somebody makes its last token, as far as `num_available` KV blocks are enough."""
        return self.num_steps_with_blocks(self.num_steps_to_first_end(), num_available)

    def num_blocks_for_steps(self, num_steps: int) -> int:
        """KV blocks that the next `num_steps` decode steps take."""
        by_phase = self._num_by_phase
        num_cycles, rest = divmod(num_steps, self._block_size)
        first = -self.num_steps % self._block_size  # the phase that needs a block now; then the one below, and so on
        below = first + 1 - rest
        num_blocks = sum(by_phase[max(below, 0) : first + 1]) + (sum(by_phase[below:]) if below < 0 else 0)
        return num_cycles * len(self.sequences) + num_blocks

    def num_steps_with_blocks(self, num_steps: int, num_available: int) -> int:
        """For how many of the next `num_steps` decode steps `num_available` KV blocks are enough."""
        if self.num_blocks_for_steps(num_steps) <= num_available:
            return num_steps
        num_cycles = num_available // len(self.sequences)
        steps = num_cycles * self._block_size
        left = num_available - num_cycles * len(self.sequences)
        while left >= (needed := self._num_by_phase[-(self.num_steps + steps) % self._block_size]):
            left -= needed
            steps += 1
        return steps

    def num_steps_to_first_end(self) -> int:
        """Decode steps until somebody makes its last token. There must be somebody."""
        while self._finish_steps[0] not in self._finishing:  # the last that was to end there has been cancelled
            heapq.heappop(self._finish_steps)
        return self._finish_steps[0] - self.num_steps

    def num_tokens_to_make(self, max_each: int) -> int:
        """Tokens that the sequences still make, summed; of each, `max_each` count at most."""
        return sum(len(each) * min(step - self.num_steps, max_each) for step, each in self._finishing.items())

    def num_blocks_to_finish(self) -> int:
        """KV blocks that the sequences still take after the next decode step, for which each has them."""
        block_size = self._block_size
        padding_tokens = sum(
            number * (-(phase + self.num_steps + 1) % block_size) for phase, number in enumerate(self._num_by_phase)
        )
        return self._total_blocks - (self.context_tokens + padding_tokens) // block_size

    def num_blocks_in_all(self, request: Request) -> int:
        """The most KV blocks that a sequence ever holds."""
        return -(-(request.isl_tokens + request.osl_tokens) // self._block_size)

    def add(self, sequence: SequenceState) -> None:
        """From here on the clock says what it has computed and made."""
        request = sequence.request
        self.sequences[sequence] = None
        sequence._clock = self
        sequence._num_computed_tokens -= self.num_steps
        sequence._num_output_tokens -= self.num_steps
        self._context_tokens += request.isl_tokens + sequence._num_output_tokens
        self._total_blocks += -(-(request.isl_tokens + request.osl_tokens) // self._block_size)
        self._num_by_phase[sequence._num_computed_tokens % self._block_size] += 1
        finish_step = request.osl_tokens - sequence._num_output_tokens
        if finish_step not in self._finishing:
            self._finishing[finish_step] = []
            heapq.heappush(self._finish_steps, finish_step)
        self._finishing[finish_step].append(sequence)

    def remove(self, sequence: SequenceState) -> None:
        """Write down what it has computed and made."""
        request = sequence.request
        finish_step = request.osl_tokens - sequence._num_output_tokens
        if finish_step in self._finishing:  # it leaves early
            self._finishing[finish_step].remove(sequence)
            if not self._finishing[finish_step]:
                del self._finishing[finish_step]
        self._num_by_phase[sequence._num_computed_tokens % self._block_size] -= 1
        self._total_blocks -= -(-(request.isl_tokens + request.osl_tokens) // self._block_size)
        self._context_tokens -= request.isl_tokens + sequence._num_output_tokens
        sequence._num_computed_tokens += self.num_steps
        sequence._num_output_tokens += self.num_steps
        sequence._clock = None
        del self.sequences[sequence]

    def advance(self, num_steps: int) -> list[SequenceState]:
        """So many decode steps are over, none past the first end. Those that end now are still to be removed."""
        self.num_steps += num_steps
        finished = self._finishing.pop(self.num_steps, [])
        while self._finish_steps and self._finish_steps[0] not in self._finishing:
            heapq.heappop(self._finish_steps)
        return finished
