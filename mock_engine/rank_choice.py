"""
Which of a worker's data-parallel ranks computes a request.

    rank = choose_rank(wire_request, drives)

Dynamo's KV router chooses one itself (`routing.dp_rank`); with its other modes the worker does, as vLLM's client of
several engine cores does.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

logger = logging.getLogger(__name__)

_WAITING_WEIGHT = 4  # vllm 0.10 to 0.14, vllm/v1/engine/core_client.py, `DPLBAsyncMPClient`: waiting * 4 + running


class RankLoad(Protocol):
    """What must be known of a rank."""

    @property
    def num_waiting(self) -> int: ...

    @property
    def num_running(self) -> int: ...


def choose_rank(wire: Mapping[str, Any], ranks: Sequence[RankLoad]) -> int:
    """The rank that the router asks for; without one, or with one that is not there, the least loaded."""
    wanted = (wire.get("routing") or {}).get("dp_rank")
    if wanted is not None:
        if isinstance(wanted, int) and 0 <= wanted < len(ranks):
            return wanted
        last = len(ranks) - 1
        logger.warning("a request wants dp_rank %r; there are 0 to %d. The least loaded takes it.", wanted, last)
    return least_loaded_rank(ranks)


def least_loaded_rank(ranks: Sequence[RankLoad]) -> int:
    """The first of those with the fewest requests, one that waits counting for four."""
    return min(range(len(ranks)), key=lambda rank: _WAITING_WEIGHT * ranks[rank].num_waiting + ranks[rank].num_running)
