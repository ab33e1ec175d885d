"""
A correct toy engine for every role, small enough to be broken in one place at a time.

    pytest --engine=conformance.selftest.toy:ToyEngine --engine-args "--kv-events --metrics --logprobs --controls"

It counts slots and KV blocks as a real engine does, in the loop's own time.
Each step of a request's life is a method of its own, so that a broken engine
(`conformance.selftest.mutants`) overrides one.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import logging
import sys
import threading
from array import array
from collections import Counter, deque
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

from conformance.release import backend, disaggregation_modes, submodule

if TYPE_CHECKING:
    LLMEngine = Any
else:
    LLMEngine = backend().LLMEngine

logger = logging.getLogger(__name__)

BLOCK_SIZE = 4
CONTEXT_LENGTH = 96
VOCABULARY = 1000
NUM_BLOCKS = 200
MAX_LOGPROBS = 5
_POLL_S = 0.05


def invalid_argument(message: str) -> Exception:
    """Dynamo's typed error for what the client did wrong."""
    error: Exception = import_module("dynamo.llm.exceptions").InvalidArgument(message)
    return error


def engine_shutdown(message: str) -> Exception:
    """Dynamo's typed error for an engine that is not there."""
    error: Exception = import_module("dynamo.llm.exceptions").EngineShutdown(message)
    return error


@dataclass(eq=False)
class Work:
    """One request inside the engine."""

    request_id: str
    prompt: list[int]
    max_tokens: int
    min_tokens: int = 0
    stop_ids: frozenset[int] = frozenset()
    seed: int = 0
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    output: list[int] = field(default_factory=list)
    has_slot: bool = False
    is_aborted: bool = False
    is_released: bool = False
    block_hashes: list[int] = field(default_factory=list)


