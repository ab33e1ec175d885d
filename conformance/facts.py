"""
What can be known of an engine before any rule is checked: a dry run.

It starts the engine once in real time, asks it one question, and says what it
offers (`capabilities`), how long it takes, and whether the loop's time can be
virtual. Nothing here judges: an engine that fails in the dry run is judged by
the rules on starting and answering.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import inspect
import time
from collections.abc import Awaitable, Callable, Mapping
from itertools import pairwise
from typing import Any

from conformance import release
from conformance.resources import held_now, probe_of
from conformance.settings import ROLES, Role, SuiteError, SuiteSettings
from conformance.streams import Stream
from conformance.transcript import Transcript
from conformance.virtual_loop import VirtualLoop
from conformance.wire import wire_request

NUMBERS = (
    "context_length",
    "kv_cache_block_size",
    "total_kv_blocks",
    "max_num_seqs",
    "max_num_batched_tokens",
    "data_parallel_size",
    "data_parallel_start_rank",
    "bootstrap_host",
    "bootstrap_port",
)
_DRY_TOKENS = 6
_PATIENCE_S = 60.0
_REAL_TRIES = 4


@dataclasses.dataclass(frozen=True, slots=True)
class Facts:
    """What the dry run found."""

    role: Role = "agg"
    clock: str = "real"
    argv: tuple[str, ...] = ()
    prefill_argv: tuple[str, ...] | None = None  # how to make a prefill peer for the decode role
    decode_argv: tuple[str, ...] | None = None  # and a decode peer for the prefill role
    numbers: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    start_s: float = 0.0  # real seconds
    first_chunk_s: float = 0.0  # real seconds
    gap_s: float = 0.0  # real seconds between chunks
    output: tuple[int, ...] = ()  # what the engine said to `DRY_REQUEST`
    capabilities: Mapping[str, str] = dataclasses.field(default_factory=dict)  # name -> "yes ..." or "no: why"
    routes_to_encoder: bool = False
    problem: str = ""  # why the dry run could not be finished
    starts: bool = True  # False: `from_args` or `start` is where it ended

    def has(self, capability: str) -> bool:
        return self.capabilities.get(capability, "").startswith("yes")


DRY_REQUEST = wire_request(list(range(1, 9)), max_tokens=_DRY_TOKENS, stop={"ignore_eos": True})


def config_numbers(config: Any) -> dict[str, Any]:
    """The numbers of an `EngineConfig`, wherever this release keeps them."""
    holder = getattr(config, "llm", None) if release.is_at_least("1.3") else config
    return {name: getattr(holder, name, None) for name in NUMBERS}


def find_facts(settings: SuiteSettings) -> Facts:
    """The dry run. Raises SuiteError if the engine cannot play the role that was asked for."""
    engine_class = settings.engine_class()
    argv = settings.argv
    try:
        role, argv = asyncio.run(_role(engine_class, argv, settings.role))
    except SuiteError:
        raise
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        problem = f"from_args: {_said(error)}"
        return Facts(role=settings.role or "agg", argv=tuple(argv), problem=problem, starts=False)
    facts = Facts(role=role, argv=tuple(argv))
    if role == "decode":
        facts = dataclasses.replace(facts, prefill_argv=asyncio.run(_argv_of_peer(engine_class, argv, "prefill")))
    if role == "prefill":
        facts = dataclasses.replace(facts, decode_argv=asyncio.run(_argv_of_peer(engine_class, argv, "decode")))
    try:
        real, facts = asyncio.run(_dry_run(engine_class, facts))
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        starts = not isinstance(error, _DoesNotStart)
        return dataclasses.replace(facts, problem=_said(error) if starts else str(error), starts=starts)
    clock, virtual = _choose_clock(settings, engine_class, facts, real)
    return dataclasses.replace(facts, clock=clock, **({} if virtual is None else _pace(virtual)))


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


async def _role(engine_class: Any, argv: list[str], wanted: Role | None) -> tuple[Role, list[str]]:
    role = await _role_with(engine_class, argv)
    if wanted is None or role == wanted:
        return role, argv
    for flag in (["--disaggregation-mode", wanted], [f"--disaggregation-mode={wanted}"]):
        try:
            if await _role_with(engine_class, [*argv, *flag]) == wanted:
                return wanted, [*argv, *flag]
        except (SystemExit, Exception):
            continue
    raise SuiteError(
        f"--engine-role is {wanted}, but the engine's WorkerConfig says {role}, "
        f"with --disaggregation-mode {wanted} too. Give the flags that make it one with --engine-args."
    )


async def _role_with(engine_class: Any, argv: list[str]) -> Role:
    _, config = await engine_class.from_args(list(argv))
    mode = getattr(config, "disaggregation_mode", None)
    return next((role for role in ROLES if role == getattr(mode, "value", None)), "agg")


async def _argv_of_peer(engine_class: Any, argv: list[str], role: Role) -> tuple[str, ...] | None:
    without = [
        word
        for i, word in enumerate(argv)
        if not word.startswith("--disaggregation-mode") and (i == 0 or argv[i - 1] != "--disaggregation-mode")
    ]
    try:
        _, found = await _role(engine_class, without, role)
    except (SystemExit, Exception):
        return None
    return tuple(found)


async def _dry_run(engine_class: Any, facts: Facts) -> tuple[_Signs, Facts]:
    before = held_now()
    engine, config = await engine_class.from_args(list(facts.argv))
    began_s = time.monotonic()
    try:
        try:
            engine_config = await engine.start(0)
        except (Exception, SystemExit) as error:
            raise _DoesNotStart(f"start: {_said(error)}") from error
        start_s = time.monotonic() - began_s
        facts = dataclasses.replace(facts, start_s=start_s, numbers=config_numbers(engine_config))
        facts = dataclasses.replace(facts, routes_to_encoder=bool(getattr(config, "route_to_encoder", False)))
        peer = None
        if facts.prefill_argv is not None:
            peer, _ = await engine_class.from_args(list(facts.prefill_argv))
            await peer.start(1)
        try:
            request = await _dry_request(facts, peer)
            transcript = await Stream("bridge", engine, request, "dry-run").finish(_PATIENCE_S)
            signs = _Signs(
                has_threads=bool(held_now().threads - before.threads),
                has_files=bool(held_now().files - before.files),
                seconds=transcript.events[-1].time_s if transcript.events else 0.0,
            )
            logprobs = await _has_logprobs(engine, facts, peer)
        finally:
            if peer is not None:
                await peer.cleanup()
        return signs, dataclasses.replace(
            facts,
            **_pace(transcript),
            output=tuple(transcript.token_ids),
            capabilities=await _capabilities(engine_class, engine, facts, logprobs),
        )
    finally:
        await engine.cleanup()


def _pace(transcript: Transcript) -> dict[str, Any]:
    """When the first chunk of an answer came, and the longest time between two."""
    times = [event.time_s for event in transcript.of_kind("chunk")]
    gaps = [later - sooner for sooner, later in pairwise(times)]
    return {"first_chunk_s": times[0] if times else 0.0, "gap_s": max(gaps, default=0.0)}


class _DoesNotStart(Exception):
    """With what `start` raised."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Signs:
    """Of a life of its own, which the loop's time does not rule."""

    has_threads: bool
    has_files: bool
    seconds: float


