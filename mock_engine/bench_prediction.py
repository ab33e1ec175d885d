"""
What a benchmark should find, before it runs: the same load on the same workers in virtual time.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields

from mock_engine.aiperf_schema import Metric
from mock_engine.deployment import DeploymentSettings, WorkerGroup
from mock_engine.errors import ConfigError
from mock_engine.fleet import FleetSettings
from mock_engine.load import Load
from mock_engine.simulate_flags import add_workload_flags
from mock_engine.simulation import SimulationSettings, simulate
from mock_engine.workload import Workload

# Ingress is left out of the model: Dynamo's frontend is there and takes its own time, some of which is in this.
# Mean time from the moment an answer's last token is due to the arrival of its client's next request: sending,
# AIPerf's bookkeeping, HTTP, tokenizing. On two cores 6 ms at least, and up to 40 where many come back at once.
TURNAROUND_S = 0.015


@dataclass(frozen=True, slots=True)
class Prediction:
    """AIPerf's metrics by simulation; without any, `reason` says why."""

    metrics: dict[str, Metric]
    reason: str = ""


def predict(settings: FleetSettings, load: Load) -> Prediction:
    """Simulate what `bench` is about to send. Flags for AIPerf alone, such as those of its output, change nothing."""
    if settings.worker.engine.speedup_ratio != 1:
        return Prediction({}, "a prediction is for --speedup-ratio 1")
    if settings.worker.faults:
        return Prediction({}, "a prediction knows no faults")
    try:
        workload = _workload(load)
        deployment = DeploymentSettings(
            tuple(WorkerGroup(settings.worker.engine, number, role) for role, number in settings.groups),
            kv_transfer_bandwidth=settings.worker.kv_transfer_bandwidth,
            data_parallel_size=settings.worker.data_parallel_size,
            router=settings.router,
            has_ingress=False,
        )
        results = simulate(SimulationSettings(deployment, workload, client_turnaround_s=TURNAROUND_S))
    except (ConfigError, argparse.ArgumentError) as error:
        return Prediction({}, f"no prediction: {error}")
    return Prediction(results.metrics)


def _workload(load: Load) -> Workload:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    add_workload_flags(parser)
    parsed, _ = parser.parse_known_args(list(load.aiperf_flags))
    values = {field.name: getattr(parsed, field.name) for field in fields(Workload)}
    given = {name: value for name, value in load.values().items() if name in values}
    return Workload(**{**values, **given})
