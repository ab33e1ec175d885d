"""
Which points are measured, in which order.

    for level in levels(limits, kv_tokens):     coarse first, each point once
        for point in level: ...

The coarsest level has powers of four, the next powers of two, the last a point between each two. An axis
always has its largest value: beyond the last point the roofline carries a time, and it should not have to.
"""

from __future__ import annotations

from typing import NamedTuple

from mock_engine.profile_measure.memory import Limits
from mock_engine.step import PrefillChunk, StepLoad

NUM_LEVELS = 3
MIN_CONTEXT_TOKENS = 16  # smaller contexts cost what these do: a kernel launch
PART_NAMES = ("linear", "head", "prefill_attention", "decode_attention")


class Point(NamedTuple):
    """One point of one table (`profile.TABLE_COLUMNS`), or a whole pass, whose load is `load`."""

    table: str
    at: tuple[int, ...] = ()
    load: StepLoad | None = None


def axis(first: int, last: int, level: int) -> list[int]:
    """Ascending values from `first` to `last`, both among them; each level has those of the levels before."""
    found = {first, last}
    value, step = first, 4 if level == 0 else 2
    while value < last:
        found.add(value)
        if level == 2 and value > 1:
            found.add(value * 3 // 2)
        value *= step
    return sorted(value for value in found if value <= last)


def points_at(limits: Limits, kv_tokens: int, level: int) -> list[Point]:
    """All points of that level and the coarser ones, each once, sorted within its table."""
    longest, most_tokens = limits.max_model_len, limits.max_num_batched_tokens
    points = [Point("linear", (tokens,)) for tokens in axis(1, most_tokens, level)]
    points += [Point("head", (sequences,)) for sequences in axis(1, limits.max_num_seqs, level)]
    longest_chunk = min(most_tokens, longest)
    most_past = max(longest - longest_chunk, longest // 2)
    past = [0, *axis(min(256, most_past), most_past, max(level - 1, 0))]  # weighs less than what is new: coarser
    points += [
        Point("prefill_attention", (new_tokens, past_tokens))
        for new_tokens in axis(1, longest_chunk, level)
        for past_tokens in past
        if new_tokens + past_tokens <= longest
    ]
    for batch_size in axis(1, limits.max_num_seqs, level):
        longest_fitting = min(longest, kv_tokens // batch_size)
        for context_tokens in axis(min(MIN_CONTEXT_TOKENS, longest // 2), longest, level):
            if context_tokens <= longest_fitting:
                points.append(Point("decode_attention", (batch_size, context_tokens)))
    return points + [Point("step", load=load) for load in _whole_passes(limits, kv_tokens, level)]


def levels(limits: Limits, kv_tokens: int) -> list[list[Point]]:
    """The levels, coarse first; each has only the points that the ones before lack."""
    found: list[list[Point]] = []
    seen: set[Point] = set()
    for level in range(NUM_LEVELS):
        fresh = [point for point in points_at(limits, kv_tokens, level) if point not in seen]
        seen.update(fresh)
        found.append(fresh)
    return found


def _whole_passes(limits: Limits, kv_tokens: int, level: int) -> list[StepLoad]:
    """Prefills, decodes, and two passes that mix them, to hold the sum of parts against."""
    longest = limits.max_model_len
    longest_prompt = min(limits.max_num_batched_tokens, longest)
    prompts = [tokens for tokens in axis(1, longest_prompt, 0) if tokens >= 64 or longest_prompt < 64]
    loads = [StepLoad((PrefillChunk(tokens, 0),), 0, 0) for tokens in _thinned(prompts, level)]
    if longest_prompt < longest:
        loads.append(StepLoad((PrefillChunk(longest_prompt, longest - longest_prompt),), 0, 0))
    batches = axis(1, limits.max_num_seqs, 0)
    for batch_size in batches if level else _thinned(batches, 0):
        longest_fitting = min(longest, kv_tokens // batch_size)
        contexts = axis(min(MIN_CONTEXT_TOKENS, longest_fitting), longest_fitting, 0)
        loads += [StepLoad((), batch_size, batch_size * context) for context in _thinned(contexts, level)]
    context = min(1024, longest)
    batch_size = max(1, min(limits.max_num_seqs, limits.max_num_batched_tokens // 8, kv_tokens // (2 * context)))
    for new_tokens in (max(1, longest_prompt // 8), max(1, longest_prompt // 2)):
        if new_tokens + batch_size <= limits.max_num_batched_tokens and new_tokens + batch_size * context <= kv_tokens:
            loads.append(StepLoad((PrefillChunk(new_tokens, 0),), batch_size, batch_size * context))
    return list(dict.fromkeys(loads))


def _thinned(values: list[int], level: int) -> list[int]:
    """First, middle and last value; from level 1 on, all."""
    return values if level else sorted({values[0], values[len(values) // 2], values[-1]})
