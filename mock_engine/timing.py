"""
How long a pass takes.

    timing = TimingModel(profile)
    timing.step_s(load)              seconds, always the same for the same load
    timing.decode_run_s(b, c, n)     the same for n decode passes in a row, as an array
    timing.is_measured_at(load)      or did the roofline carry it beyond the measured points?
    jitter = StepJitter(cv, seed)
    timing.step_s(load) * jitter.draw()

How one engine's passes follow each other, with jitter: `step_times`.

When a profile is loaded, each measured table becomes a dense grid: data-sheet
roofline times what the measurements add to it (the logarithm of measured / roofline,
interpolated, and kept as it is beyond the last measured point). Dips are taken
out, so that no pass gets faster by having more to do. The grid meets each measured
point that is not itself part of a dip.

A pass with prefill and decode is not the two added: its matrices see prompt
tokens and decoding sequences together, and read the weights once. They see draft tokens too, of which each needs
the LM head; attention reads the context of a sequence once, however many of its tokens are verified.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.random import Generator, default_rng
from numpy.typing import NDArray

from mock_engine.latency_table import MAX_AXIS_VALUE, LatencyTable
from mock_engine.monotone import MonotoneCurve, MonotoneSurface, between_points, in_order, knots_up_to, without_dips
from mock_engine.profile import Profile
from mock_engine.roofline import smooth_max
from mock_engine.step import StepLoad

FloatArray = NDArray[np.float64]

# How far the grids reach on each axis: tokens, sequences. Beyond, time grows in proportion.
MAX_TOKENS = float(MAX_AXIS_VALUE)


class TimingModel:
    """
    Seconds for a pass, from the tables of one profile.

    A load has at least one sequence, and `context_tokens` is at least `decode_batch_size`.
    """

    def __init__(self, profile: Profile, like: TimingModel | None = None) -> None:
        """`like` is of a profile that differs little: what is laid out of the very same tables is taken from it."""
        self._parts: _KernelTables | _StepTables
        if profile.tables == "kernels":
            known = like._parts if like is not None and isinstance(like._parts, _KernelTables) else None
            self._parts = _KernelTables(profile, known)
        else:
            self._parts = _StepTables(profile)

    def step_s(self, load: StepLoad) -> float:
        """
        Seconds for the pass, engine overhead included; computed in about 5 microseconds.

        Never falls when tokens are added to a sequence, new or past, when a prompt joins,
        or when a decoding sequence joins that is no shorter than the mean. (A single token over a long past can
        take longer as a decode than as the end of a prompt, which other kernels compute.)
        """
        return self._parts.step_s(load)

    def decode_run_s(self, batch_size: int, context_tokens: int, num_steps: int) -> FloatArray:
        """
        Seconds for each of `num_steps` decode passes in a row, shape (num_steps,): what `step_s` gives one by one, to
        the last bit. `context_tokens` is that of the first; each pass adds a token to each of `batch_size` sequences.
        """
        each = (context_tokens + batch_size * np.arange(num_steps)) / batch_size
        return self._parts.decode_s(batch_size, each)

    def is_measured_at(self, load: StepLoad) -> bool:
        """Whether each part of the pass lies within what was measured."""
        return self._parts.is_measured_at(load)


class StepJitter:
    """
    Factors to multiply step times with: log-normal, mean 1, coefficient of variation `cv`.

    The same seed gives the same factors. With a `cv` of 0 each is exactly 1.
    """

    _BLOCK = 1024

    def __init__(self, cv: float, seed: int | Generator) -> None:
        self._sigma = math.sqrt(math.log1p(cv * cv))
        self._rng = default_rng(seed)
        self._drawn = np.empty(0)
        self._next = 0  # the first of `_drawn` that is not used up

    def draw(self) -> float:
        """The next factor."""
        if self._sigma == 0.0:
            return 1.0
        factor = float(self.peek(1)[0])
        self._next += 1
        return factor

    def peek(self, num_factors: int) -> FloatArray:
        """The next factors, shape (num_factors,); they stay the next ones."""
        if self._sigma == 0.0:
            return np.ones(num_factors)
        while len(self._drawn) - self._next < num_factors:
            fresh = self._rng.lognormal(-(self._sigma**2) / 2, self._sigma, self._BLOCK)
            self._drawn = np.concatenate([self._drawn[self._next :], fresh])
            self._next = 0
        return self._drawn[self._next : self._next + num_factors]

    def skip(self, num_factors: int) -> None:
        """Use up factors that `peek` has shown."""
        if self._sigma != 0.0:
            self._next += num_factors


class _KernelTables:
    """Parts of a pass, measured one by one: they add up, and the engine's own time comes on top."""

    def __init__(self, profile: Profile, like: _KernelTables | None = None) -> None:
        roofline, latency = profile.roofline, profile.latency
        self._profile = profile
        known = like if like is not None and like._profile.roofline == roofline else None

        def laid_out(name: str, roofline_s: Callable[[FloatArray, FloatArray], FloatArray]) -> MonotoneSurface:
            if known is not None and known._profile.latency.get(name) is latency[name]:
                return known._surfaces[name]
            return surface(latency[name], roofline_s)

        self._linear = curve(latency["linear"], roofline.linear_s)
        self._head = curve(latency["head"], roofline.head_s)
        self._communication = (
            curve(latency["communication"], roofline.communication_s) if "communication" in latency else None
        )
        self._prefill_attention = laid_out("prefill_attention", roofline.prefill_attention_s)
        self._prefill_attention_floor_s = self._prefill_attention(1, 0)
        self._decode_attention = laid_out("decode_attention", roofline.decode_attention_s)
        self._surfaces = {"prefill_attention": self._prefill_attention, "decode_attention": self._decode_attention}
        self._min_context_tokens = float(latency["decode_attention"].axis_values(1)[0])

    def step_s(self, load: StepLoad) -> float:
        chunks, batch_size = load.prefill_chunks, load.decode_batch_size
        # One kernel launch serves the whole batch: the shortest possible one counts once, not for each chunk.
        floor_s = self._prefill_attention_floor_s
        chunks_s = 0.0
        for new_tokens, past_tokens in chunks:
            chunks_s += self._prefill_attention(new_tokens, past_tokens) - floor_s
        if not batch_size:
            return self._without_attention_s(load.num_tokens, len(chunks)) + floor_s + chunks_s
        decode_s = self._decode_attention.at(batch_size)(load.context_tokens / batch_size)
        num_drafts = load.num_draft_tokens
        seconds = self._without_attention_s(load.num_tokens, len(chunks) + batch_size, num_drafts) + decode_s + chunks_s
        if not chunks:
            return seconds
        # Launching decode attention can take less than launching that of prompts.
        num_prompt_tokens = load.num_tokens - batch_size - num_drafts
        alone_s = self._without_attention_s(num_prompt_tokens, len(chunks)) + floor_s + chunks_s
        return max(seconds, alone_s)

    def decode_s(self, batch_size: int, context_tokens: FloatArray) -> FloatArray:
        """Passes that only decode; `context_tokens` is of each sequence."""
        return self._without_attention_s(batch_size, batch_size) + self._decode_attention.at(batch_size).many(
            context_tokens
        )

    def _without_attention_s(self, tokens: int, sequences: int, draft_tokens: int = 0) -> float:
        seconds = (
            self._profile.overhead_step_s
            + self._profile.overhead_per_seq_s * sequences
            + self._linear(tokens)
            + self._head(sequences + draft_tokens)
        )
        if self._communication is not None:
            seconds += self._communication(tokens)
        return seconds

    def is_measured_at(self, load: StepLoad) -> bool:
        latency, batch_size = self._profile.latency, load.decode_batch_size
        return (
            latency["linear"].covers(load.num_tokens)
            and (not batch_size or self._is_decode_measured_at(batch_size, load.context_tokens / batch_size))
            and all(latency["prefill_attention"].covers(*chunk) for chunk in load.prefill_chunks)
        )

    def _is_decode_measured_at(self, batch_size: int, context_tokens: float) -> bool:
        """Contexts below the smallest measured one cost what that does: a kernel launch."""
        table = self._profile.latency["decode_attention"]
        return table.covers(batch_size, max(context_tokens, self._min_context_tokens))


