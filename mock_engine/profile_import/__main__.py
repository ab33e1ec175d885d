"""
Builds the shipped profiles.

    python -m mock_engine.profile_import --all --data DIR --out profiles

`DIR` holds Splitwise's perf_model.csv (as splitwise_perf_model.csv) and Dynamo's
pre-swept results (dynamo_preswept_h100.csv, or the folder dynamo_preswept_h100
with the wheel's two .npz files). The kernel tables come from the installed
aiconfigurator-core. Where to get all three: profiles/README.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mock_engine.errors import ProfileError
from mock_engine.profile_import import import_dynamo_sweep, import_kernel_tables, import_splitwise

KERNEL_PROFILES = [
    ("h100_sxm", "llama-3.1-8b", 1),
    ("h100_sxm", "llama-3.1-70b", 4),
    ("a100_sxm", "llama-3.1-8b", 1),
    ("a100_sxm", "llama-3.1-70b", 4),
]
DYNAMO_TPS = [2, 4, 8]


def build_all(data_dir: Path, out_dir: Path) -> list[str]:
    """Write all shipped profiles below `out_dir`; returns their names. Raises `ProfileError`."""
    dynamo = data_dir / "dynamo_preswept_h100"
    dynamo = dynamo if dynamo.is_dir() else dynamo.with_suffix(".csv")
    profiles = [import_kernel_tables(*kernels, "bf16", "vllm", out_dir) for kernels in KERNEL_PROFILES]
    profiles += [import_dynamo_sweep(dynamo, tp, out_dir) for tp in DYNAMO_TPS]
    profiles.append(import_splitwise(data_dir / "splitwise_perf_model.csv", out_dir))
    return [profile.name for profile in profiles]


def main(arguments: list[str] | None = None) -> int:
    """Build what the command line asks for; 2 if something is missing."""
    parser = argparse.ArgumentParser(prog="python -m mock_engine.profile_import", description=(__doc__ or "").strip())
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--all", action="store_true", required=True, help="build all shipped profiles")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder with the published figures")
    parser.add_argument("--out", type=Path, default=Path("profiles"), help="where to write (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        names = build_all(options.data, options.out)
    except ProfileError as error:
        print(f"mock-engine: error: {error}", file=sys.stderr)
        return 2
    print("\n".join(names))
    return 0


if __name__ == "__main__":
    sys.exit(main())
