"""
From Dynamo's wire request to what the engine computes.

`Planner.plan` reads a `GenerateRequest` defensively (every group may be
missing or None), decides how many tokens each choice gets and which ones, and
says why each ends. Nothing here knows about time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mock_engine.errors import RequestError
from mock_engine.output_tokens import OutputTokens
from mock_engine.request import Request, hash_blocks

_SEED_MASK = (1 << 64) - 1
_OSL_CV = 0.5  # spread of answer lengths where the client sets none


@dataclass(frozen=True, slots=True)
class Answer:
    """One choice: what the core computes, the tokens that come out, and why it ends."""

    request: Request
    token_ids: list[int]
    finish_reason: str  # "length", "stop" (a stop token) or "eos"


@dataclass(frozen=True, slots=True)
class Planner:
    """Turns wire requests into answers, the same way every time for a given seed."""

    output_tokens: OutputTokens
    max_model_len: int
    block_size: int
    default_osl: int  # mean answer length in tokens where the client sets no max_tokens
    seed: int
    list_of_token_ids: Callable[[Any], list[int]]

    def plan(self, request_id: str, wire: Mapping[str, Any]) -> list[Answer]:
        """One `Answer` a choice (`n`). Raises `RequestError`, for the client, if the request cannot be served."""
        prompt = self._prompt(wire)
        stop = {**(wire.get("stop_conditions") or {}), "eos_token_ids": wire.get("eos_token_ids")}
        sampling = wire.get("sampling_options") or {}
        num_choices = _integer(sampling, "n", default=1, minimum=1)
        seed = _integer(sampling, "seed", default=None, minimum=-(1 << 63))
        # For Dynamo, who has a higher one is served first; its vLLM worker turns the sign too (ai-dynamo 1.2 to 1.6).
        priority = -_integer(wire.get("routing") or {}, "priority", default=0, minimum=-(1 << 31))
        prompt_seed = hash((*_seed_key(self.seed), *_seed_key(seed), *prompt)) & _SEED_MASK
        return [
            self._answer(request_id, prompt, stop, choice, (prompt_seed + choice) & _SEED_MASK, priority)
            for choice in range(num_choices)
        ]

    def _prompt(self, wire: Mapping[str, Any]) -> list[int]:
        try:
            prompt = self.list_of_token_ids(wire["token_ids"])
        except (KeyError, TypeError, ValueError) as error:
            raise RequestError(f"token_ids must be a sequence of integers: {error}") from error
        if not prompt:
            raise RequestError("the prompt is empty; at least one token is needed")
        if len(prompt) >= self.max_model_len:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens and the context length is {self.max_model_len}, "
                f"which leaves no room for an answer. Shorten the prompt to {self.max_model_len - 1} tokens or fewer."
            )
        return prompt

    def _answer(
        self, request_id: str, prompt: list[int], stop: Mapping[str, Any], choice: int, seed: int, priority: int
    ) -> Answer:
        room = self.max_model_len - len(prompt)
        max_tokens = _integer(stop, "max_tokens", default=None, minimum=1)
        min_tokens = _integer(stop, "min_tokens", default=0, minimum=0)
        ignore_eos = bool(stop.get("ignore_eos"))
        finish_reason = "length"
        osl_tokens = room if max_tokens is None else min(max_tokens, room)
        if max_tokens is None and not ignore_eos:
            natural_osl = max(_natural_osl(self.default_osl, seed), min_tokens)
            if natural_osl <= room:
                osl_tokens, finish_reason = natural_osl, "eos"
        token_ids = self.output_tokens.take(seed, osl_tokens)
        if finish_reason == "eos" and self.output_tokens.eos_token_ids:
            token_ids[-1] = self.output_tokens.eos_token_ids[0]
        stop_ids = set(stop.get("stop_token_ids") or ())
        if not ignore_eos:
            stop_ids.update(stop.get("stop_token_ids_hidden") or ())
            stop_ids.update(stop["eos_token_ids"] or ())
        stop_at = _first_stop(token_ids, stop_ids, min_tokens)
        if stop_at is not None and stop_at < osl_tokens:
            token_ids, finish_reason = token_ids[:stop_at], "stop"
        all_ids = [*prompt, *token_ids]
        return Answer(
            Request(
                request_id,
                isl_tokens=len(prompt),
                osl_tokens=len(token_ids),
                block_hashes=hash_blocks(all_ids, self.block_size),
                choice=choice,
                token_ids=all_ids,
                priority=priority,
            ),
            token_ids,
            finish_reason,
        )


def _integer(options: Mapping[str, Any], name: str, default: Any, minimum: int) -> Any:
    value = options.get(name)
    if value is None:
        return default
    if not isinstance(value, int) or value < minimum:
        raise RequestError(f"{name} is {value!r}; it must be an integer of at least {minimum}")
    return value


def _seed_key(seed: int | None) -> tuple[int, int, int]:
    """
    Small ints that differ for any two 64-bit seeds, and from no seed.

    Python's hash is the same for -1 and -2, or for 3 and 2**63 - 1; of None, before 3.12, it differs by process.
    """
    return (0, 0, 0) if seed is None else (1, *divmod(seed & _SEED_MASK, 1 << 32))


def _natural_osl(mean_tokens: int, seed: int) -> int:
    """Answer lengths are log-normal; `mean_tokens` on average, never below 1."""
    sigma = np.sqrt(np.log(1 + _OSL_CV**2))
    draw = np.random.default_rng(seed).standard_normal()
    return max(1, round(mean_tokens * float(np.exp(sigma * draw - sigma**2 / 2))))


def _first_stop(token_ids: Sequence[int], stop_ids: set[int], min_tokens: int) -> int | None:
    """Tokens up to and including the first stop token that `min_tokens` allows; None if there is none."""
    if not stop_ids:
        return None
    for position in range(max(min_tokens, 1) - 1, len(token_ids)):
        if token_ids[position] in stop_ids:
            return position + 1
    return None
