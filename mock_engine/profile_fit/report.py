"""
What a fit found, what it could not tell, and what to make of it: for the console and for machines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mock_engine.profile_fit.fit import Fit
from mock_engine.profile_fit.observed import ObservedRun
from mock_engine.profile_fit.parameters import CURVES
from mock_engine.profile_fit.sensitivity import step_times
from mock_engine.step import StepLoad
from mock_engine.timing import TimingModel

_IDENTIFIED = 0.5  # posterior over prior standard deviation, at most
_FIRM = 10.0  # a difference of -2 log
_ONLY_TOGETHER = -0.8  # correlation, at most
_MIN_REQUESTS = 20
_LITTLE_SPREAD = 1.5  # longest over shortest prompt
_MANY_LEFT_OUT = 0.1
_STILL_OFF = 0.05
_MUCH_OVERHEAD_S = 0.02


@dataclass(frozen=True, slots=True)
class ParameterRow:
    """One number that was fitted. Of a correction `start` is 1, and all three are factors less their sd, a share."""

    name: str
    text: str
    is_factor: bool
    start: float
    fitted: float
    sd: float
    prior_sd: float  # if what moves all corrections together is known

    @property
    def is_identified(self) -> bool:
        return 0 < self.sd <= _IDENTIFIED * self.prior_sd

    @property
    def is_held(self) -> bool:
        """Whether the fit was told to leave it as it was."""
        return self.sd == 0


@dataclass(frozen=True, slots=True)
class StepRow:
    """Passes of one kind and size that the runs went through."""

    text: str
    num_passes: int
    start_s: float  # mean
    fitted_s: float
    sd: float  # share


def parameter_rows(fit: Fit) -> list[ParameterRow]:
    """All that was fitted."""
    parameters = fit.parameters
    texts = [curve.text for curve in CURVES for _ in curve.knots] + [each.text for each in parameters.overheads]
    rows = []
    columns = (parameters.names, texts, parameters.start, fit.values, fit.sd, parameters.own_sd)
    for index, (name, text, start, value, sd, prior_sd) in enumerate(zip(*columns, strict=True)):
        is_factor = index < parameters.num_corrections
        start, fitted = (1.0, float(np.exp(value))) if is_factor else (float(start), float(value))
        rows.append(ParameterRow(name, text, is_factor, start, fitted, float(sd), float(prior_sd)))
    return rows


def not_identified(rows: Sequence[ParameterRow]) -> list[str]:
    """The corrections that the data do not tell, those of one kind in one text: "matrices at 1, 2, 4,096 tokens"."""
    places: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.is_factor and not row.is_identified and not row.is_held:
            kind, _, where = row.name.partition(" at ")
            place, _, unit = where.partition(" ")
            places.setdefault((kind, unit), []).append(place)
    return [f"{kind} at {', '.join(found)} {unit}" for (kind, unit), found in places.items()]


def step_rows(fit: Fit) -> list[StepRow]:
    """The passes of the replayed runs, by kind and power of two."""
    loads = list(fit.loads)
    counts = np.array(list(fit.loads.values()))
    before = step_times(TimingModel(fit.start), loads)
    after, sds = step_times(TimingModel(fit.profile), loads), fit.step_sd(loads)
    kinds: dict[tuple[int, int], list[int]] = {}
    for index, load in enumerate(loads):
        kinds.setdefault((bool(load.prefill_chunks), load.num_tokens.bit_length() - 1), []).append(index)
    rows = []
    for (has_prefill, octave), indices in sorted(kinds.items()):
        span = f"{2**octave:,}" if octave == 0 else f"{2**octave:,} to {2 ** (octave + 1) - 1:,}"
        text = f"with prefill, {span} tokens" if has_prefill else f"decode, batch {span}"
        weights = counts[indices]
        rows.append(
            StepRow(
                text,
                int(weights.sum()),
                float(np.average(before[indices], weights=weights)),
                float(np.average(after[indices], weights=weights)),
                float(np.average(sds[indices], weights=weights)),
            )
        )
    return rows


def scheduling_note(fit: Fit) -> str | None:
    """What the runs say about asynchronous scheduling; None if it was not asked of them."""
    if fit.other_badness is None:
        return None
    found = "Asynchronous scheduling" if fit.profile.async_scheduling else "No asynchronous scheduling"
    much = fit.other_badness - fit.badness
    if much < _FIRM:
        return f"{found} explains the runs a little better than the other way ({much:.1f}); that is not firm."
    return f"{found} explains the runs; the other way does not (-2 log likelihood: {much:,.0f} more)."


def only_together(fit: Fit) -> list[str]:
    """Sentences about what the data show only as a sum."""
    sd = np.maximum(fit.sd, 1e-150)  # 0 of what is held
    correlation = fit.covariance / np.outer(sd, sd)
    names, num_corrections = fit.parameters.names, fit.parameters.num_corrections
    sentences = []
    for index in range(num_corrections, len(names)):
        row = correlation[index].copy()
        row[index:] = 0.0
        if row.min() <= _ONLY_TOGETHER:
            other = int(row.argmin())
            sentences.append(
                f"{names[index]} and {names[other]} show mostly as a sum (correlation {row[other]:.2f}): more of one "
                "and less of the other explains these runs nearly as well. Their sum is known better than either."
            )
    return sentences


def warnings(fit: Fit) -> list[str]:
    """What the data cannot support, and signs that something else than the engine set the times."""
    runs = [found.run for found in fit.runs]
    return [*_data_warnings(runs), *_outcome_warnings(fit)]


def _data_warnings(runs: Sequence[ObservedRun]) -> list[str]:
    found = []
    concurrencies = {run.concurrency for run in runs}
    if len(concurrencies) == 1:
        found.append(
            f"All runs have a concurrency of {concurrencies.pop()}: how passes grow with the batch is the start "
            "profile's. Add runs at others, such as 1, 4, 16 and 64."
        )
    new_tokens = [request.new_tokens for run in runs for request in run.requests]
    if max(new_tokens) < _LITTLE_SPREAD * min(new_tokens):
        found.append(
            f"All prompts have about {int(np.median(new_tokens)):,} tokens: how prefill grows with them, and what of "
            "TTFT is spent before the engine, cannot be told. Give lengths a spread (--isl-stddev)."
        )
    if all(request.itl_s is None for run in runs for request in run.requests):
        found.append("No answer has a second token: nothing is known of decode. Ask for longer answers (--osl).")
    for run in runs:
        total = len(run.requests) + run.num_left_out
        if len(run.requests) < _MIN_REQUESTS:
            found.append(f"{run.name} has {len(run.requests)} requests; {_MIN_REQUESTS} and more give firmer figures.")
        if run.num_left_out > _MANY_LEFT_OUT * total:
            found.append(
                f"{run.name}: {run.num_left_out} of {total} rows failed, were cancelled or warmed up, and were left "
                "out; if they took time of the server, the replay does not know of it."
            )
        if run.has_only_means:
            found.append(f"{run.name} has only means: its requests are taken as equal. Save details for more.")
    return found


def _outcome_warnings(fit: Fit) -> list[str]:
    found = []
    for run in fit.runs:
        if run.itl_after is not None and abs(run.itl_after) > _STILL_OFF:
            found.append(
                f"{run.run.name}: ITL of the replay is still off by {run.itl_after:+.0%}. Something else than passes "
                "may have set it: a client short of CPU, other traffic, several engines behind the URL, speculative "
                "decoding, or limits other than the profile's (--max-num-seqs, --max-num-batched-tokens)."
            )
        if abs(run.ttft_after) > 3 * _STILL_OFF:
            found.append(
                f"{run.run.name}: TTFT of the replay is still off by {run.ttft_after:+.0%}; check the server's "
                "--max-num-batched-tokens, chunked prefill and prefix caching."
            )
    for row in parameter_rows(fit):
        if row.name == "overhead_request_s" and row.fitted > _MUCH_OVERHEAD_S:
            found.append(
                f"{row.fitted * 1e3:.0f} ms of each TTFT lie before the engine: network, or a host short of CPU."
            )
    return found


def to_json(fit: Fit, start_name: str, folder: str, command: str, notes: Sequence[str]) -> dict[str, Any]:
    """All of it, for machines. Times are seconds, sds of factors and passes are shares."""
    return {
        "start": start_name,
        "profile": fit.profile.name,
        "folder": folder,
        "command": command,
        "rounds": fit.num_rounds,
        "async_scheduling": fit.profile.async_scheduling,
        "parameters": [
            {
                "name": row.name,
                "is_factor": row.is_factor,
                "start": row.start,
                "fitted": row.fitted,
                "sd": row.sd,
                "prior_sd": row.prior_sd,
                "is_identified": row.is_identified,
            }
            for row in parameter_rows(fit)
        ],
        "passes": [
            {
                "passes": row.text,
                "count": row.num_passes,
                "start_s": row.start_s,
                "fitted_s": row.fitted_s,
                "sd": row.sd,
            }
            for row in step_rows(fit)
        ],
        "runs": [
            {
                "name": run.run.name,
                "concurrency": run.run.concurrency,
                "requests": len(run.run.requests),
                "left_out": run.run.num_left_out,
                "compared": run.num_compared,
                "ttft_error_before": run.ttft_before,
                "ttft_error_after": run.ttft_after,
                "itl_error_before": run.itl_before,
                "itl_error_after": run.itl_after,
            }
            for run in fit.runs
        ],
        "visited": visited_range(fit.loads),
        "notes": list(notes),
    }


def visited_range(loads: dict[StepLoad, int]) -> dict[str, int]:
    """From where to where the passes of the runs go; beyond, the start profile's shape carries."""

    def most(values: list[int]) -> int:
        return max(values, default=0)

    decoding = [load for load in loads if load.decode_batch_size]
    return {
        "max_decode_batch_size": most([load.decode_batch_size for load in decoding]),
        "max_context_tokens_per_sequence": most([load.context_tokens // load.decode_batch_size for load in decoding]),
        "max_prefill_tokens": most([load.num_tokens - load.decode_batch_size for load in loads]),
        "max_tokens": most([load.num_tokens for load in loads]),
    }
