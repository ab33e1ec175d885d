"""
The progress of one request through an engine.

Written by the scheduler alone. A sequence that decodes gets a token in every decode step, so what it has made follows
from how many of those the engine has completed, and nothing is kept up to date for it. (Where draft tokens are
verified, a step can make several, and what a sequence has made is written down: it has no clock.)
"""

from __future__ import annotations

from enum import Enum
from typing import Protocol

from mock_engine.kv_blocks import BlockTable
from mock_engine.request import Request


class Status(Enum):
    """Where a sequence is. FINISHED and CANCELLED are final."""

    NEW = "new"  # not queued yet
    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"  # waits again
    FINISHED = "finished"
    CANCELLED = "cancelled"


class DecodeClock(Protocol):
    """What `decode_batch.DecodeBatch` offers."""

    num_steps: int  # decode steps completed


class SequenceState:
    """The progress of one request; written by the scheduler alone."""

    __slots__ = (
        "_clock",
        "_num_computed_tokens",
        "_num_output_tokens",
        "num_accepted_tokens",
        "num_cached_tokens",
        "num_draft_tokens",
        "num_preemptions",
        "num_published_blocks",
        "num_remote_tokens",
        "queue_number",
        "request",
        "status",
        "table",
    )

    def __init__(self, request: Request) -> None:
        self.request = request
        self.status = Status.NEW
        self.num_cached_tokens: int | None = None  # prompt tokens found in the prefix cache; None until first scheduled
        self.num_preemptions = 0
        self.num_remote_tokens = request.num_remote_tokens  # 0 where they never came, or are gone
        self.num_published_blocks = 0  # full blocks of this sequence that were offered for sharing
        self.num_draft_tokens = 0  # that were verified for it
        self.num_accepted_tokens = 0  # of those, that are part of its output
        self.queue_number = 0  # its place among those that came, where `waiting_queue` sorts by priority
        self.table = BlockTable()  # without the private blocks that decoding has added since it began
        # While it decodes (and has a clock), both are less the number of decode steps completed.
        self._clock: DecodeClock | None = None
        self._num_computed_tokens = 0
        self._num_output_tokens = 0

    @property
    def num_output_tokens(self) -> int:
        """Output tokens made so far."""
        return self._num_output_tokens + (self._clock.num_steps if self._clock else 0)

    @property
    def num_computed_tokens(self) -> int:
        """Tokens whose KV is in the cache."""
        return self._num_computed_tokens + (self._clock.num_steps if self._clock else 0)

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens that exist so far."""
        return self.request.isl_tokens + self.num_output_tokens

    @property
    def is_final(self) -> bool:
        return self.status is Status.FINISHED or self.status is Status.CANCELLED
