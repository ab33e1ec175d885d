"""
Rules on the shape of the engine's methods, as the bridge calls them.

What is no coroutine function may still return something to await: a decorator's
wrapper, for one. So such a method is called before anything is said of it.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from conformance import release
from conformance.bench import WORKER_ID, Bench, Draw, EngineBroken
from conformance.bridge import FOREIGN_THREAD
from conformance.reproducer import as_code
from conformance.rules import check
from conformance.rules.stand_in import StandIn
from conformance.runner_errors import NotHere
from conformance.transcript import expect
from conformance.wire import requests

AWAITED = (
    "start",
    "kv_event_sources",
    "register_prometheus",
    "health_check_payload",
    "on_endpoint_ready",
    "engine_control",
    "engine_update",
    "abort",
    "is_quiescent",
    "drain",
    "cleanup",
)
CALLED = ("component_metrics_dp_ranks", "attach_snapshot_publisher", "supported_controls", "supported_updates")
_MADE = "engine, _ = await Engine.from_args(ARGV)"


async def made_engine(bench: Bench) -> Any:
    """An engine that is not started; where from_args gives none, another rule says so."""
    if bench.facts.problem.startswith("from_args"):
        raise NotHere(f"{bench.facts.problem}; see the rules args.*")
    return await bench.make()


async def started_engine(bench: Bench) -> Any:
    """The bench's engine, also where the dry run found something wrong with it."""
    if bench.facts.problem.startswith("from_args"):
        raise NotHere(f"{bench.facts.problem}; see the rules args.*")
    try:
        await bench.ensure_engine()
    except EngineBroken as error:
        raise NotHere(f"{error}; see start.ready") from None
    return bench.engine


# generate.


@check("sig.generate", needs_engine=False, max_examples=3)
async def generate(bench: Bench, draw: Draw) -> None:
    engine = await started_engine(bench)
    generate_of(getattr(engine, "generate", None))
    request = dict(await bench.prepared(draw(requests())))
    context = bench.context()
    live = [
        "from concurrent.futures import ThreadPoolExecutor",
        "from dynamo._core import Context",
        _MADE,
        "await engine.start(1)",
        f"request = {as_code(request)}",
        "call = lambda: engine.generate(request, context=Context('r1'))",
        "stream = ThreadPoolExecutor(1).submit(call).result()  # called off the loop, as Dynamo does",
    ]
    code = "\n".join([*live, "await engine.cleanup()", "assert hasattr(stream, '__anext__'), stream"])
    problem = ""
    stream: Any = None
    try:
        stream = off_the_loop(lambda: engine.generate(request, context=context))
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    expect(
        not problem,
        f"generate raised {problem} when it was called, for a valid request; it is called on a thread without an event "
        "loop, and only gives the stream: work begins with its first step",
        code=code,
    )
    if inspect.iscoroutine(stream):
        stream.close()
    expect(
        hasattr(stream, "__anext__"),
        f"generate gives {_said(stream)}; the bridge needs an async generator: async def with yield",
        code=code,
    )
    step = off_the_loop(stream.__anext__)
    expect(
        inspect.isawaitable(step),
        f"__anext__ of what generate gives returns {_said(step)}, which cannot be awaited",
        code="\n".join([*live, "chunk = await stream.__anext__()", "await engine.cleanup()"]),
    )
    await _read_on(stream, step, context, bench.answer_within_s())


def generate_of(generate: Any) -> None:
    """Whether `generate(request, context=...)` can be called."""
    problem = ""
    try:
        inspect.signature(generate).bind({}, context=None)
    except (TypeError, ValueError) as error:
        problem = str(error)
    expect(
        not problem,
        f"generate(request, context=...) cannot be called: {problem}; its second parameter is named context",
        code=f"import inspect\n{_MADE}\ninspect.signature(engine.generate).bind({{}}, context=None)",
    )


async def _read_on(stream: Any, step: Any, context: Any, within_s: float) -> None:
    """To the end, stopped; what comes is for other rules to judge."""
    context.stop_generating()
    try:
        async with asyncio.timeout(within_s):
            while True:
                await step
                step = stream.__anext__()
    except (StopAsyncIteration, Exception):
        return


def off_the_loop(call: Callable[[], Any]) -> Any:
    """What `call` returns on a thread without an event loop."""
    with ThreadPoolExecutor(1, thread_name_prefix=FOREIGN_THREAD) as pool:
        return pool.submit(call).result()


def _said(value: Any) -> str:
    kinds = {
        "a coroutine": inspect.iscoroutine(value),
        "a sync generator": inspect.isgenerator(value),
        "None": value is None,
    }
    return next((kind for kind, is_it in kinds.items() if is_it), f"an object of type {type(value).__name__}")


# The hooks.


