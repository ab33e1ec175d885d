"""
Rules on `start` and on the EngineConfig that it returns.

The checks named `*_of` are pure: they take a configuration and raise.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from hypothesis import strategies as st

from conformance import release
from conformance.bench import WORKER_ID, Bench, Draw
from conformance.facts import NUMBERS, config_numbers
from conformance.reproducer import as_code
from conformance.resources import probe_of
from conformance.rules import check
from conformance.rules.gen import not_json_safe
from conformance.rules.sig import made_engine, started_engine
from conformance.runner_errors import NotHere
from conformance.transcript import expect
from conformance.wire import prompts, wire_request

BITS = {  # as backend.rs reads them, 1.2.1 to 1.6.1
    "context_length": 32,
    "kv_cache_block_size": 32,
    "total_kv_blocks": 64,
    "max_num_seqs": 64,
    "max_num_batched_tokens": 64,
    "data_parallel_size": 32,
    "data_parallel_start_rank": 32,
    "bootstrap_port": 16,
}
MAX_WORKER_ID = 2**64 - 1
LONG_START_S = 2.0  # real seconds; an engine that takes longer is not started over and over
_STARTED = "engine, _ = await Engine.from_args(ARGV)\nconfig = await engine.start(1)\nawait engine.cleanup()\n"


def _holder() -> str:
    """Where the numbers are in the installed release, as code."""
    return "config.llm" if release.is_at_least("1.3") else "config"


async def _config(bench: Bench) -> Any:
    await started_engine(bench)
    return bench.engine_config


def is_integer(value: Any) -> bool:
    """What the bridge reads as an integer: ints, and what has __index__, such as numpy's. Not bool."""
    if isinstance(value, bool | str | bytes):
        return False
    try:
        value.__index__()
    except Exception:
        return False
    return True


# What start returns.


@check("start.model", needs_engine=False, max_examples=1)
async def model(bench: Bench, _: Draw) -> None:
    model_of(await _config(bench))


def model_of(config: Any) -> None:
    name = getattr(config, "model", None)
    expect(
        isinstance(name, str) and name,
        f"start returned {type(config).__name__} with model {name!r}; it is a str, and not empty",
        code=f"{_STARTED}assert isinstance(config.model, str) and config.model, config.model",
    )


@check("start.config_types", needs_engine=False, max_examples=1)
async def config_types(bench: Bench, _: Draw) -> None:
    config_types_of(await _config(bench))


def config_types_of(config: Any) -> None:
    numbers = config_numbers(config)
    for name, bits in BITS.items():
        value = numbers[name]
        expect(
            value is None or (is_integer(value) and 0 <= int(value) < 2**bits),
            f"{name} is {value!r} ({type(value).__name__}); it is None or an int from 0 to 2^{bits} - 1, "
            "and with anything else the worker does not come up",
            code=f"{_STARTED}value = {_holder()}.{name}\n"
            "assert value is None or not isinstance(value, bool), value\n"
            f"assert value is None or 0 <= value.__index__() < 2**{bits}, value",
        )


@check("start.config_shape", needs_engine=False, max_examples=1)
async def config_shape(bench: Bench, _: Draw) -> None:
    config_shape_of(await _config(bench))


def config_shape_of(config: Any) -> None:
    llm = getattr(config, "llm", None)
    expect(
        llm is None or any(hasattr(llm, name) for name in NUMBERS),
        f"EngineConfig.llm is {type(llm).__name__}, without the attributes {', '.join(NUMBERS[:3])} ...; "
        "it is an LlmRegistration",
        code=f"from dynamo.common.backend import LlmRegistration\n{_STARTED}"
        "assert isinstance(config.llm, LlmRegistration), config.llm",
    )
    for name in NUMBERS:
        value = getattr(config, name, None)
        expect(
            value is None or getattr(llm, name, None) is not None,
            f"{name}={value!r} is on the EngineConfig itself, where nobody reads it from ai-dynamo 1.3 on; "
            "it belongs into EngineConfig.llm, an LlmRegistration",
            code=f"{_STARTED}value = getattr(config, {name!r}, None)\n"
            f"assert value is None or config.llm.{name} is not None, value",
        )


@check("start.config_consistent", needs_engine=False, max_examples=1)
async def config_consistent(bench: Bench, _: Draw) -> None:
    engine = await started_engine(bench)
    config_consistent_of(bench.engine_config, await _ranks(engine, "kv_event_sources"), await _ranks(engine))


