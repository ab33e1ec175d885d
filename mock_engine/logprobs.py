"""
Log probabilities that a model might have given, in the shape that Dynamo takes.

    logprobs = OutputLogprobs(source, num_top, seed, token_ids)
    chunk.update(logprobs.of(start, end))        `log_probs` and `top_logprobs` of those tokens

Of each position, the token of rank r has probability p (1 - p)^(r - 1): p is how sure the
model is there, uniform between 0.3 and 0.99, and the rank of the token that was chosen is
drawn from the same distribution (1 with temperature 0). So they add up to at most 1,
greater ranks are less likely, and the mean of what clients compute, such as perplexity, is
that of a fluent model (about 2). The same answer has the same values.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)

_LEAST_SURE, _MOST_SURE = 0.3, 0.99
_MAX_RANK = 1000  # so that nothing comes near what a float cannot hold
_OUTPUT, _PROMPT = 1, 2  # make seeds of their own


def parse_count(options: Mapping[str, Any], name: str) -> int | None:
    """How many alternatives `output_options` ask for; None if the option is absent, or wrong, which is logged."""
    value = options.get(name)
    if value is None or value == "":
        return None
    try:
        count = int(value)
    except (TypeError, ValueError, OverflowError):
        logger.warning("%s is %r; it must be an integer of at least 0. Ignored.", name, value)
        return None
    if count < 0:
        logger.warning("%s is %r; it must be an integer of at least 0. Ignored.", name, value)
        return None
    return count


@dataclass(frozen=True, slots=True)
class Alternatives:
    """The tokens that might have come instead, and the text of each token."""

    token_ids: Sequence[int]
    decode: Callable[[list[int]], str]
    _texts: dict[int, str | None] = field(default_factory=dict)

    def text(self, token_id: int) -> str | None:
        """The token's text; None for an id that the tokenizer does not know."""
        if token_id not in self._texts:
            try:
                self._texts[token_id] = self.decode([token_id])
            except OverflowError:  # ids go up to 2**32 - 1, the tokenizer's do not
                return None
        return self._texts[token_id]

    def others(self, token_id: int, count: int, start: int) -> list[int]:
        """`count` different tokens other than `token_id`, or as many as there are."""
        size = len(self.token_ids)
        found = (self.token_ids[(start + i) % size] for i in range(min(count + 1, size)))
        return [id_ for id_ in found if id_ != token_id][:count]


class _Positions:
    """How sure the model is, which rank each token has, and where its alternatives begin."""

    def __init__(self, num_tokens: int, seed: Sequence[int], is_greedy: bool) -> None:
        draw = np.random.default_rng(seed)
        sure = draw.uniform(_LEAST_SURE, _MOST_SURE, num_tokens)
        ranks = np.ones(num_tokens, np.int64) if is_greedy else np.minimum(draw.geometric(sure), _MAX_RANK)
        self.first: list[float] = np.log(sure).tolist()
        self.fall: list[float] = np.log1p(-sure).tolist()  # from one rank to the next
        self.ranks: list[int] = ranks.tolist()
        self.starts: list[int] = draw.integers(0, 1 << 30, num_tokens).tolist()

    def logprob(self, position: int, rank: int) -> float:
        return self.first[position] + (rank - 1) * self.fall[position]

    def ranked(self, position: int, token_id: int, count: int, source: Alternatives) -> list[tuple[int, int]]:
        """(rank, token) of the likeliest `count` tokens, by rank, and of `token_id`."""
        rank = self.ranks[position]
        others = source.others(token_id, count, self.starts[position])
        ranked = [(i if i < rank else i + 1, other) for i, other in enumerate(others, start=1)]
        ranked.append((rank, token_id))
        ranked.sort()
        return ranked[: max(count, 1)] if rank <= count else [*ranked[:count], (rank, token_id)]


class OutputLogprobs:
    """Of one answer. Nothing is computed before the first `of`."""

    def __init__(
        self, source: Alternatives, num_top: int, seed: int, token_ids: Sequence[int], is_greedy: bool
    ) -> None:
        self._source = source
        self._num_top = num_top
        self._seed = seed
        self._token_ids = token_ids
        self._is_greedy = is_greedy
        self._positions: _Positions | None = None

    def of(self, start: int, end: int) -> dict[str, Any]:
        """What a chunk with the tokens from `start` to `end` carries. The token that was chosen is always included."""
        if self._positions is None:
            self._positions = _Positions(len(self._token_ids), (self._seed, _OUTPUT), self._is_greedy)
        positions, text = self._positions, self._source.text
        return {
            "log_probs": [positions.logprob(i, positions.ranks[i]) for i in range(start, end)],
            "top_logprobs": [
                [
                    {"rank": rank, "token_id": id_, "token": text(id_), "logprob": positions.logprob(i, rank)}
                    for rank, id_ in positions.ranked(i, self._token_ids[i], self._num_top, self._source)
                ]
                for i in range(start, end)
            ],
        }


def prompt_logprobs(
    source: Alternatives, num_top: int, seed: int, token_ids: Sequence[int]
) -> list[dict[str, dict[str, Any]] | None]:
    """Of each prompt token, by token id as text; None for the first, which nothing comes before."""
    positions = _Positions(len(token_ids), (seed, _PROMPT), is_greedy=False)
    found: list[dict[str, dict[str, Any]] | None] = [None]
    for i in range(1, len(token_ids)):
        found.append(
            {
                str(id_): {"logprob": positions.logprob(i, rank), "rank": rank, "decoded_token": source.text(id_)}
                for rank, id_ in positions.ranked(i, token_ids[i], num_top, source)
            }
        )
    return found
