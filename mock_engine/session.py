"""
Requests as clients send them: a `Session` is one client, its `Turn`s follow one another.

`workload` makes sessions up, `trace_files` reads them; both chain the turns of a
conversation with `chain_turns`, so that prefix caching finds what a turn repeats.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Turn(NamedTuple):
    """One request of a client."""

    isl_tokens: int
    osl_tokens: int
    block_hashes: Sequence[int] = ()  # as in `Request`; none: nothing of it is shared
    think_s: float = 0.0  # the client's wait before it, from the end of the answer before


class Session(NamedTuple):
    """Turns of one client, each sent when the one before is answered."""

    arrival_s: float | None  # of the first turn, in seconds from the start; None: as soon as the load allows
    turns: Sequence[Turn]


def chain_turns(
    lengths: Iterable[tuple[int, int, float]],
    block_size: int,
    first_own_id: int,
    shared_ids: Sequence[int] = (),
    prefix_tokens: int = 0,
) -> tuple[Turn, ...]:
    """
    A conversation, in which each prompt is all prompts and answers so far, and new tokens.

    `lengths` are the new prompt tokens, output tokens and wait in seconds of each turn; the first
    prompt begins with `prefix_tokens` more. `shared_ids` are the hashes of the first full blocks;
    the others count up from `first_own_id`, where no other conversation's may be (`num_full_blocks`).
    """
    context = prefix_tokens
    sizes: list[tuple[int, int, float]] = []
    for new_tokens, osl_tokens, think_s in lengths:
        isl_tokens = context + new_tokens
        context = isl_tokens + osl_tokens
        sizes.append((isl_tokens, osl_tokens, think_s if sizes else 0.0))
    own_ids = range(first_own_id, first_own_id + context // block_size - len(shared_ids))
    block_hashes = [*shared_ids, *own_ids] if shared_ids else own_ids
    return tuple(
        Turn(isl_tokens, osl_tokens, block_hashes[: (isl_tokens + osl_tokens) // block_size], think_s)
        for isl_tokens, osl_tokens, think_s in sizes
    )


def num_full_blocks(turns: Sequence[Turn], block_size: int) -> int:
    """KV blocks that a conversation has filled at its end."""
    return (turns[-1].isl_tokens + turns[-1].osl_tokens) // block_size
