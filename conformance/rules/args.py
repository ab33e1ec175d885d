"""
Rules on `from_args`: what comes before `start`.

An engine that was only made holds nothing, so nothing here is cleaned up.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import inspect
import io
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any

from hypothesis import strategies as st

from conformance import release
from conformance.bench import Bench, Draw
from conformance.resources import held_now, settled
from conformance.rules import check
from conformance.runner_errors import NotHere
from conformance.transcript import expect
from conformance.wire import requests

MAKING_S = 5.0  # real seconds; what it imports was imported by the dry run
# parse_endpoint_types in lib/backend-common (worker.rs), all releases together.
ENDPOINT_TYPES = (
    "chat",
    "completions",
    "embedding",
    "embeddings",
    "tensor",
    "prefill",
    "image",
    "images",
    "video",
    "videos",
    "audio",
    "audios",
)
_PAIR = "engine, config = await Engine.from_args(list(ARGV))"
_SIMPLE = (str, int, float, bool, type(None))


def junk_flags() -> st.SearchStrategy[str]:
    """Flags that no engine has, and that are no beginning of one either."""
    return st.text("abcdefghijklmnopqrstuvwxyz", min_size=3, max_size=8).map(lambda name: f"--conformance-{name}")


@check("args.returns_pair", needs_engine=False, max_examples=1)
async def returns_pair(bench: Bench, _: Draw) -> None:
    engine_class = bench.engine_class
    expect(
        not inspect.isfunction(inspect.getattr_static(engine_class, "from_args", None)),
        "from_args is an ordinary method; it is called on the class, before there is an engine: make it a classmethod",
        code="import inspect\nassert not inspect.isfunction(inspect.getattr_static(Engine, 'from_args'))",
    )
    pair: Any = None
    is_awaitable = True
    problem = ""
    try:
        with _quiet([]):
            pair = engine_class.from_args(list(bench.argv))
            is_awaitable = inspect.isawaitable(pair)
            pair = await pair if is_awaitable else pair
    except (Exception, SystemExit) as error:
        problem = f"{type(error).__name__}: {error}"
    expect(not problem, f"from_args({list(bench.argv)}) raised {problem}", code=_PAIR)
    expect(is_awaitable, f"from_args gives {_said(pair)} at once; it is awaited: make it async", code=_PAIR)
    expect(
        isinstance(pair, tuple | list) and len(pair) == 2,
        f"from_args returned {_said(pair)}; it returns the pair (engine, WorkerConfig)",
        code=_PAIR,
    )
    engine, config = pair
    expect(
        isinstance(engine, engine_class | release.backend().LLMEngine),
        f"the first of the pair from from_args is {_said(engine)}; it is the engine, a {engine_class.__name__}",
        code=f"from dynamo.common.backend import LLMEngine\n{_PAIR}\nassert isinstance(engine, LLMEngine), engine",
    )
    expect(
        isinstance(config, release.backend().WorkerConfig),
        f"the second of the pair from from_args is {_said(config)}; it is Dynamo's WorkerConfig",
        code=f"from dynamo.common.backend import WorkerConfig\n{_PAIR}\nassert isinstance(config, WorkerConfig)",
    )


def _said(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"an object of type {type(value).__name__}"


@contextlib.contextmanager
def _quiet(words: Sequence[str]) -> Iterator[None]:
    """With these arguments of the program, and without argparse's usage text on the terminal."""
    usual, sys.argv = sys.argv, ["prog", *words]
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        sys.argv = usual


async def _made(bench: Bench) -> tuple[Any, Any]:
    """What from_args returns; where it does not even do that, another rule says so."""
    try:
        with _quiet([]):
            engine, config = await bench.engine_class.from_args(list(bench.argv))
    except (Exception, SystemExit) as error:
        raise NotHere(f"from_args does not give a pair ({type(error).__name__}); see args.returns_pair") from None
    return engine, config


# The arguments.


