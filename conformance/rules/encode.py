"""Rules on encode workers, and on those that stand behind one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st

from conformance.bench import Bench, Draw
from conformance.rules import check
from conformance.rules.gen import not_json_safe
from conformance.transcript import Transcript, expect, tokens_of
from conformance.wire import requests

_IMAGES = ({"image_url": [{"Url": "data:image/png;base64,iVBORw0KGgo="}]}, {"image_url": [{"Url": "file:///a.png"}]})


@check("encode.terminal")
async def terminal(bench: Bench, draw: Draw) -> None:
    terminal_of(await bench.talk(draw(requests()), stop_after=draw(st.none() | st.just(0))))


def terminal_of(transcript: Transcript) -> None:
    if transcript.error is not None or not transcript.terminals or transcript.is_cancelled:
        return
    last = transcript.last
    result = last.get("encoder_result")
    shows = (
        "type(chunks[-1].get('encoder_result')) is dict and not chunks[-1].get('token_ids') "
        "and __import__('json').dumps(chunks) "
        "or chunks[-1].get('finish_reason') in ('cancelled', 'abort')"
    )
    expect(
        isinstance(result, Mapping),
        f"the terminal chunk of an encode worker has encoder_result {_short(result)}; it is an object, which the "
        "frontend forwards",
        transcript,
        shows=shows,
    )
    problem = not_json_safe(result)
    expect(not problem, f"encoder_result holds {problem}, which is no JSON", transcript, shows=shows)
    expect(
        not tokens_of(last),
        f"the terminal chunk of an encode worker has the tokens {tokens_of(last)}; it has none",
        transcript,
        shows=shows,
    )


def _short(value: Any) -> str:
    return "absent" if value is None else f"{type(value).__name__} {value!r:.60}"


@check("encode.require", needs=("encoder",), max_examples=16)
async def require(bench: Bench, draw: Draw) -> None:
    request = draw(requests(max_tokens=st.integers(1, 4)))
    request["multi_modal_data"] = draw(st.sampled_from(_IMAGES))
    # What is no object does not pass Dynamo's own frontend; an orchestrator may set it all the same.
    wrong: st.SearchStrategy[Any] = st.sampled_from(["absent", None])
    if bench.settings.driver != "worker":
        wrong |= st.lists(st.integers(), max_size=2) | st.text(max_size=4) | st.integers() | st.booleans()
    given = draw(wrong)
    if given != "absent":
        request["encoder_result"] = given
    require_of(await bench.talk(request))


def require_of(transcript: Transcript) -> None:
    given = transcript.request.get("encoder_result", "absent")
    expect(
        is_refused(transcript),
        f"with route_to_encoder, a request with an image and encoder_result {given!r} was served "
        f"({transcript.finish_reason!r}); it did not come from an encode worker: refuse it (require_encoder_result)",
        transcript,
        shows="'raised' in chunks[-1] or 'error' in str(chunks[-1].get('finish_reason'))",
    )


def is_refused(transcript: Transcript) -> bool:
    """Whether it ended with an error, raised or told."""
    return transcript.error is not None or "error" in str(transcript.finish_reason)
