"""
Measurements as a profile: tables, profile.toml, and what whole passes say of them.

    tables = make_tables(measured)
    comparisons = compare(document, tables, measured)
"""

from __future__ import annotations

import math
import statistics
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np

from mock_engine.latency_table import LatencyTable, make_table
from mock_engine.model_config import ModelConfig
from mock_engine.profile import TABLE_COLUMNS
from mock_engine.profile_measure.gpus import Device
from mock_engine.profile_measure.grid import PART_NAMES
from mock_engine.profile_measure.measuring import Measurement, Plan
from mock_engine.profile_measure.overhead import Comparison, OverheadFit
from mock_engine.profile_measure.settings import MeasureSettings
from mock_engine.profile_writing import Document, Origin, Target, make_document, write_folder
from mock_engine.roofline import GpuDatasheet
from mock_engine.timing import TimingModel

NO_OVERHEAD = OverheadFit(0.0, 0.0, (0.0,), (0.0,))


def make_tables(measured: list[Measurement]) -> dict[str, LatencyTable]:
    """The four tables of a `kernels` profile of one GPU."""
    tables = {}
    for name in PART_NAMES:
        rows = [found for found in measured if found.point.table == name]
        points = np.array([found.point.at for found in rows], dtype=np.float64)
        tables[name] = make_table(
            name, TABLE_COLUMNS["kernels"][name], points, np.array([found.seconds for found in rows])
        )
    return tables


def jitter_of(measured: list[Measurement]) -> float:
    """The coefficient of variation of a whole pass repeated: the median over all that were measured."""
    return statistics.median(found.cv for found in measured if found.point.load is not None)


def compare(document: Document, tables: dict[str, LatencyTable], measured: list[Measurement]) -> list[Comparison]:
    """Each whole pass beside the sum of its parts; `document` says that there is no overhead."""
    with tempfile.TemporaryDirectory() as folder:
        timing = TimingModel(write_folder(Path(folder), document, tables))
    return [
        Comparison(found.point.load, found.seconds, timing.step_s(found.point.load))
        for found in measured
        if found.point.load is not None
    ]


def measured_document(
    settings: MeasureSettings,
    config: ModelConfig,
    device: Device,
    plan: Plan,
    how: tuple[str, str],
    date: str,
    jitter_cv: float,
    overhead: OverheadFit,
) -> Document:
    """profile.toml; `how` says which attention ran and how element-wise kernels did."""
    attention, elementwise = how
    on_cpu = " Measured on a CPU, to try the way through: it says nothing of any GPU." if device.kind == "cpu" else ""
    timer = "CUDA events around replays of a CUDA graph" if device.kind == "cuda" else "the host's clock, no graph"
    datasheet = GpuDatasheet(**{name: _rounded(value) for name, value in asdict(device.datasheet).items()})
    torch_version = device.software.split(",")[0].removeprefix("torch ")
    document = make_document(
        Target(device.gpu, config, "torch", torch_version, 1, settings.dtype, datasheet),
        Origin(
            how_measured=(
                f"Parts of a pass, each alone, on {device.product} ({device.software}; clock: {device.clock}), {date}. "
                f"Random weights and KV cache, {attention} over a padded, unpaged KV cache, element-wise kernels "
                f"{elementwise}. Median of up to {settings.repeats} repeats after 2 to warm up, {timer}, L2 cache "
                f"emptied before each; some layers run and counted for all.{on_cpu}"
            ),
            source=f"measured here with 'mock-engine profiles measure' on {date}",
            source_version=f"mock-engine {version('mock-engine')}, {device.software}",
            licence="own measurement",
            build_command=build_command(settings, config),
        ),
        "kernels",
        {
            "overhead_step_s": _rounded(overhead.step_s),
            "overhead_per_seq_s": _rounded(overhead.per_seq_s),
            "overhead_source": (
                f"What {len(overhead.errors_before)} whole passes of the same model under the same timer took beyond "
                f"their parts; mean difference {overhead.mean_before:.1%} without it, {overhead.mean_after:.1%} with. "
                "An engine's scheduling, sampling and launching are not in it (vLLM on H100: 10.75 us a layer, "
                "see profiles/README.md)."
            ),
            "jitter_cv": _rounded(jitter_cv),
            "jitter_source": "Repeats of whole passes, median coefficient of variation; an engine's own is not in it.",
        },
    )
    document["engine_defaults"] |= asdict(plan.limits)
    return document


def build_command(settings: MeasureSettings, config: ModelConfig) -> str:
    """The command again, with names in the place of this machine's paths."""
    words = ["mock-engine profiles measure", f"--model {config.name}", f"--dtype {settings.dtype}"]
    for name, field in MeasureSettings.__dataclass_fields__.items():
        value = getattr(settings, name)
        if name not in ("model", "model_name", "out", "dtype") and value != field.default:
            words.append(f"--{name.replace('_', '-')} {value}")
    return " ".join([*words, "--out DIR"])


def _rounded(value: float) -> float:
    """Four digits."""
    return float(f"{value:.4g}") if math.isfinite(value) else value
