"""
Which worker gets a request: the policies of Dynamo's frontend, under its names.

    router = make_router(RouterSettings("kv"), rng)
    rank = router(request, ranks)

What the KV router knows of a cache is what is in it at that moment; Dynamo's hears of it a few milliseconds later.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Generic, Protocol, TypeVar

import numpy as np

from mock_engine.drive_virtual import Flight, VirtualDrive
from mock_engine.rank_choice import least_loaded_rank
from mock_engine.request import Request
from mock_engine.router_settings import RouterSettings


class RoutedLoad:
    """
    What a router knows of a worker: which requests it has been given, and what its KV cache holds.

    Without `is_counting_prompts`, only requests are counted: most policies ask for no more.
    """

    def __init__(self, drive: VirtualDrive, is_counting_prompts: bool = True) -> None:
        self.drive = drive
        self._is_counting_prompts = is_counting_prompts
        self.num_active = 0  # requests that have not ended
        self.active_blocks = 0  # KV blocks of their prompts, one that several share counted once
        self._num_sharing: dict[int, int] = {}  # full blocks of these prompts -> how many have them
        self._prefill_tokens = 0
        self._in_prefill: OrderedDict[Flight, int] = OrderedDict()  # prompt tokens of each that were not cached

    def add(self, flight: Flight) -> None:
        """A request was sent there."""
        request = flight.sequence.request
        self.num_active += 1
        if not self._is_counting_prompts:
            return
        num_new_blocks = self.num_new_blocks(request)
        self.active_blocks += num_new_blocks
        num_shared = self._num_blocks(request) - num_new_blocks
        for block_hash in request.block_hashes[:num_shared]:
            self._num_sharing[block_hash] += 1
        self._num_sharing.update(dict.fromkeys(request.block_hashes[num_shared : self._num_shareable(request)], 1))
        if not request.num_remote_tokens:
            uncached = request.isl_tokens - self.num_overlap_blocks(request) * self._block_size
            self._drop_prefilled()
            self._prefill_tokens += uncached
            self._in_prefill[flight] = uncached

    def remove(self, flight: Flight) -> None:
        """It has ended."""
        self.num_active -= 1
        if not self._is_counting_prompts:
            return
        request, num_sharing = flight.sequence.request, self._num_sharing
        hashes = request.block_hashes[: self._num_shareable(request)]
        # Who shares a block shares all before it.
        num_shared = bisect_left(hashes, True, key=lambda block_hash: num_sharing[block_hash] == 1)
        for block_hash in hashes[:num_shared]:
            num_sharing[block_hash] -= 1
        deque(map(num_sharing.__delitem__, hashes[num_shared:]), maxlen=0)  # a loop, at half the cost of one in Python
        self.active_blocks -= self._num_blocks(request) - num_shared
        self._prefill_tokens -= self._in_prefill.pop(flight, 0)

    @property
    def active_prefill_tokens(self) -> int:
        """Prompt tokens of requests that have made no token yet, less those found cached as they were sent there."""
        self._drop_prefilled()
        return self._prefill_tokens

    def num_overlap_blocks(self, request: Request) -> int:
        """Blocks at the start of the prompt that its cache holds."""
        if not request.block_hashes:
            return 0
        num_full = request.isl_tokens // self._block_size
        return self.drive.core.scheduler.blocks.num_prefix_blocks(request.block_hashes[:num_full])

    def num_new_blocks(self, request: Request) -> int:
        """Blocks of the prompt that no other request there has: what it would add to `active_blocks`."""
        num_sharing = self._num_sharing
        return self._num_blocks(request) - bisect_left(
            request.block_hashes, True, 0, self._num_shareable(request), key=lambda each: each not in num_sharing
        )

    def _num_shareable(self, request: Request) -> int:
        """
        Full blocks of the prompt. None of one that another worker has prefilled: for those, Dynamo's router
        assumes that nothing is shared.
        """
        if request.num_remote_tokens:
            return 0
        return min(len(request.block_hashes), request.isl_tokens // self._block_size)

    def _drop_prefilled(self) -> None:
        in_prefill = self._in_prefill
        while in_prefill and next(iter(in_prefill)).first_token_s is not None:
            self._prefill_tokens -= in_prefill.popitem(last=False)[1]

    def _num_blocks(self, request: Request) -> int:
        return -(-request.isl_tokens // self._block_size)

    @property
    def _block_size(self) -> int:
        return self.drive.core.scheduler.blocks.block_size


class Counted(Protocol):
    """A worker of which it is known how many requests it has."""

    @property
    def num_active(self) -> int: ...


Worker = TypeVar("Worker", bound=Counted)
Rank = TypeVar("Rank", bound=RoutedLoad)
Router = Callable[[Request, Sequence[Worker]], Worker]


def make_router(
    settings: RouterSettings, rng: np.random.Generator, worker_of: Callable[[Rank], int] | None = None
) -> Router[Rank]:
    """
    A router with a state of its own. It is given workers that are up, at least one.

    `worker_of` says that they are data-parallel ranks, those of a worker one after the other. By KV cost a
    rank is a worker of its own; with the other modes the worker chooses among its ranks (`rank_choice`).
    """
    if settings.router_mode == "kv":
        return _by_kv_cost(settings, rng)
    if worker_of is None:
        return _by_count(settings, rng)
    route: Router[_Worker[Rank]] = _by_count(settings, rng)

    def choose(request: Request, ranks: Sequence[Rank]) -> Rank:
        chosen = route(request, [_Worker(list(group)) for _, group in groupby(ranks, worker_of)]).ranks
        return chosen[least_loaded_rank([rank.drive for rank in chosen])]

    return choose


class _Worker(Generic[Rank]):
    """Several ranks as one worker."""

    def __init__(self, ranks: list[Rank]) -> None:
        self.ranks = ranks

    @property
    def num_active(self) -> int:
        return sum(rank.num_active for rank in self.ranks)


def _by_count(settings: RouterSettings, rng: np.random.Generator) -> Router[Worker]:
    routers: dict[str, Router[Worker]] = {
        "round-robin": _round_robin(),
        "random": lambda _, workers: workers[int(rng.integers(len(workers)))],
        "power-of-two": lambda _, workers: _least_loaded(
            [workers[index] for index in rng.permutation(len(workers))[:2]]
        ),
        "least-loaded": lambda _, workers: _least_loaded(workers),
    }
    return routers[settings.router_mode]


def _round_robin() -> Router[Worker]:
    num_routed = 0

    def choose(_: Request, workers: Sequence[Worker]) -> Worker:
        nonlocal num_routed
        num_routed += 1
        return workers[(num_routed - 1) % len(workers)]

    return choose


def _least_loaded(workers: Sequence[Worker]) -> Worker:
    return min(workers, key=lambda worker: worker.num_active)


def _by_kv_cost(settings: RouterSettings, rng: np.random.Generator) -> Router[Rank]:
    """The lowest cost, or with a temperature a draw by softmax over the costs, scaled to a range of 1."""

    def choose(request: Request, workers: Sequence[Rank]) -> Rank:
        costs = [_kv_cost(settings, request, worker) for worker in workers]
        if settings.router_temperature == 0:
            lowest = min(costs)
            return _least_loaded([worker for worker, cost in zip(workers, costs, strict=True) if cost == lowest])
        spread = max(costs) - min(costs)
        scaled = (np.asarray(costs) - min(costs)) / (spread or 1.0)
        weights = np.exp(-scaled / settings.router_temperature)
        return workers[int(rng.choice(len(workers), p=weights / weights.sum()))]

    return choose


def _kv_cost(settings: RouterSettings, request: Request, worker: RoutedLoad) -> float:
    """
    Blocks to prefill, less the credit for those in the cache, plus blocks that would decode, of which those that
    several requests share count once. What another worker has prefilled counts for neither of the first two.

    Source: ai-dynamo 1.4.2, `dynamo.frontend --help`, router options: "adjusted prompt-side prefill load after
    overlap ... credits are subtracted", "block-equivalent decode cost", "When tracking active blocks, assume KV
    cache reuse".
    """
    decode_blocks = worker.active_blocks + worker.num_new_blocks(request)
    if request.num_remote_tokens:
        return decode_blocks
    block_size = worker.drive.core.scheduler.blocks.block_size
    prefill_blocks = (worker.active_prefill_tokens + request.isl_tokens) / block_size
    overlap_blocks = worker.num_overlap_blocks(request)
    adjusted = prefill_blocks - settings.router_kv_overlap_score_credit * overlap_blocks
    return settings.router_prefill_load_scale * adjusted + decode_blocks
