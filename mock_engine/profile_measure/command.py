"""
`mock-engine profiles measure`: from flags to a profile's folder.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from mock_engine.errors import ConfigError
from mock_engine.json_file import write_json
from mock_engine.model_config import ModelConfig
from mock_engine.profile import WEIGHT_BYTES, Profile, as_name
from mock_engine.profile_measure.gpus import Device, check_torch, find_device, with_clock_now
from mock_engine.profile_measure.grid import NUM_LEVELS
from mock_engine.profile_measure.measured_models import read_measured
from mock_engine.profile_measure.measuring import Measurement, Plan, Timer, measure
from mock_engine.profile_measure.memory import plan_memory
from mock_engine.profile_measure.overhead import fit_overhead
from mock_engine.profile_measure.profile_document import NO_OVERHEAD, compare, jitter_of, make_tables, measured_document
from mock_engine.profile_measure.report import report_markdown, results_json, summary_lines
from mock_engine.profile_measure.settings import MeasureSettings
from mock_engine.profile_writing import write_folder
from mock_engine.roofline import Roofline


def measure_command(
    flags: argparse.Namespace, console: Console, make_timer: Callable[[Device], Timer] | None = None
) -> int:
    """Measure, write the profile and its report, print how parts and whole passes agree. Raises `MockEngineError`."""
    settings = MeasureSettings.from_flags(flags)
    if flags.json is not None and not flags.json.parent.is_dir():
        raise ConfigError(
            f"--json {flags.json}: there is no folder {flags.json.parent}. Make it, or name another file."
        )
    config = read_measured(settings.model, settings.max_model_len)
    if settings.model_name is not None:
        config = config._replace(name=as_name(settings.model_name) or config.name)
    check_torch(settings.device)
    device = find_device(settings)
    limits = device.limits(config, settings)
    memory = plan_memory(config, limits, device.free_bytes, device.memory_kind)
    roofline = Roofline(config.shape, device.datasheet, 1, WEIGHT_BYTES[settings.dtype], "bf16")
    plan = Plan(limits, memory.kv_tokens, roofline, settings.repeats, settings.max_minutes * 60)
    _make_folder(settings.out)
    console.print(
        f"{config.name} in {settings.dtype} on {device.product}: KV cache of {memory.kv_tokens:,} tokens, contexts "
        f"up to {limits.max_model_len:,}, batches up to {limits.max_num_seqs:,}",
        highlight=False,
        soft_wrap=True,
    )
    start_s = time.monotonic()
    measured, how = _measure(config, settings, device, plan, console, make_timer or _timer)
    device = with_clock_now(device)
    minutes = (time.monotonic() - start_s) / 60
    profile = _write(settings, config, device, plan, how, measured, minutes, console, flags.json)
    console.print(
        f"{profile.name}: {len(measured)} points in {minutes:.1f} minutes. Try it:\n"
        f"mock-engine simulate --profile {settings.out}",
        highlight=False,
        soft_wrap=True,
    )
    return 0


def _measure(
    config: ModelConfig,
    settings: MeasureSettings,
    device: Device,
    plan: Plan,
    console: Console,
    make_timer: Callable[[Device], Timer],
) -> tuple[list[Measurement], tuple[str, str]]:
    """The points, and how attention and element-wise kernels ran."""
    import torch

    from mock_engine.profile_measure.transformer import RandomTransformer

    try:
        model = RandomTransformer(config, plan.kv_tokens, settings.dtype, device.kind, settings.seed)
        with _progress(console) as on_point:
            measured = measure(model, make_timer(device), plan, on_point)
    except torch.OutOfMemoryError:
        raise ConfigError(
            f"{device.product} ran out of memory, though {device.free_bytes / 1e9:.1f} GB were free at the start. "
            "End what else runs there, or lower --max-num-batched-tokens and --max-num-seqs."
        ) from None
    return measured, (model.attention_backend.how, model.elementwise.how)


def _write(
    settings: MeasureSettings,
    config: ModelConfig,
    device: Device,
    plan: Plan,
    how: tuple[str, str],
    measured: list[Measurement],
    minutes: float,
    console: Console,
    json_path: Path | None,
) -> Profile:
    date = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    tables = make_tables(measured)
    facts = (settings, config, device, plan, how, date, jitter_of(measured))
    comparisons = compare(measured_document(*facts, NO_OVERHEAD), tables, measured)
    fit = fit_overhead(comparisons)
    document = measured_document(*facts, fit)
    profile = write_folder(settings.out, document, tables)
    report = report_markdown(document, measured, comparisons, fit, minutes)
    (settings.out / "report.md").write_text(report, encoding="utf-8")
    write_json(json_path, results_json(document, measured, comparisons, fit, minutes))
    for line in summary_lines(fit):
        console.print(line, highlight=False, soft_wrap=True)
    return profile


def _timer(device: Device) -> Timer:
    from mock_engine.profile_measure.timers import CpuTimer, GpuTimer

    return GpuTimer(device.l2_cache_bytes) if device.kind == "cuda" else CpuTimer(device.l2_cache_bytes)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {folder}: {error.strerror}. Name a folder that can be written.") from None


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[Callable[[int, int, int], None]]:
    """A bar for each level on a terminal, nothing elsewhere."""
    if not console.is_terminal:
        yield lambda _level, _done, _of: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("measuring")

        def on_point(level: int, done: int, of: int) -> None:
            progress.update(task, description=f"grid {level + 1} of {NUM_LEVELS}", completed=done, total=of)

        yield on_point
