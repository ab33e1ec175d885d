"""`mock-engine profiles list | show | check`; `import` is in `import_command`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mock_engine.errors import ProfileError
from mock_engine.json_file import write_json
from mock_engine.profile import Profile, check_profile, list_profiles, load_profile
from mock_engine.step import PrefillChunk, StepLoad
from mock_engine.timing import TimingModel

_HOW_MEASURED = {
    "kernels": "kernels, each timed alone, summed",
    "steps": "whole passes of a running engine",
    "not measured": "not measured",
}
_SHOWN_PREFILLS = (512, 2048, 8192)  # new tokens
_SHOWN_DECODES = ((1, 1024), (32, 1024), (128, 1024), (32, 8192))  # batch size, context tokens of each


def list_command(json_path: Path | None, console: Console) -> int:
    """Print the shipped profiles, one a row, under where they come from and how they were measured."""
    profiles = [load_profile(name) for name in list_profiles()]
    if json_path is not None:
        write_json(json_path, [summarize(profile) for profile in profiles])
    by_source: dict[tuple[str, str], list[Profile]] = {}
    for profile in profiles:
        source = f"{profile.source} ({profile.source_version}, {profile.licence})"
        by_source.setdefault((source, profile.tables if profile.is_measured else "not measured"), []).append(profile)
    for (source, how), of_source in by_source.items():
        console.print(f"[bold]{escape(source)}[/bold]: {_HOW_MEASURED[how]}", highlight=False, soft_wrap=True)
        table = Table(box=None, pad_edge=False, header_style="dim")
        table.add_column("profile", no_wrap=True)
        table.add_column("engine", no_wrap=True)
        for column in ("KV tokens", "error"):
            table.add_column(column, justify="right", no_wrap=True)
        for profile in of_source:
            kv_tokens = profile.total_kv_blocks() * profile.block_size
            error = f"{max(profile.expected_error.values()):.1%}" if profile.expected_error else ""
            table.add_row(profile.name, profile.engine_version, f"{kv_tokens:,}", error)
        console.print(table)
        console.print()
    console.print(
        "[dim]error: a point left out and predicted from the others misses by this share of its pass (median, of the "
        "worst table); the measurement's own error comes on top[/dim]",
        soft_wrap=True,
    )
    return 0


def show_command(name: str, json_path: Path | None, console: Console) -> int:
    """Print all there is to know about one profile. Raises `ProfileError`."""
    profile = load_profile(name)
    summary = summarize(profile)
    write_json(json_path, summary)
    for key, value in summary.items():
        if isinstance(value, dict):
            console.print(f"[bold]{key}[/bold]")
            for inner_key, inner_value in value.items():
                console.print(f"  {inner_key}: {_text(inner_value)}", highlight=False, soft_wrap=True, markup=False)
        else:
            console.print(f"[bold]{key}[/bold]  {_text(value)}", highlight=False, soft_wrap=True)
    return 0


def check_command(names: list[str], json_path: Path | None, console: Console) -> int:
    """Check profiles by name or folder, or all shipped ones. Raises `ProfileError` with the first problem, if any."""
    problems = {name: check_profile(name) for name in names or list_profiles()}
    write_json(json_path, problems)
    for name, found in problems.items():
        console.print(f"{name}: {f'{len(found)} wrong' if found else 'fine'}", highlight=False, soft_wrap=True)
    lines = [line for found in problems.values() for line in found]
    if lines:
        raise ProfileError("\n".join(lines))
    return 0


def summarize(profile: Profile) -> dict[str, Any]:
    """A profile as plain data: where it comes from, what fits, and some times as the model gives them."""
    timing = TimingModel(profile)
    prefills = {f"new_tokens {n}": StepLoad((PrefillChunk(n, 0),), 0, 0) for n in _SHOWN_PREFILLS}
    decodes = {
        f"batch_size {batch_size}, context_tokens {context}": StepLoad((), batch_size, batch_size * context)
        for batch_size, context in _SHOWN_DECODES
    }
    num_blocks = profile.total_kv_blocks()
    return {
        "name": profile.name,
        "is_measured": profile.is_measured,
        "tables": {name: f"{len(table.seconds)} points" for name, table in profile.latency.items()},
        "source": {
            "source": f"{profile.source} {profile.source_version}",
            "licence": profile.licence,
            "how_measured": profile.how_measured,
            "overhead": profile.overhead_source,
            "jitter": profile.jitter_source,
            "build_command": profile.build_command,
        },
        "engine": f"{profile.engine} {profile.engine_version}",
        "engine_defaults": {
            key: getattr(profile, key)
            for key in ("block_size", "max_model_len", "max_num_seqs", "max_num_batched_tokens")
        },
        "kv_cache_dtype": profile.kv_cache_dtype,
        "kv_blocks": num_blocks,
        "kv_tokens": num_blocks * profile.block_size,
        "kv_capacity": (
            f"reported by the engine at a utilization of {profile.measured_gpu_memory_utilization}"
            if profile.measured_kv_blocks
            else "computed from memory, weights and KV bytes a token"
        ),
        "jitter_cv": profile.jitter_cv,
        "expected_error": profile.expected_error,
        "prefill_ms": {key: round(timing.step_s(load) * 1e3, 3) for key, load in prefills.items()},
        "decode_ms": {key: round(timing.step_s(load) * 1e3, 3) for key, load in decodes.items()},
        "model_shape": asdict(profile.shape),
        "gpu_datasheet": asdict(profile.datasheet),
    }


def _text(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
