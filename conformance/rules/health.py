"""Rules on the health check: the request that a worker sends to its own engine when nobody else does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st

from conformance.bench import Bench, Draw
from conformance.rules import check
from conformance.rules.gen import not_json_safe
from conformance.transcript import Transcript, Violation, expect, tokens_of
from conformance.wire import OTHER_KEYS, OUTPUT_KEYS, SAMPLING_KEYS, STOP_KEYS, requests, wire_request

MARKER = "_HEALTH_CHECK"  # dynamo.health_check.HEALTH_CHECK_KEY
MAX_U32 = 2**32 - 1
_GROUPS = {"stop_conditions": STOP_KEYS, "sampling_options": SAMPLING_KEYS, "output_options": OUTPUT_KEYS}
_LATER_KEYS = ("prefill_result", "bootstrap_info", "encoder_result", "mm_routing_info", "prompt_embeds")
_REQUEST_KEYS = frozenset({"model", "token_ids", "eos_token_ids", "annotations", *_GROUPS, *OTHER_KEYS, *_LATER_KEYS})


@check("health.payload", in_process=True, needs=("health",), max_examples=12)
async def payload(bench: Bench, draw: Draw) -> None:
    probe = probe_request(await payload_from(bench.engine))
    for _ in range(draw(st.integers(0, 2))):
        await bench.talk(draw(requests(max_tokens=st.integers(1, 3))))
    for _ in range(draw(st.integers(1, 3))):
        probe_answer_of(await bench.talk(dict(probe), as_is=True))


async def payload_from(engine: Any) -> Any:
    """The engine's payload, checked. Raises Violation."""
    try:
        given = await engine.health_check_payload()
    except Exception as error:
        raise Violation(
            f"health_check_payload raised {type(error).__name__}: {error}", code=_PAYLOAD_CODE.format(more="")
        ) from error
    payload_of(given)
    return given


_PAYLOAD_CODE = """\
import json
engine, _ = await Engine.from_args(ARGV)
await engine.start(1)
payload = await engine.health_check_payload()
await engine.cleanup()
assert payload is None or type(payload) is dict and json.dumps(payload, allow_nan=False), payload
assert payload is None or type(payload["token_ids"]) is list and payload["token_ids"], payload
assert payload is None or all(0 <= token.__index__() < 2**32 for token in payload["token_ids"]), payload{more}"""


def payload_of(payload: Any) -> None:
    """Pure: whether the runtime can read it as a request."""
    if payload is None:
        return
    code = _PAYLOAD_CODE.format(
        more="""
assert all(isinstance(payload.get(key) or {}, dict) for key in "stop_conditions sampling_options".split()), payload"""
    )
    expect(
        isinstance(payload, Mapping),
        f"health_check_payload gave {type(payload).__name__}; it is a dict that can be written as JSON, or None",
        code=code,
    )
    problem = not_json_safe(payload)
    expect(
        not problem, f"health_check_payload holds {problem}, which is no JSON; the probe is then turned off", code=code
    )
    token_ids = payload.get("token_ids")
    expect(
        isinstance(token_ids, list | tuple)
        and token_ids
        and all(isinstance(token, int) and 0 <= token <= MAX_U32 for token in token_ids),
        f"the token_ids of health_check_payload are {token_ids!r}; a request has at least one, each from 0 to 2^32 - 1",
        code=code,
    )
    for name in _GROUPS:
        group = payload.get(name)
        expect(
            group is None or isinstance(group, Mapping),
            f"{name} of health_check_payload is {type(group).__name__}; in a request it is an object",
            code=code,
        )


def probe_request(payload: Mapping[str, Any]) -> dict[str, Any]:
    """
    The payload as it comes back to `generate`: read as a request and written again.

    What a request does not have is lost on the way, and what the payload does not say is there as None.
    """
    request = wire_request(payload["token_ids"], sampling={"temperature": None})
    for name, keys in _GROUPS.items():
        request[name] |= {key: value for key, value in (payload.get(name) or {}).items() if key in keys}
    for key in _REQUEST_KEYS - set(_GROUPS):
        if payload.get(key) is not None:
            request[key] = payload[key]
    return {**request, MARKER: True}


def probe_answer_of(transcript: Transcript) -> None:
    """Pure: whether the answer to a probe says that the engine is well, and the first chunk of it already."""
    error = transcript.error
    expect(
        error is None,
        f"the engine's own health check raised {type(error).__name__}: {error}; the worker stays NotReady",
        transcript,
        shows="'raised' not in chunks[-1]",
    )
    reason = transcript.finish_reason
    expect(
        reason in ("stop", "length", "eos"),
        f"the engine's own health check ended with finish_reason {reason!r}; a healthy engine ends it with 'stop', "
        "'length' or 'eos'",
        transcript,
        shows="chunks[-1].get('finish_reason') in ('stop', 'length', 'eos')",
    )
    first = transcript.chunks[0]
    expect(
        tokens_of(first) or first.get("finish_reason"),
        f"the first chunk of the answer to a health check is {first!r}; it has neither a token nor an end, and the "
        "runtime looks at the first one only, so the check passes before the engine has done anything",
        transcript,
        shows="chunks[0].get('token_ids') or chunks[0].get('finish_reason')",
    )
