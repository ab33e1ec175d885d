"""
What a prefill worker hands over to a decode worker, and what the request becomes on either side.

    clamped(request)                        what a prefill worker makes of it: one token, whatever was asked for
    for_prefill(answers), for_decode(answers)
    handoff.to_params()                     `disaggregated_params` of a prefill worker's last chunk
    Handoff.of_request(request, isl)        the same again, from `prefill_result` of a decode worker's request

Dynamo's frontend carries `disaggregated_params` from one to the other and does not look inside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

from mock_engine.errors import RequestError
from mock_engine.prompt import Answer

KIND = "mock-engine.kv"
VERSION = 1
# What Dynamo's frontend (1.4.2 to 1.6.1) writes on a request that a decode worker is to serve alone, because its prompt
# is short or mostly cached there (conditional disaggregation).
BYPASS_ANNOTATION = "x-bypass-remote-prefill"
_PROBE_KEY = "_HEALTH_CHECK"  # dynamo/health_check.py, HEALTH_CHECK_KEY; 1.2 has no such thing


@dataclass(frozen=True, slots=True)
class Handoff:
    """One KV cache that waits in a prefill worker, and where to fetch it."""

    worker_id: int  # of the prefill worker, as Dynamo knows it
    handle: int  # which of its KV caches
    host: str
    port: int
    num_tokens: int  # of the prompt
    num_blocks: int
    num_cached_tokens: int  # of the prompt, found in the prefill worker's prefix cache

    def to_params(self) -> dict[str, Any]:
        """`disaggregated_params`, which may hold JSON alone."""
        return {"kind": KIND, "version": VERSION, **{field.name: getattr(self, field.name) for field in fields(self)}}

    @classmethod
    def of_request(cls, request: Mapping[str, Any], isl_tokens: int) -> Self:
        """What came with a request of `isl_tokens`. Raises `RequestError` where that is nothing of ours."""
        result = request.get("prefill_result")
        params = result.get("disaggregated_params") if isinstance(result, Mapping) else None
        if not isinstance(params, Mapping):
            raise RequestError(
                f"prefill_result is {_brief(result)}; a decode worker needs the disaggregated_params of a prefill "
                f"worker. Is there one (--disaggregation-mode prefill), and did the frontend ask it?"
            )
        if (params.get("kind"), params.get("version")) != (KIND, VERSION):
            raise RequestError(
                f"disaggregated_params are {_brief(params)}; this worker takes those of kind {KIND!r}, version "
                f"{VERSION}. All prefill and decode workers of a model must be mock-engine's, of one release."
            )
        try:
            handoff = cls(**{field.name: params[field.name] for field in fields(cls)})
        except KeyError as error:
            raise RequestError(f"disaggregated_params have no {error.args[0]}: {_brief(params)}") from None
        for field in fields(cls):
            value = getattr(handoff, field.name)
            is_right = isinstance(value, str) if field.name == "host" else type(value) is int and value >= 0
            if not is_right:
                raise RequestError(f"disaggregated_params have {field.name} {value!r}: {_brief(params)}")
        if handoff.num_tokens != isl_tokens:
            raise RequestError(
                f"disaggregated_params are of a prompt of {handoff.num_tokens} tokens; this one has {isl_tokens}"
            )
        return handoff


def is_probe(request: Mapping[str, Any]) -> bool:
    """Whether it is a health check, which a worker answers without another one."""
    return request.get(_PROBE_KEY) is True


def is_for_decode_alone(request: Mapping[str, Any]) -> bool:
    """Whether the frontend wants a decode worker to compute the prompt too."""
    return BYPASS_ANNOTATION in (request.get("annotations") or ())


def clamped(request: Mapping[str, Any]) -> dict[str, Any]:
    """The request as a prefill worker plans it: one choice, one token."""
    stop = {**(request.get("stop_conditions") or {}), "max_tokens": 1, "min_tokens": None}
    sampling = {**(request.get("sampling_options") or {}), "n": None}
    return {**request, "stop_conditions": stop, "sampling_options": sampling}


def for_prefill(answers: Sequence[Answer]) -> list[Answer]:
    """Their KV blocks stay until they have been fetched."""
    return [replace(answer, request=replace(answer.request, keeps_blocks=True)) for answer in answers]


def for_decode(answers: Sequence[Answer]) -> list[Answer]:
    """
    The prompt's KV cache comes to the first choice; the others find its full blocks, and compute the rest.

    The last prompt token is computed again, which gives the first output token (as vLLM under Dynamo does).
    """
    first, *others = answers
    remote = replace(first.request, num_remote_tokens=first.request.isl_tokens - 1)
    return [replace(first, request=remote), *others]


def _brief(value: Any) -> str:
    text = repr(dict(value) if isinstance(value, Mapping) else value)
    return text if len(text) <= 80 else f"{text[:77]}..."
