"""Rules on prefill and decode workers, and on engines with several data-parallel ranks."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st

from conformance.bench import Bench, Draw
from conformance.reproducer import as_code
from conformance.rules import check
from conformance.rules.encode import is_refused
from conformance.rules.gen import not_json_safe
from conformance.rules.health import payload_from, probe_answer_of, probe_request
from conformance.transcript import Transcript, expect, tokens_of
from conformance.wire import requests

MAX_U32 = 2**32 - 1


@check("disagg.prefill_one")
async def prefill_one(bench: Bench, draw: Draw) -> None:
    budget = draw(st.none() | st.integers(1, 12))
    request = draw(requests(max_tokens=st.just(budget)))
    request["stop_conditions"]["min_tokens"] = draw(st.none() | st.integers(0, 12 if budget is None else budget))
    prefill_one_of(await bench.answer(request))


def prefill_one_of(transcript: Transcript) -> None:
    stop = transcript.request.get("stop_conditions") or {}
    num_tokens = len(transcript.token_ids)
    expect(
        num_tokens <= 1,
        f"a prefill worker gave {num_tokens} tokens for max_tokens={stop.get('max_tokens')}, "
        f"min_tokens={stop.get('min_tokens')}; it gives one at most, the rest is for the decode worker",
        transcript,
        shows="sum(len(chunk['token_ids']) for chunk in chunks) <= 1",
    )


@check("disagg.prefill_params")
async def prefill_params(bench: Bench, draw: Draw) -> None:
    prefill_params_of(await bench.talk(draw(requests()), stop_after=draw(st.none() | st.integers(0, 1))))


def prefill_params_of(transcript: Transcript) -> None:
    if transcript.error is not None or transcript.is_cancelled or not transcript.terminals:
        return
    params = params_of(transcript)
    shows = (
        "any(type(chunk.get('disaggregated_params')) is dict and __import__('json').dumps(chunk) for chunk in chunks)"
    )
    expect(
        params is not None,
        "no chunk of a prefill worker has disaggregated_params; the terminal one carries what the decode worker needs",
        transcript,
        shows=shows,
    )
    expect(
        isinstance(params, Mapping),
        f"disaggregated_params is {type(params).__name__}; it is an object",
        transcript,
        shows=shows,
    )
    problem = not_json_safe(params)
    expect(not problem, f"disaggregated_params holds {problem}, which is no JSON", transcript, shows=shows)


def params_of(transcript: Transcript) -> Any:
    """The disaggregated_params of the terminal chunk; of an earlier one where a bootstrap address is sent ahead."""
    for chunk in reversed(transcript.chunks):
        if isinstance(chunk, Mapping) and chunk.get("disaggregated_params") is not None:
            return chunk["disaggregated_params"]
    return None


@check("disagg.handoff", in_process=True, needs=("peer",), max_examples=8)
async def handoff(bench: Bench, draw: Draw) -> None:
    is_prefill = bench.facts.role == "prefill"
    peer = await bench.make_started(list(bench.facts.decode_argv or bench.facts.prefill_argv or ()))
    prefill, decode = (bench.engine, peer) if is_prefill else (peer, bench.engine)
    request = draw(requests())
    first = await bench.talk(copy.deepcopy(request), engine=prefill, as_is=True)
    if params_of(first) is None:
        return  # disagg.prefill_params says so
    handed: dict[str, Any] = {"disaggregated_params": params_of(first), "prompt_tokens_details": None}
    second = await bench.talk({**request, "prefill_result": handed}, engine=decode, as_is=True)
    handoff_of(second, _handoff_script(bench, request))


def handoff_of(transcript: Transcript, code: str = "") -> None:
    """`transcript`: of the decode worker."""
    error = transcript.error
    expect(
        error is None,
        f"with what the prefill engine handed off, the decode engine raised {type(error).__name__}: {error}",
        transcript,
        code=code,
    )
    expect(
        transcript.terminals and not transcript.is_cancelled and not is_refused(transcript),
        f"with what the prefill engine handed off, the decode engine ended with {transcript.finish_reason!r}",
        transcript,
        code=code,
    )
    expect(
        transcript.token_ids or transcript.finish_reason in ("stop", "eos"),
        "with what the prefill engine handed off, the decode engine gave no token",
        transcript,
        code=code,
    )


def _handoff_script(bench: Bench, request: Mapping[str, Any]) -> str:
    peer = list(bench.facts.decode_argv or bench.facts.prefill_argv or ())
    prefill, decode = ("ARGV", repr(peer)) if bench.facts.role == "prefill" else (repr(peer), "ARGV")
    return f"""\