@check("sig.async_hooks", needs_engine=False, max_examples=1)
async def async_hooks(bench: Bench, _: Draw) -> None:
    plain = hooks_of(bench.engine_class)
    if "start" in plain:
        _expect_awaitable("start", await _value_of(bench, await made_engine(bench), "start"))
    engine = await started_engine(bench)
    for name in CALLED:
        if name == "attach_snapshot_publisher" or not _is_own(bench.engine_class, name):
            continue
        value = await _value_of(bench, engine, name)
        expect(
            not inspect.isawaitable(value),
            f"{name} gives {_said(value)}; it is called and not awaited: make it an ordinary method",
            code=_called_code(name),
        )
    await _expect_plain_on_ready(engine)
    others = [name for name in plain if name not in ("start", "kv_event_sources")]
    if others:
        other = await bench.make_started()
        for name in others:
            _expect_awaitable(name, await _value_of(bench, other, name))


def hooks_of(engine_class: Any) -> list[str]:
    """Which awaited hooks are no coroutine functions, and so have to be called. Raises for what is surely wrong."""
    plain = []
    for name in AWAITED:
        if not _is_own(engine_class, name):
            continue
        kind = kind_of(getattr(engine_class, name))
        expect(
            kind in ("coroutine function", "function"),
            f"{name} is {_a(kind)}; it is awaited: make it async def, without yield",
            code=_awaited_code(name),
        )
        if kind == "function":
            plain.append(name)
    for name in CALLED:
        if not _is_own(engine_class, name):
            continue
        kind = kind_of(getattr(engine_class, name))
        expect(
            kind == "function",
            f"{name} is {_a(kind)}; it is called and not awaited: make it an ordinary method",
            code=_called_code(name),
        )
    return plain


def _is_own(engine_class: Any, name: str) -> bool:
    """Whether it is a hook of the installed release, and the engine's own."""
    base = release.backend().LLMEngine
    return hasattr(base, name) and getattr(engine_class, name, None) is not getattr(base, name)


def kind_of(thing: Any) -> str:
    """ "function", "coroutine function", "async generator function", "generator function", or the type's name."""
    if not callable(thing):
        return type(thing).__name__
    if not inspect.isroutine(thing) and not hasattr(thing, "func"):  # an object with __call__; not a partial
        thing = type(thing).__call__
    if inspect.iscoroutinefunction(thing):
        return "coroutine function"
    if inspect.isasyncgenfunction(thing):
        return "async generator function"
    return "generator function" if inspect.isgeneratorfunction(thing) else "function"


def _a(kind: str) -> str:
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


async def _value_of(bench: Bench, engine: Any, name: str) -> Any:
    """What the hook returns; what it raises is for other rules."""
    given: dict[str, tuple[Any, ...]] = {
        "start": (WORKER_ID,),
        "abort": (bench.context("nobody"),),
        "engine_control": ("conformance_unknown", {}),
        "engine_update": ("conformance_unknown", {}),
        "on_endpoint_ready": (StandIn(),),
        "register_prometheus": (StandIn(),),
    }
    try:
        value = getattr(engine, name)(*given.get(name, ()))
    except Exception:
        return _nothing()
    if inspect.iscoroutine(value) and name in CALLED:
        value.close()
    return value


async def _nothing() -> None:
    """A hook that raised said nothing of its kind."""


def _expect_awaitable(name: str, value: Any) -> None:
    if inspect.iscoroutine(value):
        value.close()
    expect(
        inspect.isawaitable(value),
        f"{name} gives {_said(value)}; it is awaited: make it async",
        code=_awaited_code(name),
    )


def _awaited_code(name: str) -> str:
    return f"import inspect\n{_MADE}\nassert inspect.iscoroutinefunction(engine.{name}), engine.{name}"


def _called_code(name: str) -> str:
    return (
        f"import inspect\n{_MADE}\nhook = engine.{name}\n"
        "assert inspect.isroutine(hook) and not inspect.iscoroutinefunction(hook), hook\n"
        "assert not inspect.isasyncgenfunction(hook) and not inspect.isgeneratorfunction(hook), hook"
        + ("" if name == "attach_snapshot_publisher" else "\nassert not inspect.isawaitable(hook()), hook")
    )


async def _expect_plain_on_ready(engine: Any) -> None:
    if not hasattr(release.backend().LLMEngine, "kv_event_sources"):
        return
    value = engine.kv_event_sources()
    expect(
        inspect.isawaitable(value),
        f"kv_event_sources gives {_said(value)}; it is awaited: make it async",
        code=_awaited_code("kv_event_sources"),
    )
    try:
        sources = await value
    except Exception:
        return
    for source in sources if isinstance(sources, list) else ():
        if not hasattr(source, "on_ready"):
            continue
        kind = kind_of(source.on_ready)
        expect(
            kind == "function",
            f"PushSource.on_ready is {_a(kind)}; it is called and never awaited, so nothing in it runs, and nobody "
            "says so",
            code=f"""
import inspect
{_MADE}
await engine.start(1)
sources = await engine.kv_event_sources()
await engine.cleanup()
for source in sources:
    assert callable(source.on_ready) and not inspect.iscoroutinefunction(source.on_ready), source
""",
        )
