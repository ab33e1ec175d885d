"""
Requests as Dynamo's Rust side writes them, and Hypothesis strategies for them.

Every option key is present, None where the client set nothing; temperatures
went through float32; seeds may be negative; token ids go up to 2^32 - 1.
Observed on the real worker, ai-dynamo 1.2.1 to 1.6.1.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

MAX_TOKEN_ID = 2**32 - 1
MAX_INT32 = 2**31 - 1

STOP_KEYS = (
    "max_tokens",
    "stop",
    "stop_token_ids",
    "stop_token_ids_hidden",
    "min_tokens",
    "ignore_eos",
    "max_thinking_tokens",
)
SAMPLING_KEYS = (
    "n",
    "best_of",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "use_beam_search",
    "length_penalty",
    "seed",
    "include_stop_str_in_output",
    "guided_decoding",
)
OUTPUT_KEYS = (
    "logprobs",
    "prompt_logprobs",
    "skip_special_tokens",
    "formatted_prompt",
    "return_tokens_as_token_ids",
)
OTHER_KEYS = ("multi_modal_data", "routing", "bootstrap_info", "extra_args", "mm_processor_kwargs", "mdc_sum")


def wire_request(
    token_ids: Sequence[int],
    *,
    max_tokens: int | None = None,
    stop: dict[str, Any] | None = None,
    sampling: dict[str, Any] | None = None,
    output: dict[str, Any] | None = None,
    **others: Any,
) -> dict[str, Any]:
    """One request in wire form; greedy unless `sampling` says otherwise."""
    return {
        "model": "",
        "token_ids": list(token_ids),
        "stop_conditions": {**dict.fromkeys(STOP_KEYS), "max_tokens": max_tokens, **(stop or {})},
        "sampling_options": {**dict.fromkeys(SAMPLING_KEYS), "temperature": 0.0, **(sampling or {})},
        "output_options": {**dict.fromkeys(OUTPUT_KEYS), **(output or {})},
        "eos_token_ids": [],
        "annotations": [],
        **dict.fromkeys(OTHER_KEYS),
        **others,
    }


def as_float32(value: float) -> float:
    """What is left of a number that went through Rust's f32: 0.1 -> 0.10000000149011612."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def prompts(max_size: int = 40, *, any_id: bool = False) -> st.SearchStrategy[list[int]]:
    """Prompts of at least one token. Small ids, which every vocabulary has, unless `any_id`."""
    ids = st.integers(0, MAX_TOKEN_ID) if any_id else st.integers(1, 200)
    return st.lists(ids, min_size=1, max_size=max(1, max_size))


def temperatures() -> st.SearchStrategy[float | None]:
    return st.none() | st.floats(0, 2, width=32).map(as_float32) | st.just(as_float32(0.1))


def seeds() -> st.SearchStrategy[int | None]:
    return st.none() | st.integers(-(2**63), 2**63 - 1)


def sampling_options() -> st.SearchStrategy[dict[str, Any]]:
    """Whatever a client may set about sampling, n apart."""
    return st.fixed_dictionaries(
        {},
        optional={
            "temperature": temperatures(),
            "top_p": st.none() | st.floats(0.125, 1, width=32).map(as_float32),
            "top_k": st.none() | st.integers(-1, 100),
            "min_p": st.none() | st.floats(0, 0.5, width=32).map(as_float32),
            "seed": seeds(),
            "presence_penalty": st.none() | st.floats(-2, 2, width=32).map(as_float32),
            "frequency_penalty": st.none() | st.floats(-2, 2, width=32).map(as_float32),
            "repetition_penalty": st.none() | st.floats(0.5, 2, width=32).map(as_float32),
            "n": st.none() | st.just(1),
        },
    )


def requests(
    *, max_isl: int = 24, max_tokens: st.SearchStrategy[int | None] | None = None, **others: Any
) -> st.SearchStrategy[dict[str, Any]]:
    """Ordinary requests that every engine must answer: short prompts, short answers, any sampling options."""
    return st.builds(
        wire_request,
        prompts(max_isl),
        max_tokens=st.integers(1, 12) if max_tokens is None else max_tokens,
        sampling=sampling_options(),
        stop=st.fixed_dictionaries({}, optional={"ignore_eos": st.just(True), "min_tokens": st.none() | st.just(0)}),
        **{name: st.just(value) for name, value in others.items()},
    )