@check("args.argv_respected", needs_engine=False, max_examples=2)
async def argv_respected(bench: Bench, draw: Draw) -> None:
    await _made(bench)
    argv = list(bench.argv)
    junk = draw(st.lists(junk_flags(), min_size=1, max_size=3))
    usual = await _outcome(bench, list(argv), [])
    unstable = usual.differences(await _outcome(bench, list(argv), []))
    given = list(argv)
    beside_junk = await _outcome(bench, given, junk)
    expect(
        given == argv,
        f"from_args changed the list it was given from {argv} to {given}",
        code="given = list(ARGV)\nawait Engine.from_args(given)\nassert given == ARGV, given",
    )
    _same(beside_junk, (argv, junk), usual, (argv, []), unstable)
    _same(await _outcome(bench, None, argv), (None, argv), usual, (argv, []), unstable)
    nothing = await _outcome(bench, [], [])
    for words in (junk, argv):
        _same(await _outcome(bench, [], words), ([], words), nothing, ([], []), unstable)


class _Outcome:
    """Plain values of the engine and its configuration, or the type of what was raised."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    def differences(self, other: _Outcome) -> list[str]:
        names = dict.fromkeys([*self.values, *other.values])
        return [name for name in names if self.values.get(name, "absent") != other.values.get(name, "absent")]

    def said(self, name: str) -> str:
        if "raised" in self.values:
            return f"raises {self.values['raised']}"
        return f"gives {name} = {self.values[name]!r}" if name in self.values else "works"


async def _outcome(bench: Bench, argv: list[str] | None, words: Sequence[str]) -> _Outcome:
    try:
        with _quiet(words):
            engine, config = await bench.engine_class.from_args(argv)
    except (Exception, SystemExit) as error:
        return _Outcome({"raised": type(error).__name__})
    return _Outcome({**_plain("config", config), **_plain("engine", engine)})


def _plain(path: str, thing: Any, depth: int = 2) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in getattr(thing, "__dict__", {}).items():
        if isinstance(value, _SIMPLE):
            found[f"{path}.{name}"] = value
        elif depth > 1:
            found |= _plain(f"{path}.{name}", value, depth - 1)
    return found


Case = tuple[list[str] | None, list[str]]  # the list that is given, and sys.argv[1:]


def _same(found: _Outcome, case: Case, wanted: _Outcome, wanted_case: Case, unstable: Sequence[str]) -> None:
    differences = [name for name in found.differences(wanted) if name not in unstable]
    name = differences[0] if differences else ""
    expect(
        not differences,
        f"from_args({case[0]}) with sys.argv[1:] = {case[1]} {found.said(name)}, where from_args({wanted_case[0]}) "
        f"with sys.argv[1:] = {wanted_case[1]} {wanted.said(name)}; a list is used as it is, even an empty one, "
        "and only None means sys.argv",
        code=f"""
import argparse, sys
async def made(argv, words):
    sys.argv = ["prog", *words]
    try:
        engine, config = await Engine.from_args(argv)
    except (Exception, SystemExit) as error:
        return repr(error)
    plain = (str, int, float, argparse.Namespace)
    return repr((config, [value for value in vars(engine).values() if isinstance(value, plain)]))
found, wanted = await made({case[0]!r}, {case[1]!r}), await made({wanted_case[0]!r}, {wanted_case[1]!r})
assert found == wanted, (found, wanted)
""",
    )


@check("args.bad_flag", needs_engine=False, max_examples=6)
async def bad_flag(bench: Bench, draw: Draw) -> None:
    await _made(bench)
    words = [draw(junk_flags())]
    form = draw(st.sampled_from(["alone", "with =", "with a value"]))
    if form == "with =":
        words[0] += "=1"
    elif form == "with a value":
        words.append("1")
    is_first = "--" in bench.argv or draw(st.booleans())
    argv = [*words, *bench.argv] if is_first else [*bench.argv, *words]
    before = held_now()
    error: BaseException | None = None
    try:
        with _quiet([]):
            await bench.engine_class.from_args(list(argv))
    except (Exception, SystemExit) as raised:
        error = raised.with_traceback(None)
    refused = (ValueError, argparse.ArgumentError, *release.exceptions("InvalidArgument"))
    code = f"""