async def _ranks(engine: Any, hook: str = "component_metrics_dp_ranks") -> list[int]:
    """The data-parallel ranks that a hook names; what else may be wrong with it is for other rules."""
    if not hasattr(release.backend().LLMEngine, hook):
        return []
    found: Any = None
    try:
        value = getattr(engine, hook)()
        found = await value if inspect.isawaitable(value) else value
    except Exception:
        return []
    ranks: list[Any] = [getattr(one, "dp_rank", one) for one in found] if isinstance(found, list) else []
    return [int(rank) for rank in ranks if is_integer(rank)]


def config_consistent_of(config: Any, kv_ranks: Sequence[int] = (), metrics_ranks: Sequence[int] = ()) -> None:
    """`kv_ranks`: the ranks of the KV event sources; `metrics_ranks`: those of the component metrics."""
    numbers = {name: value for name, value in config_numbers(config).items() if is_integer(value) or name[0] == "b"}
    where = _holder()
    for name, value in numbers.items():
        if name in ("data_parallel_start_rank", "bootstrap_host"):
            continue
        expect(
            value is None or not is_integer(value) or value > 0,
            f"{name} is {value}; it is above 0, or None where there is nothing to say",
            code=f"{_STARTED}value = {where}.{name}\nassert value is None or value > 0, value",
        )
    host, port = numbers.get("bootstrap_host"), numbers.get("bootstrap_port")
    expect(
        host is None or isinstance(host, str),
        f"bootstrap_host is {host!r} ({type(host).__name__}); it is a str",
        code=f"{_STARTED}host = {where}.bootstrap_host\nassert host is None or isinstance(host, str), host",
    )
    expect(
        (host is None) == (port is None),
        f"bootstrap_host is {host!r} and bootstrap_port {port!r}; only with both is there an address to advertise",
        code=f"{_STARTED}assert ({where}.bootstrap_host is None) == ({where}.bootstrap_port is None)",
    )
    live = "engine, _ = await Engine.from_args(ARGV)\nconfig = await engine.start(1)\n"
    expect(
        not kv_ranks or numbers.get("kv_cache_block_size"),
        f"there are KV event sources for the ranks {list(kv_ranks)} and no kv_cache_block_size, so the worker skips "
        "them",
        code=f"{live}sources = await engine.kv_event_sources()\nawait engine.cleanup()\n"
        f"assert not sources or {where}.kv_cache_block_size",
    )
    first, size = (numbers.get(f"data_parallel_{name}") or 0 for name in ("start_rank", "size"))
    known = range(first, first + (size or 1))
    for hook, ranks in (("kv_event_sources", kv_ranks), ("component_metrics_dp_ranks", metrics_ranks)):
        outside = [rank for rank in ranks if rank not in known]
        found = "{source.dp_rank for source in await engine.kv_event_sources()}"
        found = found if hook == "kv_event_sources" else "set(engine.component_metrics_dp_ranks())"
        expect(
            not outside,
            f"{hook} names the ranks {list(ranks)}, and the worker advertises {list(known)[:8]} (data_parallel_start_"
            f"rank {numbers.get('data_parallel_start_rank')}, data_parallel_size {numbers.get('data_parallel_size')}); "
            f"nobody asks for rank {outside[0] if outside else ''}",
            code=f"{live}ranks = {found}\nawait engine.cleanup()\n"
            f"first, size = {where}.data_parallel_start_rank or 0, {where}.data_parallel_size or 1\n"
            "assert ranks <= set(range(first, first + size)), ranks",
        )


@check("start.runtime_data_json", needs_engine=False, max_examples=1)
async def runtime_data_json(bench: Bench, _: Draw) -> None:
    runtime_data_json_of(await _config(bench))


def runtime_data_json_of(config: Any) -> None:
    data = getattr(config, "runtime_data", None)
    if data is None:
        return
    code = (
        f"import json\n{_STARTED}data = config.runtime_data or {{}}\n"
        "assert isinstance(data, dict) and json.loads(json.dumps(data)) == data, data"
    )
    expect(
        isinstance(data, Mapping),
        f"runtime_data is {type(data).__name__}; it is None or a dict",
        code=code,
    )
    problem = not_json_safe(data)
    expect(not problem, f"runtime_data holds {problem}, which cannot be written as JSON", code=code)
    try:
        json.dumps(_as_dict(data))
    except (TypeError, ValueError, RecursionError) as error:
        problem = str(error)
    expect(not problem, f"runtime_data cannot be written as JSON: {problem}", code=code)


