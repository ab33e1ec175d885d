"""Rules on the hooks that only some engines have: the endpoint's, and logits processors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from conformance import release
from conformance.bench import WORKER_ID, Bench, Draw
from conformance.reproducer import as_code
from conformance.rules import check
from conformance.rules.sig import made_engine, started_engine
from conformance.rules.stand_in import StandIn
from conformance.runner_errors import NotHere
from conformance.transcript import Transcript, expect
from conformance.wire import prompts, wire_request

_SPEC = """
engine, _ = await Engine.from_args(ARGV)
await engine.start(1)
spec = await engine.logits_processor_spec()
await engine.cleanup()
"""


def _plain_requests(budgets: st.SearchStrategy[int]) -> st.SearchStrategy[dict[str, Any]]:
    """Greedy, and without any option that an engine might refuse."""
    return st.builds(wire_request, prompts(), max_tokens=budgets)


@check("hook.on_endpoint_ready", needs_engine=False, max_examples=3)
async def on_endpoint_ready(bench: Bench, draw: Draw) -> None:
    engine = await made_engine(bench)
    request = dict(await bench.prepared(draw(_plain_requests(st.integers(1, 12)))))
    problem = ""
    endpoint = StandIn()
    try:
        await engine.start(WORKER_ID)
    except (Exception, SystemExit) as error:
        raise NotHere(f"start raised {type(error).__name__}; see start.ready") from None
    try:
        await engine.on_endpoint_ready(endpoint)
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    if problem and endpoint.touched:
        raise NotHere(f"on_endpoint_ready uses {endpoint.touched[0]} of the endpoint, which only a real worker has")
    code = f"""
from dynamo._core import Context
engine, _ = await Engine.from_args(ARGV)
await engine.start(1)
try:
    await engine.on_endpoint_ready(None)
    request = {as_code(request)}
    chunks = [chunk async for chunk in engine.generate(request, context=Context("r1"))]
finally:
    await engine.cleanup()
assert chunks and chunks[-1].get("finish_reason"), chunks
"""
    expect(not problem, f"on_endpoint_ready raised {problem}; the worker does not come up then", code=code)
    transcript = await bench.talk(request, engine=engine, as_is=True)
    failure = transcript.error
    expect(
        failure is None and transcript.terminals,
        "after one call of on_endpoint_ready a request got "
        f"{type(failure).__name__ if failure else 'no terminal chunk'}: {failure or ''}; there is no second call",
        transcript,
        code=code,
    )


@check("hook.logits_spec", in_process=True, max_examples=6)
async def logits_spec(bench: Bench, draw: Draw) -> None:
    engine = await started_engine(bench)
    spec = await engine.logits_processor_spec()
    logits_spec_of(spec)
    forced = _forced_tokens(spec)
    if not forced:
        return
    if bench.facts.role in ("agg", "decode"):
        await _expect_fresh_state(bench, draw, forced)
    elif bench.facts.role == "prefill" and spec.generation_only:
        await _expect_left_out(bench, draw, forced)


def logits_spec_of(spec: Any) -> None:
    engine_module: Any = release.submodule("engine")
    expect(
        spec is None or isinstance(spec, engine_module.LogitsProcessorSpec),
        f"logits_processor_spec returned {type(spec).__name__}; it is None or a LogitsProcessorSpec",
        code=f"from dynamo.common.backend.engine import LogitsProcessorSpec\n{_SPEC}"
        "assert spec is None or isinstance(spec, LogitsProcessorSpec), spec",
    )
    for entry in spec.entries if spec is not None else ():
        is_forced = isinstance(entry, engine_module.ForcedTokenSequenceSpec)
        expect(
            is_forced or isinstance(entry, engine_module.PythonProcessorSpec),
            f"an entry of the LogitsProcessorSpec is {type(entry).__name__}; known are ForcedTokenSequenceSpec and "
            "PythonProcessorSpec",
            code="from dynamo.common.backend.engine import ForcedTokenSequenceSpec, PythonProcessorSpec\n"
            f"{_SPEC}known = ForcedTokenSequenceSpec | PythonProcessorSpec\n"
            "assert all(isinstance(one, known) for one in spec.entries), spec",
        )
        if is_forced:
            _round_trip_of(entry, engine_module)
        else:
            _factory_of(entry)


def _round_trip_of(entry: Any, engine_module: Any) -> None:
    problem = ""
    back: Any = None
    try:
        payload = json.loads(json.dumps(engine_module.serialize_logits_processor_entries([entry])))
        (back,) = engine_module.deserialize_logits_processor_entries(payload)
    except (TypeError, ValueError) as error:
        problem = f"{type(error).__name__}: {error}"
    code = f"""
