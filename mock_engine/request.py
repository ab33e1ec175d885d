"""
What a client asked for.

A `Request` never changes. Progress lives in `scheduler.SequenceState`. The core
counts tokens, and knows a prompt's content only through the hashes of its full KV
blocks (`hash_blocks`); token ids are here for those who tell others what is in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mock_engine.errors import RequestError


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """
    One sequence to be computed: `isl_tokens` of prompt, then exactly `osl_tokens` of output.

    `block_hashes` has one entry for each full KV block of prompt plus output,
    in order; each hash covers its block and everything before it. It may be
    shorter: blocks without a hash are not shared. Raises `RequestError` for
    lengths below 1.
    """

    request_id: str
    isl_tokens: int
    osl_tokens: int
    block_hashes: Sequence[int] = ()
    choice: int = 0  # which of the `n` answers to one prompt this is
    num_remote_tokens: int = 0  # prompt tokens whose KV another worker has computed and handed over
    keeps_blocks: bool = False  # its KV blocks stay taken when it ends, until `Scheduler.give_back`
    token_ids: Sequence[int] = ()  # of prompt and output, for `kv_events`; nobody else looks at them
    priority: int = 0  # with --scheduling-policy priority, who has a lower one is served first: vLLM's convention

    def __post_init__(self) -> None:
        if self.isl_tokens < 1:
            raise RequestError(f"the prompt has {self.isl_tokens} tokens; at least 1 is needed")
        if self.osl_tokens < 1:
            raise RequestError(f"{self.osl_tokens} output tokens were asked for; at least 1 is needed")


def hash_blocks(token_ids: Sequence[int], block_size: int, salt: int = 0) -> tuple[int, ...]:
    """
    One hash for each full block of `block_size` tokens, chained: equal hashes mean equal prefixes and equal salts.

    The trailing partial block has none. Hashes are signed 64-bit and, for ints,
    the same in every process (Python randomizes only the hashes of strings and bytes).
    """
    hashes = []
    parent = salt
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        parent = hash((parent, *token_ids[start : start + block_size]))
        hashes.append(parent)
    return tuple(hashes)