import copy
from dynamo._core import Context
prefill, decode = [(await Engine.from_args(argv))[0] for argv in ({prefill}, {decode})]
await prefill.start(1); await decode.start(2)
request = {as_code(dict(request))}
first = [chunk async for chunk in prefill.generate(copy.deepcopy(request), context=Context("r1"))]
params = [chunk["disaggregated_params"] for chunk in first if chunk.get("disaggregated_params")][-1]
request["prefill_result"] = {{"disaggregated_params": params, "prompt_tokens_details": None}}
second = [chunk async for chunk in decode.generate(request, context=Context("r2"))]
await prefill.cleanup(); await decode.cleanup()
assert second[-1]["finish_reason"] in ("stop", "eos", "length"), second
assert any(chunk["token_ids"] for chunk in second) or second[-1]["finish_reason"] != "length", second"""


@check("disagg.decode_requires", max_examples=12)
async def decode_requires(bench: Bench, draw: Draw) -> None:
    request = draw(requests(max_tokens=st.integers(1, 4)))
    given = draw(st.sampled_from(["absent", None, {}]))
    if given != "absent":
        request["prefill_result"] = given
    decode_requires_of(await bench.talk(request, as_is=True))


def decode_requires_of(transcript: Transcript) -> None:
    given = transcript.request.get("prefill_result", "absent")
    if given == {}:
        return  # what that is worth is the engine's to say; it did not hang
    expect(
        is_refused(transcript),
        f"a decode worker served a request with prefill_result {given!r} ({transcript.finish_reason!r}, "
        f"{len(transcript.token_ids)} tokens); without a prefill worker before it, it refuses (require_prefill_result)",
        transcript,
        shows="'raised' in chunks[-1] or 'error' in str(chunks[-1].get('finish_reason'))",
    )


@check("disagg.probe_bypass", in_process=True, needs=("health",), max_examples=12)
async def probe_bypass(bench: Bench, draw: Draw) -> None:
    probe = probe_request(await payload_from(bench.engine))
    beside = [await bench.open(draw(requests())) for _ in range(draw(st.integers(0, 2)))]
    for _ in range(draw(st.integers(1, 2))):
        probe_answer_of(await bench.talk(dict(probe), as_is=True))
    for stream in beside:
        await stream.finish(bench.answer_within_s())


@check("disagg.dp_rank")
async def dp_rank(bench: Bench, draw: Draw) -> None:
    start = bench.facts.numbers.get("data_parallel_start_rank") or 0
    size = bench.facts.numbers["data_parallel_size"]
    near = st.integers(max(0, start - 2), start + size + 2)
    rank = draw(near | st.integers(0, MAX_U32))
    request = draw(requests())
    request["routing"] = {"dp_rank": rank}
    transcript = await bench.talk(request)
    error = transcript.error
    expect(
        error is None and transcript.terminals and not is_refused(transcript),
        f"routing.dp_rank {rank}, of the ranks {start} to {start + size - 1}: "
        f"{repr(error) if error is not None else repr(transcript.finish_reason)}; a rank that is not there falls back "
        "to the engine's own choice (validate_global_dp_rank)",
        transcript,
        shows="chunks[-1].get('finish_reason')",
    )
    expect(
        any(map(tokens_of, transcript.chunks)) or transcript.finish_reason in ("stop", "eos"),
        f"routing.dp_rank {rank}, of the ranks {start} to {start + size - 1}: no token came",
        transcript,
        shows="any(chunk.get('token_ids') for chunk in chunks)",
    )
