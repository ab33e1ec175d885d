"""
Rules on errors: what is raised for a request that cannot be served, and what is left of the engine then.

`wrong_request` and `wrong_requests` draw what a client can get wrong; an engine may serve it after all. Failures of
the engine's own are made with the probe's fault points, where it has any.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from hypothesis import assume
from hypothesis import strategies as st

from conformance import release
from conformance.bench import Bench, Draw
from conformance.reproducer import as_code
from conformance.resources import probe_of
from conformance.rules import check
from conformance.transcript import Transcript, expect
from conformance.wire import MAX_TOKEN_ID, prompts, requests, wire_request

# With these the router takes the worker for gone: "No workers available" for everybody.
EVICTING = ("EngineShutdown", "StreamIncomplete")
_STOPPED = ("stop", "kill", "abort", "drop", "cancel")
_LONGEST_PROMPT = 200_000
_BROKEN_IMAGE = {"image_url": [{"Url": "data:image/png;base64,%%%"}]}

# What a client can get wrong: part of the request, option, value.
_BAD_OPTIONS: list[tuple[str, str, Any]] = [
    ("stop_conditions", "max_tokens", 0),
    ("stop_conditions", "min_tokens", 2**31),
    ("stop_conditions", "stop_token_ids", [MAX_TOKEN_ID]),
    ("sampling_options", "n", 0),
    ("sampling_options", "n", 2),
    ("sampling_options", "temperature", -1.0),
    ("sampling_options", "top_p", 0.0),
    ("sampling_options", "top_p", 1.5),
    ("sampling_options", "top_k", -5),
    ("sampling_options", "min_p", 2.0),
    ("sampling_options", "presence_penalty", 5.0),
    ("sampling_options", "repetition_penalty", -1.0),
    ("sampling_options", "guided_decoding", {"regex": "("}),
    ("sampling_options", "guided_decoding", {"json": "{not json"}),
    ("output_options", "logprobs", 10_000),
    ("output_options", "prompt_logprobs", 10_000),
]


Wrong = tuple[str, dict[str, Any]]  # what is wrong, in a few words, and the request


def wrong_request(bench: Bench) -> st.SearchStrategy[Wrong]:
    """One mistake of the client's."""
    return st.one_of([*_wrong_prompts(bench), st.builds(_with_bad_option, prompts(8), st.sampled_from(_BAD_OPTIONS))])


