"""
What the user asked `mock-engine profiles measure` for.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from mock_engine.errors import ConfigError

DTYPES = ("bf16", "fp16")


@dataclass(frozen=True, slots=True)
class MeasureSettings:
    """The flags, checked as far as they can be without a device."""

    model: Path
    out: Path
    dtype: str = "bf16"
    device: str = "cuda"
    max_model_len: int | None = None  # the model's own
    max_num_seqs: int | None = None  # vLLM's default for the GPU
    max_num_batched_tokens: int | None = None
    repeats: int = 20
    max_minutes: float = 10.0
    model_name: str | None = None
    gpu: str | None = None
    gpu_tflops: float | None = None
    gpu_memory_bandwidth: float | None = None  # GB/s
    seed: int = 0

    @classmethod
    def from_flags(cls, flags: argparse.Namespace) -> MeasureSettings:
        """The settings in parsed flags. Raises `ConfigError`."""
        if flags.tp != 1:
            raise ConfigError(
                f"--tp is {flags.tp}; only --tp 1 is measured: one GPU, without what several say to each other. "
                "For tensor parallelism use a shipped profile."
            )
        if flags.out.exists() and (not flags.out.is_dir() or any(flags.out.iterdir())):
            raise ConfigError(f"--out {flags.out} is not an empty folder; name a new one")
        settings = cls(**{name: getattr(flags, name) for name in cls.__dataclass_fields__})
        for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "repeats"):
            value = getattr(settings, name)
            least = 3 if name == "repeats" else 2
            if value is not None and value < least:
                raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")
        for name in ("max_minutes", "gpu_tflops", "gpu_memory_bandwidth"):
            value = getattr(settings, name)
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"--{name.replace('_', '-')} is {value:g}; it must be above 0")
        return settings


def add_measure_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `profiles measure`; `--json` aside, which all of `profiles` have."""
    parser.add_argument(
        "--model", type=Path, required=True, metavar="CONFIG", help="a model's config.json, or a folder that holds one"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the new profile's folder")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of weights and KV cache (%(default)s)")
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="GPUs a model is split over; only 1")
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="cpu tries the way through; its times say nothing of a GPU (%(default)s)",
    )
    group = parser.add_argument_group("grid")
    group.add_argument("--max-model-len", type=int, help="longest context measured (default: the model's)")
    group.add_argument("--max-num-seqs", type=int, help="largest batch measured (default: as vLLM on this GPU)")
    group.add_argument("--max-num-batched-tokens", type=int, help="most tokens in a step (default: likewise)")
    group.add_argument("--repeats", type=int, default=20, help="times each point is taken; the median counts (20)")
    group.add_argument(
        "--max-minutes", type=float, default=10.0, help="refine the grid for so long; the coarsest is finished (10)"
    )
    group.add_argument("--seed", type=int, default=0, help="seed of the random weights (%(default)s)")
    group = parser.add_argument_group("names and data sheet", "of GPUs other than H100 and H200 SXM, A100 SXM 80GB")
    group.add_argument("--model-name", help="the model's name in the profile (default: its folder's)")
    group.add_argument("--gpu", metavar="NAME", help="the GPU's name in the profile")
    group.add_argument("--gpu-tflops", type=float, help="dense tensor-core TFLOPS in the dtype")
    group.add_argument("--gpu-memory-bandwidth", type=float, help="of its memory, GB/s")
