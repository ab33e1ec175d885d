"""
Benchmarks of hidden profiles, as a user has them of a server: simulated, written as AIPerf writes, read again.

    runs = benchmark(folder, "h100-sxm/...", {1: 24, 8: 48})       concurrency -> requests
"""

from __future__ import annotations

from pathlib import Path

from mock_engine.deployment import DeploymentSettings, WorkerGroup
from mock_engine.engine_settings import EngineSettings
from mock_engine.profile_fit import ObservedRun, read_run
from mock_engine.simulation import SimulationSettings, simulate
from mock_engine.workload import Workload

LENGTHS = {"isl": 600, "isl_stddev": 300.0, "osl": 200, "osl_stddev": 80.0}


def export(
    path: Path, profile: str, *, jitter: float | None = None, seed: int = 0, turnaround_s: float = 0.0, **load
) -> Path:
    """Simulate a load of `LENGTHS` and what `load` changes of it; the rows go to `path`."""
    engine = EngineSettings(profile=profile, jitter=jitter, seed=seed)
    workload = Workload(**{**LENGTHS, "random_seed": seed, **load})
    settings = SimulationSettings(
        DeploymentSettings((WorkerGroup(engine),)), workload, client_turnaround_s=turnaround_s
    )
    simulate(settings, requests_out=path)
    return path


def benchmark(folder: Path, profile: str, counts: dict[int, int], **options) -> list[ObservedRun]:
    """One run for each concurrency."""
    runs = []
    for concurrency, num_requests in counts.items():
        artifacts = folder / f"concurrency-{concurrency}"
        artifacts.mkdir()
        export(
            artifacts / "profile_export.jsonl",
            profile,
            concurrency=concurrency,
            request_count=num_requests,
            **options,
        )
        runs.append(read_run(artifacts))
    return runs
