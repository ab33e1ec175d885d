"""
Fits what vLLM adds to its kernels, on real steps of vLLM on H100.

    python -m mock_engine.profile_import.fit_overhead STEP_CYCLES.csv.gz

The file: one row a step, with columns experiment_id, model, tp, batch_num_prefill_reqs, batch_prefill_tokens,
batch_num_decode_reqs, batch_num_finished and cyc (ms from this step's start to the next one's). It was made from
inference-sim/inference-sim, branch stepml-experiments, commit 9293b222 (Apache-2.0). Prompts of these runs were
nearly all in the prefix cache: a prefill is the last few tokens of a prompt.

The overhead of a step grows with the layers of the model (each is a dozen kernels with gaps between them): so
fitted on two runs, it fits the third better than one that is the same for all models. Prints the
figures that `overhead.H100_VLLM` holds.
"""

from __future__ import annotations

import csv
import gzip
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mock_engine.errors import ProfileError
from mock_engine.profile import Profile, load_profile
from mock_engine.step import PrefillChunk, StepLoad
from mock_engine.timing import TimingModel

FloatArray = NDArray[np.float64]

MIN_REPEATS = 8  # of one batch size in one experiment, to say how much a step varies
PROFILES = {
    "llama-2-70b": "h100-sxm/llama-2-70b/vllm-tp4-bf16",
    "llama-2-70b-hf": "h100-sxm/llama-2-70b/vllm-tp4-bf16",
    "codellama-34b": "h100-sxm/codellama-34b/vllm-tp2-bf16",
}
# Mean tokens in the KV cache of a running sequence: the prompt and half of the output, by experiment. And of a prompt.
MEAN_CONTEXT_TOKENS = {"general": 698, "codegen": 716}
MEAN_PROMPT_TOKENS = {"general": 575, "codegen": 593}


class Experiment(NamedTuple):
    """Steps of one run; arrays of shape (n,), seconds."""

    name: str
    num_layers: int
    num_seqs: FloatArray
    num_decode_only: FloatArray  # the batch size, 0 where somebody was in prefill
    num_finished: FloatArray
    measured_s: FloatArray
    kernels_s: FloatArray

    def errors(self, per_layer_s: float, per_seq_s: float) -> FloatArray:
        """predicted / measured - 1 of each step."""
        overhead_s = per_layer_s * self.num_layers + per_seq_s * self.num_seqs
        return np.asarray((self.kernels_s + overhead_s) / self.measured_s - 1)


class Fit(NamedTuple):
    """What comes out. `mean_*` are mean |predicted / measured - 1|, each experiment counting the same."""

    per_layer_s: float
    per_seq_s: float
    mean_before: float
    mean_after: float
    held_out: dict[str, FloatArray]  # errors of each experiment's steps, with the overhead fitted on the others
    per_finished_s: float  # what a step takes longer for each sequence that ends in it, and ...
    per_finished_sd_s: float  # ... the standard error of that
    jitter_cv: float


def kernels_of(name: str) -> TimingModel | None:
    """Step times of a shipped profile without the engine's overhead."""
    return TimingModel(replace(load_profile(name), overhead_step_s=0.0, overhead_per_seq_s=0.0))


