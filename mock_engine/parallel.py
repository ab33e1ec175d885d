"""
Many simulations at once: on all cores of this machine, or on a Ray cluster that is there already.

    with Pool(processes=8) as pool:
        results = pool.run(settings)           in the order of `settings`, a list
"""

from __future__ import annotations

import importlib
import importlib.util
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any, Protocol

from mock_engine.errors import ConfigError, ProcessError
from mock_engine.parent_death import die_with_parent
from mock_engine.simulation import SimulationResults, SimulationSettings, simulate

OnDone = Callable[[], None]


class Pool(Protocol):
    """Runs simulations side by side. Raises what the first failing one raises."""

    num_processes: int

    def run(self, settings: Sequence[SimulationSettings], on_done: OnDone) -> list[SimulationResults]: ...

    def __enter__(self) -> Pool: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def make_pool(processes: int | None, is_ray: bool) -> Pool:
    """A pool of so many processes (None: one a core), here or on Ray. Raises `ConfigError` if there is none."""
    if processes is not None and processes < 1:
        raise ConfigError(f"--processes is {processes}; it must be at least 1")
    if is_ray:
        if processes is not None:
            raise ConfigError("--processes is for this machine; --ray takes what the cluster gives. Leave one out.")
        return _RayPool()
    return _LocalPool(processes or len(os.sched_getaffinity(0)))


class _LocalPool:
    def __init__(self, num_processes: int) -> None:
        self.num_processes = num_processes
        self._executor = ProcessPoolExecutor(
            num_processes, mp_context=multiprocessing.get_context("spawn"), initializer=_belong_to_parent
        )

    def run(self, settings: Sequence[SimulationSettings], on_done: OnDone) -> list[SimulationResults]:
        futures: list[Future[SimulationResults]] = [self._executor.submit(simulate, each) for each in settings]
        try:
            for future in as_completed(futures):
                future.result()
                on_done()
        except BrokenProcessPool as error:
            raise ProcessError("a process died, perhaps for want of memory. Use fewer --processes.") from error
        return [future.result() for future in futures]

    def __enter__(self) -> _LocalPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:  # do not wait for what nobody wants any more
            for process in multiprocessing.active_children():
                process.terminate()
        self._executor.shutdown(cancel_futures=True)


def _belong_to_parent() -> None:
    """Ctrl-C is the first process's to handle: it ends the others. They end with it in any case."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent()()


class _RayPool:
    """Ray schedules the simulations; what runs there must have mock-engine installed."""

    def __init__(self) -> None:
        if importlib.util.find_spec("ray") is None:
            raise ConfigError("--ray needs Ray, which is not installed. Run: pip install ray, or leave --ray out.")
        self._ray: Any = importlib.import_module("ray")
        try:
            self._ray.init(address="auto", log_to_driver=False, logging_level="WARNING")
        except ConnectionError:
            raise ConfigError(
                "--ray found no Ray cluster. Start one with 'ray start --head', or leave --ray out."
            ) from None
        self.num_processes = max(1, int(self._ray.cluster_resources().get("CPU", 1)))
        self._simulate = self._ray.remote(simulate)

    def run(self, settings: Sequence[SimulationSettings], on_done: OnDone) -> list[SimulationResults]:
        references = [self._simulate.remote(each) for each in settings]
        waiting = list(references)
        while waiting:
            done, waiting = self._ray.wait(waiting)
            self._get(done[0])
            on_done()
        return [self._get(reference) for reference in references]

    def _get(self, reference: Any) -> SimulationResults:
        try:
            results: SimulationResults = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from None
        return results

    def __enter__(self) -> _RayPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ray.shutdown()