async def _dry_request(facts: Facts, peer: Any) -> dict[str, Any]:
    request = copy.deepcopy(DRY_REQUEST)  # NVIDIA's own prefill helper changes what it gets
    if facts.role == "encode":
        return {**request, "multi_modal_data": {"image_url": []}}
    if facts.role == "decode":
        params: Any = {"handle": "none"}
        if peer is not None:
            answer = await Stream("bridge", peer, copy.deepcopy(DRY_REQUEST), "dry-prefill").finish(_PATIENCE_S)
            params = answer.last.get("disaggregated_params", params)
        return {**request, "prefill_result": {"disaggregated_params": params}}
    return request


def _choose_clock(
    settings: SuiteSettings, engine_class: Any, facts: Facts, real: _Signs
) -> tuple[str, Transcript | None]:
    """
    The clock, and an answer in virtual time if it is that.

    What a step takes of it is not to be known from a real run, in which the host may have stalled.
    """
    if settings.driver == "worker" or settings.clock == "real":
        return "real", None
    if settings.clock == "virtual":
        with contextlib.suppress(Exception):  # found and said by the rules
            answer = _virtual_answer(engine_class, facts)
            return "virtual", None if answer.is_hung else answer
        return "virtual", None
    if real.has_threads or real.has_files:
        return "real", None
    try:
        virtual = _virtual_answer(engine_class, facts)
        if virtual.is_hung:
            return "real", None
        real_s, virtual_s = real.seconds, virtual.events[-1].time_s
        for _ in range(_REAL_TRIES - 1):
            if virtual_s >= real_s / 4:
                break
            # A busy host makes real time long.
            real_s = min(real_s, asyncio.run(_one_answer(engine_class, facts)).events[-1].time_s)
    except Exception:
        return "real", None
    # An engine that reads another clock than the loop's spins in virtual time, or takes none of it.
    return ("virtual", virtual) if real_s / 4 <= virtual_s <= 2 * real_s + 0.05 else ("real", None)


