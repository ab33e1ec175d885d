"""
The engine as a Dynamo backend.

    python -m mock_engine worker --profile h100-sxm/llama-3.1-8b/vllm-tp1-bf16

`MockLLMEngine` is a Dynamo `LLMEngine` (ai-dynamo 1.2.1 to 1.6.1). Dynamo's
Rust worker calls `__anext__` of a stream on a thread without an event loop,
never closes it, and drops it wherever it happens to be. So nothing is held
across a yield, and letting go of a request is one synchronous call that works
on any thread.
"""

from __future__ import annotations

import asyncio
import logging
import os
import tempfile
from collections.abc import AsyncGenerator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from mock_engine.adapter_announcement import Announcement
from mock_engine.admission import Admission, raise_fault
from mock_engine.controls import CONTROLS, UPDATES, Controls
from mock_engine.core import Token
from mock_engine.dcgm import DcgmCollector, DcgmServer
from mock_engine.drive_realtime import RealTimeDrive, Stream
from mock_engine.dynamo_release import (
    HAS_ADAPTERS,
    HAS_DRAIN,
    EngineShutdown,
    LLMEngine,
    add_metrics,
    check_answers,
    component_snapshot,
    engine_config,
    health_check_payload,
    push_source,
)
from mock_engine.engine_settings import Engine, build_engines
from mock_engine.errors import ConfigError, MockEngineError
from mock_engine.exposition import EngineCollector
from mock_engine.fault_injector import FaultInjector
from mock_engine.faults import DEATH_STATUS
from mock_engine.kv_feed import KvFeed, KvLoad
from mock_engine.live_request import LiveRequest
from mock_engine.lora import parse_lora_modules
from mock_engine.realtime_clock import RealTimeClock
from mock_engine.recorder import Recorder
from mock_engine.recording import INTERVAL_S, Recording
from mock_engine.request_spans import NO_SPANS, is_traced, start_spans
from mock_engine.step import StepLoad
from mock_engine.worker_config import worker_config, worker_parser
from mock_engine.worker_roles import AggregatedRole, make_role
from mock_engine.worker_settings import WorkerSettings

logger = logging.getLogger(__name__)

_POLL_S = 0.02  # how often a request that hangs is asked whether its client has gone

# How often and when `cleanup` looks whether all readers have heard that their streams are over. If the process ends
# before, Dynamo 1.4.2 dies of SIGABRT ("exception not rethrown"), and its keys in etcd stay until their lease is over.
_NUM_PARTING_LOOKS, _PARTING_LOOK_S = 25, 0.02
_STOPS = "the worker stops before the answer is whole"