class Blocks:
    """KV blocks by content, counted by how many requests use them; tells a publisher what it stores and removes."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.users: Counter[int] = Counter()
        self.publisher: Any = None

    def hashes_of(self, token_ids: Sequence[int]) -> list[int]:
        """One signed 64-bit hash a full block, each of all tokens up to its end."""
        hashes = []
        digest = hashlib.blake2b(digest_size=8)
        for i in range(len(token_ids) // BLOCK_SIZE):
            digest.update(repr(token_ids[i * BLOCK_SIZE : (i + 1) * BLOCK_SIZE]).encode())
            hashes.append(int.from_bytes(digest.digest(), "little", signed=True))
        return hashes

    def take(self, token_ids: Sequence[int]) -> list[int]:
        """Use the full blocks of these tokens; those that are new are stored."""
        hashes = self.hashes_of(token_ids)
        new = [i for i, block in enumerate(hashes) if not self.users[block]]
        self.users.update(hashes)
        if new:
            self.publish_stored(token_ids, hashes, new[0])
        return hashes

    def publish_stored(self, token_ids: Sequence[int], hashes: list[int], first: int) -> None:
        if self.publisher is not None:
            self.publisher.publish_stored(
                token_ids=list(token_ids[first * BLOCK_SIZE : len(hashes) * BLOCK_SIZE]),
                num_block_tokens=[BLOCK_SIZE] * (len(hashes) - first),
                block_hashes=hashes[first:],
                parent_hash=hashes[first - 1] if first else None,
            )

    def give_back(self, hashes: Sequence[int]) -> None:
        """The last user of a block removes it; deepest first, so that no stored block loses its parent."""
        gone = []
        for block in reversed(hashes):
            self.users[block] -= 1
            if not self.users[block]:
                del self.users[block]
                gone.append(block)
        if gone:
            self.publish_removed(gone)

    def publish_removed(self, hashes: list[int]) -> None:
        if self.publisher is not None:
            self.publisher.publish_removed(block_hashes=hashes)


class ToyProbe:
    """See `conformance.resources.Probe` and `FaultProbe`."""

    def __init__(self, engine: ToyEngine) -> None:
        self._engine = engine

    def in_use(self) -> dict[str, int]:
        engine = self._engine
        return {
            "requests": len(engine.open),
            "slots": engine.num_slots_used,
            "waiting": len(engine.queue),
            "kv_blocks": sum(engine.blocks.users.values()),
            "transfers": len(engine.transfers),
        }

    def fault_points(self) -> list[str]:
        return ["start.begin", "start.end", "request", "request.step"]

    def inject(self, point: str) -> None:
        self._engine.faults.append(point)


class ToyEngine(LLMEngine):  # type: ignore[misc]
    """A correct `LLMEngine`, ai-dynamo 1.2.1 to 1.6.1."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.role: str = options.disaggregation_mode
        self.lock = threading.RLock()  # a stream is dropped on any thread
        self.loop: asyncio.AbstractEventLoop | None = None
        self.is_running = False
        self.open: dict[str, list[Work]] = {}
        self.queue: deque[tuple[Work, asyncio.Future[None]]] = deque()
        self.num_slots_used = 0
        self.blocks = Blocks(NUM_BLOCKS)
        self.transfers: set[str] = set()
        self.requests_by_rank = [0] * options.data_parallel_size  # all that is done for a rank: it has no cache
        self.snapshots: Any = None
        self.is_asleep = False
        self.is_profiling = False
        self.faults: list[str] = []
        self.steps_task: asyncio.Task[None] | None = None
        self.logits_spec: Any = None

    @classmethod
    def parser(cls) -> argparse.ArgumentParser:
        parser = argparse.ArgumentParser(prog="toy", allow_abbrev=False)
        parser.add_argument("--disaggregation-mode", choices=sorted(disaggregation_modes()), default="agg")
        parser.add_argument("--route-to-encoder", action="store_true")
        parser.add_argument("--max-num-seqs", type=int, default=4)
        parser.add_argument("--data-parallel-size", type=int, default=1)
        parser.add_argument("--step-s", type=float, default=0.01, help="the loop's seconds for one token")
        parser.add_argument("--kv-events", action="store_true")
        parser.add_argument("--metrics", action="store_true")
        parser.add_argument("--logprobs", action="store_true")
        parser.add_argument("--controls", action="store_true")
        parser.add_argument("--logits", action="store_true")
        return parser

    @classmethod
    async def from_args(cls, argv: list[str] | None = None) -> tuple[Any, Any]:
        options = cls.parser().parse_args(argv)
        return cls(options), cls.worker_config(options)

    @classmethod
    def worker_config(cls, options: argparse.Namespace) -> Any:
        config = backend().WorkerConfig(namespace="toy", component=options.disaggregation_mode)
        config.disaggregation_mode = disaggregation_modes()[options.disaggregation_mode]
        if options.route_to_encoder:
            config.route_to_encoder = True
        return config

    # Life.

    async def start(self, worker_id: int) -> Any:
        del worker_id
        self.reach("start.begin")
        self.loop = asyncio.get_running_loop()
        self.steps_task = self.loop.create_task(self.background(), name="toy-background")
        self.logits_spec = self.make_logits_spec()
        self.reach("start.end")
        self.is_running = True
        return self.engine_config()

    def engine_config(self) -> Any:
        numbers: dict[str, Any] = {
            "context_length": CONTEXT_LENGTH,
            "kv_cache_block_size": BLOCK_SIZE,
            "total_kv_blocks": NUM_BLOCKS,
            "max_num_seqs": self.options.max_num_seqs,
            "max_num_batched_tokens": CONTEXT_LENGTH,
        }
        if self.options.data_parallel_size > 1:
            numbers["data_parallel_size"] = self.options.data_parallel_size
        module = backend()
        if hasattr(module, "LlmRegistration"):
            return module.EngineConfig(model="toy", runtime_data={"kind": "toy"}, llm=module.LlmRegistration(**numbers))
        return module.EngineConfig(model="toy", **numbers)

    def reach(self, point: str) -> None:
        """A place where the probe can let something fail."""
        if point in self.faults:
            self.faults.remove(point)
            raise engine_shutdown(f"fault injected at {point}") if point.startswith("start") else RuntimeError(point)

    async def background(self) -> None:
        """What a real engine's step loop would be: here it only publishes how full the cache is."""
        while True:
            await asyncio.sleep(1.0)
            self.publish_snapshot()

    async def cleanup(self) -> None:
        self.is_running = False
        with self.lock:
            for works in list(self.open.values()):
                for work in works:
                    work.is_aborted = True
            for _, turn in self.queue:
                self.wake(turn)
        task, self.steps_task = self.steps_task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        self.release_all()
        self.blocks.publisher = None
        self.snapshots = None

    def release_all(self) -> None:
        with self.lock:
            for works in list(self.open.values()):
                for work in list(works):
                    self.release(work)
            self.transfers.clear()

    async def is_quiescent(self) -> bool:
        return not self.open and not self.transfers

    async def drain(self) -> None:
        """Of ai-dynamo 1.2 only."""
        while self.open:  # noqa: ASYNC110  (requests end on any thread)
            await asyncio.sleep(_POLL_S)

    if hasattr(backend(), "LlmRegistration"):
        del drain

    # Requests.

    async def generate(self, request: Mapping[str, Any], context: Any) -> AsyncGenerator[dict[str, Any], None]:
        if not self.is_running:
            raise engine_shutdown("the engine is not running")
        if self.role == "encode":
            yield await self.encode(request, context)
            return
        work = self.admit(request, context)
        try:
            if not await self.wait_for_slot(work, context):
                yield self.cancelled(work)
                return
            self.take_blocks(work)
            while True:
                if self.is_cancelled(work, context):
                    yield self.cancelled(work)
                    return
                if len(work.output) >= self.budget(work):
                    yield self.terminal(work, self.reason(work, "length"))
                    return
                await self.step(work, context)
                if self.is_cancelled(work, context):
                    yield self.cancelled(work)
                    return
                token = self.next_token(work)
                work.output.append(token)
                chunk = self.chunk(work, token)
                if self.is_stop_token(work, token):
                    yield {**chunk, **self.ending(work, "stop")}
                    return
                if len(work.output) == self.budget(work):
                    yield {**chunk, **self.ending(work, "length")}
                    return
                yield chunk
        finally:
            self.release(work)

    def admit(self, request: Mapping[str, Any], context: Any) -> Work:
        """Check the request before anything is taken for it."""
        self.reach("request")
        self.check_handover(request)
        self.requests_by_rank[self.rank_of(request)] += 1
        prompt = self.prompt_of(request)
        stop = request.get("stop_conditions") or {}
        sampling = request.get("sampling_options") or {}
        self.check_lengths(prompt)
        self.check_choices(sampling.get("n"))
        num_logprobs, num_prompt_logprobs = self.logprob_options(request)
        work = Work(
            context.id(),
            prompt,
            self.max_tokens(prompt, stop.get("max_tokens")),
            self.min_tokens(stop),
            self.stop_ids(request, stop),
            int(sampling.get("seed") or 0),
            num_logprobs,
            num_prompt_logprobs,
        )
        with self.lock:
            self.open.setdefault(work.request_id, []).append(work)
        return work

    def prompt_of(self, request: Mapping[str, Any]) -> list[int]:
        token_ids = request["token_ids"]
        if isinstance(token_ids, bytes | bytearray | memoryview):
            packed = array("i", bytes(token_ids))
            if sys.byteorder != "little":
                packed.byteswap()
            return packed.tolist()
        return list(token_ids)

    def rank_of(self, request: Mapping[str, Any]) -> int:
        """The rank that the router asks for; this engine's own choice, 0, where it has no such rank."""
        rank = (request.get("routing") or {}).get("dp_rank")
        return rank if isinstance(rank, int) and 0 <= rank < self.options.data_parallel_size else 0

    def check_lengths(self, prompt: Sequence[int]) -> None:
        if not prompt:
            raise invalid_argument("the prompt is empty")
        if len(prompt) >= CONTEXT_LENGTH:
            raise invalid_argument(f"the prompt has {len(prompt)} tokens; {CONTEXT_LENGTH - 1} fit")

    def check_choices(self, n: int | None) -> None:
        if n is not None and n > 1:
            raise invalid_argument(f"n is {n}; this engine gives one choice")

    def check_handover(self, request: Mapping[str, Any]) -> None:
        is_probe = request.get("_HEALTH_CHECK") is True
        if self.role == "decode" and not is_probe and not isinstance(request.get("prefill_result"), dict):
            raise invalid_argument("a decode worker needs prefill_result")
        has_media = self.options.route_to_encoder and request.get("multi_modal_data") is not None
        if has_media and not is_probe and not isinstance(request.get("encoder_result"), dict):
            raise invalid_argument("encoder_result must be an object")

    def max_tokens(self, prompt: Sequence[int], asked: int | None) -> int:
        room = CONTEXT_LENGTH - len(prompt)
        if self.role == "prefill":
            return 1
        return room if asked is None else min(asked, room)

    def min_tokens(self, stop: Mapping[str, Any]) -> int:
        return 0 if self.role == "prefill" else stop.get("min_tokens") or 0

    def stop_ids(self, request: Mapping[str, Any], stop: Mapping[str, Any]) -> frozenset[int]:
        ids = [*(stop.get("stop_token_ids") or ()), *(stop.get("stop_token_ids_hidden") or ())]
        if not stop.get("ignore_eos"):
            ids += request.get("eos_token_ids") or ()
        return frozenset(ids)

    def logprob_options(self, request: Mapping[str, Any]) -> tuple[int | None, int | None]:
        module = submodule("logprobs")
        if module is None or not self.options.logprobs:
            return None, None
        asked: tuple[int | None, int | None] = module.parse_logprob_options(request.get("output_options") or {})
        return asked

    async def wait_for_slot(self, work: Work, context: Any) -> bool:
        """True with a slot; False if the request was cancelled while it waited."""
        turn: asyncio.Future[None] | None = None
        with self.lock:
            if self.num_slots_used < self.options.max_num_seqs:
                self.num_slots_used += 1
                work.has_slot = True
            else:
                turn = asyncio.get_running_loop().create_future()
                self.queue.append((work, turn))
        while not work.has_slot:
            if self.is_cancelled(work, context):
                return False
            assert turn is not None
            await asyncio.wait([turn], timeout=_POLL_S)
        return not self.is_cancelled(work, context)

    def take_blocks(self, work: Work) -> None:
        with self.lock:
            work.block_hashes = self.blocks.take(work.prompt)
        self.publish_snapshot()

    def is_cancelled(self, work: Work, context: Any) -> bool:
        return work.is_aborted or bool(context.is_stopped())

    def budget(self, work: Work) -> int:
        return work.max_tokens

    async def step(self, work: Work, context: Any) -> None:
        """The time of one token; as long as the engine sleeps, none passes."""
        self.reach("request.step")
        while True:
            await asyncio.sleep(self.options.step_s)
            if not self.is_asleep or self.is_cancelled(work, context):
                return

    def next_token(self, work: Work) -> int:
        text = f"{work.seed} {work.prompt} {len(work.output)}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little") % VOCABULARY

    def is_stop_token(self, work: Work, token: int) -> bool:
        return token in work.stop_ids and len(work.output) >= work.min_tokens

    def chunk(self, work: Work, token: int) -> dict[str, Any]:
        chunk: dict[str, Any] = {"token_ids": [token], "index": 0}
        if work.num_logprobs is not None:
            count = min(work.num_logprobs, MAX_LOGPROBS)
            logprobs = [-0.1 - 0.5 * rank for rank in range(max(count, 1))]
            chunk["log_probs"] = [logprobs[0]]
            if count:
                chunk["top_logprobs"] = [
                    [
                        {"rank": rank + 1, "token_id": (token + rank) % VOCABULARY, "token": None, "logprob": logprob}
                        for rank, logprob in enumerate(logprobs)
                    ]
                ]
        return chunk

    def ending(self, work: Work, reason: str) -> dict[str, Any]:
        """What the terminal chunk has beyond the others."""
        ending: dict[str, Any] = {"finish_reason": reason, "completion_usage": self.usage(work)}
        if self.role == "prefill" and reason != "cancelled":
            ending["disaggregated_params"] = {"handle": work.request_id, "blocks": len(work.block_hashes)}
        if work.num_prompt_logprobs is not None and reason != "cancelled":
            ending["engine_data"] = {"prompt_logprobs": self.prompt_logprobs(work)}
        return ending

    def prompt_logprobs(self, work: Work) -> list[dict[str, Any] | None]:
        return [None, *({str(token): {"logprob": -1.5, "rank": 1}} for token in work.prompt[1:])]

    def usage(self, work: Work) -> dict[str, Any]:
        num_prompt, num_output = len(work.prompt), len(work.output)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_output,
            "total_tokens": num_prompt + num_output,
        }

    def reason(self, work: Work, reason: str) -> str:
        del work
        return reason

    def terminal(self, work: Work, reason: str) -> dict[str, Any]:
        """A terminal chunk without tokens."""
        return {"token_ids": [], "index": 0, **self.ending(work, reason)}

    def cancelled(self, work: Work) -> dict[str, Any]:
        logger.debug("request %s cancelled", work.request_id)
        return self.terminal(work, "cancelled")

    async def abort(self, context: Any) -> None:
        """By id: the context is not the one that `generate` got. Unknown and finished requests are ignored."""
        with self.lock:
            for work in self.open.get(context.id(), ()):
                self.abort_work(work)

    def abort_work(self, work: Work) -> None:
        work.is_aborted = True
        for waiting, turn in self.queue:
            if waiting is work:
                self.wake(turn)

    def release(self, work: Work) -> None:
        """Give everything back. On any thread, any number of times, without waiting."""
        with self.lock:
            if work.is_released:
                return
            work.is_released = True
            self.forget(work)
            self.queue = deque(entry for entry in self.queue if entry[0] is not work)
            self.give_blocks_back(work)
            if work.has_slot:
                self.give_slot_back()
        self.publish_snapshot()

    def forget(self, work: Work) -> None:
        works = self.open.get(work.request_id, [])
        if work in works:
            works.remove(work)
        if not works:
            self.open.pop(work.request_id, None)

    def give_blocks_back(self, work: Work) -> None:
        self.blocks.give_back(work.block_hashes)

    def give_slot_back(self) -> None:
        """To the one that waits longest, if somebody does."""
        if self.queue:
            waiting, turn = self.queue.popleft()
            waiting.has_slot = True
            self.wake(turn)
        else:
            self.num_slots_used -= 1

    def wake(self, turn: asyncio.Future[None]) -> None:
        if self.loop is not None and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(_resolve, turn)

    async def encode(self, request: Mapping[str, Any], context: Any) -> dict[str, Any]:
        """The one chunk of an encode worker."""
        work = Work(context.id(), self.prompt_of(request), 0)
        self.reach("request")
        with self.lock:
            self.open.setdefault(work.request_id, []).append(work)
        try:
            if not self.is_cancelled(work, context):
                await self.step(work, context)
            if self.is_cancelled(work, context):
                return self.cancelled(work)
            return {**self.terminal(work, "stop"), "encoder_result": {"handle": f"toy:{work.request_id}"}}
        finally:
            self.release(work)

    # KV events and metrics.

    async def kv_event_sources(self) -> list[Any]:
        module = submodule("publisher")
        if not self.options.kv_events or module is None or self.role == "encode":
            return []
        ranks = range(1, self.options.data_parallel_size)
        others = [module.PushSource(on_ready=self.on_idle_rank_ready, dp_rank=rank) for rank in ranks]
        return [module.PushSource(on_ready=self.on_kv_ready, dp_rank=0), *others]

    def on_kv_ready(self, publisher: Any) -> None:
        self.blocks.publisher = publisher

    def on_idle_rank_ready(self, publisher: Any) -> None:
        """All KV blocks are in the cache of rank 0."""
        del publisher

    def component_metrics_dp_ranks(self) -> list[int]:
        return list(range(self.options.data_parallel_size)) if self.options.metrics else []

    def attach_snapshot_publisher(self, publisher: Any) -> None:
        self.snapshots = publisher

    def publish_snapshot(self) -> None:
        module = submodule("publisher")
        snapshots = self.snapshots
        if module is None or snapshots is None or not self.is_running:
            return
        used = len(self.blocks.users)
        snapshots.publish(
            0,
            module.ComponentSnapshot(
                kv_used_blocks=used,
                kv_total_blocks=NUM_BLOCKS,
                gpu_cache_usage=used / NUM_BLOCKS,
                dp_rank=0,
                kv_cache_hit_rate=None,
            ),
        )

    async def register_prometheus(self, metrics: Any) -> None:
        del metrics

    async def health_check_payload(self) -> dict[str, Any] | None:
        module = submodule("health_check")
        payload: dict[str, Any] | None = module.build_health_check_payload(bos_token_id=1) if module else None
        return payload

    # Controls and hooks.

    def supported_controls(self) -> set[str]:
        return {"sleep", "wake_up", "start_profile", "stop_profile"} if self.options.controls else set()

    async def engine_control(self, control: str, body: dict[str, Any]) -> dict[str, Any]:
        del body
        if control not in self.supported_controls():
            return {"status": "error", "message": f"unsupported engine control: {control}"}
        if control in ("sleep", "wake_up"):
            self.is_asleep = control == "sleep"
        else:
            self.is_profiling = control == "start_profile"
        return {"status": "ok", "is_sleeping": self.is_asleep, "is_profiling": self.is_profiling}

    def supported_updates(self) -> set[str]:
        return {"max_num_seqs"} if self.options.controls else set()

    async def engine_update(self, update: str, body: dict[str, Any]) -> dict[str, Any]:
        if update not in self.supported_updates():
            return {"status": "error", "message": f"unsupported engine update: {update}"}
        value = body.get("value")
        if not isinstance(value, int) or value < 1:
            return {"status": "error", "message": "value must be an integer of at least 1"}
        return {"status": "ok"}

    async def on_endpoint_ready(self, endpoint: Any) -> None:
        del endpoint

    def make_logits_spec(self) -> Any:
        engine_module = submodule("engine")
        forced = getattr(engine_module, "ForcedTokenSequenceSpec", None)
        if forced is None or not self.options.logits:
            return None
        return engine_module.LogitsProcessorSpec(entries=(forced(token_ids=(7, 8), eos_token_id=2),))  # type: ignore[union-attr]

    async def logits_processor_spec(self) -> Any:
        return self.logits_spec

    def conformance_probe(self) -> ToyProbe:
        return ToyProbe(self)


