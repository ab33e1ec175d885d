"""
How a request comes in: its adapter is loaded, its answer planned, a rank and its faults chosen, and it is queued.

    admission = Admission(settings, engines, drives, role, faults, open_requests)
    live = await admission.admit(request, context)
    admission.stop()                 before the drives; `close` after them
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NoReturn

from mock_engine.content import Content
from mock_engine.drive_realtime import RealTimeDrive, Stream
from mock_engine.dynamo_release import ERROR_TYPES, EngineShutdown, InvalidArgument, list_of_token_ids
from mock_engine.engine_settings import Engine
from mock_engine.errors import RequestError
from mock_engine.fault_injector import FaultInjector, RequestFault
from mock_engine.handoff import is_probe
from mock_engine.live_request import LiveRequest
from mock_engine.lora import Adapters, parse_lora_modules
from mock_engine.output_tokens import OutputTokens
from mock_engine.prompt import Planner
from mock_engine.rank_choice import choose_rank
from mock_engine.worker_roles import AggregatedRole
from mock_engine.worker_settings import WorkerSettings

_POLL_S = 0.02  # how often a request looks whether its LoRA adapter has room


class Admission:
    """
    See the module. Raises `ConfigError` for a model folder that cannot be used.

    `drives` may be filled later; `open_requests` are those that have been admitted and not closed, which others keep.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        engines: Sequence[Engine],
        drives: Sequence[RealTimeDrive],
        role: AggregatedRole,
        faults: FaultInjector,
        open_requests: Mapping[Stream, LiveRequest],
    ) -> None:
        self._drives = drives
        self._role = role
        self._faults = faults
        self._open = open_requests
        self._is_stopped = False
        self._adapters = Adapters(parse_lora_modules(settings.lora_modules), settings.max_loras)
        self._admitting: Counter[str] = Counter()  # adapters of requests that are loaded and not queued yet
        self._planning = ThreadPoolExecutor(1, "mock-engine-plan")  # a thread comes with the first slow request
        words = OutputTokens.from_model_path(settings.model_path)
        self.probe_token_id = words.word_ids[0]
        self._planner = Planner(
            words,
            engines[0].scheduler.max_model_len,
            engines[0].block_size,
            settings.engine.default_osl,
            settings.engine.seed,
            list_of_token_ids,
            Content.from_model_path(settings.model_path, words, settings.content),
        )

    def stop(self) -> None:
        """From now on nobody is admitted, not even those whose answers are being planned."""
        self._is_stopped = True

    def close(self) -> None:
        """End the thread. What is planned now takes milliseconds, and finds that nobody is admitted. Safe twice."""
        self._planning.shutdown()

    async def admit(self, request: Mapping[str, Any], context: Any) -> LiveRequest:
        """The request, queued. Raises `InvalidArgument`, `EngineShutdown`, or what a fault says."""
        try:
            return await self._admit(request, context)
        except RequestError as error:
            raise InvalidArgument(str(error)) from error
        except RuntimeError as error:
            raise EngineShutdown(str(error)) from error

    async def _admit(self, request: Mapping[str, Any], context: Any) -> LiveRequest:
        adapter = await self._load_adapter(request, context)
        if adapter is None:
            return await self._queue(request, context, None)
        self._admitting[adapter] += 1
        try:
            routing = {**(request.get("routing") or {}), "lora_name": adapter}
            return await self._queue({**request, "routing": routing}, context, adapter)
        finally:
            self._admitting[adapter] -= 1

    async def _queue(self, request: Mapping[str, Any], context: Any, adapter: str | None) -> LiveRequest:
        self._check_running()
        plan = partial(self._role.plan, self._planner, context.id(), request)
        if Planner.is_slow(request):
            answers, handoff = await asyncio.get_running_loop().run_in_executor(self._planning, plan)
            self._check_running()
        else:
            answers, handoff = plan()
        drive = self._drives[choose_rank(request, self._drives)]
        fault = None if self._faults.is_empty else self._faults.admit(drive.now_s(), drive.dp_rank)
        if fault is not None and fault.error is not None and not fault.error.tokens:
            raise_fault(fault)
        delay_s = 0.0 if fault is None else fault.delay_s
        stream = self._role.submit(drive, answers, handoff, context.is_stopped, delay_s)
        return LiveRequest(
            context.id(),
            answers,
            stream,
            None if handoff is None else handoff.num_cached_tokens,
            (request.get("stop_conditions") or {}).get("max_tokens"),
            is_probe(request),
            fault,
            adapter,
        )

    def _check_running(self) -> None:
        if self._is_stopped:
            raise EngineShutdown("the engine is not running")

    async def _load_adapter(self, request: Mapping[str, Any], context: Any) -> str | None:
        """The LoRA adapter that a request needs, once it is loaded, or the client has gone. None: the base model."""
        name = self._adapters.name_in(request)
        drive = self._drives[0]
        while name is not None and drive.speedup_ratio and not (context.is_stopped() or self._is_stopped):
            in_use = {live.adapter for live in tuple(self._open.values()) if live.adapter is not None}
            wait_s = self._adapters.wait_s(name, drive.now_s(), in_use | set(+self._admitting))
            if wait_s == 0:
                break
            await asyncio.sleep(_POLL_S if wait_s is None else min(_POLL_S, drive.real_s(wait_s)))
        return name


def raise_fault(fault: RequestFault) -> NoReturn:
    """Raise the error that a fault says."""
    assert fault.error is not None
    raise ERROR_TYPES[fault.error.type](fault.error.message)