class MockLLMEngine(LLMEngine):  # type: ignore[misc]
    """An `LLMEngine` that takes as long as a profile was measured to take. Made by `from_args`."""

    def __init__(self, settings: WorkerSettings) -> None:
        self.settings = settings
        self.faults = FaultInjector(settings.faults, settings.engine.seed, _die)
        self.controls: Controls | None = None
        self._drives: list[RealTimeDrive] = []  # one for each data-parallel rank; none before `start`
        self._kv_feed: KvFeed | None = None
        self._recording: Recording | None = None
        self._dcgm: DcgmServer | None = None
        self._open: dict[Stream, LiveRequest] = {}  # `_close` changes it on any thread
        self._is_stopped = False
        self._is_traced = is_traced()
        self._announcement: Announcement | None = None

    @classmethod
    async def from_args(cls, argv: list[str] | None = None) -> tuple[MockLLMEngine, Any]:
        """The engine, not started, and its `WorkerConfig`. Exits with status 2 and one line for a wrong flag."""
        parser = worker_parser()
        flags = parser.parse_args(argv)
        try:
            settings = WorkerSettings.from_flags(flags)
            if any(fault.worker is not None for fault in settings.faults):
                raise ConfigError("a --fault names a worker, which only 'mock-engine serve' and 'bench' can do")
            check_answers(settings.tool_call_parser, settings.reasoning_parser, settings.lora_modules)
            engine = cls(settings)
            _ = engine._admission  # finds every wrong setting before Dynamo starts
            Recorder(settings.record, settings.status).close()
        except MockEngineError as error:
            parser.error(str(error))
        config = worker_config(settings, flags, engine.served_model_name)
        engine._announcement = Announcement(
            config, tuple(parse_lora_modules(settings.lora_modules)), settings.max_loras, engine._engine.block_size
        )
        return engine, config

    @property
    def served_model_name(self) -> str:
        """The name that clients use: `--model-name`, else the profile's model."""
        return self.settings.model_name or self._engine.profile.model

    async def start(self, worker_id: int) -> Any:
        """Be ready to serve; return Dynamo's `EngineConfig`. Raises `EngineShutdown` if that is not possible."""
        settings = self.settings
        await self._wait(self.faults.start_delay_s)
        if self.faults.start_failure is not None:
            raise EngineShutdown(self.faults.start_failure)
        try:
            engine = self._engine
            _ = self._admission
            if settings.record is not None or settings.status is not None:
                recorder = Recorder(settings.record, settings.status)
                self._recording = Recording(recorder, self._drives, self._num_open)
            if settings.dcgm_port is not None:
                gpus = DcgmCollector(engine, self._metrics.stats.steps, self._drives, f"{worker_id:x}")
                self._dcgm = DcgmServer(gpus, settings.dcgm_host, settings.dcgm_port)
        except MockEngineError as error:
            raise EngineShutdown(str(error)) from error
        schedulers = [each.core.scheduler for each in self._engines]
        feed = self._kv_feed = KvFeed(engine.block_size, schedulers, self._keeps_kv_event)
        for rank, each in enumerate(self._engines):
            drive = RealTimeDrive(each.core, RealTimeClock(), settings.engine.speedup_ratio, rank, self.faults)
            drive.on_change = partial(feed.note_load, rank)
            drive.on_step = self._metrics.stats.ranks[rank].steps.add
            self._drives.append(drive)
            drive.start()
        try:
            await self._role.start(self._drives, worker_id)
        except MockEngineError as error:
            raise EngineShutdown(str(error)) from error
        self._metrics.watch(self._drives, lambda: self._open.copy().values())
        self.controls = Controls(
            self._drives, self.faults, engine, settings.engine, _profile_folder(settings), self._cancel_all
        )
        if self._recording is not None:
            self._recording.start()
        logger.info(
            "serving %s as %s: %d KV blocks of %d tokens, context %d",
            engine.profile.name,
            self.served_model_name,
            engine.num_blocks,
            engine.block_size,
            engine.scheduler.max_model_len,
        )
        return engine_config(
            model=str(settings.model_path),
            served_model_name=self.served_model_name,
            context_length=engine.scheduler.max_model_len,
            kv_cache_block_size=engine.block_size,
            total_kv_blocks=engine.num_blocks,
            max_num_seqs=engine.scheduler.max_num_seqs,
            max_num_batched_tokens=engine.scheduler.max_num_batched_tokens,
            data_parallel_size=len(self._engines),
        )

    async def kv_event_sources(self) -> list[Any]:
        """One `PushSource` for each data-parallel rank: the router learns what is in its KV cache."""
        if self._kv_feed is None or self.settings.enable_kv_events is False:
            return []
        return [push_source(partial(self._kv_feed.attach_kv, rank), rank) for rank in range(len(self._engines))]

    def component_metrics_dp_ranks(self) -> list[int]:
        """All data-parallel ranks: each publishes how full its KV cache is."""
        return list(range(len(self._engines)))

    def attach_snapshot_publisher(self, publisher: Any) -> None:
        """Dynamo takes the loads of all ranks there."""

        def publish(rank: int, load: KvLoad) -> None:
            publisher.publish(rank, component_snapshot(rank, load.num_used_blocks, load.num_blocks, load.hit_rate))

        if self._kv_feed is not None:
            self._kv_feed.attach_loads(publish)

    async def generate(self, request: Mapping[str, Any], context: Any) -> AsyncGenerator[dict[str, Any], None]:
        """
        Stream the answer to `request`, one chunk for the tokens of a step; the last has `finish_reason` and usage.

        With `n` > 1 every choice gets its tokens, and one terminal chunk ends them all, because Dynamo's
        adapter stops reading at the first. Raises `InvalidArgument` for a request that cannot be served,
        `EngineShutdown` when the engine is not running.
        """
        if not self._drives:
            raise EngineShutdown("the engine is not running")
        live = await self._admission.admit(request, context)
        self._open[live.stream] = live
        spans = start_spans(context) if self._is_traced else NO_SPANS
        live.stream.on_started = spans.started
        try:
            while not live.is_ended:
                tokens = await _next_tokens(live.stream)
                if not tokens or context.is_stopped():
                    live.cancel()
                    spans.ended(live)
                    if self._is_stopped and not context.is_stopped():
                        raise EngineShutdown(_STOPS)
                    logger.debug("request %s cancelled", live.request_id)
                    yield live.cancelled_chunk()
                    return
                chunks = live.chunks(tokens)
                spans.sent(live)
                for chunk in chunks:
                    if "finish_reason" in chunk:
                        chunk.update(self._role.terminal_of(live.stream))
                    yield chunk
                if live.is_broken:
                    await self._break(live, context)
                    yield live.cancelled_chunk()
                    return
        finally:
            spans.ended(live)
            self._close(live)

    async def abort(self, context: Any) -> None:
        """Let go of the request with this context's id; unknown and finished ones are ignored."""
        for live in self._open.copy().values():
            if live.request_id == context.id():
                live.cancel()

    if HAS_ADAPTERS:

        async def on_endpoint_ready(self, endpoint: Any) -> None:
            """Announce the LoRA adapters, in the background: the worker's own model comes first, and after this."""
            if self._announcement is not None:
                self._announcement.start(endpoint)

    async def cleanup(self) -> None:
        """
        Stop and release everything. Safe before `start`, after it failed, twice.

        Streams that are still open raise `EngineShutdown`, upon which Dynamo's frontend takes the request to another
        worker (`--migration-limit`). A terminal chunk would be taken for the end of the answer.
        """
        if not self._is_stopped:
            await self._wait(self.faults.cleanup_delay_s)
        self._is_stopped = True
        admission: Admission | None = self.__dict__.get("_admission")
        if admission is not None:
            admission.stop()
        if self.controls is not None:
            self.controls.close()
        for drive in self._drives:
            await drive.stop()
        if self._made_role is not None:
            await self._made_role.stop()
        if self._kv_feed is not None:
            self._kv_feed.close()
        for _ in range(_NUM_PARTING_LOOKS):  # a stream that nobody reads is not waited for longer
            if not self._open:
                break
            await asyncio.sleep(_PARTING_LOOK_S)
        if admission is not None:
            admission.close()
        if self._announcement is not None:
            self._announcement.stop()
        recording, self._recording = self._recording, None
        if recording is not None:
            await recording.stop()
        dcgm, self._dcgm = self._dcgm, None
        if dcgm is not None:
            dcgm.stop()

    async def register_prometheus(self, metrics: Any) -> None:
        """Show our metrics on the worker's /metrics (DYN_SYSTEM_PORT). From ai-dynamo 1.3 on, once, after `start`."""
        add_metrics(metrics, self._metrics.text, self._metrics.add_labels)

    async def health_check_payload(self) -> dict[str, Any] | None:
        """A request of one token, for Dynamo to send when nobody else does (DYN_HEALTH_CHECK_ENABLED)."""
        return health_check_payload(self._admission.probe_token_id)

    async def is_quiescent(self) -> bool:
        """
        True when no request is open and no KV cache is to be fetched. From ai-dynamo 1.3 on, polled on prefill
        workers before `cleanup`.
        """
        return self._is_quiescent

    if HAS_DRAIN:

        async def drain(self) -> None:
            """Return when that is so. ai-dynamo 1.2 calls it once, before `cleanup`; later ones never do."""
            while not self._is_quiescent:  # noqa: ASYNC110  (requests end on any thread; an Event belongs to one)
                await asyncio.sleep(INTERVAL_S)

    def supported_controls(self) -> set[str]:
        """What `POST /engine/control/<name>` on the system port can do. Asked by ai-dynamo 1.3 and later."""
        return set(CONTROLS)

    async def engine_control(self, control: str, body: dict[str, Any]) -> dict[str, Any]:
        """See docs/controls.md. Never raises."""
        if self.controls is None or self._is_stopped:
            return {"status": "error", "message": "the engine is not running"}
        return await self.controls.control(control, body)

    def supported_updates(self) -> set[str]:
        """The same for `POST /engine/update/<name>`."""
        return set(UPDATES)

    async def engine_update(self, update: str, body: dict[str, Any]) -> dict[str, Any]:
        """See docs/controls.md. Never raises."""
        if self.controls is None or self._is_stopped:
            return {"status": "error", "message": "the engine is not running"}
        return await self.controls.update(update, body)

    def conformance_probe(self) -> _Probe:
        """What requests hold, exactly, for the conformance suite (docs/conformance.md). Dynamo never calls it."""
        return _Probe(self)

    @property
    def _is_quiescent(self) -> bool:
        return self._num_open() == 0 and (self._made_role is None or self._made_role.num_transfers == 0)

    @cached_property
    def _role(self) -> AggregatedRole:
        """What this worker does of a request."""
        return make_role(self.settings, self._engine)

    @property
    def _made_role(self) -> AggregatedRole | None:
        """The same, without making it: settings with which nothing starts make none."""
        role: AggregatedRole | None = self.__dict__.get("_role")
        return role

    @cached_property
    def _engines(self) -> list[Engine]:
        """What the settings make, one for each data-parallel rank. Raises `ProfileError` or `ConfigError`."""
        settings = self.settings.engine
        seeds = range(settings.seed, settings.seed + self.settings.data_parallel_size)
        return build_engines(settings, seeds, self._warn_unmeasured)

    @property
    def _engine(self) -> Engine:
        """The first: in what can be said of it, all are alike."""
        return self._engines[0]

    @cached_property
    def _admission(self) -> Admission:
        """How requests come in. Raises `ConfigError`."""
        return Admission(self.settings, self._engines, self._drives, self._role, self.faults, self._open)

    @cached_property
    def _metrics(self) -> EngineCollector:
        return EngineCollector(self._engine, self.settings.engine, self.served_model_name, len(self._engines))

    async def _break(self, live: LiveRequest, context: Any) -> None:
        """A fault lets no more of a request out: raise, or return once it is cancelled."""
        assert live.fault is not None
        if live.fault.error is not None and live.num_sent >= live.fault.error.tokens:
            raise_fault(live.fault)
        while not (context.is_stopped() or live.is_cancelled or self._is_stopped):  # noqa: ASYNC110
            await asyncio.sleep(_POLL_S)
        if self._is_stopped and not context.is_stopped():
            raise EngineShutdown(_STOPS)

    async def _wait(self, model_s: float) -> None:
        ratio = self._drives[0].speedup_ratio if self._drives else self.settings.engine.speedup_ratio
        if model_s and ratio:
            await asyncio.sleep(model_s / ratio)

    def _keeps_kv_event(self, event: str, rank: int) -> bool:
        """Whether it is to be published. On any thread."""
        return self.faults.is_empty or self.faults.keeps_kv_event(event, self._drives[rank].last_step_s, rank)

    def _close(self, live: LiveRequest) -> None:
        """Synchronous, and safe on any thread: a dropped stream is finalized where it is dropped."""
        live.cancel()
        self._role.let_go(live.stream)
        live.is_closed = True
        self._open.pop(live.stream, None)
        self._metrics.stats.add_closed(live)
        recording = self._recording
        if recording is not None and not live.is_probe:
            recording.add(live)

    def _cancel_all(self) -> None:
        """Cancel all that is open, also what a fault lets hang after its last token."""
        for live in self._open.copy().values():
            live.cancel()

    def _num_open(self) -> int:
        """
        Requests that somebody still waits for.

        Not all streams that exist: Dynamo may drop one without the interpreter's lock, and Python
        hears of it only when Dynamo's Rust side takes the lock the next time.
        """
        return sum(live.is_awaited for live in self._open.copy().values())

    def _warn_unmeasured(self, load: StepLoad) -> None:
        logger.warning(
            "%s was not measured at this load (%d prefill tokens, %d decoding, %d context tokens): "
            "times outside the measured range follow the roofline. Said once.",
            self.settings.engine.profile,
            load.num_tokens - load.decode_batch_size,
            load.decode_batch_size,
            load.context_tokens,
        )


