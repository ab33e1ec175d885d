"""
What a worker does with a request, by its role: all of it, the prompt, or what comes after the prompt.

    role = make_role(settings, engine)
    await role.start(drives, worker_id)
    answers, handoff = role.plan(planner, request_id, request)
    stream = role.submit(drive, answers, handoff, is_stopped)
    role.terminal_of(stream)            what its last chunk has besides
    role.let_go(stream)                 on any thread, however it has ended
    await role.stop()                   after the drives

A prefill worker's KV caches are kept until they are fetched (`kv_sender`), a decode worker fetches them (`kv_fetcher`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from mock_engine.drive_realtime import RealTimeDrive, Stream
from mock_engine.engine_settings import Engine
from mock_engine.errors import ConfigError
from mock_engine.handoff import Handoff, clamped, for_decode, for_prefill, is_for_decode_alone, is_probe
from mock_engine.kv_channel import TcpNetwork
from mock_engine.kv_fetcher import KvFetcher
from mock_engine.kv_sender import KvSender
from mock_engine.kv_transfer import transfer_s
from mock_engine.prompt import Answer, Planner
from mock_engine.realtime_clock import RealTimeClock
from mock_engine.sequence import SequenceState
from mock_engine.worker_settings import WorkerSettings

Plan = tuple[list[Answer], Handoff | None]


class AggregatedRole:
    """Does all of a request; the others do what they do not change in the same way."""

    async def start(self, drives: Sequence[RealTimeDrive], worker_id: int) -> None:
        """Be ready for requests to `drives`. Raises `ConfigError`."""

    async def stop(self) -> None:
        """Let go of everything. The drives have stopped. Safe twice, and before `start`."""

    def plan(self, planner: Planner, request_id: str, request: Mapping[str, Any]) -> Plan:
        """The answers, and where the KV cache of the prompt is. Raises `RequestError`."""
        return planner.plan(request_id, request), None

    def submit(
        self,
        drive: RealTimeDrive,
        answers: Sequence[Answer],
        handoff: Handoff | None,
        is_stopped: Callable[[], bool],
        delay_s: float = 0.0,
    ) -> Stream:
        """Queue what was planned, a fault's delay later. Raises `RequestError`."""
        del handoff
        return drive.submit([answer.request for answer in answers], is_stopped, delay_s)

    def terminal_of(self, stream: Stream) -> dict[str, Any]:
        """What the last chunk of a stream has besides; from now on the client may have it."""
        del stream
        return {}

    def let_go(self, stream: Stream) -> None:
        """The stream is over. Synchronous, and safe on any thread."""

    @property
    def num_transfers(self) -> int:
        """KV caches that are not where they should go."""
        return 0


class PrefillRole(AggregatedRole):
    """Computes prompts, and keeps their KV caches until they are fetched."""

    def __init__(self, settings: WorkerSettings, engine: Engine) -> None:
        self._settings = settings
        self._seconds_of = partial(transfer_s, profile=engine.profile, bandwidth=settings.kv_transfer_bandwidth)
        self.senders: dict[RealTimeDrive, KvSender] = {}
        self._handles: dict[Stream, int] = {}  # kept, and not yet handed to the client
        self._worker_id = 0

    async def start(self, drives: Sequence[RealTimeDrive], worker_id: int) -> None:
        self._worker_id = worker_id
        for drive in drives:
            host, timeout_s = self._settings.kv_transfer_host, self._settings.kv_transfer_timeout
            sender = KvSender(drive, self._seconds_of, host, timeout_s, RealTimeClock(), TcpNetwork())
            self.senders[drive] = sender
            drive.on_kept = self._keep
            try:
                await sender.start()
            except OSError as error:
                raise ConfigError(
                    f"cannot listen on --kv-transfer-host {host}: {error.strerror or error}. "
                    f"Name an address of this machine that decode workers can reach."
                ) from error

    async def stop(self) -> None:
        for sender in self.senders.values():
            await sender.stop()

    def plan(self, planner: Planner, request_id: str, request: Mapping[str, Any]) -> Plan:
        if is_probe(request):
            return super().plan(planner, request_id, request)
        return for_prefill(planner.plan(request_id, clamped(request))), None

    def terminal_of(self, stream: Stream) -> dict[str, Any]:
        handle = self._handles.pop(stream, None)
        if handle is None:
            return {}
        (sequence,) = stream.sequences
        sender = self.senders[stream.drive]
        handoff = Handoff(
            worker_id=self._worker_id,
            handle=handle,
            host=sender.host,
            port=sender.port,
            num_tokens=sequence.request.isl_tokens,
            num_blocks=sequence.table.num_blocks,
            num_cached_tokens=sequence.num_cached_tokens or 0,
        )
        return {"disaggregated_params": handoff.to_params()}

    def let_go(self, stream: Stream) -> None:
        stream.is_let_go = True  # before the look: its last step may be ending now, on another thread
        handle = self._handles.pop(stream, None)
        if handle is not None:
            self.senders[stream.drive].withdraw(handle)

    @property
    def num_transfers(self) -> int:
        return sum(sender.num_open for sender in self.senders.values())

    def _keep(self, stream: Stream, sequence: SequenceState) -> None:
        self._handles[stream] = self.senders[stream.drive].offer(sequence)
        if stream.is_let_go:
            self.let_go(stream)


class DecodeRole(AggregatedRole):
    """Makes output tokens of prompts whose KV caches it fetches."""

    def __init__(self) -> None:
        self.fetchers: dict[RealTimeDrive, KvFetcher] = {}

    async def start(self, drives: Sequence[RealTimeDrive], worker_id: int) -> None:
        del worker_id
        self.fetchers.update((drive, KvFetcher(drive, TcpNetwork())) for drive in drives)

    async def stop(self) -> None:
        for fetcher in self.fetchers.values():
            await fetcher.stop()

    def plan(self, planner: Planner, request_id: str, request: Mapping[str, Any]) -> Plan:
        answers, _ = super().plan(planner, request_id, request)
        if is_probe(request) or is_for_decode_alone(request):
            return answers, None
        handoff = Handoff.of_request(request, answers[0].request.isl_tokens)
        return for_decode(answers), handoff

    def submit(
        self,
        drive: RealTimeDrive,
        answers: Sequence[Answer],
        handoff: Handoff | None,
        is_stopped: Callable[[], bool],
        delay_s: float = 0.0,
    ) -> Stream:
        if handoff is None:
            return super().submit(drive, answers, handoff, is_stopped, delay_s)
        stream = drive.prepare([answer.request for answer in answers], is_stopped)
        drive.after_delay(stream, delay_s, partial(self.fetchers[drive].fetch, handoff=handoff))
        return stream

    @property
    def num_transfers(self) -> int:
        return sum(fetcher.num_open for fetcher in self.fetchers.values())


def make_role(settings: WorkerSettings, engine: Engine) -> AggregatedRole:
    """What `--disaggregation-mode` says."""
    if settings.disaggregation_mode == "prefill":
        return PrefillRole(settings, engine)
    return DecodeRole() if settings.disaggregation_mode == "decode" else AggregatedRole()
