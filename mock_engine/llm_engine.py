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
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Any

from mock_engine.drive_realtime import RealTimeDrive, Stream
from mock_engine.dynamo_release import (
    HAS_DRAIN,
    EngineShutdown,
    InvalidArgument,
    LLMEngine,
    WorkerConfig,
    engine_config,
    list_of_token_ids,
)
from mock_engine.engine_settings import DEFAULT_TOKENIZER, Engine, EngineSettings, build_engine
from mock_engine.errors import MockEngineError, RequestError
from mock_engine.flags import OneLineParser, add_dynamo_flags, add_engine_flags, add_model_flags
from mock_engine.output_tokens import OutputTokens
from mock_engine.prompt import Answer, Planner
from mock_engine.realtime_clock import RealTimeClock
from mock_engine.recorder import Recorder, RequestRow, TimelineRow
from mock_engine.step import StepLoad

logger = logging.getLogger(__name__)

_RECORD_INTERVAL_S = 0.25


class MockLLMEngine(LLMEngine):  # type: ignore[misc]
    """An `LLMEngine` that takes as long as a profile was measured to take. Made by `from_args`."""

    def __init__(
        self,
        settings: EngineSettings,
        model_path: Path = DEFAULT_TOKENIZER,
        model_name: str | None = None,
        record_folder: Path | None = None,
        status_path: Path | None = None,
    ) -> None:
        self.settings = settings
        self.model_path = model_path
        self.model_name = model_name
        self._record_folder = record_folder
        self._status_path = status_path
        self._engine: Engine | None = None
        self._planner: Planner | None = None
        self._drive: RealTimeDrive | None = None
        self._recorder: Recorder | None = None
        self._record_task: asyncio.Task[None] | None = None
        self._ended: deque[RequestRow] = deque()  # written by `_record`, which alone touches the files
        self._open: dict[Stream, str] = {}  # and its context id; `_close` changes it on any thread
        self._is_stopped = False

    @classmethod
    async def from_args(cls, argv: list[str] | None = None) -> tuple[MockLLMEngine, Any]:
        """The engine, not started, and its `WorkerConfig`. Exits with status 2 and one line for a wrong flag."""
        parser = OneLineParser(prog="mock-engine worker", description="One Dynamo worker for an existing cluster.")
        add_engine_flags(parser)
        add_model_flags(parser)
        add_dynamo_flags(parser)
        flags = parser.parse_args(argv)
        try:
            settings = EngineSettings.from_flags(flags)
            engine = cls(settings, flags.model_path, flags.model_name, flags.record, flags.status)
            engine._build()  # finds every wrong setting before Dynamo starts
            Recorder(flags.record, flags.status).close()
        except MockEngineError as error:
            parser.error(str(error))
        config = WorkerConfig(
            namespace=flags.namespace,
            component=flags.component,
            endpoint=flags.endpoint,
            model_name=str(engine.model_path),
            served_model_name=engine.served_model_name,
            endpoint_types=flags.endpoint_types,
            discovery_backend=flags.discovery_backend,
            request_plane=flags.request_plane,
            event_plane=flags.event_plane,
        )
        return engine, config

    @property
    def served_model_name(self) -> str:
        """The name that clients use: `--model-name`, else the profile's model."""
        return self.model_name or self._build().profile.model

    async def start(self, worker_id: int) -> Any:
        """Be ready to serve; return Dynamo's `EngineConfig`. Raises `EngineShutdown` if that is not possible."""
        del worker_id
        try:
            engine = self._build()
            if self._record_folder is not None or self._status_path is not None:
                self._recorder = Recorder(self._record_folder, self._status_path)
        except MockEngineError as error:
            raise EngineShutdown(str(error)) from error
        self._drive = RealTimeDrive(engine.core, RealTimeClock(), self.settings.speedup_ratio)
        self._drive.start()
        if self._recorder is not None:
            self._record_task = asyncio.get_running_loop().create_task(
                self._record(self._recorder, self._drive), name="mock-engine-record"
            )
        logger.info(
            "serving %s as %s: %d KV blocks of %d tokens, context %d",
            engine.profile.name,
            self.served_model_name,
            engine.num_blocks,
            engine.block_size,
            engine.scheduler.max_model_len,
        )
        return engine_config(
            model=str(self.model_path),
            served_model_name=self.served_model_name,
            context_length=engine.scheduler.max_model_len,
            kv_cache_block_size=engine.block_size,
            total_kv_blocks=engine.num_blocks,
            max_num_seqs=engine.scheduler.max_num_seqs,
            max_num_batched_tokens=engine.scheduler.max_num_batched_tokens,
        )

    async def generate(self, request: Mapping[str, Any], context: Any) -> AsyncGenerator[dict[str, Any], None]:
        """
        Stream the answer to `request`, one chunk for the tokens of a step; the last has `finish_reason` and usage.

        With `n` > 1 every choice gets its tokens, and one terminal chunk ends them all, because Dynamo's
        adapter stops reading at the first. Raises `InvalidArgument` for a request that cannot be served,
        `EngineShutdown` when the engine is not running.
        """
        if self._drive is None or self._planner is None or self._is_stopped:
            raise EngineShutdown("the engine is not running")
        request_id = context.id()
        try:
            answers = self._planner.plan(request_id, request)
            stream = self._drive.submit([answer.request for answer in answers], context.is_stopped)
        except RequestError as error:
            raise InvalidArgument(str(error)) from error
        except RuntimeError as error:
            raise EngineShutdown(str(error)) from error
        arrival_unix_s = time.time()
        self._open[stream] = request_id
        num_left = len(answers)
        num_sent = 0
        finish_reason = "cancelled"
        try:
            while num_left:
                tokens = await self._next_tokens(stream)
                if not tokens or context.is_stopped():
                    self._drive.cancel(stream)
                    logger.debug("request %s cancelled", request_id)
                    yield {"token_ids": [], "index": 0, "finish_reason": "cancelled", **_usage(stream, num_sent)}
                    return
                self._drive.note_sent(stream, tokens)
                num_sent += len(tokens)
                chunks: dict[int, dict[str, Any]] = {}
                for token in tokens:
                    choice = token.sequence.request.choice
                    chunk = chunks.setdefault(choice, {"token_ids": [], "index": choice})
                    chunk["token_ids"].append(answers[choice].token_ids[token.output_index])
                    num_left -= token.is_last
                *others, last = chunks.values()
                for chunk in others:
                    yield chunk
                if num_left == 0:
                    finish_reason = answers[last["index"]].finish_reason
                    last.update(finish_reason=finish_reason, **_usage(stream, num_sent))
                yield last
        finally:
            self._close(request_id, stream, answers, finish_reason, arrival_unix_s)

    async def abort(self, context: Any) -> None:
        """Let go of the request with this context's id; unknown and finished ones are ignored."""
        for stream, request_id in self._open.copy().items():
            if request_id == context.id() and self._drive is not None:
                self._drive.cancel(stream)

    async def cleanup(self) -> None:
        """Stop and release everything; open streams end as cancelled. Safe before `start`, after it failed, twice."""
        self._is_stopped = True
        if self._drive is not None:
            await self._drive.stop()
        if self._record_task is not None:
            self._record_task.cancel()
            await asyncio.gather(self._record_task, return_exceptions=True)
            self._record_task = None
        if self._recorder is not None:
            if self._drive is not None:
                self._write_records(self._recorder, self._drive)
            self._recorder.close()
            self._recorder = None

    async def is_quiescent(self) -> bool:
        """True when no request is open. From ai-dynamo 1.3 on, polled on prefill workers before `cleanup`."""
        return self._num_open() == 0

    if HAS_DRAIN:

        async def drain(self) -> None:
            """Return when no request is open. ai-dynamo 1.2 calls it once, before `cleanup`; later ones never do."""
            while self._num_open():  # noqa: ASYNC110  (requests end on any thread; an Event belongs to one)
                await asyncio.sleep(_RECORD_INTERVAL_S)

    def conformance_probe(self) -> _Probe:
        """What requests hold, exactly, for the conformance suite (docs/conformance.md). Dynamo never calls it."""
        return _Probe(self)

    def _num_open(self) -> int:
        """
        Requests that somebody still waits for.

        Not all streams that exist: Dynamo may drop one without the interpreter's lock, and Python
        hears of it only when Dynamo's Rust side takes the lock the next time.
        """
        return sum(not (stream.is_cancelled or stream.is_stopped()) for stream in self._open.copy())

    def _build(self) -> Engine:
        if self._engine is None:
            engine = build_engine(self.settings, self._warn_unmeasured)
            self._planner = Planner(
                OutputTokens.from_model_path(self.model_path),
                engine.scheduler.max_model_len,
                engine.block_size,
                self.settings.default_osl,
                self.settings.seed,
                list_of_token_ids,
            )
            self._engine = engine
        return self._engine

    def _warn_unmeasured(self, load: StepLoad) -> None:
        logger.warning(
            "%s was not measured at this load (%d prefill tokens, %d decoding, %d context tokens): "
            "times outside the measured range follow the roofline. Said once.",
            self.settings.profile,
            load.num_tokens - load.decode_batch_size,
            load.decode_batch_size,
            load.context_tokens,
        )

    async def _next_tokens(self, stream: Stream) -> Any:
        try:
            return await stream.next_tokens()
        except RuntimeError as error:
            raise EngineShutdown(str(error)) from error

    def _close(
        self, request_id: str, stream: Stream, answers: list[Answer], finish_reason: str, arrival_unix_s: float
    ) -> None:
        """Synchronous, and safe on any thread: a dropped stream is finalized where it is dropped."""
        assert self._drive is not None
        self._drive.cancel(stream)
        self._open.pop(stream, None)
        recorder = self._recorder
        if recorder is not None and recorder.keeps_requests:
            for choice, sequence in enumerate(stream.sequences):
                is_whole = len(stream.sent_s[choice]) == len(answers[choice].token_ids)
                self._ended.append(
                    RequestRow(
                        request_id,
                        choice,
                        round(arrival_unix_s, 6),
                        round(stream.arrival_s, 6),
                        sequence.request.isl_tokens,
                        sequence.request.osl_tokens,
                        sequence.num_cached_tokens or 0,
                        sequence.num_preemptions,
                        answers[choice].finish_reason if is_whole else finish_reason,
                        [round(due_s, 6) for due_s in stream.due_s[choice]],
                        [round(sent_s, 6) for sent_s in stream.sent_s[choice]],
                    )
                )

    async def _record(self, recorder: Recorder, drive: RealTimeDrive) -> None:
        while True:
            self._write_records(recorder, drive)
            await asyncio.sleep(_RECORD_INTERVAL_S)

    def _write_records(self, recorder: Recorder, drive: RealTimeDrive) -> None:
        while self._ended:
            recorder.add_request(self._ended.popleft())
        scheduler = drive.core.scheduler
        recorder.add_state(
            TimelineRow(
                unix_s=time.time(),
                time_s=drive.now_s(),
                num_open_requests=self._num_open(),
                num_running=scheduler.num_running,
                num_waiting=drive.num_waiting,
                kv_used_blocks=scheduler.blocks.num_used,
                kv_cached_blocks=scheduler.blocks.num_cached,
                kv_total_blocks=scheduler.blocks.num_blocks,
                num_output_tokens=drive.num_output_tokens,
                num_preemptions=scheduler.num_preemptions,
                prefix_queries_tokens=scheduler.num_prefix_queries_tokens,
                prefix_hits_tokens=scheduler.num_prefix_hits_tokens,
                lateness_p50_s=drive.lateness.quantile_s(0.5),
                lateness_p99_s=drive.lateness.quantile_s(0.99),
                cpu_s=time.process_time(),
                num_tasks=len(asyncio.all_tasks()),
                num_threads=threading.active_count(),
            )
        )


class _Probe:
    """Reads counts that other threads may change meanwhile; each is right at some moment."""

    def __init__(self, engine: MockLLMEngine) -> None:
        self._engine = engine

    def in_use(self) -> dict[str, int]:
        engine = self._engine
        if engine._drive is None:
            return {}
        scheduler = engine._drive.core.scheduler
        return {
            "requests": len(engine._open),
            "streams": len(engine._drive.streams),
            "running": scheduler.num_running,
            "waiting": engine._drive.num_waiting,
            "kv_blocks": scheduler.blocks.num_used,
        }


def _usage(stream: Stream, num_sent: int) -> dict[str, Any]:
    """`completion_usage` of `num_sent` tokens over all choices; the prompt counts once."""
    first = stream.sequences[0]
    usage: dict[str, Any] = {
        "prompt_tokens": first.request.isl_tokens,
        "completion_tokens": num_sent,
        "total_tokens": first.request.isl_tokens + num_sent,
    }
    if first.num_cached_tokens is not None:
        usage["prompt_tokens_details"] = {"cached_tokens": first.num_cached_tokens}
    return {"completion_usage": usage}
