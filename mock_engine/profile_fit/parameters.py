"""
What may differ between a profile and a server, as numbers with a prior; and the profile that given numbers make.

    parameters = parameters_of(start)
    parameters.start                       the start profile itself
    parameters.apply(values)               the profile with these values, ready for a `TimingModel`
    parameters.prior                       factor of the prior covariance: values = start + prior @ u, u standard normal

A correction multiplies a table by exp(f), where f is smooth along a load axis: given at knots, whose prior is a
Gaussian process. One common term moves all tables together, so a GPU that is faster everywhere costs little; a
table that bends away from the others costs more the sharper the bend. Overheads are seconds, and never negative.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mock_engine.latency_table import LatencyTable, make_table, matern
from mock_engine.profile import Profile
from mock_engine.roofline import Roofline
from mock_engine.step import PrefillChunk, StepLoad
from mock_engine.timing import TimingModel

FloatArray = NDArray[np.float64]

_TOKEN_KNOTS: FloatArray = np.exp2(np.arange(14.0))  # through the matrices: 1 to 8,192
_KV_KNOTS: FloatArray = np.exp2(np.arange(6.0, 24.0, 3.0))  # KV tokens that decode attention reads
_PROMPT_KNOTS: FloatArray = np.exp2(np.arange(5.0, 18.0, 3.0))  # prompt tokens so far that prefill attention sees
_BATCH_SIZES: FloatArray = np.exp2(np.arange(10.0))
_CONTEXTS: FloatArray = np.exp2(np.arange(5.0, 18.0, 2.0))
_BATCH_SIZE_RATIO, _CONTEXT_RATIO = 1.4, 1.8  # finer makes laying out slow
_COMMON_SD = 0.7  # a GPU, or a number of GPUs, twice as fast
_MATRIX_SD, _ATTENTION_SD = 0.3, 0.3
_LENGTH_OCTAVES = 2.5
_NUGGET = 1e-6


@dataclass(frozen=True, slots=True)
class Overhead:
    """A scalar of `profile.toml` that may be fitted."""

    key: str  # of Profile
    sd: float  # of the prior around the start profile's value, s
    text: str
    is_in_steps: bool  # part of a pass, and so of `kernels` profiles alone


OVERHEADS = (
    Overhead("overhead_step_s", 1.5e-3, "engine's own time for each pass", True),
    Overhead("overhead_per_seq_s", 5e-6, "and for each sequence in it", True),
    Overhead("overhead_request_s", 5e-3, "before a request is queued (HTTP, tokenizing)", False),
    Overhead("overhead_per_prompt_token_s", 2e-6, "and for each prompt token", False),
)


@dataclass(frozen=True, slots=True)
class Curve:
    """A correction along one axis: where its values are given."""

    name: str
    knots: FloatArray
    sd: float
    text: str
    knot_text: str

    def at(self, values: FloatArray, axis: FloatArray) -> FloatArray:
        """The correction at places on the axis: linear in the logarithm, constant beyond the knots."""
        return np.asarray(np.interp(np.log2(np.maximum(axis, 1.0)), np.log2(self.knots), values))

    def shares(self, axis: FloatArray) -> FloatArray:
        """How much of each value the correction at places on the axis has, shape (places, knots)."""
        return np.array([self.at(own, axis) for own in np.eye(len(self.knots))]).T


MATRICES = Curve("matrices", _TOKEN_KNOTS, _MATRIX_SD, "matrices and communication, by tokens in the pass", "tokens")
DECODE_ATTENTION = Curve(
    "decode attention", _KV_KNOTS, _ATTENTION_SD, "decode attention, by KV tokens of the batch", "KV tokens"
)
PREFILL_ATTENTION = Curve(
    "prefill attention", _PROMPT_KNOTS, _ATTENTION_SD, "prefill attention, by tokens of the prompt so far", "tokens"
)
CURVES = (MATRICES, DECODE_ATTENTION, PREFILL_ATTENTION)


@dataclass(frozen=True, slots=True)
class Parameters:
    """All that is fitted of one start profile. Values are first those of `CURVES`, then of `overheads`."""

    profile: Profile
    overheads: tuple[Overhead, ...]
    start: FloatArray
    prior: FloatArray  # (values, latents)
    names: tuple[str, ...]
    latency: dict[str, LatencyTable]  # the tables that are corrected
    shortest_s: FloatArray  # of whole decode passes: what each takes over contexts of one token

    def apply(self, values: FloatArray, like: Profile | None = None) -> Profile:
        """The start profile, corrected. Tables that come out as in `like` are the very ones of it."""
        matrices, decode_attention, prefill_attention, overheads = self.split(values)
        curves = matrices, decode_attention, prefill_attention
        if self.profile.tables == "kernels":
            latency = _correct_kernels(self.latency, *curves)
        else:
            latency = _correct_steps(self.latency, self.profile.roofline, self.shortest_s, *curves)
        if like is not None:
            for name, table in like.latency.items():
                if np.array_equal(table.seconds, latency[name].seconds):
                    latency[name] = table
        changes = {overhead.key: float(value) for overhead, value in zip(self.overheads, overheads, strict=True)}
        return replace(self.profile, latency=latency, **changes)  # type: ignore[arg-type]

    def split(self, values: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
        """Values of the three curves, and of the overheads."""
        ends = np.cumsum([len(curve.knots) for curve in CURVES])
        matrices, decode_attention, prefill_attention, overheads = np.split(values, ends)
        return matrices, decode_attention, prefill_attention, overheads

    @property
    def num_corrections(self) -> int:
        return sum(len(curve.knots) for curve in CURVES)

    @property
    def at_least(self) -> FloatArray:
        """The smallest value each may have."""
        return np.where(np.arange(len(self.start)) < self.num_corrections, -np.inf, 0.0)

    @property
    def own_sd(self) -> FloatArray:
        """Of the prior, if what moves all corrections together is known."""
        return np.asarray(np.sqrt((self.prior[:, 1:] ** 2).sum(axis=1)))


def parameters_of(profile: Profile) -> Parameters:
    """What is fitted when the fit starts from `profile`."""
    overheads = tuple(each for each in OVERHEADS if profile.tables == "kernels" or not each.is_in_steps)
    num_knots = sum(len(curve.knots) for curve in CURVES)
    num_values = num_knots + len(overheads)
    prior = np.zeros((num_values, 1 + num_values))
    prior[:num_knots, 0] = _COMMON_SD
    row = 0
    for curve in CURVES:
        size = len(curve.knots)
        prior[row : row + size, 1 + row : 1 + row + size] = curve.sd * _smooth(np.log2(curve.knots))
        row += size
    for index, overhead in enumerate(overheads, num_knots):
        prior[index, 1 + index] = overhead.sd
    start = np.concatenate([np.zeros(num_knots), [getattr(profile, overhead.key) for overhead in overheads]])
    names = [f"{curve.name} at {knot:,.0f} {curve.knot_text}" for curve in CURVES for knot in curve.knots]
    latency, shortest_s = profile.latency, np.empty(0)
    if profile.tables == "steps":
        timing = TimingModel(profile)
        latency = _refined(profile, timing)
        batch_sizes = latency["decode"].points[:, 0]
        at_one = np.array([timing.step_s(StepLoad((), int(size), int(size))) for size in batch_sizes])
        shortest_s = np.minimum(at_one, latency["decode"].seconds)
    keys = (overhead.key for overhead in overheads)
    return Parameters(
        profile,
        overheads,
        start,
        prior,
        (*names, *keys),
        latency,
        shortest_s,
    )


def _refined(profile: Profile, timing: TimingModel) -> dict[str, LatencyTable]:
    """
    Whole passes laid out evenly, as the start profile has them: between measured points that are octaves
    apart, a correction needs something to act on.
    """
    prefill, decode = profile.latency["prefill"], profile.latency["decode"]
    tokens = np.union1d(prefill.points[:, 0], _TOKEN_KNOTS)
    prefill_s = [timing.step_s(StepLoad((PrefillChunk(int(n), 0),), 0, 0)) for n in tokens]
    batch_sizes = _spread(np.union1d(decode.axis_values(0), _BATCH_SIZES), _BATCH_SIZE_RATIO)
    contexts = _spread(np.union1d(decode.axis_values(1), _CONTEXTS), _CONTEXT_RATIO)
    points = np.array([(size, context) for size in batch_sizes for context in contexts])
    decode_s = [timing.step_s(StepLoad((), int(size), int(size * context))) for size, context in points]
    return {
        "prefill": make_table(prefill.name, prefill.columns, tokens[:, np.newaxis], np.array(prefill_s)),
        "decode": make_table(decode.name, decode.columns, points, np.array(decode_s)),
    }


def _spread(values: FloatArray, ratio: float) -> FloatArray:
    """Of ascending values those that are by this ratio above the one before."""
    kept = [float(values[0])]
    for value in values[1:].tolist():
        if value >= ratio * kept[-1]:
            kept.append(value)
    return np.array(kept)


def _smooth(octaves: FloatArray) -> FloatArray:
    """Cholesky factor of a Matern 3/2 process, which bends as times at the end of a roofline's slope do."""
    covariance = matern(np.abs(octaves[:, np.newaxis] - octaves), _LENGTH_OCTAVES)
    return np.asarray(np.linalg.cholesky(covariance + _NUGGET * np.eye(len(octaves))))


