"""
From Dynamo's wire request to what the engine computes.

`Planner.plan` reads a `GenerateRequest` defensively (every group may be
missing or None), decides how many tokens each choice gets and which ones, and
says why each ends. Nothing here knows about time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mock_engine.content import Content
from mock_engine.errors import RequestError
from mock_engine.guided import demanded
from mock_engine.logprobs import OutputLogprobs, parse_count, prompt_logprobs
from mock_engine.output_tokens import OutputTokens
from mock_engine.request import Request, hash_blocks

_SEED_MASK = (1 << 64) - 1
_OSL_CV = 0.5  # spread of answer lengths where the client sets none


@dataclass(frozen=True, slots=True)
class Answer:
    """One choice: what the core computes, the tokens that come out, and why it ends."""

    request: Request
    token_ids: list[int]
    finish_reason: str  # "length", "stop" (a stop token or string) or "eos"
    num_reasoning_tokens: int = 0  # that it begins with, marks included
    logprobs: OutputLogprobs | None = None  # only where the client asks for them
    engine_data: dict[str, Any] | None = None  # what else its last chunk carries, such as `prompt_logprobs`


@dataclass(frozen=True, slots=True)
class Planner:
    """Turns wire requests into answers, the same way every time for a given seed."""

    output_tokens: OutputTokens
    max_model_len: int
    block_size: int
    default_osl: int  # mean answer length in tokens where the client sets no max_tokens
    seed: int
    list_of_token_ids: Callable[[Any], list[int]]
    content: Content

    @staticmethod
    def is_slow(wire: Mapping[str, Any]) -> bool:
        """Whether `plan` may take milliseconds, which belong on another thread than the one that paces tokens."""
        sampling, output = wire.get("sampling_options") or {}, wire.get("output_options") or {}
        return bool(sampling.get("guided_decoding")) or output.get("prompt_logprobs") is not None

    def plan(self, request_id: str, wire: Mapping[str, Any]) -> list[Answer]:
        """One `Answer` a choice (`n`). Raises `RequestError`, for the client, if the request cannot be served."""
        prompt = self._prompt(wire)
        sampling = wire.get("sampling_options") or {}
        output = wire.get("output_options") or {}
        num_choices = _integer(sampling, "n", default=1, minimum=1)
        seed = _integer(sampling, "seed", default=None, minimum=-(1 << 63))
        # For Dynamo, who has a higher one is served first; its vLLM worker turns the sign too (ai-dynamo 1.2 to 1.6).
        priority = -_integer(wire.get("routing") or {}, "priority", default=0, minimum=-(1 << 31))
        prompt_seed = hash((*_seed_key(self.seed), *_seed_key(seed), *prompt)) & _SEED_MASK
        num_logprobs = parse_count(output, "logprobs")
        num_prompt_logprobs = parse_count(output, "prompt_logprobs")
        engine_data = None
        if num_prompt_logprobs is not None:
            found = prompt_logprobs(self.content.alternatives, num_prompt_logprobs, prompt_seed, prompt)
            engine_data = {"prompt_logprobs": found}
        answers = []
        for choice in range(num_choices):
            choice_seed = (prompt_seed + choice) & _SEED_MASK
            token_ids, num_thoughts, finish_reason = self._tokens(len(prompt), wire, choice_seed)
            logprobs = None
            if num_logprobs is not None:
                is_greedy = sampling.get("temperature") == 0
                logprobs = OutputLogprobs(self.content.alternatives, num_logprobs, choice_seed, token_ids, is_greedy)
            all_ids = [*prompt, *token_ids]
            request = Request(
                request_id,
                isl_tokens=len(prompt),
                osl_tokens=len(token_ids),
                block_hashes=hash_blocks(all_ids, self.block_size, _hash_salt(wire)),
                choice=choice,
                token_ids=all_ids,
                priority=priority,
            )
            answers.append(Answer(request, token_ids, finish_reason, num_thoughts, logprobs, engine_data))
        return answers

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

    def _tokens(self, isl_tokens: int, wire: Mapping[str, Any], seed: int) -> tuple[list[int], int, str]:
        """The tokens of an answer, how many of them are thoughts, and why it ends."""
        stop = wire.get("stop_conditions") or {}
        room = self.max_model_len - isl_tokens
        max_tokens = _integer(stop, "max_tokens", default=None, minimum=1)
        min_tokens = _integer(stop, "min_tokens", default=0, minimum=0)
        ignore_eos = bool(stop.get("ignore_eos"))
        limit = room if max_tokens is None else min(max_tokens, room)
        thoughts: list[int] = []
        if not _is_thinking_off(wire):
            thoughts = self.content.thoughts(seed, _integer(stop, "max_thinking_tokens", default=None, minimum=0))
        demand = demanded(wire.get("sampling_options") or {})
        written = self.content.demanded(demand, seed, max(limit - len(thoughts), 1))
        if written is not None:
            token_ids, finish_reason = self._ended(thoughts + written.token_ids, written.is_whole, limit)
        else:
            osl_tokens, finish_reason = limit, "length"
            if max_tokens is None and not ignore_eos:
                natural_osl = max(len(thoughts) + _natural_osl(self.default_osl, seed), min_tokens)
                if natural_osl <= room:
                    osl_tokens, finish_reason = natural_osl, "eos"
            token_ids = thoughts[:osl_tokens]
            token_ids += self.output_tokens.take(seed, osl_tokens - len(token_ids))
            if finish_reason == "eos" and self.output_tokens.eos_token_ids:
                token_ids[-1] = self.output_tokens.eos_token_ids[0]
        stop_at = self._stop_at(token_ids, stop, wire.get("eos_token_ids"), min_tokens)
        if stop_at is not None and stop_at < len(token_ids):
            token_ids, finish_reason = token_ids[:stop_at], "stop"
        return token_ids, min(len(thoughts), len(token_ids)), finish_reason

    def _ended(self, token_ids: list[int], is_whole: bool, limit: int) -> tuple[list[int], str]:
        """An answer that is demanded ends when it is whole, whatever `ignore_eos` and `min_tokens` say."""
        if not is_whole or len(token_ids) >= limit:
            return token_ids[:limit], "length"
        if self.output_tokens.eos_token_ids:
            return [*token_ids, self.output_tokens.eos_token_ids[0]], "eos"
        if not token_ids:
            raise RequestError("the answer would be empty, and this model has no token that ends one")
        return token_ids, "stop"

    def _stop_at(
        self, token_ids: list[int], stop: Mapping[str, Any], eos_token_ids: Any, min_tokens: int
    ) -> int | None:
        """Tokens up to the first stop token or stop string, with it; None if there is none."""
        stop_ids = set(stop.get("stop_token_ids") or ())
        if not stop.get("ignore_eos"):
            stop_ids.update(stop.get("stop_token_ids_hidden") or ())
            stop_ids.update(eos_token_ids or ())
        stops = stop.get("stop") or ()
        if isinstance(stops, str):
            stops = (stops,)
        found = (
            _first_stop(token_ids, stop_ids, min_tokens),
            self.content.first_stop(token_ids, stops, min_tokens),
        )
        return min((position for position in found if position is not None), default=None)


def _integer(options: Mapping[str, Any], name: str, default: Any, minimum: int) -> Any:
    value = options.get(name)
    if value is None:
        return default
    if not isinstance(value, int) or value < minimum:
        raise RequestError(f"{name} is {value!r}; it must be an integer of at least {minimum}")
    return value


def _is_thinking_off(wire: Mapping[str, Any]) -> bool:
    """Whether the client has turned thoughts off by the arguments of the chat template, as Qwen and DeepSeek do it."""
    options = (wire.get("extra_args") or {}).get("reasoning_parser_kwargs") or {}
    template = options.get("chat_template_kwargs") or {}
    return template.get("enable_thinking") is False or template.get("thinking") is False


def _hash_salt(wire: Mapping[str, Any]) -> int:
    """What keeps KV blocks apart that have the same tokens: of another adapter, or of another `cache_salt`."""
    routing = wire.get("routing") or {}
    parts = [routing.get("lora_name") or "", routing.get("cache_salt") or ""]
    if not any(parts):
        return 0
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")


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
