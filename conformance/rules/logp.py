"""
Rules on log probabilities, of the answer and of the prompt.

The checks named `*_of` are pure: they take a transcript and raise.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st

from conformance import release
from conformance.bench import Bench, Draw
from conformance.rules import check
from conformance.runner_errors import NotHere
from conformance.transcript import Transcript, expect, tokens_of
from conformance.wire import requests

MAX_LOGPROB = 1e-3  # rounding in half precision; a probability instead of its logarithm is far above


def _asked(draw: Draw, **output: Any) -> dict[str, Any]:
    request: dict[str, Any] = draw(requests())
    request["output_options"].update(output)
    return request


@check("logp.aligned")
async def aligned(bench: Bench, draw: Draw) -> None:
    request = _asked(draw, logprobs=draw(st.integers(0, 5)))
    aligned_of(await bench.talk(request, stop_after=draw(st.none() | st.integers(1, 4))))


def aligned_of(transcript: Transcript) -> None:
    shows = (
        "all(chunk.get('log_probs') is None or len(chunk['log_probs']) == len(chunk['token_ids']) and "
        f"all(-1e30 < one <= {MAX_LOGPROB} for one in chunk['log_probs']) for chunk in chunks)"
    )
    for chunk in transcript.chunks:
        log_probs = chunk.get("log_probs") if isinstance(chunk, Mapping) else None
        if log_probs is None:
            continue
        expect(
            isinstance(log_probs, list | tuple),
            f"log_probs is {type(log_probs).__name__}; it is a list of floats",
            transcript,
            shows=shows,
        )
        expect(
            len(log_probs) == len(tokens_of(chunk)),
            f"a chunk has {len(tokens_of(chunk))} tokens and {len(log_probs)} log_probs; they are read side by side, "
            "so there is one for each, or none at all",
            transcript,
            shows=shows,
        )
        for value in log_probs:
            expect(
                _is_number(value) and math.isfinite(value) and value <= MAX_LOGPROB,
                f"log_probs has {value!r}; the logarithm of a probability is a finite number of at most 0",
                transcript,
                shows=shows,
            )


@check("logp.top")
async def top(bench: Bench, draw: Draw) -> None:
    request = _asked(draw, logprobs=draw(st.none() | st.integers(0, 5)))
    # Greedy and nothing else: then the token that was chosen is the most likely one for every engine.
    request["sampling_options"] = {**dict.fromkeys(request["sampling_options"]), "temperature": 0.0}
    request["stop_conditions"].update(ignore_eos=None, min_tokens=None)
    top_of(await bench.talk(request, stop_after=draw(st.none() | st.integers(1, 4))))


def top_of(transcript: Transcript) -> None:
    asked = (transcript.request.get("output_options") or {}).get("logprobs")
    for chunk in transcript.chunks:
        lists = chunk.get("top_logprobs") if isinstance(chunk, Mapping) else None
        if lists is None:
            continue
        tokens = tokens_of(chunk)
        expect(
            isinstance(lists, list | tuple) and all(isinstance(entries, list | tuple) for entries in lists),
            f"top_logprobs is {_kind(lists)}; it is a list of lists of objects, one list for each token",
            transcript,
            shows=_TOP_SHOWS,
        )
        expect(
            len(lists) == len(tokens),
            f"a chunk has {len(tokens)} tokens and {len(lists)} lists in top_logprobs; one for each, or none at all",
            transcript,
            shows=_TOP_SHOWS,
        )
        for token, entries in zip(tokens, lists, strict=True):
            for entry in entries:
                problem = _entry_problem(entry)
                expect(
                    not problem,
                    f"an entry of top_logprobs {problem}; each is an object with rank (int), token_id (int) and "
                    f"logprob (number): {entry!r:.100}",
                    transcript,
                    shows=_TOP_SHOWS,
                )
            ids = [entry["token_id"] for entry in entries]
            expect(
                token in ids or not ids,
                f"the token {token} was chosen, and its list in top_logprobs has {ids} only",
                transcript,
                shows=_TOP_SHOWS,
            )
            expect(
                asked is None or len(entries) <= asked + 1,
                f"logprobs={asked}, and a token has {len(entries)} entries in top_logprobs; at most {asked}, and one "
                "for the chosen token",
                transcript,
                shows=f"all(len(one) <= {asked} + 1 for chunk in chunks for one in chunk.get('top_logprobs') or [])",
            )


_TOP_SHOWS = (
    "all(len(chunk['top_logprobs']) == len(chunk['token_ids']) and all(not top or token in "
    "[one['token_id'] + 0 * one['rank'] + 0 * (one['logprob'] == one['logprob'] or 1 / 0) for one in top] "
    "for token, top in zip(chunk['token_ids'], chunk['top_logprobs'])) "
    "for chunk in chunks if chunk.get('top_logprobs') is not None)"
)


def _entry_problem(entry: Any) -> str:
    if not isinstance(entry, Mapping):
        return f"is {type(entry).__name__}"
    for key in ("rank", "token_id"):
        value: Any = entry.get(key)
        if not hasattr(value, "__index__") or isinstance(value, bool) or int(value) < 0:
            return f"has {key} {value!r}" if key in entry else f"has no {key}"
    logprob: Any = entry.get("logprob")
    if not _is_number(logprob) or math.isnan(logprob) or logprob > MAX_LOGPROB:
        return f"has logprob {logprob!r}" if "logprob" in entry else "has no logprob"
    return ""


@check("logp.bad_option", in_process=True)  # what is no number does not come through the frontend
async def bad_option(bench: Bench, draw: Draw) -> None:
    bad = draw(st.integers(-(2**31), -1) | st.sampled_from(["x", "many", "1.5x", "-1", [], {}, [1]]))
    key = draw(st.sampled_from(["logprobs", "prompt_logprobs"]))
    request = _asked(draw)
    request["output_options"] |= {"logprobs": None, "prompt_logprobs": None}
    without = copy.deepcopy(request)
    request["output_options"][key] = bad
    bad_option_of(await bench.talk(request), await bench.talk(without), key)


def bad_option_of(transcript: Transcript, without: Transcript, key: str) -> None:
    """`without`: the same request that does not ask."""
    bad = transcript.request["output_options"][key]
    error = transcript.error
    expect(
        error is None or without.error is not None,
        f"{key}={bad!r} raised {type(error).__name__}: {error}; a value that says nothing is ignored, with a warning "
        "(parse_logprob_options)",
        transcript,
        without,
        shows="'raised' not in chunks[-1]",
    )
    for name in ("log_probs", "top_logprobs", "engine_data"):
        given, usual = _has(transcript, name), _has(without, name)
        expect(
            given == usual,
            f"{key}={bad!r}: {name} {'came' if given else 'did not come'}, and without it {name} "
            f"{'came' if usual else 'did not come'}; a value that says nothing is ignored",
            transcript,
            without,
            shows=f"any(chunk.get('{name}') for chunk in chunks) == any(chunk.get('{name}') for chunk in others[0])",
        )


def _has(transcript: Transcript, name: str) -> bool:
    return any(isinstance(chunk, Mapping) and bool(chunk.get(name)) for chunk in transcript.chunks)


@check("logp.prompt")
async def prompt(bench: Bench, draw: Draw) -> None:
    if bench.facts.role != "agg":
        raise NotHere(f"a {bench.facts.role} worker's terminal chunk is not what the client gets")
    request = _asked(draw, prompt_logprobs=draw(st.integers(0, 3)), logprobs=draw(st.none() | st.integers(0, 2)))
    transcript = await bench.talk(request)
    if isinstance(transcript.error, release.exceptions("InvalidArgument")):
        raise NotHere(f"the engine refuses prompt_logprobs: {transcript.error}")
    prompt_of(transcript)


def prompt_of(transcript: Transcript) -> None:
    if not transcript.terminals or transcript.is_cancelled:
        return
    data = transcript.last.get("engine_data")
    given: Any = data.get("prompt_logprobs") if isinstance(data, Mapping) else None
    num_tokens = len(transcript.request["token_ids"])
    asked = (transcript.request.get("output_options") or {}).get("prompt_logprobs")
    found = "(chunks[-1].get('engine_data') or {}).get('prompt_logprobs')"
    expect(
        given is not None,
        f"prompt_logprobs={asked}, and the terminal chunk has no engine_data.prompt_logprobs; an engine that cannot "
        "give them raises InvalidArgument",
        transcript,
        shows=f"{found} is not None",
    )
    expect(
        isinstance(given, list | tuple) and len(given) == num_tokens,
        f"engine_data.prompt_logprobs has {len(given) if isinstance(given, list | tuple) else given!r} entries for a "
        f"prompt of {num_tokens} tokens; one for each, and None for the first",
        transcript,
        shows=f"len({found}) == {num_tokens}",
    )
    expect(
        given[0] is None,
        f"the first of prompt_logprobs is {given[0]!r:.60}; nothing stands before the first token, so it is None",
        transcript,
        shows=f"{found}[0] is None",
    )
    for entry in given[1:]:
        expect(
            isinstance(entry, Mapping)
            and all(isinstance(key, str) and key.isdecimal() for key in entry)
            and all(isinstance(one, Mapping) and _is_number(one.get("logprob")) for one in entry.values()),
            f"an entry of prompt_logprobs is {entry!r:.100}; after the first each is an object by token id, written as "
            'a str: {"17": {"logprob": -1.5}}',
            transcript,
            shows=f"all(type(key) is str and type(one['logprob']) is float for entry in {found}[1:] "
            "for key, one in entry.items())",
        )


def _is_number(value: Any) -> bool:
    return hasattr(value, "__float__") and not isinstance(value, bool)


def _kind(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"a list of {', '.join(sorted({type(part).__name__ for part in value}))}"
    return f"a {type(value).__name__}"