class _Probe:
    """
    Reads counts that other threads may change meanwhile; each is right at some moment.

    A KV cache that waits for a decode worker is no request's any more: its blocks are not among those.
    """

    def __init__(self, engine: MockLLMEngine) -> None:
        self._engine = engine

    def in_use(self) -> dict[str, int]:
        engine = self._engine
        drives = engine._drives
        if not drives:
            return {}
        schedulers = [drive.core.scheduler for drive in drives]
        return {
            "requests": len(engine._open),
            "streams": sum(len(drive.streams) for drive in drives),
            "running": sum(scheduler.num_running for scheduler in schedulers),
            "waiting": sum(drive.num_waiting for drive in drives),
            "kv_blocks": sum(scheduler.blocks.num_used for scheduler in schedulers)
            - sum(drive.num_kept_blocks for drive in drives),
        }


def _profile_folder(settings: WorkerSettings) -> Path:
    return settings.record or Path(tempfile.gettempdir()) / "mock-engine-profiles"


def _die(reason: str) -> None:
    logger.warning("the fault %s ends this process now", reason)
    logging.shutdown()
    os._exit(DEATH_STATUS)


async def _next_tokens(stream: Stream) -> list[Token]:
    try:
        return await stream.next_tokens()
    except RuntimeError as error:
        raise EngineShutdown(str(error)) from error