def _virtual_answer(engine_class: Any, facts: Facts) -> Transcript:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(_one_answer(engine_class, facts))


async def _one_answer(engine_class: Any, facts: Facts) -> Transcript:
    engine, _ = await engine_class.from_args(list(facts.argv))
    try:
        await engine.start(0)
        request = await _dry_request(facts, None)
        return await Stream("bridge", engine, request, "dry-run").finish(_PATIENCE_S)
    finally:
        await engine.cleanup()


# What it offers.


async def _has_logprobs(engine: Any, facts: Facts, peer: Any) -> str:
    if not release.is_at_least("1.3"):
        return f"no: ai-dynamo {release.dynamo_version()} has no logprobs"
    request = await _dry_request(facts, peer)
    request["output_options"] = {**request["output_options"], "logprobs": 1}
    transcript = await Stream("bridge", engine, request, "dry-logprobs").finish(_PATIENCE_S)
    if any(isinstance(chunk, Mapping) and chunk.get("log_probs") is not None for chunk in transcript.chunks):
        return "yes"
    return "no: no chunk of an answer with logprobs=1 has log_probs"


async def _capabilities(engine_class: Any, engine: Any, facts: Facts, logprobs: str) -> dict[str, str]:
    base = release.backend().LLMEngine

    def overrides(name: str) -> bool:
        own = getattr(engine_class, name, None)
        return own is not None and own is not getattr(base, name, None)

    async def asked(name: str, say: Callable[[Any], str]) -> str:
        if not hasattr(base, name):
            return f"no: ai-dynamo {release.dynamo_version()} has no {name}"
        if not overrides(name):
            return f"no: {name} is not overridden"
        try:
            value = getattr(engine, name)()
            if inspect.isawaitable(value):
                value = await _bounded(value)
        except Exception as error:
            return f"yes, but {name} raises {type(error).__name__}"
        return say(value)

    def sources(value: Any) -> str:
        if isinstance(value, list) and not value:
            return "no: kv_event_sources returns an empty list"
        return f"yes, {', '.join(type(source).__name__ for source in value or ())}"

    size = facts.numbers.get("data_parallel_size")
    probe = probe_of(engine)
    faults = getattr(probe, "fault_points", None)
    points = ", ".join(faults()) if callable(faults) else ""
    return {
        "abort": "yes" if overrides("abort") else "no: abort is not overridden",
        "kv": await asked("kv_event_sources", sources),
        "metrics": await asked(
            "component_metrics_dp_ranks",
            lambda ranks: f"yes, ranks {ranks}" if ranks != [] else "no: component_metrics_dp_ranks is empty",
        ),
        "logprobs": logprobs,
        "controls": await asked(
            "supported_controls",
            lambda names: f"yes, {sorted(names, key=str)}" if names else "no: supported_controls is empty",
        ),
        "updates": await asked(
            "supported_updates",
            lambda names: f"yes, {sorted(names, key=str)}" if names else "no: supported_updates is empty",
        ),
        "logits": await asked("logits_processor_spec", lambda spec: "yes" if spec is not None else "no: it is None"),
        "health": await asked(
            "health_check_payload", lambda payload: "yes" if payload is not None else "no: health_check_payload is None"
        ),
        "quiescence": "yes" if overrides("is_quiescent") else "no: is_quiescent is not overridden",
        "dp": f"yes, {size} ranks" if isinstance(size, int) and size > 1 else "no: data_parallel_size is not above 1",
        "probe": "yes" if probe is not None else "no: the engine has no conformance_probe()",
        "faults": f"yes, {points}" if points else "no: the probe has no fault_points()",
        "peer": (
            "yes"
            if facts.prefill_argv is not None or facts.decode_argv is not None
            else "no: no engine of the other role"
        ),
        "encoder": "yes" if facts.routes_to_encoder else "no: route_to_encoder is not set",
    }


async def _bounded(value: Awaitable[Any]) -> Any:
    async with asyncio.timeout(_PATIENCE_S):
        return await value