def _as_dict(data: Any) -> Any:
    return {key: _as_dict(value) for key, value in data.items()} if isinstance(data, Mapping) else data


# What it depends on.


@check("start.worker_id_opaque", needs_engine=False, max_examples=2)
async def worker_id_opaque(bench: Bench, draw: Draw) -> None:
    usual = _comparable(await _config(bench))
    is_slow = bench.facts.start_s > LONG_START_S
    edges = [MAX_WORKER_ID] if is_slow else [0, 1, MAX_WORKER_ID]
    for worker_id in [*edges, draw(st.integers(0, MAX_WORKER_ID))]:
        different = _different(usual, await _numbers_with(bench, worker_id))
        # What is measured at each start (free GPU memory, say) may differ. What depends on the id does so every time.
        for _ in range(2 if different else 0):
            same_id, other_id = await _numbers_with(bench, WORKER_ID), await _numbers_with(bench, worker_id)
            different = [name for name in different if name in _different(same_id, other_id)]
        name = different[0] if different else ""
        expect(
            not different,
            f"with worker_id {worker_id} start returns another {name} than with {WORKER_ID}; the id says nothing about "
            "the engine",
            code=f"""
found = []
for worker_id in ({WORKER_ID}, {worker_id}):
    engine, _ = await Engine.from_args(ARGV)
    config = await engine.start(worker_id)
    await engine.cleanup()
    found.append(getattr({_holder() if name in NUMBERS else "config"}, {name!r}))
assert found[0] == found[1], found
""",
        )


async def _numbers_with(bench: Bench, worker_id: int) -> dict[str, Any]:
    engine = await made_engine(bench)
    problem = ""
    config: Any = None
    try:
        config = await engine.start(worker_id)
    except (Exception, SystemExit) as error:
        problem = f"{type(error).__name__}: {error}"
    finally:
        await cleaned(bench, engine)
    expect(
        not problem,
        f"start({worker_id}) raised {problem}, and start({WORKER_ID}) did not; any u64 may come as worker_id",
        code=f"engine, _ = await Engine.from_args(ARGV)\nawait engine.start({worker_id})\nawait engine.cleanup()",
    )
    return _comparable(config)


def _comparable(config: Any) -> dict[str, Any]:
    """What the engine is, not where: a port or a host may be another one at each start."""
    numbers = {name: value for name, value in config_numbers(config).items() if not name.startswith("bootstrap")}
    return {**numbers, "model": getattr(config, "model", None)}