def _resolve(turn: asyncio.Future[None]) -> None:
    if not turn.done():
        turn.set_result(None)


class ToyWithoutProbe(ToyEngine):
    """The same engine, seen only from outside."""

    conformance_probe = None  # type: ignore[assignment]


class ToyWithChoices(ToyEngine):
    """The same engine, and n > 1 as well: all choices go on in step, and one terminal chunk ends them all."""

    def check_choices(self, n: int | None) -> None:
        pass

    async def generate(self, request: Mapping[str, Any], context: Any) -> AsyncGenerator[dict[str, Any], None]:
        n = (request.get("sampling_options") or {}).get("n") or 1
        if n == 1 or self.role == "encode" or not self.is_running:
            async for chunk in super().generate(request, context):
                yield chunk
            return
        work = self.admit(request, context)
        try:
            if not await self.wait_for_slot(work, context):
                yield self.cancelled(work)
                return
            self.take_blocks(work)
            going_on = list(range(n))
            for num_tokens in range(1, self.budget(work) + 1):
                await self.step(work, context)
                if self.is_cancelled(work, context):
                    yield self.cancelled(work)
                    return
                for index in list(going_on):
                    token = self.next_token(work)
                    work.output.append(token)
                    chunk = {**self.chunk(work, token), "index": index}
                    is_stop = token in work.stop_ids and num_tokens >= work.min_tokens
                    if is_stop or num_tokens == self.budget(work):
                        going_on.remove(index)
                        chunk |= self.choice_ending(work, "stop" if is_stop else "length", is_last=not going_on)
                    yield chunk
                if not going_on:
                    return
            yield self.terminal(work, "length")
        finally:
            self.release(work)

    def choice_ending(self, work: Work, reason: str, *, is_last: bool) -> dict[str, Any]:
        """What the last chunk of a choice has beyond the others: nothing but in the last choice."""
        return self.ending(work, reason) if is_last else {}
