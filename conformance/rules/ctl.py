"""Rules on engine controls and updates: what is advertised, and what each answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hypothesis import strategies as st

from conformance import release
from conformance.bench import Bench, Draw
from conformance.rules import check
from conformance.rules.gen import not_json_safe
from conformance.runner_errors import NotHere
from conformance.transcript import Violation, expect
from conformance.wire import requests

KINDS = ("control", "update")
# What stops serving, and what brings it back (lib/backend-common/src/worker.rs, engine_control_policy); and the
# pairs of other names that engines have.
PAIRS = (
    ("sleep", "wake_up"),
    ("pause_generation", "resume_generation"),
    ("release_memory_occupation", "resume_memory_occupation"),
    ("pause_generation", "continue_generation"),
    ("start_profile", "stop_profile"),
)
_STRANGE = ("", " ", "SLEEP", "wake-up", "__class__", "../sleep", "model_taints", "cleanup", "nobody")


@check("ctl.sets", in_process=True, max_examples=6)
async def sets(bench: Bench, draw: Draw) -> None:
    num_calls = draw(st.integers(2, 4))
    calls: dict[str, list[Any]] = {kind: [] for kind in KINDS}
    for _ in range(num_calls):
        for kind in KINDS:
            calls[kind].append(getattr(bench.engine, f"supported_{kind}s")())
        if draw(st.booleans()):
            await bench.talk(draw(requests(max_tokens=st.integers(1, 3))))
    for kind in KINDS:
        sets_of(kind, calls[kind])


def sets_of(kind: str, calls: Sequence[Any]) -> None:
    """`calls`: what each call of supported_<kind>s gave."""
    code = f"""\
engine, _ = await Engine.from_args(ARGV)
await engine.start(1)
names, again = list(engine.supported_{kind}s()), list(engine.supported_{kind}s())
assert all(type(name) is str and name and "/" not in name for name in names), names
assert len(names) == len(set(names)) and set(names) == set(again), (names, again)
assert "model_taints" not in names, names
assert not isinstance(engine.supported_{kind}s(), str)
await engine.cleanup()"""
    first: list[Any] | None = None
    for given in calls:
        expect(
            isinstance(given, Iterable) and not isinstance(given, str | bytes | Mapping),
            f"supported_{kind}s gave {type(given).__name__}; it is a set of names",
            code=code,
        )
        names = list(given)
        wrong = [name for name in names if not isinstance(name, str) or not name or "/" in name]
        expect(
            not wrong,
            f"supported_{kind}s has {wrong[:1]}; each name becomes a route, /engine/{kind}/NAME: a str, not empty, "
            "without a slash",
            code=code,
        )
        expect(len(set(names)) == len(names), f"supported_{kind}s has a name twice: {sorted(names)}", code=code)
        expect(
            "model_taints" not in names, f"supported_{kind}s has model_taints, a route of the worker's own", code=code
        )
        first = names if first is None else first
        expect(
            set(names) == set(first),
            f"supported_{kind}s gave {sorted(first)} first and {sorted(names)} later; the routes are made once",
            code=code,
        )


_BODIES: st.SearchStrategy[dict[str, Any]] = st.just({}) | st.dictionaries(
    st.sampled_from(["level", "tags", "value", "name", "timeout", "x"]),
    st.none() | st.integers(-5, 2000) | st.text(max_size=5) | st.lists(st.text(max_size=3), max_size=2),
    max_size=3,
)


@check("ctl.dispatch", needs_engine=False, max_examples=20)
async def dispatch(bench: Bench, draw: Draw) -> None:
    engine = await bench.make_started()
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(KINDS))
        advertised = sorted(name for name in getattr(engine, f"supported_{kind}s")() if isinstance(name, str))
        is_known = draw(st.booleans()) and bool(advertised)
        name = draw(st.sampled_from(advertised) if is_known else st.sampled_from(_STRANGE) | st.text(max_size=6))
        is_known = name in advertised
        body = draw(_BODIES)
        await _call(bench, engine, kind, name, body, is_known=is_known)


async def _call(bench: Bench, engine: Any, kind: str, name: str, body: dict[str, Any], *, is_known: bool) -> Any:
    code = _dispatch_script(kind, name, body, is_known)
    try:
        async with asyncio.timeout(bench.answer_within_s()):
            answer = await getattr(engine, f"engine_{kind}")(name, dict(body))
    except TimeoutError:
        raise Violation(f"engine_{kind}({name!r}, {body!r}) never returned", code=code) from None
    except Exception as error:
        is_bodys_fault = isinstance(error, (ValueError, TypeError, *release.exceptions("InvalidArgument")))
        if is_known and body and is_bodys_fault:
            return None  # such a body is the caller's mistake
        wanted = "returns a JSON object" if is_known else 'is answered with {"status": "error"}'
        raise Violation(
            f"engine_{kind}({name!r}, {body!r}) raised {type(error).__name__}: {error}; "
            f"{'what is advertised' if is_known else 'a name that is not advertised'} {wanted}",
            code=code,
        ) from error
    dispatch_of(kind, name, answer, is_known=is_known, code=code)
    return answer


def dispatch_of(kind: str, name: str, answer: Any, *, is_known: bool, code: str = "") -> None:
    problem = f"{type(answer).__name__}" if not isinstance(answer, Mapping) else not_json_safe(answer)
    expect(
        not problem,
        f"engine_{kind}({name!r}) returned {problem or answer}; a handler returns a JSON object",
        code=code,
    )
    expect(
        is_known or answer.get("status") == "error",
        f"engine_{kind}({name!r}), which is not advertised, returned {answer!r:.100}; "
        'it is answered with {"status": "error", ...}',
        code=code,
    )


def _dispatch_script(kind: str, name: str, body: Mapping[str, Any], is_known: bool) -> str:
    wanted = "" if is_known else ' and answer["status"] == "error"'
    return f"""\
