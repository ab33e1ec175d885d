"""Sweeps and searches: the front that no point beats, the bracket around a rate, and where simulations run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mock_engine.deployment import DeploymentSettings, WorkerGroup
from mock_engine.engine_settings import EngineSettings
from mock_engine.errors import ConfigError, ProcessError
from mock_engine.parallel import make_pool
from mock_engine.simulation import SimulationSettings, simulate
from mock_engine.slos import parse_slos
from mock_engine.sweep import SweepPoint, find_max_rate, pareto_front
from mock_engine.workload import Workload
from tests.helpers.processes import wait_for

SMALL = SimulationSettings(
    DeploymentSettings((WorkerGroup(EngineSettings()),)), Workload(isl=64, osl=8, concurrency=2, request_count=10)
)


def point(tokens_per_gpu_s, tokens_per_user_s):
    metrics = {
        "output_token_throughput": {"avg": float(tokens_per_gpu_s)},
        "output_token_throughput_per_user": {"avg": float(tokens_per_user_s)},
    }
    return SweepPoint({}, SimpleNamespace(metrics=metrics, num_gpus=1, num_finished=1))


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=20))
def test_the_front_is_exactly_the_points_that_no_other_beats(places):
    points = [point(*place) for place in places]
    front = pareto_front(points)
    for each, (gpu, user) in zip(points, places, strict=True):
        is_beaten = any(x >= gpu and y >= user and (x, y) != (gpu, user) for x, y in places)
        assert (each in front) == (not is_beaten)


class StepPool:
    """Simulations that meet their objectives up to a rate, in no time."""

    def __init__(self, limit, num_processes):
        self.limit = limit
        self.num_processes = num_processes
        self.rates = []

    def run(self, settings, on_done):
        results = []
        for each in settings:
            rate = each.workload.request_rate
            if rate is None:  # how long does a request take that is alone?
                assert each.workload.concurrency == 1
                return [SimpleNamespace(metrics={"request_latency": {"avg": 500.0}}, num_finished=20)]
            assert each.workload.benchmark_duration == 60.0
            self.rates.append(rate)
            good = {"avg": 10.0 if rate <= self.limit else 0.0}
            results.append(SimpleNamespace(metrics={"good_request_count": good}, num_sent=10, keeps_up=True))
            on_done()
        return results


@given(limit=st.floats(0.01, 5000), num_processes=st.integers(1, 9))
def test_the_search_finds_the_rate_within_one_per_cent_and_tries_few(limit, num_processes):
    settings = SimulationSettings(SMALL.deployment, Workload(), parse_slos("time_to_first_token:1s"))
    pool = StepPool(limit, num_processes)
    found = find_max_rate(settings, 0.95, pool, lambda: None)
    assert found.best.request_rate <= limit < found.best.request_rate * 1.01
    assert [each.request_rate for each in found.tried] == sorted(pool.rates)
    assert len(pool.rates) < 25 + 6 * num_processes


def test_objectives_that_every_rate_meets_end_the_search_with_an_error():
    settings = SimulationSettings(SMALL.deployment, Workload(), parse_slos("time_to_first_token:1s"))
    with pytest.raises(ConfigError, match="any rate meets these objectives"):
        find_max_rate(settings, 0.95, StepPool(float("inf"), 2), lambda: None)


def test_a_pool_gives_what_simulating_here_gives_in_the_same_order():
    settings = [SimulationSettings(SMALL.deployment, Workload(isl=isl, osl=8, request_count=10)) for isl in (64, 900)]
    done = []
    with make_pool(2, is_ray=False) as pool:
        results = pool.run(settings, lambda: done.append(1))
    assert [each.to_json() for each in results] == [simulate(each).to_json() for each in settings]
    assert len(done) == 2


def test_a_simulation_that_cannot_be_ends_the_sweep_with_its_own_error():
    wrong = SimulationSettings(SMALL.deployment, Workload(isl=10**6, osl=8))
    with make_pool(1, is_ray=False) as pool, pytest.raises(ConfigError, match="the context length is"):
        pool.run([wrong], lambda: None)


def test_a_process_that_is_killed_ends_the_sweep_and_says_so(monkeypatch):
    monkeypatch.setattr("mock_engine.parallel.simulate", kill_yourself)
    with make_pool(1, is_ray=False) as pool, pytest.raises(ProcessError, match="a process died"):
        pool.run([SMALL], lambda: None)


def kill_yourself(_):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.e2e
def test_processes_of_a_sweep_end_with_a_parent_that_is_killed():
    """Not even SIGKILL leaves one behind: a CI job that runs out of time gives its cores back."""
    sweep = ("simulate", "--request-count", "100000000", "--sweep", "concurrency=64,256", "--processes", "2")
    parent = subprocess.Popen([sys.executable, "-m", "mock_engine", *sweep], stdout=subprocess.DEVNULL)
    workers: list[psutil.Process] = []

    def are_at_work():
        workers[:] = [each for each in psutil.Process(parent.pid).children() if each.cpu_times().user > 0.5]
        return len(workers) == 2

    try:
        wait_for(are_at_work, "both processes compute")
    finally:
        parent.kill()
        parent.wait()
    wait_for(lambda: not any(each.is_running() and each.status() != "zombie" for each in workers), "both have ended")


class FakeRay(ModuleType):
    """As much of Ray as is used, in this process."""

    class exceptions:
        class RayTaskError(Exception):
            def __init__(self, cause):
                super().__init__(str(cause))
                self.cause = cause

    def __init__(self):
        super().__init__("ray")
        self.__spec__ = SimpleNamespace(name="ray")
        self.is_up = True
        self.calls = []

    def init(self, **options):
        self.calls.append(("init", options["address"]))
        if not self.is_up:
            raise ConnectionError("no cluster")

    def shutdown(self):
        self.calls.append("shutdown")

    def cluster_resources(self):
        return {"CPU": 3.0}

    def remote(self, function):
        return SimpleNamespace(remote=lambda *args: (function, args))

    def wait(self, references):
        return references[-1:], references[:-1]  # the last is ready first

    def get(self, reference):
        function, args = reference
        try:
            return function(*args)
        except Exception as error:
            raise self.exceptions.RayTaskError(error) from error


@pytest.fixture
def ray(monkeypatch):
    module = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", module)
    return module


def test_ray_runs_them_on_the_cluster_that_is_there_and_lets_go_of_it(ray):
    settings = [SimulationSettings(SMALL.deployment, Workload(isl=isl, osl=8, request_count=10)) for isl in (64, 900)]
    with make_pool(None, is_ray=True) as pool:
        assert pool.num_processes == 3
        results = pool.run(settings, lambda: None)
    assert [each.to_json() for each in results] == [simulate(each).to_json() for each in settings]
    assert ray.calls == [("init", "auto"), "shutdown"]


@pytest.mark.usefixtures("ray")
def test_an_error_on_ray_is_the_simulation_s_own():
    with make_pool(None, is_ray=True) as pool, pytest.raises(ConfigError, match="the context length is"):
        pool.run([SimulationSettings(SMALL.deployment, Workload(isl=10**6, osl=8))], lambda: None)


def test_without_a_cluster_or_with_processes_ray_is_refused(ray):
    ray.is_up = False
    with pytest.raises(ConfigError, match="--ray found no Ray cluster"):
        make_pool(None, is_ray=True)
    with pytest.raises(ConfigError, match="--processes is for this machine"):
        make_pool(2, is_ray=True)