try:
    await Engine.from_args({argv!r})
except SystemExit as error:
    assert error.code == 2, error.code
except ValueError:
    pass
else:
    raise AssertionError("the flag was taken")
"""
    called = f"from_args({argv})"
    expect(error is not None, f"{called} took a flag that it does not know; a typing error goes unseen", code=code)
    if isinstance(error, SystemExit):
        expect(error.code == 2, f"{called} raised SystemExit({error.code!r}); a wrong flag is status 2", code=code)
    else:
        expect(
            isinstance(error, refused),
            f"{called} raised {type(error).__name__}; a wrong flag ends in SystemExit(2) or ValueError",
            code=code,
        )
    left = [name for name in await settled(before, 0.3) if not _is_of_the_loop(name)]
    expect(
        not left,
        f"{called} failed and left {', '.join(left)} behind",
        code=_left_code("try:\n    await Engine.from_args({argv!r})\nexcept (ValueError, SystemExit):\n    pass", argv),
    )


def _is_of_the_loop(name: str) -> bool:
    """Threads of the loop's own pool, which `asyncio.to_thread` uses; the loop ends them."""
    return name.startswith("thread asyncio_")


def _left_code(act: str, argv: Sequence[str]) -> str:
    return f"""
import os, threading
def held():
    threads = {{thread.name for thread in threading.enumerate() if not thread.name.startswith("asyncio_")}}
    files = {{os.readlink(f"/proc/self/fd/{{fd}}") for fd in os.listdir("/proc/self/fd")[:-1]}}
    children = {{pid for task in os.listdir("/proc/self/task") for pid in
                open(f"/proc/self/task/{{task}}/children").read().split()}}
    return threads | {{file for file in files if file.startswith("socket")}} | children
before = held()
{act.format(argv=list(argv))}
assert held() <= before, held() - before
"""


# What is made.


@check("args.cheap", needs_engine=False, max_examples=2)
async def cheap(bench: Bench, draw: Draw) -> None:
    await _made(bench)
    before, gpu_bytes = held_now(), _gpu_bytes()
    number = draw(st.integers(1, 2))
    kept, times = [], []
    for _ in range(number):
        began_s = time.perf_counter()
        kept.append(await _made(bench))
        times.append(time.perf_counter() - began_s)
    left = [name for name in await settled(before, 0.3) if _is_costly(name)]
    expect(
        not left,
        f"from_args, called {number} times, left {', '.join(left)}; before start nothing may be held, since cleanup "
        "is not called for an engine that was never started",
        code=_left_code("kept = [await Engine.from_args(list(ARGV))]", ()),
    )
    expect(
        _gpu_bytes() <= gpu_bytes,
        f"from_args took {_gpu_bytes() - gpu_bytes} bytes of GPU memory; that belongs into start",
        code=f"import torch\nbefore = torch.cuda.memory_allocated()\n{_PAIR}\n"
        "assert torch.cuda.memory_allocated() <= before",
    )
    expect(
        min(times) < MAKING_S,
        f"from_args takes {min(times):.1f} s; what takes long belongs into start",
        code=f"import time\n{_PAIR}\nbegan_s = time.perf_counter()\n{_PAIR}\n"
        f"assert time.perf_counter() - began_s < {MAKING_S}",
    )


def _is_costly(name: str) -> bool:
    if name.startswith("open file"):
        return any(part in name for part in ("socket:", "/dev/nvidia", "/dev/kfd", "/dev/dri"))
    return name.startswith(("thread ", "child process ")) and not _is_of_the_loop(name)


def _gpu_bytes() -> int:
    torch = sys.modules.get("torch")
    cuda = getattr(torch, "cuda", None)
    return int(cuda.memory_allocated()) if cuda is not None and cuda.is_initialized() else 0