class _StepTables:
    """
    Whole passes: prefill of one prompt, and decode of a batch. The roofline says which share is attention.

    A mixed pass takes as long as a prefill with the decoding sequences as extra tokens,
    plus their attention over the KV cache; at least as long as either alone, and no
    longer than one after the other. Draft tokens take what as many more decoding sequences
    would take, less their attention.
    """

    def __init__(self, profile: Profile) -> None:
        roofline, latency = profile.roofline, profile.latency
        self._latency = latency
        prefill = latency["prefill"]
        tokens = knots_up_to(MAX_TOKENS, prefill.axis_values(0))
        whole_s = dense(prefill, roofline.prefill_s, tokens)
        attention_s = roofline.prefill_attention_s(tokens, np.zeros_like(tokens))
        attention_s = whole_s * attention_s / roofline.prefill_s(tokens)
        self._linear = MonotoneCurve(tokens, without_dips(whole_s - attention_s))
        self._prefill_attention = _attention_over_past(tokens, without_dips(attention_s))

        decode = latency["decode"]
        batch_sizes = knots_up_to(MAX_TOKENS, decode.axis_values(0))
        contexts = knots_up_to(MAX_TOKENS, decode.axis_values(1))
        decode_s = dense(decode, roofline.decode_s, batch_sizes, contexts)
        self._decode = MonotoneSurface(batch_sizes, contexts, decode_s)
        # Attention: what a pass takes longer than one over contexts of a single token.
        self._decode_attention = MonotoneSurface(batch_sizes, contexts, without_dips(decode_s - decode_s[:, :1]))

    def step_s(self, load: StepLoad) -> float:
        chunks, batch_size = load.prefill_chunks, load.decode_batch_size
        context_tokens = load.context_tokens / batch_size if batch_size else 0.0  # of each
        decode_s = self._decode.at(batch_size)(context_tokens) if batch_size else 0.0
        num_drafts = load.num_draft_tokens
        if num_drafts:
            as_sequences = self._decode.at(batch_size + num_drafts)
            verified_s = as_sequences(1.0) + self._decode_attention.at(batch_size)(context_tokens)
            decode_s = max(decode_s, min(verified_s, as_sequences(context_tokens)))
        if not chunks:
            return decode_s
        attention_s = 0.0
        for new_tokens, past_tokens in chunks:
            attention_s += self._prefill_attention(new_tokens, past_tokens)
        tokens = load.num_tokens
        prefill_s = self._linear(tokens - batch_size - num_drafts) + attention_s
        if not batch_size:
            return prefill_s
        together_s = self._linear(tokens) + attention_s + self._decode_attention.at(batch_size)(context_tokens)
        return min(prefill_s + decode_s, max(prefill_s, decode_s, together_s))

    def decode_s(self, batch_size: int, context_tokens: FloatArray) -> FloatArray:
        """Passes that only decode; `context_tokens` is of each sequence."""
        return self._decode.at(batch_size).many(context_tokens)

    def is_measured_at(self, load: StepLoad) -> bool:
        batch_size = load.decode_batch_size
        return (not batch_size or self._latency["decode"].covers(batch_size, load.context_tokens / batch_size)) and all(
            chunk.past_tokens == 0 and self._latency["prefill"].covers(chunk.new_tokens)
            for chunk in load.prefill_chunks
        )