def read_experiments(path: Path, timing_of: Callable[[str], TimingModel | None] = kernels_of) -> list[Experiment]:
    """
    Steps by experiment, each with the time that its kernels take, or what else `timing_of` a profile's name says; those
    of which it says nothing are left out. Raises `ProfileError`.
    """
    rows: dict[tuple[str, str], list[tuple[int, int, int, int, float]]] = defaultdict(list)
    try:
        with gzip.open(path, "rt", newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                counts = (
                    "batch_num_prefill_reqs",
                    "batch_prefill_tokens",
                    "batch_num_decode_reqs",
                    "batch_num_finished",
                )
                prefills, tokens, decoding, finished = (int(float(row[name])) for name in counts)
                seconds = float(row["cyc"]) / 1e3
                rows[row["experiment_id"], PROFILES[row["model"]]].append(
                    (prefills, tokens, decoding, finished, seconds)
                )
    except (OSError, KeyError, ValueError) as error:
        raise ProfileError(f"{path} is not a table of steps: {error!r}. See {__name__} for its columns.") from None
    experiments = []
    for (name, profile), steps in rows.items():
        timing = timing_of(profile)
        if timing is not None:
            experiments.append(_experiment(name, load_profile(profile), timing, steps))
    return experiments


def _experiment(
    name: str, profile: Profile, timing: TimingModel, steps: list[tuple[int, int, int, int, float]]
) -> Experiment:
    workload = name.rsplit("-", 1)[1]
    each, prompt = MEAN_CONTEXT_TOKENS[workload], MEAN_PROMPT_TOKENS[workload]
    kernels_s = []
    for prefills, tokens, decoding, _, _ in steps:
        new_tokens = max(1, tokens // prefills) if prefills else 0
        chunks = (PrefillChunk(new_tokens, max(0, prompt - new_tokens)),) * prefills
        kernels_s.append(timing.step_s(StepLoad(chunks, decoding, decoding * each)))
    num_prefills, _, num_decoding, num_finished, measured_s = np.asarray(steps, dtype=np.float64).T
    return Experiment(
        name,
        profile.shape.num_layers,
        num_prefills + num_decoding,
        np.where(num_prefills == 0, num_decoding, 0),
        num_finished,
        measured_s,
        np.asarray(kernels_s),
    )


def fit(experiments: Sequence[Experiment]) -> Fit:
    """The overhead, none of it negative, that leaves the smallest mean error; and the jitter."""
    per_layer_s, per_seq_s = _best(experiments)
    held_out = {}
    if len(experiments) > 1:
        for run in experiments:
            held_out[run.name] = run.errors(*_best([other for other in experiments if other is not run]))
    per_finished_s, per_finished_sd_s = _per_finished(experiments, per_layer_s, per_seq_s)
    variations = []
    for run in experiments:
        for batch_size in np.unique(run.num_decode_only[run.num_decode_only > 0]):
            repeats_s = run.measured_s[run.num_decode_only == batch_size]
            if len(repeats_s) >= MIN_REPEATS:
                variations.append(np.std(repeats_s, ddof=1) / np.mean(repeats_s))
    return Fit(
        per_layer_s,
        per_seq_s,
        _mean_error(experiments, 0.0, 0.0),
        _mean_error(experiments, per_layer_s, per_seq_s),
        held_out,
        per_finished_s,
        per_finished_sd_s,
        float(np.mean(variations)),
    )


def _best(experiments: Sequence[Experiment]) -> tuple[float, float]:
    grid = [(layer * 0.25e-6, seq * 1e-6) for layer in range(120) for seq in range(21)]
    return min(grid, key=lambda pair: _mean_error(experiments, *pair))


def _mean_error(experiments: Sequence[Experiment], per_layer_s: float, per_seq_s: float) -> float:
    return float(np.mean([np.mean(np.abs(run.errors(per_layer_s, per_seq_s))) for run in experiments]))


def _per_finished(experiments: Sequence[Experiment], per_layer_s: float, per_seq_s: float) -> tuple[float, float]:
    """By least squares on what is left, each experiment with a level of its own; slow outliers left out."""
    rest_s, finished = [], []
    for run in experiments:
        errors = run.errors(per_layer_s, per_seq_s)
        usual = np.abs(errors) < 0.2
        left_s = -errors[usual] * run.measured_s[usual]
        rest_s.append(left_s - np.mean(left_s))
        finished.append(run.num_finished[usual] - np.mean(run.num_finished[usual]))
    y, x = np.concatenate(rest_s), np.concatenate(finished)
    if not np.any(x):
        return 0.0, float("inf")
    slope = float(x @ y / (x @ x))
    return slope, float(np.std(y - slope * x) / np.sqrt(x @ x))


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
    result = fit(experiments)
    for run in experiments:
        left_out = result.held_out[run.name]
        print(
            f"{run.name}: {len(run.measured_s)} steps, kernels {np.median(run.kernels_s / run.measured_s):.1%}; "
            f"with the overhead of the others: median error {np.median(np.abs(left_out)):.1%}, "
            f"bias {np.median(left_out):+.1%}"
        )
    every = np.abs(np.concatenate(list(result.held_out.values())))
    print(f"all of them: median error {np.median(every):.1%}, p95 {np.quantile(every, 0.95):.1%}")
    print(f"overhead {result.per_layer_s * 1e6:.2f} us a layer, {result.per_seq_s * 1e6:.0f} us a sequence")
    print(f"mean error {result.mean_before:.1%} without, {result.mean_after:.1%} with")
    print(
        f"each sequence that ends: {result.per_finished_s * 1e6:.0f} us, standard error "
        f"{result.per_finished_sd_s * 1e6:.0f} us: left out of the model"
    )
    print(f"jitter: coefficient of variation {result.jitter_cv:.1%} at the same batch size")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
