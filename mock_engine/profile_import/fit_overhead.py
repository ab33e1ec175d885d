"""
Fits what vLLM adds to its kernels, on real steps of vLLM on H100.

    python -m mock_engine.profile_import.fit_overhead STEP_CYCLES.csv.gz

The file: one row a step, with columns experiment_id, model, tp, batch_prefill_tokens,
batch_decode_tokens and cyc (ms from this step's start to the next one's). It was
made from inference-sim/inference-sim, branch stepml-experiments, commit 9293b222
(Apache-2.0). Only steps without prefill count: the prompts of these runs were
nearly all in the prefix cache. Prints the figures that `overhead.H100_VLLM` holds.
"""

from __future__ import annotations

import csv
import gzip
import sys
import tempfile
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mock_engine.errors import ProfileError
from mock_engine.profile_import.kernel_tables import import_kernel_tables
from mock_engine.step import StepLoad
from mock_engine.timing import TimingModel

FloatArray = NDArray[np.float64]

MIN_REPEATS = 8  # of one batch size in one experiment, to say how much a step varies
MODELS = {"llama-2-70b": "llama-2-70b", "llama-2-70b-hf": "llama-2-70b", "codellama-34b": "codellama-34b"}
# Mean tokens in the KV cache of a running sequence: the prompt and half of the output, by experiment.
MEAN_CONTEXT_TOKENS = {"general": 698, "codegen": 716}


class Experiment(NamedTuple):
    """Decode steps of one run; arrays of shape (n,), seconds."""

    name: str
    batch_sizes: FloatArray
    measured_s: FloatArray
    kernels_s: FloatArray


class Fit(NamedTuple):
    """What comes out. Errors are mean |predicted / measured - 1|, each experiment counting the same."""

    step_s: float
    per_seq_s: float
    error_before: float
    error_after: float
    jitter_cv: float


def read_experiments(path: Path) -> list[Experiment]:
    """Decode steps by experiment, each with the time that its kernels take. Raises `ProfileError`."""
    steps: dict[tuple[str, str, int], list[tuple[int, float]]] = defaultdict(list)
    try:
        with gzip.open(path, "rt", newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if float(row["batch_prefill_tokens"]) == 0:
                    key = (row["experiment_id"], row["model"], int(row["tp"]))
                    steps[key].append((int(float(row["batch_decode_tokens"])), float(row["cyc"]) / 1e3))
    except (OSError, KeyError, ValueError) as error:
        raise ProfileError(f"{path} is not a table of steps: {error!r}. See {__name__} for its columns.") from None
    experiments = []
    with tempfile.TemporaryDirectory() as folder:
        for (name, model, tp), rows in steps.items():
            profile = import_kernel_tables("h100_sxm", MODELS[model], tp, "bf16", "vllm", Path(folder))
            timing = TimingModel(replace(profile, overhead_step_s=0.0, overhead_per_seq_s=0.0))
            context_tokens = MEAN_CONTEXT_TOKENS[name.rsplit("-", 1)[1]]
            kernels_s = [timing.step_s(StepLoad((), batch, batch * context_tokens)) for batch, _ in rows]
            batch_sizes, measured_s = np.asarray(rows, dtype=np.float64).T
            experiments.append(Experiment(name, batch_sizes, measured_s, np.asarray(kernels_s)))
    return experiments


def fit(experiments: list[Experiment]) -> Fit:
    """The overhead, none of it negative, that leaves the smallest mean error; and the jitter."""

    def error(step_s: float, per_seq_s: float) -> float:
        return float(
            np.mean(
                [
                    np.mean(np.abs((run.kernels_s + step_s + per_seq_s * run.batch_sizes) / run.measured_s - 1))
                    for run in experiments
                ]
            )
        )

    grid = [(step_us * 1e-6, seq_us * 1e-6) for step_us in range(0, 1500, 20) for seq_us in range(21)]
    step_s, per_seq_s = min(grid, key=lambda pair: error(*pair))
    variations = []
    for run in experiments:
        for batch_size in np.unique(run.batch_sizes):
            repeats_s = run.measured_s[run.batch_sizes == batch_size]
            if len(repeats_s) >= MIN_REPEATS:
                variations.append(np.std(repeats_s, ddof=1) / np.mean(repeats_s))
    return Fit(step_s, per_seq_s, error(0.0, 0.0), error(step_s, per_seq_s), float(np.mean(variations)))


def main(arguments: list[str]) -> int:
    """Print the fit for the file named on the command line."""
    if len(arguments) != 1:
        print(f"usage: python -m {__spec__.name if __spec__ else __name__} STEP_CYCLES.csv.gz", file=sys.stderr)
        return 2
    try:
        experiments = read_experiments(Path(arguments[0]))
    except ProfileError as error:
        print(f"mock-engine: error: {error}", file=sys.stderr)
        return 2
    for run in experiments:
        print(
            f"{run.name}: {len(run.measured_s)} decode steps, kernels {np.median(run.kernels_s / run.measured_s):.1%}"
        )
    result = fit(experiments)
    print(f"overhead {result.step_s * 1e6:.0f} us a step, {result.per_seq_s * 1e6:.0f} us a sequence")
    print(f"mean error {result.error_before:.1%} without, {result.error_after:.1%} with")
    print(f"jitter: coefficient of variation {result.jitter_cv:.1%} at the same batch size")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