def wrong_requests(bench: Bench, draw: Draw) -> list[Wrong]:
    """Many mistakes, one a request: each that can be made with a prompt, and half of those with an option."""
    options = draw(st.permutations(_BAD_OPTIONS))[: len(_BAD_OPTIONS) // 2]
    prompt = draw(prompts(8))
    return [*(draw(kind) for kind in _wrong_prompts(bench)), *(_with_bad_option(prompt, bad) for bad in options)]


def _wrong_prompts(bench: Bench) -> list[st.SearchStrategy[Wrong]]:
    context = bench.facts.numbers.get("context_length")
    kinds = [
        st.tuples(st.just("an empty prompt"), st.builds(wire_request, st.just([]), max_tokens=st.integers(1, 6))),
        st.builds(_beyond_vocabulary, prompts(8)),
        st.just(("a broken image", wire_request([1, 2], max_tokens=2, multi_modal_data=_BROKEN_IMAGE))),
    ]
    if isinstance(context, int) and context <= _LONGEST_PROMPT:
        kinds.append(st.builds(_beyond_context, st.just(context), st.integers(1, 8) | st.just(context)))
    return kinds


def _beyond_vocabulary(prompt: list[int]) -> Wrong:
    return "a token id that no vocabulary has", wire_request([*prompt, MAX_TOKEN_ID], max_tokens=4)


def _beyond_context(context: int, beyond: int) -> Wrong:
    return f"a prompt {beyond} tokens beyond the context", wire_request([7] * (context + beyond), max_tokens=4)


def _with_bad_option(prompt: list[int], bad: tuple[str, str, Any]) -> Wrong:
    part, option, value = bad
    request = wire_request(prompt, max_tokens=4)
    request[part][option] = value
    return f"{option}={value!r}", request


def request_faults(bench: Bench) -> list[str]:
    """Places where the engine's own probe can let one request fail; none where the engine is in another process."""
    points = getattr(probe_of(bench.engine), "fault_points", None)
    return [point for point in points() if point.startswith("request")] if callable(points) else []


async def _ask_with_fault(bench: Bench, request: Mapping[str, Any], point: str, engine: Any = None) -> Transcript:
    """On an engine of its own: a fault that this request does not reach must not meet another."""
    engine = engine or await bench.make_started()
    request = await bench.prepared(request)
    probe_of(engine).inject(point)
    return await bench.talk(request, as_is=True, engine=engine)


# What is raised.


@check("err.typed", in_process=True)
async def typed(bench: Bench, draw: Draw) -> None:
    faults = request_faults(bench)
    kind = draw(st.sampled_from(["of the client", "of nobody"] + ["of the engine"] * bool(faults)))
    if kind == "of the client":
        for what, request in wrong_requests(bench, draw):
            typed_for_client_of(await bench.talk(request, stop_after=3), what)
    elif kind == "of nobody":
        for request in draw(st.lists(requests(), min_size=3, max_size=5)):
            typed_for_engine_of(await bench.talk(request, stop_after=3), "a valid request")
    else:
        point = draw(st.sampled_from(faults))
        transcript = await _ask_with_fault(bench, draw(requests()), point)
        typed_for_engine_of(transcript, f"a failure inside the engine (at {point})", point)


def typed_for_client_of(transcript: Transcript, what: str) -> None:
    """The client made a mistake: what was raised, if anything, has to say so."""
    error = transcript.error
    expect(
        error is None or _blames_client(error),
        f"{what} raised {_said(error)}; an error of the client is raised as InvalidArgument (or ValueError, which the "
        f"bridge takes for it: HTTP 400), and {type(error).__name__} looks like the engine's own failure (HTTP 500)",
        transcript,
        shows=_is_not_raised(error),
    )


def typed_for_engine_of(transcript: Transcript, what: str, point: str = "") -> None:
    """The client made no mistake: what was raised, if anything, must not say that it did."""
    error = transcript.error
    expect(
        error is None or not _blames_client(error),
        f"{what} raised {_said(error)}; InvalidArgument, ValueError and TypeError blame the client (HTTP 400); "
        "raise another type for what is not its mistake",
        transcript,
        shows=_is_not_raised(error),
        code=_fault_code(transcript, point, ("InvalidArgument", "ValueError", "TypeError")) if point else "",
    )


def _blames_client(error: BaseException) -> bool:
    if isinstance(error, (*release.exceptions("InvalidArgument"), ValueError, TypeError)):
        return True
    code = getattr(error, "code", None)  # dynamo.llm.exceptions.HttpError
    return type(error).__name__ == "HttpError" and isinstance(code, int) and 400 <= code < 500


@check("err.no_evict", in_process=True)
async def no_evict(bench: Bench, draw: Draw) -> None:
    faults = request_faults(bench)
    kind = draw(st.sampled_from(["wrong", "valid", "not handed over"] + ["fault"] * bool(faults)))
    if kind == "wrong":
        for what, request in wrong_requests(bench, draw):
            no_evict_of(await bench.talk(request, stop_after=3), what)
    elif kind == "fault":
        point = draw(st.sampled_from(faults))
        transcript = await _ask_with_fault(bench, draw(requests()), point)
        no_evict_of(transcript, f"a failure inside the engine (at {point})", point)
    else:
        what = "a valid request" if kind == "valid" else "a request without what the worker before this one adds"
        stop_after = draw(st.none() | st.integers(0, 3))
        no_evict_of(await bench.talk(draw(requests()), stop_after=stop_after, as_is=kind == "not handed over"), what)


def no_evict_of(transcript: Transcript, what: str, point: str = "") -> None:
    error = transcript.error
    expect(
        not isinstance(error, (*release.exceptions(*EVICTING), GeneratorExit)),
        f"{what} raised {_said(error)}; with {', '.join(EVICTING)} or GeneratorExit the router takes the whole worker "
        "for gone, and the next requests get 'No workers available'. Raise InvalidArgument or Unknown",
        transcript,
        shows=_is_not_raised(error),
        code=_fault_code(transcript, point, (*EVICTING, "GeneratorExit")) if point else "",
    )


def _fault_code(transcript: Transcript, point: str, unwanted: tuple[str, ...]) -> str:
    return f"""
from dynamo._core import Context
engine, _ = await Engine.from_args(ARGV)
await engine.start(1)
engine.conformance_probe().inject({point!r})
found = ""
try:
    async for chunk in engine.generate({as_code(dict(transcript.request))}, context=Context("r1")):
        print(chunk)
except BaseException as error:
    found = type(error).__name__
await engine.cleanup()
assert found not in {unwanted}, found
"""


def _said(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")


def _is_not_raised(error: BaseException | None) -> str:
    return f"not chunks[-1].get('raised', '').startswith('{type(error).__name__}(')"


# What is left.


@check("err.recover")
async def recover(bench: Bench, draw: Draw) -> None:
    """As many wrong requests as there are places, so that it shows if each keeps one."""
    places = bench.facts.numbers.get("max_num_seqs")
    most = min(places if isinstance(places, int) else 4, 8)
    faults = request_faults(bench)
    wrong = draw(st.lists(wrong_request(bench), min_size=1, max_size=5))
    point = draw(st.just("") | st.sampled_from(faults)) if faults else ""
    engine = await bench.make_started() if point else None
    asked: list[tuple[Transcript, str]] = []
    for i in range(most):
        _, request = wrong[i % len(wrong)]
        if point:
            transcript = await _ask_with_fault(bench, wire_request([1 + i, 2, 3], max_tokens=4), point, engine)
            assume(transcript.error is not None or transcript.is_cancelled)  # else it may meet the last one
        else:
            transcript = await bench.talk(copy.deepcopy(request), stop_after=3, engine=engine)
        asked.append((transcript, point))
    stream = await bench.open(draw(requests()), engine=engine)
    recover_of(await stream.finish(bench.answer_within_s()), asked)


def recover_of(transcript: Transcript, asked: Sequence[tuple[Transcript, str]]) -> None:
    """`transcript` is of a valid request after those `asked`; the texts are fault points."""
    errors = sorted({_said(before.error) for before, _ in asked if before.error is not None})
    found = (
        "never ended"
        if transcript.is_hung
        else f"raised {_said(transcript.error)}"
        if transcript.error is not None
        else f"ended with finish_reason {transcript.finish_reason!r}"
    )
    expect(
        not transcript.is_hung and transcript.error is None and transcript.terminals and not transcript.is_cancelled,
        f"after {len(asked)} requests that could not be served ({'; '.join(errors)[:200] or 'without an error'}) the "
        f"next, valid one {found}; one request's failure must not end the service of others",
        transcript,
        *(before for before, _ in asked),
        code=_recover_code(transcript, asked),
    )


def _recover_code(transcript: Transcript, asked: Sequence[tuple[Transcript, str]]) -> str:
    before = ", ".join(f"({as_code(dict(one.request))}, {point!r})" for one, point in asked)
    return f"""
from dynamo._core import Context
engine, _ = await Engine.from_args(ARGV)
await engine.start(1)
async def ask(request_id, request, num_chunks=None):
    try:
        context, chunks = Context(request_id), []
        async for chunk in engine.generate(request, context=context):
            chunks.append(chunk)
            if len(chunks) == num_chunks: context.stop_generating()
    except Exception as error:
        print(request_id, repr(error))
    return chunks
for request, point in [{before}]:
    if point: engine.conformance_probe().inject(point)
    await asyncio.wait_for(ask("wrong", request, num_chunks=3), 20)
chunks = await asyncio.wait_for(ask("right", {as_code(dict(transcript.request))}), 20)
assert chunks and chunks[-1].get("finish_reason") not in (None, "cancelled", "abort"), chunks
await engine.cleanup()
"""


# How it is told.


@check("err.no_bare_error_chunk")
async def no_bare_error_chunk(bench: Bench, draw: Draw) -> None:
    faults = request_faults(bench)
    kind = draw(st.sampled_from(["wrong", "valid"] + ["fault"] * bool(faults)))
    if kind == "wrong":
        for what, request in wrong_requests(bench, draw):
            no_bare_error_chunk_of(await bench.talk(request, stop_after=6), what)
    elif kind == "valid":
        stop_after = draw(st.none() | st.integers(0, 3))
        no_bare_error_chunk_of(await bench.talk(draw(requests()), stop_after=stop_after), "a valid request")
    else:
        point = draw(st.sampled_from(faults))
        transcript = await _ask_with_fault(bench, draw(requests()), point)
        no_bare_error_chunk_of(transcript, f"a failure inside the engine (at {point})", point)


def no_bare_error_chunk_of(transcript: Transcript, what: str, point: str = "") -> None:
    for chunk in transcript.chunks:
        reason = chunk.get("finish_reason") if isinstance(chunk, Mapping) else None
        is_error = isinstance(reason, Mapping) or (isinstance(reason, str) and reason.partition(":")[0] == "error")
        expect(
            not is_error,
            f"{what} ended with a chunk with finish_reason {reason!r}; raise the error instead, so that the client "
            "gets its type and its HTTP status",
            transcript,
            shows="not any(str(chunk.get('finish_reason')).startswith(('error', '{')) for chunk in chunks)",
            code=_chunk_code(transcript, point, "error") if point else "",
        )
    expect(
        not transcript.is_cancelled or transcript.of_kind(*_STOPPED),
        f"{what} ended with finish_reason {transcript.finish_reason!r}, though nobody stopped it; an error is raised, "
        "and not told as a cancellation",
        transcript,
        shows="chunks[-1].get('finish_reason') not in ('cancelled', 'abort')",
        code=_chunk_code(transcript, point, "cancelled", "abort") if point else "",
    )


def _chunk_code(transcript: Transcript, point: str, *unwanted: str) -> str:
    return f"""
from dynamo._core import Context
engine, _ = await Engine.from_args(ARGV)
await engine.start(1)
engine.conformance_probe().inject({point!r})
reasons = []
try:
    async for chunk in engine.generate({as_code(dict(transcript.request))}, context=Context("r1")):
        reasons.append(str(chunk.get("finish_reason")))
except Exception as error:
    print(repr(error))
await engine.cleanup()
assert not any(word in reason for reason in reasons for word in {unwanted}), reasons
"""
