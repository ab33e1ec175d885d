"""
Speculative decoding: how many tokens a decode step makes.

    speculation = Speculation(num_tokens=3, acceptance_rate=0.7, draft_cost=0.1)
    speculation.rejected(request)        where in its output a draft token is rejected
    speculation.tokens_per_step          what that comes to on average

A drafter proposes `num_tokens` tokens for each sequence that decodes, and the model looks at all of them in one pass.
Those before the first rejected one come out, and one more that the model itself has made. Whether the draft token at
a place of the output is accepted is drawn for that place: once, with the same probability at each, and from a seed and
the request alone. So a step makes 1 + a truncated geometric number of tokens, and neither who else runs nor a
preemption changes which.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from zlib import crc32

import numpy as np

from mock_engine.errors import ConfigError
from mock_engine.request import Request

_NEVER = 1 << 62  # an output position that no request reaches


@dataclass(frozen=True, slots=True)
class Speculation:
    """How an engine speculates. Raises `ConfigError` for a value out of range."""

    num_tokens: int  # draft tokens of each sequence in a step
    acceptance_rate: float  # of a draft token, when all before it were accepted
    draft_cost: float  # seconds to draft one token for all sequences, as a share of a decode pass of theirs
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_tokens < 1:
            raise ConfigError(f"--num-speculative-tokens is {self.num_tokens}; it must be 1 or more, or 0 for none")
        if not 0 <= self.acceptance_rate <= 1:
            raise ConfigError(
                f"--speculative-acceptance-rate is {self.acceptance_rate:g}; it is a probability from 0 to 1"
            )
        if not 0 <= self.draft_cost < float("inf"):
            raise ConfigError(
                f"--speculative-draft-cost is {self.draft_cost:g}; it is a share of a decode pass, 0 or more"
            )

    @property
    def num_lookahead_tokens(self) -> int:
        """Tokens after the draft for which a KV block is taken too: a drafting model fills them for the next draft."""
        return self.num_tokens if self.draft_cost else 0

    @property
    def tokens_per_step(self) -> float:
        """Tokens that a step makes for one sequence, on average, where neither OSL nor context length cuts it short."""
        return float(sum(self.acceptance_rate**i for i in range(self.num_tokens + 1)))

    def rejected(self, request: Request) -> list[int]:
        """Output positions at which a draft token is rejected, ascending; the last is one that is never reached."""
        rng = np.random.default_rng([self.seed, crc32(request.request_id.encode()), request.choice])
        draws = rng.random(request.osl_tokens + self.num_tokens)
        return [*np.flatnonzero(draws >= self.acceptance_rate).tolist(), _NEVER]


class SpeculationCounts:
    """
    What became of draft tokens, as vLLM counts it (`vllm:spec_decode_num_...`).

    A token that was accepted counts also where the request ended before it: so has vLLM, and the rate does not depend
    on how long answers are.
    """

    def __init__(self, num_tokens: int) -> None:
        self.num_drafts = 0  # once a step for each sequence that had draft tokens in it
        self.num_draft_tokens = 0
        self.num_accepted_tokens = 0
        self._num_by_accepted = [0] * (num_tokens + 1)  # drafts of which so many tokens were accepted

    def add(self, num_draft_tokens: int, num_accepted_tokens: int) -> None:
        """One sequence in one step."""
        if num_draft_tokens:
            self.num_drafts += 1
            self.num_draft_tokens += num_draft_tokens
            self.num_accepted_tokens += num_accepted_tokens
            self._num_by_accepted[num_accepted_tokens] += 1

    @classmethod
    def total(cls, counts: Iterable[SpeculationCounts]) -> SpeculationCounts:
        """Those of several engines together."""
        found = list(counts)
        total = cls(max((len(each._num_by_accepted) - 1 for each in found), default=0))
        for each in found:
            total.num_drafts += each.num_drafts
            total.num_draft_tokens += each.num_draft_tokens
            total.num_accepted_tokens += each.num_accepted_tokens
            for number, drafts in enumerate(each._num_by_accepted):
                total._num_by_accepted[number] += drafts
        return total

    @property
    def acceptance_rate(self) -> float:
        """Accepted draft tokens, of all."""
        return self.num_accepted_tokens / self.num_draft_tokens if self.num_draft_tokens else 0.0

    @property
    def tokens_per_step(self) -> float:
        """Tokens that a step made for a sequence that had draft tokens in it (vLLM's mean acceptance length)."""
        return 1 + self.num_accepted_tokens / self.num_drafts if self.num_drafts else 1.0

    def to_json(self) -> dict[str, float | list[int]]:
        """All figures, for machines."""
        return {
            "num_drafts": self.num_drafts,
            "num_draft_tokens": self.num_draft_tokens,
            "num_accepted_tokens": self.num_accepted_tokens,
            "num_accepted_tokens_per_pos": self.num_accepted_tokens_per_pos,
            "acceptance_rate": self.acceptance_rate,
            "tokens_per_step": self.tokens_per_step,
        }

    @property
    def num_accepted_tokens_per_pos(self) -> list[int]:
        """Drafts whose first, second, ... token was accepted."""
        return list(accumulate(self._num_by_accepted[:0:-1]))[::-1]