def _attention_over_past(tokens: FloatArray, attention_s: FloatArray) -> MonotoneSurface:
    """
    Attention of a chunk over (new tokens, past tokens), from `attention_s` of whole prompts of `tokens`.

    Whole-pass sources measure no past tokens: the part of the causal triangle that is
    new costs what it costs in a prompt of the full length.
    """
    of_prompt = MonotoneCurve(tokens, attention_s)
    past = knots_up_to(MAX_TOKENS, np.zeros(1))
    lengths = tokens[:, np.newaxis] + past
    prompt_s = np.vectorize(of_prompt, otypes=[float])(lengths)
    share = 1 - past * (past + 1) / (lengths * (lengths + 1))
    return MonotoneSurface(tokens, past, without_dips(prompt_s * share))


def curve(table: LatencyTable, roofline_s: Callable[[FloatArray], FloatArray]) -> MonotoneCurve:
    """The dense form of a table with one axis."""
    knots = knots_up_to(MAX_TOKENS, table.axis_values(0))
    return MonotoneCurve(knots, dense(table, roofline_s, knots))


def surface(table: LatencyTable, roofline_s: Callable[[FloatArray, FloatArray], FloatArray]) -> MonotoneSurface:
    """The dense form of a table with two axes."""
    x_knots = knots_up_to(MAX_TOKENS, table.axis_values(0))
    y_knots = knots_up_to(MAX_TOKENS, table.axis_values(1))
    return MonotoneSurface(x_knots, y_knots, dense(table, roofline_s, x_knots, y_knots))


def dense(table: LatencyTable, roofline_s: Callable[..., FloatArray], *knots: FloatArray) -> FloatArray:
    """
    Seconds on the grid of `knots` (one array for each axis, every measured value among them):
    the measured points less their dips, and around them what `predict` says, falling nowhere.
    """
    measured = np.full([len(axis) for axis in knots], np.nan)
    at = tuple(np.searchsorted(axis, table.points[:, i]) for i, axis in enumerate(knots))
    measured[at] = in_order(table.points, table.seconds)
    return between_points(predict(table, roofline_s, *np.meshgrid(*knots, indexing="ij")), measured)


def predict(table: LatencyTable, roofline_s: Callable[..., FloatArray], *places: FloatArray) -> FloatArray:
    """
    Seconds at places anywhere: roofline times the measurements' correction, interpolated in the logarithm.

    The smallest measured time is a floor under the roofline: launching costs that much, however little there is to do.
    """
    floor_s = np.min(table.seconds)
    measured_at = tuple(table.points.T)
    residual = np.log(table.seconds / smooth_max(roofline_s(*measured_at), floor_s))
    return np.asarray(smooth_max(roofline_s(*places), floor_s) * np.exp(table.interpolate(residual, *places)))
