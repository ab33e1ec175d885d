"""
`mock-engine profiles import SOURCE`: profiles out of measurements.

    kernels     NVIDIA's measured kernels (needs the extra `profiles`)
    dynamo      what dynamo.mocker --planner-profile-data takes, and Dynamo's pre-swept results
    splitwise   a CSV file like Splitwise's perf_model.csv
    steps       a plain CSV file of an engine's steps
    catalogue   all that ships

The importers are loaded when one is used: the command line does without them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.progress import track

from mock_engine.errors import ProfileError
from mock_engine.json_file import write_json
from mock_engine.profile import PROFILES_DIR, WEIGHT_BYTES, Profile
from mock_engine.roofline import KV_CACHE_BYTES

_DYNAMO_HELP = "the profiler's folder, the mocker's .npz, or a folder or .csv of pre-swept results"


def add_import_flags(parser: argparse.ArgumentParser) -> None:
    """Add one subcommand for each source, with its flags."""
    sources = parser.add_subparsers(metavar="SOURCE", required=True)
    kernels = sources.add_parser("kernels", help="NVIDIA's measured kernels; needs pip install 'mock-engine[profiles]'")
    _add_target_flags(kernels, dtypes=("bf16", "fp8", "fp8_block"))
    kernels.add_argument("--backend", default="vllm", help="vllm, trtllm or sglang (%(default)s)")
    kernels.add_argument(
        "--backend-version", metavar="VERSION", help="whose kernels (default: the newest complete ones)"
    )

    dynamo = sources.add_parser("dynamo", help="results of Dynamo's profiler: its npz and json files")
    dynamo.add_argument("path", type=Path, metavar="PATH", help=_DYNAMO_HELP)
    _add_target_flags(dynamo, dtypes=tuple(WEIGHT_BYTES))

    steps = sources.add_parser(
        "steps",
        help="a plain CSV file of an engine's steps",
        epilog="Columns: prefill_tokens, decode_batch_size, context_tokens (summed over the decoding sequences), ms.",
    )
    steps.add_argument("path", type=Path, metavar="CSV", help="one row a step")
    _add_target_flags(steps, dtypes=tuple(WEIGHT_BYTES))
    splitwise = sources.add_parser("splitwise", help="a CSV file like Splitwise's perf_model.csv")
    splitwise.add_argument("path", type=Path, metavar="CSV", help="perf_model.csv")
    _add_target_flags(splitwise, dtypes=())
    splitwise.add_argument("--file-model", metavar="NAME", help="what the file calls the model (default: as Splitwise)")
    splitwise.add_argument("--file-hardware", metavar="NAME", help="and the GPU (default: as Splitwise)")

    for source, engine in ((dynamo, "vllm"), (steps, "vllm"), (splitwise, "splitwise")):
        source.add_argument("--backend", default=engine, help="the engine that was measured (%(default)s)")
        source.add_argument("--backend-version", metavar="VERSION", help="its version (default: not stated)")
        source.add_argument("--source-name", metavar="TEXT", help="who measured, and where it is published")
        source.add_argument("--source-version", metavar="TEXT", default="not stated", help="of that (%(default)s)")
        source.add_argument("--licence", metavar="TEXT", default="not stated", help="of the figures (%(default)s)")

    catalogue = sources.add_parser("catalogue", help="all that ships")
    catalogue.add_argument("--data", type=Path, required=True, metavar="DIR", help="where the published figures are")
    catalogue.add_argument(
        "--catalogue",
        type=Path,
        default=PROFILES_DIR / "catalogue.toml",
        metavar="FILE",
        help="(default: the shipped one)",
    )
    for name, source in sources.choices.items():
        source.add_argument(
            "--out",
            type=Path,
            default=Path("profiles"),
            metavar="DIR",
            help="folder to write profiles in (%(default)s)",
        )
        source.add_argument("--json", type=Path, metavar="FILE", help="write names, folders and errors there")
        source.set_defaults(source=name)


def _add_target_flags(parser: argparse.ArgumentParser, dtypes: tuple[str, ...]) -> None:
    parser.add_argument("--system", required=True, metavar="GPU", help="such as h100_sxm or a100_sxm")
    parser.add_argument("--model", required=True, help="such as llama-3.1-8b, or a config.json, or its folder")
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="GPUs that share the model (%(default)s)")
    if dtypes:
        parser.add_argument("--dtype", choices=dtypes, default="bf16", help="of the weights (%(default)s)")
        parser.add_argument(
            "--kv-cache-dtype",
            choices=tuple(KV_CACHE_BYTES),
            help="of the KV cache, bf16 is any 16 bit type (default: fp8 for trtllm with --dtype fp8, else bf16)",
        )


def import_command(flags: argparse.Namespace, console: Console) -> int:
    """Build what the flags ask for, and say what came of it. Raises `ProfileError`."""
    if getattr(flags, "tp", 1) < 1:
        raise ProfileError(f"--tp is {flags.tp}; allowed is a whole number of at least 1. Use --tp 1 for one GPU.")
    profiles = _catalogue(flags, console) if flags.source == "catalogue" else [_import_one(flags)]
    write_json(
        flags.json,
        [
            {"name": profile.name, "folder": str(flags.out / profile.name), "expected_error": profile.expected_error}
            for profile in profiles
        ],
    )
    for profile in profiles:
        points = sum(len(table.seconds) for table in profile.latency.values())
        kv_tokens = profile.total_kv_blocks() * profile.block_size
        errors = [f"{table} {error:.1%}" for table, error in profile.expected_error.items()]
        console.print(
            f"{flags.out / profile.name}: {points:,} points, {kv_tokens:,} KV tokens; "
            f"error of a point left out: {', '.join(errors) or 'too few points to tell'}",
            highlight=False,
            soft_wrap=True,
            markup=False,
        )
    return 0


def _import_one(flags: argparse.Namespace) -> Profile:
    from mock_engine import profile_import

    system = flags.system.replace("-", "_")
    if flags.source == "kernels":
        return profile_import.import_kernel_tables(
            system,
            flags.model,
            flags.tp,
            flags.dtype,
            flags.backend,
            flags.out,
            engine_version=flags.backend_version,
            kv_cache_dtype=flags.kv_cache_dtype,
        )
    measured = {
        "system": system,
        "model": flags.model,
        "tp": flags.tp,
        "engine": flags.backend,
        "engine_version": flags.backend_version,
    }
    origin = (flags.source_name or flags.path.name, flags.source_version, flags.licence)
    if flags.source == "splitwise":
        return profile_import.import_splitwise(
            flags.path,
            flags.out,
            **measured,
            file_model=flags.file_model,
            file_hardware=flags.file_hardware,
            origin=origin if flags.source_name else None,
        )
    import_passes = {"dynamo": profile_import.import_dynamo_sweep, "steps": profile_import.import_step_rows}
    profile: Profile = import_passes[flags.source](
        flags.path, flags.out, **measured, dtype=flags.dtype, kv_cache_dtype=flags.kv_cache_dtype, origin=origin
    )
    return profile


def _catalogue(flags: argparse.Namespace, console: Console) -> list[Profile]:
    from mock_engine.profile_import.catalogue import build, read_catalogue

    entries = read_catalogue(flags.catalogue)
    shown = track(entries, "building", console=console, transient=True) if console.is_terminal else entries
    return [build(entry, flags.data, flags.out) for entry in shown]
