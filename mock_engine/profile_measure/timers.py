"""
How long a piece of work takes, over and over.

    seconds = timer.time(work, repeats=20)      one figure a repeat

`GpuTimer`: CUDA events around replays of a CUDA graph. Before each replay a buffer of four times the L2 cache is
written, so that weights and KV cache come from memory, as in a pass, where those of all other layers went by in
between. It is written several times over, which keeps the GPU busy while the host launches the graph: launching is
not in the time.
`CpuTimer`: the host's clock, no graph; the cache is emptied as well.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from mock_engine.profile_measure.measuring import Work

_MAX_POINT_S = 1.0  # a point of slow passes is repeated less often...
_MIN_REPEATS = 5  # ...but so often
_WARM_UPS = 2
_FLUSHES = 5  # longer, together, than it takes to launch a graph


def repeats_for(first_s: float, repeats: int) -> int:
    """How often to repeat what took `first_s` seconds: `repeats` times, less if that takes above a second."""
    return min(repeats, max(_MIN_REPEATS, int(_MAX_POINT_S / max(first_s, 1e-9))))


class GpuTimer:
    """Times work on the current CUDA device. The work must be fit for a CUDA graph: no sizes that depend on data."""

    def __init__(self, l2_cache_bytes: int) -> None:
        self._flushed = torch.empty(4 * l2_cache_bytes, dtype=torch.int8, device="cuda")

    def time(self, work: Work, repeats: int) -> list[float]:
        """Seconds of each repeat."""
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # cuBLAS chooses kernels and compilers compile before anything is captured
            for _ in range(_WARM_UPS):
                work()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = work()  # its tensors live as long as the graph
        self._replay_s(graph)
        seconds = [self._replay_s(graph)]
        while len(seconds) < repeats_for(seconds[0], repeats):
            seconds.append(self._replay_s(graph))
        del kept
        graph.reset()
        return seconds

    def _replay_s(self, graph: torch.cuda.CUDAGraph) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        for _ in range(_FLUSHES):
            self._flushed.zero_()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


class CpuTimer:
    """Times work on the host."""

    def __init__(self, l2_cache_bytes: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._flushed = torch.empty(l2_cache_bytes, dtype=torch.int8)
        self._clock = clock

    def time(self, work: Work, repeats: int) -> list[float]:
        """Seconds of each repeat."""
        for _ in range(_WARM_UPS):
            work()
        seconds = [self._run_s(work)]
        while len(seconds) < repeats_for(seconds[0], repeats):
            seconds.append(self._run_s(work))
        return seconds

    def _run_s(self, work: Work) -> float:
        self._flushed.zero_()
        start_s = self._clock()
        work()
        return self._clock() - start_s
