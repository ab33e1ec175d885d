"""
A request to an engine inside Dynamo's real worker, with the interface of `streams.Stream`.

    stream = WorkerConversation(driver, request, "r1", stop_after=2)
    transcript = await stream.finish(within_s=2.0)

The transcript has what the engine said to the real bridge, what the client did, and of what the client saw only the
errors that the engine did not raise: "refused", where the bridge would not take a chunk, and that of a dead worker.

Observed on ai-dynamo 1.2.1, 1.4.2 and 1.6.1:

* When a client stops, its own stream ends at once. Within 1 ms the engine's context is stopped and `abort` called.
  The bridge reads on, to the terminal chunk if that is one of the next two; with the second chunk that is none it
  lets go ("gone").
* When a client leaves, the bridge notices with the engine's next chunk, and then does the same.
* After a terminal chunk the bridge reads once more, as a rule, and throws away what comes.
* A request that does not parse as a `PreprocessedRequest` (n is -1, say) never comes to the engine, nor does an
  answer to the client: `finish` raises NotHere. What parses is completed, and its unknown keys are gone.
"""

from __future__ import annotations

import asyncio
import json
from bisect import insort
from collections.abc import Mapping
from typing import Any

from conformance.context import RequestContext
from conformance.runner_errors import NotHere
from conformance.streams import Stream
from conformance.transcript import Event, Transcript
from conformance.wire import wire_request
from conformance.worker_driver import WorkerDriver, WorkerStream
from conformance.worker_records import Record

_ARRIVES_WITHIN_S = 1.0  # from the client to the engine; 1 ms as a rule
_ORDINARY = wire_request([1], max_tokens=1)


class BridgeError(Exception):
    """What the client got instead of an answer, where the engine itself raised nothing."""