def _different(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return [name for name, value in one.items() if value != other[name]]


async def cleaned(bench: Bench, engine: Any) -> None:
    """Clean up, so that two engines need not fit at once; how well it does so is for the rules of `life`."""
    with contextlib.suppress(Exception):
        async with asyncio.timeout(bench.answer_within_s()):
            await engine.cleanup()


# When it returns, and when it does not.


@check("start.ready", needs_engine=False, max_examples=3)
async def ready(bench: Bench, draw: Draw) -> None:
    request = wire_request(draw(prompts()), max_tokens=draw(st.integers(1, 12)))
    engine = await made_engine(bench)
    problem = ""
    try:
        request = dict(await bench.prepared(request))
        await engine.start(WORKER_ID)
    except (Exception, SystemExit) as error:
        problem = f"{type(error).__name__}: {error}"
    expect(
        not problem,
        f"start raised {problem}; with these arguments the engine serves nobody",
        code="engine, _ = await Engine.from_args(ARGV)\nawait engine.start(1)\nawait engine.cleanup()",
    )
    transcript = await bench.talk(request, engine=engine, as_is=True)
    failure = transcript.error
    expect(
        failure is None and transcript.terminals,
        f"a request right after start got {type(failure).__name__ if failure else 'no terminal chunk'}: "
        f"{failure or ''}; when start returns the engine serves",
        transcript,
        shows="chunks[-1].get('finish_reason')",
        code=f"""
from dynamo._core import Context
engine, _ = await Engine.from_args(ARGV)
request = {as_code(request)}
await engine.start(1)
try:
    chunks = [chunk async for chunk in engine.generate(request, context=Context("r1"))]
finally:
    await engine.cleanup()
assert chunks and chunks[-1].get("finish_reason"), chunks
""",
    )


@check("start.no_signal_handlers", needs_engine=False, max_examples=1)
async def no_signal_handlers(bench: Bench, _: Draw) -> None:
    if threading.current_thread() is not threading.main_thread():
        raise NotHere("signal handlers can be looked at from the main thread only")
    engine = await made_engine(bench)
    with _marked_signals() as markers:
        try:
            await engine.start(WORKER_ID)
        except (Exception, SystemExit) as error:
            raise NotHere(f"start raised {type(error).__name__}; see start.ready") from None
        changed = [sig.name for sig, marker in markers.items() if signal.getsignal(sig) is not marker]
    expect(
        not changed,
        f"start put its own handler on {' and '.join(changed)}; the worker's handlers begin the graceful shutdown, "
        "and the engine's part of it is cleanup",
        code="""
import signal
mark = lambda *_: None
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, mark)
engine, _ = await Engine.from_args(ARGV)
await engine.start(1)
found = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
await engine.cleanup()
assert found == [mark, mark], found
""",
    )


@contextlib.contextmanager
def _marked_signals() -> Iterator[dict[signal.Signals, Callable[..., Any]]]:
    """SIGTERM and SIGINT with handlers that can be told from all others; they call the usual ones."""
    loop = asyncio.get_running_loop()
    usual = {sig: signal.getsignal(sig) for sig in (signal.SIGTERM, signal.SIGINT)}
    markers = {sig: _passing_on(handler) for sig, handler in usual.items() if handler is not None}
    for sig, marker in markers.items():
        signal.signal(sig, marker)
    try:
        yield markers
    finally:
        for sig in markers:
            loop.remove_signal_handler(sig)
            signal.signal(sig, usual[sig])


def _passing_on(handler: Any) -> Callable[..., Any]:
    def marker(number: int, frame: Any) -> Any:
        if callable(handler):
            return handler(number, frame)
        raise SystemExit(128 + number)

    return marker


# How it fails.


@check("start.typed_failure", needs_engine=False, max_examples=4)
async def typed_failure(bench: Bench, draw: Draw) -> None:
    engine = await made_engine(bench)
    points = _fault_points(engine)
    if points:
        point = draw(st.sampled_from(points))
        probe_of(engine).inject(point)
        error = await _failure(bench, engine)
        typed_failure_of(error, f"With a fault at {point}, ", _with_probe(point))
        return
    if bench.facts.start_s > LONG_START_S:
        raise NotHere(
            f"start takes {bench.facts.start_s:.0f} s, and there is no conformance_probe() that makes it fail at will"
        )
    with _Faults(engine) as calls:
        error = await _failure(bench, engine)
    plainly = "engine, _ = await Engine.from_args(ARGV)\nawait engine.start(1)\nawait engine.cleanup()"
    typed_failure_of(error, "With nothing done to it, ", plainly)
    await cleaned(bench, engine)
    if error is not None or not calls.names:
        raise NotHere("start calls nothing that the suite can make fail, and the engine has no conformance_probe()")
    await _injected_failure(bench, draw, len(calls.names))


async def _injected_failure(bench: Bench, draw: Draw, num_calls: int) -> None:
    place = draw(st.integers(1, num_calls))
    shutdown = release.exceptions("EngineShutdown")[0]
    for kind in (draw(st.sampled_from([RuntimeError, OSError])), shutdown):
        engine = await made_engine(bench)
        with _Faults(engine, place, kind("injected by the conformance suite")) as faults:
            error = await _failure(bench, engine)
        await cleaned(bench, engine)
        name = faults.names[-1] if faults.names else ""
        said, code = f"When {name} raised {kind.__name__}, ", _with_patch(name, kind.__name__)
        exits_of(error, said, code)
        if kind is shutdown:  # an untyped one was the suite's; a typed one must not lose its type on the way
            typed_failure_of(error, said, code)


def _fault_points(engine: Any) -> list[str]:
    points = getattr(probe_of(engine), "fault_points", None)
    return [point for point in points() if point.startswith("start")] if callable(points) else []


async def _failure(bench: Bench, engine: Any) -> BaseException | None:
    """What start raised; None if it did not, or did not come back."""
    patience_s = bench.answer_within_s() if bench.is_virtual else 3 + 3 * bench.facts.start_s
    try:
        async with asyncio.timeout(patience_s):
            await engine.start(WORKER_ID)
    except TimeoutError:
        return None
    except (Exception, SystemExit, GeneratorExit) as error:
        return error.with_traceback(None)
    return None


def exits_of(error: BaseException | None, said: str, code: str) -> None:
    expect(
        error is None or isinstance(error, Exception),
        f"{said}start raised {type(error).__name__}({error}); that ends the process at once, without cleanup. "
        "Raise EngineShutdown",
        code=code,
    )


def typed_failure_of(error: BaseException | None, said: str, code: str) -> None:
    """`error`: what start raised, None if it did not; `said`: what was done to it."""
    exits_of(error, said, code)
    expect(
        error is None or isinstance(error, release.exceptions("DynamoException")),
        f"{said}start raised {type(error).__name__}: {error}; what the worker understands is EngineShutdown, or "
        "another DynamoException",
        code=code,
    )


def _with_probe(point: str) -> str:
    return f"""
from dynamo.llm.exceptions import DynamoException
engine, _ = await Engine.from_args(ARGV)
engine.conformance_probe().inject({point!r})
try:
    await engine.start(1)
except DynamoException as error:
    print("typed:", repr(error))
await engine.cleanup()
"""


def _with_patch(name: str, kind: str) -> str:
    targets = {"Thread.start": "threading.Thread.start", "create_task": "asyncio.get_running_loop().create_task"}
    target = targets.get(name, name if name.startswith("subprocess") else f"engine.{name}")
    return f"""
import subprocess, threading
from dynamo.llm.exceptions import EngineShutdown
def fail(*_, **__):
    raise {kind}("injected")
engine, _ = await Engine.from_args(ARGV)
usual, {target} = {target}, fail
try:
    await engine.start(1)
except Exception as error:
    assert isinstance(error, {kind if kind == "EngineShutdown" else "Exception"}), repr(error)
finally:
    {target} = usual
await engine.cleanup()
"""


class _Faults:
    """
    Counts what start calls on the loop's own thread; the `fail_at`-th call raises `error` instead.

    Looked at: the engine's own functions, new threads, tasks and child processes.
    """

    def __init__(self, engine: Any, fail_at: int = 0, error: BaseException | None = None) -> None:
        self.names: list[str] = []
        self._engine = engine
        self._fail_at = fail_at
        self._error = error
        self._thread = threading.get_ident()
        self._is_on = True
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> _Faults:
        loop: Any = asyncio.get_running_loop()
        self._patch(threading.Thread, "start", "Thread.start", threading.Thread.start)
        self._patch(subprocess.Popen, "__init__", "subprocess.Popen.__init__", subprocess.Popen.__init__)
        self._patch(loop, "create_task", "create_task", loop.create_task)
        for name in _own_functions(self._engine):
            with contextlib.suppress(AttributeError):  # an engine with __slots__
                self._patch(self._engine, name, name, getattr(self._engine, name))
        return self

    def __exit__(self, *_: object) -> None:
        self._is_on = False
        self._undo.close()

    def _patch(self, owner: Any, name: str, said: str, original: Any) -> None:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self._count(said, args)
            return original(*args, **kwargs)

        async def counted_async(*args: Any, **kwargs: Any) -> Any:
            self._count(said, ())
            return await original(*args, **kwargs)

        patch = counted_async if inspect.iscoroutinefunction(original) else counted
        is_own = name in vars(owner)
        setattr(owner, name, patch)

        def undo() -> None:
            if vars(owner).get(name) is patch:
                if is_own:
                    setattr(owner, name, original)
                else:
                    delattr(owner, name)

        self._undo.callback(undo)

    def _count(self, said: str, args: tuple[Any, ...]) -> None:
        if not self._is_on or threading.get_ident() != self._thread:
            return
        self.names.append(said)
        if len(self.names) == self._fail_at and self._error is not None:
            self._is_on = False  # once
            for argument in args:
                if inspect.iscoroutine(argument):
                    argument.close()
            raise self._error


def _own_functions(engine: Any) -> list[str]:
    """The engine's own, without those of the contract."""
    contract = set(dir(release.backend().LLMEngine)) | {"conformance_probe"}
    names: dict[str, None] = {}
    for kind in type(engine).__mro__:
        if kind.__module__.split(".")[0] in ("builtins", "abc", "typing"):
            continue
        names |= {name: None for name, thing in vars(kind).items() if inspect.isfunction(thing)}
    return [
        name
        for name in names
        if name not in contract and not name.startswith("__") and name not in getattr(engine, "__dict__", {})
    ]
