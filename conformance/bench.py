"""
The engine on the bench: what a check gets to work with.

    transcript = await bench.answer(request)          a whole answer; anything else is a violation
    stream = await bench.open(request, stop_after=2)  a request under way
    engine = await bench.make()                       another engine, not started

A started engine is kept from example to example, and replaced after a broken
one. All streams and engines of an example end with it.

With the worker driver the started engine is in Dynamo's worker, in a process of
its own: `bench.engine` and `bench.engine_config` are None, and time is real.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import sys
import time
import warnings
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, TypeVar

from hypothesis.errors import StopTest, UnsatisfiedAssumption

from conformance import release
from conformance.context import RequestContext
from conformance.facts import Facts, config_numbers
from conformance.runner_errors import NotHere
from conformance.settings import SuiteSettings
from conformance.streams import DriverName, Stream
from conformance.transcript import Transcript, Violation, expect
from conformance.virtual_loop import VirtualLoop
from conformance.worker_conversation import WorkerConversation
from conformance.worker_driver import START_LIMIT_S, WorkerDriver, WorkerError

T = TypeVar("T")
Draw = Callable[..., Any]

CANCEL_WITHIN_S = 2.0  # Dynamo's own test kit (lib/backend-common, check_cancellation)
_QUICK_START_S = 0.25  # an engine in this process that starts faster is a new one for every rule
WORKER_ID = 7587892345678901234  # a u64, as the runtime hands out


class EngineBroken(Violation):
    """The engine could not be brought to the point where the rule can be looked at."""


class Bench:
    """One engine class with its arguments, and everything of the example that runs now."""

    def __init__(self, settings: SuiteSettings, facts: Facts) -> None:
        self.settings = settings
        self.facts = facts
        self.engine_class = settings.engine_class()
        self.argv = facts.argv
        self.engine: Any = None
        self.engine_config: Any = None
        self.transcripts: list[Transcript] = []
        self.contexts: list[RequestContext] = []
        self.unraisable: list[str] = []
        self.log_records: list[logging.LogRecord] = []
        self.never_awaited: list[str] = []
        self._runner: asyncio.Runner | None = None
        self._streams: list[Stream] = []
        self._made: list[Any] = []
        self._peer: Any = None  # for the decode role: an engine of the same class in the prefill role
        self._num_requests = 0
        self._worker: WorkerDriver | None = None
        self._worker_problem = ""  # why the worker did not start; it is not tried again

    # The loop.

    @property
    def is_virtual(self) -> bool:
        return self.facts.clock == "virtual"

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run on the bench's loop, which lives as long as its engine."""
        if self._runner is None:
            self._runner = asyncio.Runner(loop_factory=VirtualLoop if self.is_virtual else None)
        return self._runner.run(coroutine)

    # Engines.

    async def make(self, argv: list[str] | None = None) -> Any:
        """Another engine, not started, with the run's arguments. It is cleaned up when the example ends."""
        engine, _ = await self.engine_class.from_args(list(self.argv if argv is None else argv))
        self._made.append(engine)
        return engine

    async def make_started(self, argv: list[str] | None = None) -> Any:
        """Another engine, started."""
        engine = await self.make(argv)
        await engine.start(WORKER_ID)
        return engine

    async def ensure_engine(self) -> None:
        """A started engine on the bench. Raises EngineBroken if it does not start."""
        if self.is_in_worker:
            await self._ensure_worker()
            return
        if self.engine is not None:
            return
        try:
            engine, _ = await self.engine_class.from_args(list(self.argv))
            self.engine_config = await engine.start(WORKER_ID)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            raise EngineBroken(f"the engine does not start: {type(error).__name__}: {error}") from None
        self.engine = engine

    @property
    def is_in_worker(self) -> bool:
        """Whether the engine is in another process."""
        return self.settings.driver == "worker"

    async def _ensure_worker(self) -> None:
        if self._worker is not None and not self._worker.is_alive:
            await self._worker.close()
            self._worker = None
        if self._worker is not None:
            return
        if self._worker_problem:
            raise EngineBroken(self._worker_problem)
        worker = WorkerDriver(self.settings.engine, self.facts.argv)
        try:
            await worker.start(START_LIMIT_S + 3 * self.facts.start_s)
        except WorkerError as error:
            self._worker_problem = f"Dynamo's worker does not start: {error}"
            raise EngineBroken(self._worker_problem) from None
        self._worker = worker

    async def _ensure_peer(self) -> Any:
        if self._peer is None and self.facts.prefill_argv is not None:
            self._peer, _ = await self.engine_class.from_args(list(self.facts.prefill_argv))
            await self._peer.start(WORKER_ID + 1)
        return self._peer

    # Requests.

    @property
    def cancel_within_s(self) -> float:
        """How long a cancelled stream may go on, in the loop's time."""
        return CANCEL_WITHIN_S if self.is_virtual else CANCEL_WITHIN_S + 4 * self.facts.gap_s

    def answer_within_s(self, num_tokens: int = 64) -> float:
        """How long an answer may take before it counts as hung, in the loop's time."""
        expected_s = self.facts.first_chunk_s + num_tokens * self.facts.gap_s
        return 60 + 20 * expected_s if self.is_virtual else 10 + 10 * expected_s

    def next_id(self) -> str:
        self._num_requests += 1
        return f"request-{self._num_requests}"

    def context(self, request_id: str | None = None) -> RequestContext:
        """A context as the worker makes one for each request."""
        context = RequestContext(request_id or self.next_id())
        self.contexts.append(context)
        return context

    async def prepared(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """The request as this role gets it: after a prefill or encode worker, where there is one before it."""
        facts = self.facts
        if facts.role == "decode" and request.get("prefill_result") is None:
            return {**request, "prefill_result": await self._prefilled(request)}
        if facts.role == "encode" and request.get("multi_modal_data") is None:
            return {**request, "multi_modal_data": {"image_url": [{"Url": "data:image/png;base64,iVBORw0KGgo="}]}}
        return request

    async def _prefilled(self, request: Mapping[str, Any]) -> dict[str, Any]:
        peer = await self._ensure_peer()
        params: Any = {"handle": "none"}
        if peer is not None:
            stream = Stream(self.settings.driver, peer, copy.deepcopy(request), self.next_id(), context=None)
            chunk = (await stream.finish(self.answer_within_s())).last
            params = chunk.get("disaggregated_params", params)
        return {"disaggregated_params": params, "prompt_tokens_details": None}

    async def open(
        self,
        request: Mapping[str, Any],
        *,
        engine: Any = None,
        request_id: str | None = None,
        as_is: bool = False,
        driver: DriverName | None = None,
        **places: Any,
    ) -> Stream:
        """
        Begin a request; it is read in the background. `places`: see `Stream`.

        `as_is`: the request exactly as given, without what the role adds. `driver`: another than the run's.
        """
        if not as_is:
            request = await self.prepared(request)
        stream: Stream
        if self.is_in_worker and engine is None and driver in (None, "worker"):
            stream = self._open_in_worker(request, request_id, **places)
        else:
            stream = self._open_here(request, engine, request_id, driver, **places)
        self._streams.append(stream)
        self.transcripts.append(stream.transcript)
        return stream

    def _open_in_worker(self, request: Mapping[str, Any], request_id: str | None, **places: Any) -> WorkerConversation:
        assert self._worker is not None, "needs_engine is False, and a request goes to the engine on the bench"
        return WorkerConversation(self._worker, request, request_id or self.next_id(), **places)

    def _open_here(
        self,
        request: Mapping[str, Any],
        engine: Any,
        request_id: str | None,
        driver: DriverName | None,
        **places: Any,
    ) -> Stream:
        if driver is None:
            driver = "bridge" if self.is_in_worker else self.settings.driver
        context = self.context(request_id)
        engine = self.engine if engine is None else engine
        return Stream(driver, engine, request, context.id(), context=context, **places)

    async def talk(self, request: Mapping[str, Any], *, within_s: float | None = None, **places: Any) -> Transcript:
        """Open a request and read it to its end, whatever that is. A stream that never ends is a violation."""
        stream = await self.open(request, **places)
        transcript = await stream.finish(self.answer_within_s() if within_s is None else within_s)
        expect(
            not transcript.is_hung,
            "the stream never ended",
            transcript,
            shows="'TimeoutError' not in str(chunks[-1:])",
        )
        return transcript

    async def answer(self, request: Mapping[str, Any], **places: Any) -> Transcript:
        """A whole answer to a request that every engine must serve; an error is a violation."""
        transcript = await self.talk(request, **places)
        error = transcript.error or transcript.refusal
        if error is not None:
            raise Violation(
                f"a valid request was answered with {type(error).__name__}: {error}",
                [transcript],
                shows="'raised' not in chunks[-1]",
            )
        return transcript

    async def let_pass(self, seconds: float) -> None:
        """Let that much of the loop's time pass."""
        await asyncio.sleep(seconds)

    async def let_threads_run(self, is_done: Callable[[], bool], patience_s: float = 1.0) -> bool:
        """Give other threads real time until `is_done`; whether it is."""
        end_s = time.monotonic() + patience_s
        while not is_done():
            if time.monotonic() > end_s:
                return False
            await asyncio.sleep(0)
            time.sleep(0.002)  # noqa: ASYNC251  (the loop's own time may be virtual)
        return True

    # Examples.

    def run_example(self, check: Callable[..., Coroutine[Any, Any, None]], draw: Draw, *, needs_engine: bool) -> None:
        """One example of a check, from nothing open to nothing open. Raises what the check raises."""
        self.begin_example()
        is_broken = True
        try:
            self.run(self._example(check, draw, needs_engine))
            is_broken = False
        except (UnsatisfiedAssumption, StopTest, NotHere):  # nothing was found; Hypothesis draws another, or we stop
            is_broken = False
            raise
        finally:
            self.end_example(is_broken=is_broken)

    async def _example(self, check: Callable[..., Coroutine[Any, Any, None]], draw: Draw, needs_engine: bool) -> None:
        if needs_engine:
            await self.ensure_engine()
        await check(self, draw)

    def begin_example(self) -> None:
        self.transcripts, self.contexts = [], []
        self.unraisable, self.log_records, self.never_awaited = [], [], []
        self._handler = _Keep(self.log_records)
        logging.getLogger().addHandler(self._handler)
        self._hook, sys.unraisablehook = sys.unraisablehook, self._keep_unraisable
        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()
        warnings.simplefilter("default")
        warnings.showwarning = self._keep_warning

    def end_example(self, *, is_broken: bool) -> None:
        """End everything of this example; throw the engine away if it broke a rule."""
        try:
            if self._runner is not None:
                self.run(self._end_streams())
                if is_broken:
                    self.close()
        finally:
            self._warnings.__exit__(None, None, None)
            sys.unraisablehook = self._hook
            logging.getLogger().removeHandler(self._handler)

    async def _end_streams(self) -> None:
        streams, self._streams = self._streams, []
        for stream in streams:
            if not stream.is_over:
                stream.context.stop_generating()
        for stream in streams:
            if not stream.is_over:
                await stream.finish(self.cancel_within_s)
        made, self._made = self._made, []
        for engine in made:
            await self._clean(engine)

    async def _clean(self, engine: Any) -> None:
        try:
            async with asyncio.timeout(self.answer_within_s()):
                await engine.cleanup()
        except Exception:  # that is for the rules of `life` to say
            return

    def renew(self) -> None:
        """Between two rules: a new engine, where that costs next to nothing. A worker is kept."""
        if not self.is_in_worker and self.facts.start_s < _QUICK_START_S:
            self.close()

    def close(self) -> None:
        """Clean up the kept engines, end the worker, and close the loop."""
        if self._runner is None:
            return
        worker, self._worker = self._worker, None
        kept = [engine for engine in (self.engine, self._peer) if engine is not None]
        self.engine = self.engine_config = self._peer = None
        try:
            for engine in kept:
                self.run(self._clean(engine))
            if worker is not None:
                self.run(worker.close())
        finally:
            self._runner.close()
            self._runner = None

    def _keep_unraisable(self, unraisable: Any) -> None:
        error = unraisable.exc_value
        self.unraisable.append(f"{unraisable.err_msg or 'Exception ignored in'}: {type(error).__name__}: {error}")

    def _keep_warning(self, message: Any, category: Any, *_: Any, **__: Any) -> None:
        if issubclass(category, RuntimeWarning) and "never awaited" in str(message):
            self.never_awaited.append(str(message))

    # What the engine says of itself.

    @property
    def numbers(self) -> dict[str, Any]:
        """context_length, kv_cache_block_size ... as the started engine advertises them; None where it does not."""
        return dict(self.facts.numbers) if self.is_in_worker else config_numbers(self.engine_config)

    def has_release(self, name: str) -> bool:
        return release.is_at_least(name)


class _Keep(logging.Handler):
    """Warnings and worse."""

    def __init__(self, records: list[logging.LogRecord]) -> None:
        super().__init__(logging.WARNING)
        self._records = records

    def emit(self, record: logging.LogRecord) -> None:
        self._records.append(record)