@check("args.reentrant", needs_engine=False, max_examples=2)
async def reentrant(bench: Bench, draw: Draw) -> None:
    await _made(bench)
    (first, config), (second, other_config) = await asyncio.gather(_made(bench), _made(bench))
    both = "(first, config), (second, other) = [await Engine.from_args(list(ARGV)) for _ in range(2)]\n"
    expect(
        first is not second,
        "two calls of from_args give the same engine; each gives an engine of its own",
        code=f"{both}assert first is not second",
    )
    different = [
        name for name, value in vars(config).items() if not _equal(value, getattr(other_config, name, "absent"))
    ]
    name = different[0] if different else ""
    expect(
        not different,
        f"two calls of from_args with the same arguments give different configurations: {name} is "
        f"{getattr(config, name, None)!r} and {getattr(other_config, name, None)!r}",
        code=f"{both}assert config.{name} == other.{name}, (config.{name}, other.{name})",
    )
    if _shared(first, second):
        await _expect_independent(bench, draw)


def _equal(value: Any, other: Any) -> bool:
    """Of values that cannot be compared only the type counts."""
    kind: Any = type(value)
    return kind is type(other) if kind.__eq__ is object.__eq__ else bool(value == other)


async def _expect_independent(bench: Bench, draw: Draw) -> None:
    """A container of both may be a table or a cache. Requests that come and go in it are the state of one engine."""
    try:
        engine, other = await bench.make_started(), await bench.make()
    except Exception:
        raise NotHere("the engine does not start; see start.ready") from None
    shared = _shared(engine, other)
    before = {path: _content(thing) for path, thing in shared.items()}
    stream = await bench.open(draw(requests(max_tokens=st.just(12))), engine=engine)
    await stream.wait_chunks(1, bench.answer_within_s())
    during = {path: _content(thing) for path, thing in shared.items()}
    await stream.finish(bench.answer_within_s())
    moved = [path for path, thing in shared.items() if during[path] != before[path] and _content(thing) == before[path]]
    expect(
        not moved,
        f"two engines share {', '.join(moved)}: a request of one engine is in it while it runs, so the other engine "
        "sees requests that are not its own",
        stream.transcript,
        code="\n".join(
            [
                "first, _ = await Engine.from_args(list(ARGV))",
                "second, _ = await Engine.from_args(list(ARGV))",
                *(f"assert first{path} is not second{path}" for path in moved[:1]),
            ]
        ),
    )


def _content(thing: Any) -> list[int]:
    return [id(part) for part in list(thing)[:1000]]


def _shared(first: Any, second: Any) -> dict[str, Any]:
    """Containers that can be reached from both engines, by their path from the first."""
    others = {id(thing) for thing in _containers(second).values()}
    return {path: thing for path, thing in _containers(first).items() if id(thing) in others}


def _containers(engine: Any, max_depth: int = 4) -> dict[str, Any]:
    """dicts, lists, sets and deques of the engine and of the parts that come from its own package."""
    home = type(engine).__module__.split(".")[0]
    found: dict[str, Any] = {}
    seen: set[int] = set()
    waiting = deque([("", engine, 0)])
    while waiting:
        path, thing, depth = waiting.popleft()
        if id(thing) in seen or depth > max_depth:
            continue
        seen.add(id(thing))
        if isinstance(thing, dict | list | set | deque):
            found[path] = thing
        elif type(thing).__module__.split(".")[0] == home:
            waiting.extend((f"{path}.{name}", part, depth + 1) for name, part in _attributes(thing, home).items())
    return found


def _attributes(thing: Any, home: str) -> dict[str, Any]:
    attributes = dict(getattr(thing, "__dict__", {}))
    for kind in type(thing).__mro__:
        if kind.__module__.split(".")[0] == home:
            own = {name: value for name, value in vars(kind).items() if not name.startswith("__")}
            attributes = {**attributes, **{name: value for name, value in own.items() if name not in attributes}}
    return attributes


# The configuration.


@check("args.config_valid", needs_engine=False, max_examples=1)
async def config_valid(bench: Bench, _: Draw) -> None:
    _, config = await _made(bench)
    config_valid_of(config)