import json
from dynamo.common.backend.engine import deserialize_logits_processor_entries, serialize_logits_processor_entries
{_SPEC}
back = deserialize_logits_processor_entries(json.loads(json.dumps(serialize_logits_processor_entries(spec.entries))))
assert [tuple(one.token_ids) for one in back] == [tuple(one.token_ids) for one in spec.entries], back
assert [one.eos_token_id for one in back] == [one.eos_token_id for one in spec.entries], back
"""
    expect(not problem, f"{entry} cannot be written as JSON and read back: {problem}", code=code)
    expect(
        (tuple(back.token_ids), back.eos_token_id) == (tuple(entry.token_ids), entry.eos_token_id),
        f"{entry}, written as JSON and read back, is {back}",
        code=code,
    )


def _factory_of(entry: Any) -> None:
    first, second = entry.factory(), entry.factory()
    expect(
        first is not second,
        f"the factory of a {type(entry).__name__} gives the same {type(first).__name__} twice; each request needs one "
        "of its own, since it has state",
        code=f"{_SPEC}factories = [one.factory for one in spec.entries if hasattr(one, 'factory')]\n"
        "assert all(factory() is not factory() for factory in factories)",
    )


def _forced_tokens(spec: Any) -> list[int]:
    """What the first forced sequence makes each answer begin with."""
    return next((list(entry.token_ids) for entry in getattr(spec, "entries", ()) if hasattr(entry, "token_ids")), [])


async def _expect_fresh_state(bench: Bench, draw: Draw, forced: Sequence[int]) -> None:
    """Where one answer begins with the forced tokens, all do."""
    budget = len(forced) + draw(st.integers(0, 3))
    batch = draw(st.lists(_plain_requests(st.just(budget)), min_size=2, max_size=3))
    transcripts = [await bench.answer(batch[0])]
    streams = [await bench.open(request) for request in batch[1:]]
    for stream in streams:
        transcripts.append(await stream.finish(bench.answer_within_s()))
    begins = [transcript.token_ids[: len(forced)] == list(forced) for transcript in transcripts]
    without = [transcript for transcript, is_forced in zip(transcripts, begins, strict=True) if not is_forced]
    expect(
        not any(begins) or not without,
        f"the forced tokens {list(forced)} begin one answer, and another begins with "
        f"{without[0].token_ids[: len(forced)] if without else ''}: the processor's state is left from another request",
        *sorted(transcripts, key=lambda transcript: transcript in without),
        code=f"""
from dynamo._core import Context
engine, _ = await Engine.from_args(ARGV)
await engine.start(1)
request = {as_code(dict(transcripts[0].request))}
begins = []
for i in range(3):
    chunks = [chunk async for chunk in engine.generate(request, context=Context(f"r{{i}}"))]
    begins.append([token for chunk in chunks for token in chunk["token_ids"]][:{len(forced)}])
await engine.cleanup()
forced = {list(forced)}
assert forced not in begins or begins == [forced] * 3, begins
""",
    )


async def _expect_left_out(bench: Bench, draw: Draw, forced: Sequence[int]) -> None:
    """The one token of a prefill is the model's; the same forced one for every prompt is not."""
    batch = draw(
        st.lists(
            _plain_requests(st.just(4)), min_size=3, max_size=3, unique_by=lambda request: str(request["token_ids"])
        )
    )
    transcripts: list[Transcript] = [await bench.answer(request) for request in batch]
    expect(
        any(transcript.token_ids != list(forced[:1]) for transcript in transcripts),
        f"every prompt is answered with the forced token {forced[0]} on a prefill worker, though generation_only is "
        "set: logits processors belong to the workers that generate",
        *transcripts,
        shows=f"any([t for c in some for t in c['token_ids']] != {list(forced[:1])} for some in [chunks, *others])",
    )