import json
engine, _ = await Engine.from_args(ARGV)
await engine.start(1)
answer = await asyncio.wait_for(engine.engine_{kind}({name!r}, {json.loads(json.dumps(body))!r}), 10)
await engine.cleanup()
assert isinstance(answer, dict) and json.dumps(answer){wanted}, answer"""


@check("ctl.pause_resume", needs_engine=False, max_examples=12)
async def pause_resume(bench: Bench, draw: Draw) -> None:
    engine = await bench.make_started()
    names = set(engine.supported_controls())
    pairs = [pair for pair in PAIRS if names.issuperset(pair)]
    if not pairs:
        raise NotHere(f"of {sorted(names)} no two are known to undo each other")
    done: list[str] = []
    for _ in range(draw(st.integers(0, 4))):
        await _switch(engine, bench, draw(st.sampled_from(draw(st.sampled_from(pairs)))), done)
    # Now off, once or several times in a row, and on again.
    for off, on in draw(st.permutations(pairs)):
        for _ in range(draw(st.integers(0, 3))):
            await _switch(engine, bench, off, done)
        for _ in range(draw(st.sampled_from([1, 1, 2]))):
            await _switch(engine, bench, on, done)
    await _serves(engine, bench, draw, done)


async def _switch(engine: Any, bench: Bench, name: str, done: list[str]) -> None:
    done.append(name)
    try:
        async with asyncio.timeout(bench.answer_within_s()):
            await engine.engine_control(name, {})
    except Exception as error:
        raise Violation(
            f"after {', '.join(done[:-1]) or 'nothing'}, the control {name} raised {type(error).__name__}: {error}; "
            "a control that changes nothing any more does no harm",
            code=_pause_script(done),
        ) from error


async def _serves(engine: Any, bench: Bench, draw: Draw, done: list[str]) -> None:
    transcript = await (await bench.open(draw(requests()), engine=engine)).finish(bench.answer_within_s())
    error = transcript.error
    outcome = f"raised {error!r}" if error is not None else f"ended with {transcript.finish_reason!r}"
    expect(
        error is None and transcript.terminals and not transcript.is_hung and not transcript.is_cancelled,
        f"after {', '.join(done)} everything is on again, and a request "
        f"{'never ended' if transcript.is_hung else outcome}",
        transcript,
        code=_pause_script(done),
    )


def _pause_script(done: Sequence[str]) -> str:
    return f"""\
from dynamo._core import Context
engine, _ = await Engine.from_args(ARGV)
await engine.start(1)
for name in {list(done)!r}: await engine.engine_control(name, {{}})
async def talk():
    request = {{"token_ids": [1, 2, 3], "stop_conditions": {{"max_tokens": 3}}, "sampling_options": {{}}}}
    return [chunk async for chunk in engine.generate(request, context=Context("r1"))]
chunks = await asyncio.wait_for(talk(), 10)
await engine.cleanup()
assert chunks[-1]["finish_reason"] in ("stop", "eos", "length"), chunks"""