class WorkerConversation(Stream):
    """One request under way. Everything that happens is in `transcript`."""

    def __init__(
        self,
        driver: WorkerDriver,
        request: Mapping[str, Any],
        request_id: str,
        *,
        stop_after: int | None = None,
        drop_after: int | None = None,
        aborts: bool = False,
        reads_on: bool = False,
    ) -> None:
        """
        Send it at once. Raises NotHere if no client can send such a request.

        `stop_after`, `drop_after`: the client does so when it has that many chunks; the engine may be ahead of it.
        `aborts`: the bridge always does. `reads_on`: write down what comes after the terminal chunk too.
        """
        try:
            json.dumps(request, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise NotHere(f"no Dynamo client sends such a request ({error}); --engine-driver bridge does") from None
        self._worker = driver
        self._sent = driver.open(request, request_id=request_id, stop_after=stop_after, drop_after=drop_after)
        context = _ClientContext(request_id, self._sent)
        super().__init__("worker", None, request, request_id, aborts=aborts, reads_on=reads_on, context=context)
        self._opened_s = self._sent.opened_s
        self._num_events_taken = self._num_records_taken = 0
        self._has_begun = self._is_over_for_engine = self._is_lost = self._is_refused = False
        self._client_error: Event | None = None
        self._gone_s = 0.0

    # What a client does.

    def stop(self) -> None:
        """Want no more tokens. The bridge tells the engine: it stops the context, and calls `abort`."""
        self.note("stop")
        self.context.stop_generating()

    async def abort(self) -> None:
        """The same; a client knows no other way."""
        self.note("abort")
        self.context.stop_generating()

    def kill(self) -> None:
        raise NotHere("a Dynamo client can stop and leave; it cannot kill")

    def cancel_step(self) -> bool:
        raise NotHere("the engine's tasks are in the worker's process; --engine-driver bridge cancels them")

    async def drop(self) -> None:
        """Leave. The bridge notices with the engine's next chunk. Returns without waiting."""
        self.note("drop")
        self._sent.leave()

    async def finish(self, within_s: float) -> Transcript:
        transcript = await super().finish(within_s)
        self._pump_task.result()
        if self._is_refused:
            raise NotHere(
                "a Dynamo worker takes no such request: it never comes to the engine; --engine-driver bridge sends it"
            )
        return transcript

    # What comes of it.

    async def _pump(self) -> None:
        try:
            await self._arrive()
            while not (self._is_refused or self._is_over_for_both()):
                await self._sent.wait_news()
                self._take()
            await self._end()
        except asyncio.CancelledError:  # it hangs
            self.context.stop_generating()

    async def _arrive(self) -> None:
        """Until the engine has the request, or the client an answer, or it is clear that neither will be."""
        if await self._comes_soon(self._sent):
            return
        # Is it this request, or does the worker take none at all?
        other = self._worker.open(_ORDINARY)
        is_served = await self._comes_soon(other) and bool(other.said)
        self._is_refused = is_served and not (self._sent.said or self._sent.is_over)
        other.stop()

    async def _comes_soon(self, sent: WorkerStream) -> bool:
        try:
            async with asyncio.timeout(_ARRIVES_WITHIN_S):
                while not sent.said:
                    await sent.wait_news()
        except TimeoutError:
            return sent.is_over  # it never came there, and the client knows; it may hear of an answer before we do
        return True

    def _is_over_for_both(self) -> bool:
        self._take()
        return self._sent.is_over and (self._is_over_for_engine or not self._has_begun)

    def _take(self) -> None:
        """Write down what is new."""
        records, events = self._sent.said[self._num_records_taken :], self._sent.events[self._num_events_taken :]
        self._num_records_taken += len(records)
        self._num_events_taken += len(events)
        for event in events:
            self._take_event(Event(*event))
        for record in records:
            self._take_record(record, record.time_s - self._opened_s)
        self._progress.set()

    def _take_event(self, event: Event) -> None:
        """Of the client: what it did by itself; its chunks are those that the engine said."""
        if event.kind == "error":
            self._client_error = event
        elif event.kind in ("stop", "drop") and not self.transcript.of_kind("stop", "abort", "drop"):
            self._put(event)

    def _take_record(self, record: Record, time_s: float) -> None:
        """Of the engine."""
        self._has_begun = True
        if record.kind in ("gone", "lost"):
            self._gone_s, self._is_lost, self._is_over_for_engine = time_s, record.kind == "lost", True
        elif record.kind in ("chunk", "end", "error") and not self._is_over_for_engine:
            self._put(Event(time_s, record.kind, record.value))
            self._num_chunks += record.kind == "chunk"
            if self.transcript.terminals and not self._reads_on:
                self._put(Event(time_s, "end"))  # as far as anybody is told
            self._is_over_for_engine = bool(self.transcript.of_kind("end", "error"))
        if not record.is_stopped:
            self._put_stops_after(time_s)

    def _put(self, event: Event) -> None:
        insort(self.transcript.events, event, key=lambda event: event.time_s)

    def _put_stops_after(self, time_s: float) -> None:
        """The engine could not know of them at `time_s`: the client's stop was on its way."""
        events = self.transcript.events
        for stop in [event for event in events if event.kind in ("stop", "abort") and event.time_s < time_s]:
            events.remove(stop)
            self._put(Event(time_s, stop.kind))

    async def _end(self) -> None:
        """What is left to say when nothing more will come."""
        transcript = self.transcript
        error = self._client_error
        if error is not None and transcript.error is None:
            text = str(error.value)
            if self._is_lost or not self._has_begun:
                await self._worker.wait_ended()
            if not self._worker.is_alive:
                text += f"; the worker's exit code is {self._worker.exit_code}; its log ends with:\n"
                text += self._worker.log_tail()
            is_refused = self._has_begun and not self._is_lost
            self._put(Event(error.time_s, "refused" if is_refused else "error", BridgeError(text)))
        elif not self._is_refused and not transcript.of_kind("end", "error", "drop"):
            self._put(Event(max([self._gone_s, *(event.time_s for event in transcript.events)]), "gone"))


class _ClientContext(RequestContext):
    """The client's end of it."""

    def __init__(self, request_id: str, sent: WorkerStream) -> None:
        super().__init__(request_id)
        self._sent = sent

    def stop_generating(self) -> None:
        super().stop_generating()
        self._sent.stop()