def _correct_kernels(
    latency: dict[str, LatencyTable],
    matrices: FloatArray,
    decode_attention: FloatArray,
    prefill_attention: FloatArray,
) -> dict[str, LatencyTable]:
    corrected = {}
    for name, table in latency.items():
        if name == "decode_attention":
            factor = DECODE_ATTENTION.at(decode_attention, table.points[:, 0] * table.points[:, 1])
        elif name == "prefill_attention":
            factor = PREFILL_ATTENTION.at(prefill_attention, table.points[:, 0] + table.points[:, 1])
        else:
            factor = MATRICES.at(matrices, table.points[:, 0])
        corrected[name] = _scaled(table, table.seconds * np.exp(factor))
    return corrected


def _correct_steps(
    latency: dict[str, LatencyTable],
    roofline: Roofline,
    shortest_s: FloatArray,
    matrices: FloatArray,
    decode_attention: FloatArray,
    prefill_attention: FloatArray,
) -> dict[str, LatencyTable]:
    """Whole passes: what is attention in them is told as `timing` tells it, the rest are matrices."""
    prefill, decode = latency["prefill"], latency["decode"]
    tokens = prefill.points[:, 0]
    share = roofline.prefill_attention_s(tokens, np.zeros_like(tokens)) / roofline.prefill_s(tokens)
    factor = (1 - share) * np.exp(MATRICES.at(matrices, tokens)) + share * np.exp(
        PREFILL_ATTENTION.at(prefill_attention, tokens)
    )
    batch, context = decode.points.T
    decode_s = shortest_s * np.exp(MATRICES.at(matrices, batch)) + (decode.seconds - shortest_s) * np.exp(
        DECODE_ATTENTION.at(decode_attention, batch * context)
    )
    return {"prefill": _scaled(prefill, prefill.seconds * factor), "decode": _scaled(decode, decode_s)}


def _scaled(table: LatencyTable, seconds: FloatArray) -> LatencyTable:
    return make_table(table.name, table.columns, table.points, seconds)