def config_valid_of(config: Any) -> None:
    """What `Worker.run` and the Rust worker check before they begin."""
    namespace = getattr(config, "namespace", None)
    expect(
        isinstance(namespace, str) and namespace,
        f"WorkerConfig.namespace is {namespace!r}; it is the name under which the worker is found",
        code=f"{_PAIR}\nassert isinstance(config.namespace, str) and config.namespace, config.namespace",
    )
    mode = getattr(config, "disaggregation_mode", None)
    modes = release.disaggregation_modes()
    role = next((name for name, known in modes.items() if known is mode), "")
    expect(
        role,
        f"WorkerConfig.disaggregation_mode is {mode!r}; it is one of {', '.join(map(str, modes.values()))}",
        code=f"from dynamo.common.constants import DisaggregationMode\n{_PAIR}\n"
        "assert isinstance(config.disaggregation_mode, DisaggregationMode), config.disaggregation_mode",
    )
    _endpoint_types_of(config, role)
    model_input = getattr(config, "model_input", None)
    expect(
        model_input == release.core("ModelInput").Tokens,
        f"WorkerConfig.model_input is {model_input}; an LLMEngine gets tokens: ModelInput.Tokens",
        code=f"from dynamo.llm import ModelInput\n{_PAIR}\nassert config.model_input == ModelInput.Tokens",
    )
    expect(
        not getattr(config, "route_to_encoder", False) or role in ("agg", "prefill"),
        f"WorkerConfig.route_to_encoder is set on a worker in the {role} role; only agg and prefill workers "
        "send to encoders",
        code=f"{_PAIR}\nrole = config.disaggregation_mode.value\n"
        "assert not config.route_to_encoder or role in ('agg', 'prefill'), role",
    )
    response_plane = getattr(config, "response_plane", "tcp")
    expect(
        response_plane in ("tcp", "quic") or not release.is_at_least("1.6"),
        f"WorkerConfig.response_plane is {response_plane!r}; it is 'tcp' or 'quic'",
        code=f"{_PAIR}\nassert config.response_plane in ('tcp', 'quic'), config.response_plane",
    )
    _fields_of(config)


def _endpoint_types_of(config: Any, role: str) -> None:
    if role in ("prefill", "encode"):
        return  # not read for these
    text = getattr(config, "endpoint_types", None)
    words = [word.strip().lower() for word in text.split(",")] if isinstance(text, str) else []
    unknown = [word for word in words if word and word not in ENDPOINT_TYPES]
    expect(
        any(words) and not unknown,
        f"WorkerConfig.endpoint_types is {text!r}"
        + (f", with the unknown {unknown[0]!r}" if unknown else "")
        + "; it is a list such as 'chat,completions'",
        code=f"known = {list(ENDPOINT_TYPES)}\n{_PAIR}\n"
        "words = [word.strip().lower() for word in config.endpoint_types.split(',') if word.strip()]\n"
        "assert words and set(words) <= set(known), config.endpoint_types",
    )


def _fields_of(config: Any) -> None:
    """Each field by itself goes into Dynamo's own Rust classes, which take only the right types."""
    rust = import_module("dynamo._core").backend
    for name, value in vars(config).items():
        for kind, needed in (("WorkerConfig", {"namespace": "x"}), ("RuntimeConfig", {})):
            if name == "disaggregation_mode" or name not in inspect.signature(getattr(rust, kind)).parameters:
                continue
            problem = ""
            try:
                getattr(rust, kind)(**{**needed, name: list(value) if name == "metrics_labels" else value})
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"
            given = ", ".join([*(f"{key}={text!r}" for key, text in needed.items() if key != name), f"{name}=value"])
            expect(
                not problem,
                f"WorkerConfig.{name} is {value!r}; Dynamo's Rust side does not take it: {problem}",
                code=f"from dynamo._core import backend\n{_PAIR}\nvalue = config.{name}\nbackend.{kind}({given})",
            )
