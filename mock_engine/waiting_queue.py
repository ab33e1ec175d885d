"""
Who waits, in the order in which they are served.

    queue = make_queue("fcfs")           first come, first served: a deque
    queue = make_queue("priority")       the most important first, and of equal ones who came first
    queue.append(sequence)               it comes
    queue.appendleft(sequence)           it was here before, and waits again

Where all are equally important, both are the same.

Source: vllm 0.10 to 0.14, vllm/v1/core/sched/request_queue.py.
"""

from __future__ import annotations

from bisect import bisect
from collections import deque

from mock_engine.sequence import SequenceState

SCHEDULING_POLICIES = ("fcfs", "priority")


def rank(sequence: SequenceState) -> tuple[int, int]:
    """The lower, the earlier it is served, and the later preempted. Its second part tells who came first."""
    return sequence.request.priority, sequence.queue_number


class PriorityQueue(deque[SequenceState]):
    """
    Sorted by `rank`, save that those which have KV blocks already go before all others, who could otherwise keep them
    from running. Other ways to put something in are not to be used.
    """

    def __init__(self) -> None:
        super().__init__()
        self._num_came = 0

    def append(self, sequence: SequenceState) -> None:
        """Behind all that are as important."""
        self._num_came += 1
        sequence.queue_number = self._num_came
        self._insert(sequence)

    def appendleft(self, sequence: SequenceState) -> None:
        """Where it would stand had it never left: before those, as important, that came after it."""
        self._insert(sequence)

    def _insert(self, sequence: SequenceState) -> None:
        self.insert(bisect(self, _place(sequence), key=_place), sequence)


def _place(sequence: SequenceState) -> tuple[bool, tuple[int, int]]:
    return not sequence.table.num_blocks, rank(sequence)


def make_queue(scheduling_policy: str) -> deque[SequenceState]:
    """An empty queue for one of `SCHEDULING_POLICIES`."""
    return PriorityQueue() if scheduling_policy == "priority" else deque()
