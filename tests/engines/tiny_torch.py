"""
A small real engine: a transformer with random weights, paged KV cache, continuous batching in a thread.

    pytest --engine=tests.engines.tiny_torch:TinyTorchEngine

It does what engines do and nothing is simulated, so it shows what the suite says of a correct one. Works on
ai-dynamo 1.2.1 to 1.6.1. Token ids beyond the vocabulary are taken modulo its size, so that any tokenizer can
stand before it. top_p, top_k and penalties are ignored.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import math
import random
import sys
import threading
from array import array
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from dynamo.common import backend
from dynamo.llm.exceptions import EngineShutdown, InvalidArgument

try:
    from dynamo.common.backend.logprobs import parse_logprob_options
except ModuleNotFoundError:  # 1.2.1 has no logprobs for engines

    def parse_logprob_options(_options: Mapping[str, Any]) -> tuple[None, None]:
        return None, None


logger = logging.getLogger(__name__)

_VOCAB_SIZE = 512
_NUM_LAYERS = 2
_NUM_HEADS = 4
_HEAD_DIM = 16
_HIDDEN = _NUM_HEADS * _HEAD_DIM
_MAX_TOP_LOGPROBS = 20


class TinyTransformer:
    """
    Decoder-only: RMS norm, rotary attention, MLP; weights drawn from `seed`.

    Its KV cache is `num_blocks` blocks of `block_size` tokens. In float64, so that what else is in the batch
    does not change which token is the greedy one.
    """

    def __init__(self, num_blocks: int, block_size: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def weight(rows: int, columns: int) -> torch.Tensor:
            return torch.randn(rows, columns, generator=generator, dtype=torch.float64) / math.sqrt(rows)

        self.block_size = block_size
        self._embedding = weight(_VOCAB_SIZE, _HIDDEN) * math.sqrt(_VOCAB_SIZE)
        self._head = weight(_HIDDEN, _VOCAB_SIZE) * 4
        self._layers = [
            (
                weight(_HIDDEN, 3 * _HIDDEN),
                weight(_HIDDEN, _HIDDEN),
                weight(_HIDDEN, 4 * _HIDDEN),
                weight(4 * _HIDDEN, _HIDDEN),
            )
            for _ in range(_NUM_LAYERS)
        ]
        self._keys = torch.zeros(_NUM_LAYERS, num_blocks, block_size, _NUM_HEADS, _HEAD_DIM, dtype=torch.float64)
        self._values = torch.zeros_like(self._keys)
        self._wave_lengths = 1e4 ** (torch.arange(_HEAD_DIM // 2, dtype=torch.float64) / (_HEAD_DIM // 2))

    @torch.inference_mode()
    def forward(self, token_ids: list[list[int]], first: list[int], block_tables: list[list[int]]) -> torch.Tensor:
        """
        Logits after the last token of every row, shape (rows, vocabulary).

        All rows are equally long; row i starts at position `first[i]`, and what lies before is in its blocks.
        Their keys and values are written to the cache on the way.
        """
        longest = max(len(blocks) for blocks in block_tables)
        tables = torch.tensor([blocks + [0] * (longest - len(blocks)) for blocks in block_tables])
        positions = torch.tensor(first)[:, None] + torch.arange(len(token_ids[0]))
        blocks, offsets = tables.gather(1, positions // self.block_size), positions % self.block_size
        is_seen = torch.arange(longest * self.block_size) <= positions[:, None, :, None]
        x = self._embedding[torch.tensor(token_ids)]
        for layer, (to_qkv, to_out, up, down) in enumerate(self._layers):
            query, key, value = (_norm(x) @ to_qkv).unflatten(-1, (3, _NUM_HEADS, _HEAD_DIM)).unbind(2)
            self._keys[layer, blocks, offsets] = self._rotate(key, positions)
            self._values[layer, blocks, offsets] = value
            attended = F.scaled_dot_product_attention(
                self._rotate(query, positions).transpose(1, 2),
                self._keys[layer, tables].flatten(1, 2).transpose(1, 2),
                self._values[layer, tables].flatten(1, 2).transpose(1, 2),
                attn_mask=is_seen,
            )
            x = x + attended.transpose(1, 2).flatten(2) @ to_out
            x = x + F.gelu(_norm(x) @ up) @ down
        return _norm(x[:, -1]) @ self._head

    def _rotate(self, heads: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        angles = (positions[..., None] / self._wave_lengths)[:, :, None, :]
        left, right = heads.chunk(2, dim=-1)
        return torch.cat(
            [left * angles.cos() - right * angles.sin(), left * angles.sin() + right * angles.cos()], dim=-1
        )


def _norm(x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, (_HIDDEN,), eps=1e-6)


@dataclass(frozen=True, slots=True)
class Sampling:
    """What the client asked for."""

    max_tokens: int
    min_tokens: int
    stop_token_ids: frozenset[int]
    eos_token_ids: frozenset[int]
    temperature: float  # 0 is greedy
    seed: int
    num_top_logprobs: int | None  # None: no logprobs

    def finish_reason(self, token_ids: list[int]) -> str | None:
        """Why the answer ends after the last of `token_ids`; None if it goes on."""
        if len(token_ids) >= self.min_tokens:
            if token_ids[-1] in self.stop_token_ids:
                return "stop"
            if token_ids[-1] in self.eos_token_ids:
                return "eos"
        return "length" if len(token_ids) >= self.max_tokens else None


@dataclass(eq=False, slots=True)
class Sequence:
    """One request on its way. The engine's lock guards all of it but `ready` and `is_ready`."""

    request_id: str
    prompt: list[int]
    sampling: Sampling
    is_stopped: Callable[[], bool]
    loop: asyncio.AbstractEventLoop
    generator: torch.Generator
    token_ids: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    ready: deque[dict[str, Any]] = field(default_factory=deque)
    is_ready: asyncio.Event = field(default_factory=asyncio.Event)

    def put(self, chunk: dict[str, Any]) -> None:
        """Hand `chunk` to `next_chunk`, on any thread."""
        self.ready.append(chunk)
        try:
            self.loop.call_soon_threadsafe(self.is_ready.set)
        except RuntimeError:  # the loop is closed, and with it whoever waited
            logger.debug("request %s: nobody waits any more", self.request_id)

    async def next_chunk(self) -> dict[str, Any]:
        while not self.ready:
            self.is_ready.clear()
            await self.is_ready.wait()
        return self.ready.popleft()

    def usage(self, num_sent: int) -> dict[str, Any]:
        prompt = len(self.prompt)
        return {"prompt_tokens": prompt, "completion_tokens": num_sent, "total_tokens": prompt + num_sent}


class TinyTorchEngine(backend.LLMEngine):
    """An `LLMEngine`. One thread owns the model and allots blocks; letting go of a request works on any thread."""

    def __init__(
        self,
        model_name: str = "tiny-torch",
        context_length: int = 512,
        block_size: int = 16,
        num_blocks: int = 128,
        max_num_seqs: int = 8,
        seed: int = 0,
    ) -> None:
        self.model_name = model_name
        self.context_length = context_length
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.max_num_seqs = max_num_seqs
        self.seed = seed
        self.model: TinyTransformer | None = None
        self.free_blocks = list(range(num_blocks))
        self._open: dict[Sequence, None] = {}  # in order of arrival; those with blocks run, the others wait
        self._changed = threading.Condition()  # its lock can be taken again: a stream may be collected anywhere
        self._is_stopped = False
        self._thread: threading.Thread | None = None

    @classmethod
    async def from_args(cls, argv: list[str] | None = None) -> tuple[TinyTorchEngine, Any]:
        parser = argparse.ArgumentParser(prog="tiny-torch")
        for flag, default in {
            "--model-name": "tiny-torch",
            "--namespace": "dynamo",
            "--component": "backend",
            "--endpoint": "generate",
            "--endpoint-types": "chat,completions",
            "--discovery-backend": "etcd",
            "--request-plane": "tcp",
            "--event-plane": None,
        }.items():
            parser.add_argument(flag, default=default)
        sizes = {"context_length": 512, "block_size": 16, "num_blocks": 128, "max_num_seqs": 8}
        for name, size in sizes.items():
            parser.add_argument("--" + name.replace("_", "-"), type=int, default=size)
        parser.add_argument("--seed", type=int, default=0)
        flags = vars(parser.parse_args(argv))
        engine = cls(flags["model_name"], seed=flags.pop("seed"), **{name: flags.pop(name) for name in sizes})
        if min(engine.context_length, engine.block_size, engine.max_num_seqs) < 1:
            parser.error("sizes are 1 or more")
        if engine.num_blocks * engine.block_size < engine.context_length:
            parser.error(f"--num-blocks {engine.num_blocks} do not hold one sequence of --context-length")
        return engine, backend.WorkerConfig(served_model_name=engine.model_name, **flags)

    async def start(self, worker_id: int) -> Any:
        del worker_id
        loaded: Future[None] = Future()
        thread = threading.Thread(target=self._serve, args=(loaded,), name="tiny-torch", daemon=True)
        thread.start()
        self._thread = thread  # one that did not start cannot be joined
        try:
            await asyncio.wrap_future(loaded)
        except Exception as error:
            raise EngineShutdown(f"the model cannot be built: {error}") from error
        numbers = {
            "context_length": self.context_length,
            "kv_cache_block_size": self.block_size,
            "total_kv_blocks": self.num_blocks,
            "max_num_seqs": self.max_num_seqs,
            "max_num_batched_tokens": self.context_length,
        }
        if hasattr(backend, "LlmRegistration"):  # from 1.3
            numbers = {"llm": backend.LlmRegistration(**numbers)}
        return backend.EngineConfig(model=self.model_name, served_model_name=self.model_name, **numbers)

    async def generate(self, request: Mapping[str, Any], context: Any) -> AsyncGenerator[dict[str, Any], None]:
        sequence = self._sequence(request, context)
        num_sent = 0
        try:
            self._submit(sequence)
            while True:
                chunk = await sequence.next_chunk()
                if context.is_stopped():
                    chunk = _terminal("cancelled")
                    self._close(sequence)
                num_sent += len(chunk["token_ids"])
                is_last = "finish_reason" in chunk
                if is_last:
                    chunk["completion_usage"] = sequence.usage(num_sent)
                yield chunk
                if is_last:
                    return
        finally:
            self._close(sequence)

    async def abort(self, context: Any) -> None:
        for sequence in list(self._open):
            if sequence.request_id == context.id():
                self._close(sequence, _terminal("cancelled"))

    async def is_quiescent(self) -> bool:
        return not self._open

    async def cleanup(self) -> None:
        with self._changed:
            self._is_stopped = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()  # at most one step
            self._thread = None
        self.model = None

    def _sequence(self, request: Mapping[str, Any], context: Any) -> Sequence:
        """The request, checked. Raises `InvalidArgument`, never another exception, for one that cannot be served."""
        stop = request.get("stop_conditions") or {}
        options = request.get("sampling_options") or {}
        prompt = [token_id % _VOCAB_SIZE for token_id in _token_ids(request.get("token_ids"))]
        if not 0 < len(prompt) < self.context_length:
            raise InvalidArgument(f"the prompt has {len(prompt)} tokens; 1 to {self.context_length - 1} are possible")
        if _whole(options, "n", 1) != 1:
            raise InvalidArgument(f"n is {options['n']}; this engine gives one answer")
        room = self.context_length - len(prompt)
        ignore_eos = bool(stop.get("ignore_eos"))
        stop_ids = [*(stop.get("stop_token_ids") or []), *(stop.get("stop_token_ids_hidden") or [])]
        temperature = options.get("temperature")
        if temperature is not None and not (isinstance(temperature, int | float) and 0 <= temperature < math.inf):
            raise InvalidArgument(f"temperature is {temperature!r}; it is a number, 0 or more")
        num_top_logprobs, prompt_logprobs = parse_logprob_options(request.get("output_options") or {})
        if prompt_logprobs is not None:
            raise InvalidArgument("this engine has no prompt_logprobs")
        seed = _whole(options, "seed", random.getrandbits(63), lowest=-(2**64)) % 2**63
        sampling = Sampling(
            max_tokens=min(_whole(stop, "max_tokens", room), room),
            min_tokens=_whole(stop, "min_tokens", 0),
            stop_token_ids=frozenset(() if ignore_eos else stop_ids),
            eos_token_ids=frozenset(() if ignore_eos else request.get("eos_token_ids") or ()),
            temperature=1.0 if temperature is None else temperature,
            seed=seed,
            num_top_logprobs=num_top_logprobs,
        )
        loop = asyncio.get_running_loop()
        generator = torch.Generator().manual_seed(seed)
        return Sequence(context.id(), prompt, sampling, context.is_stopped, loop, generator)

    def _submit(self, sequence: Sequence) -> None:
        with self._changed:
            if self._is_stopped or self._thread is None or not self._thread.is_alive():
                raise EngineShutdown("the engine is not running")
            if sequence.is_stopped():
                sequence.put(_terminal("cancelled"))
            elif sequence.sampling.max_tokens == 0:
                sequence.put(_terminal("length"))
            else:
                self._open[sequence] = None
                self._changed.notify()

    def _close(self, sequence: Sequence, last: dict[str, Any] | None = None) -> None:
        """
        Let go of it, and hand its stream `last` if it was still open. Synchronous, on any thread.

        The blocks can be given back in the middle of a step: they get a new owner between steps only.
        """
        with self._changed:
            if sequence in self._open:
                del self._open[sequence]
                self.free_blocks += sequence.blocks
                if last is not None:
                    sequence.put(last)

    def _serve(self, loaded: Future[None]) -> None:
        """The thread: build the model, then make one step after another while there is work."""
        try:
            torch.set_num_threads(1)  # matrices this small need no helper threads; counts for the whole process
            self.model = TinyTransformer(self.num_blocks, self.block_size, self.seed)
        except Exception as error:
            loaded.set_exception(error)
            return
        loaded.set_result(None)
        try:
            while self._wait_for_work():
                self._step(self.model)
        except Exception:
            logger.exception("the model failed")
        finally:
            with self._changed:
                self._is_stopped = True
                for sequence in list(self._open):
                    self._close(sequence, _terminal("cancelled"))

    def _wait_for_work(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._open or self._is_stopped)
            return not self._is_stopped

    def _step(self, model: TinyTransformer) -> None:
        """Prefill what gets in, each on its own, and decode one token for all that already ran."""
        for sequence in list(self._open):
            if sequence.is_stopped():
                self._close(sequence, _terminal("cancelled"))
        running = [sequence for sequence in list(self._open) if sequence.blocks]
        for sequence in self._admit(self.max_num_seqs - len(running)):
            logits = model.forward([sequence.prompt], [0], [sequence.blocks])
            self._add_token(sequence, logits[0])
        if running:
            last = [[sequence.token_ids[-1]] for sequence in running]
            positions = [len(sequence.prompt) + len(sequence.token_ids) - 1 for sequence in running]
            logits = model.forward(last, positions, [sequence.blocks for sequence in running])
            for sequence, row in zip(running, logits, strict=True):
                self._add_token(sequence, row)

    def _admit(self, num_seats: int) -> list[Sequence]:
        """Give the first waiting sequences all the blocks that they can come to need, as long as there are any."""
        admitted: list[Sequence] = []
        with self._changed:
            for sequence in [waiting for waiting in self._open if not waiting.blocks]:
                num_needed = -(-(len(sequence.prompt) + sequence.sampling.max_tokens) // self.block_size)
                if len(admitted) == num_seats or num_needed > len(self.free_blocks):
                    break
                sequence.blocks = [self.free_blocks.pop() for _ in range(num_needed)]
                admitted.append(sequence)
        return admitted

    def _add_token(self, sequence: Sequence, logits: torch.Tensor) -> None:
        sampling = sequence.sampling
        if sampling.temperature < 1e-5:
            token_id = int(logits.argmax())
        else:
            probabilities = (logits / sampling.temperature).softmax(0)
            token_id = int(torch.multinomial(probabilities, 1, generator=sequence.generator))
        sequence.token_ids.append(token_id)
        chunk: dict[str, Any] = {"token_ids": [token_id], "index": 0}
        if sampling.num_top_logprobs is not None:
            chunk |= _logprobs(logits, token_id, min(sampling.num_top_logprobs, _MAX_TOP_LOGPROBS))
        reason = sampling.finish_reason(sequence.token_ids)
        if reason is not None:
            self._close(sequence, {**chunk, "finish_reason": reason})
        else:
            sequence.put(chunk)


def _terminal(reason: str) -> dict[str, Any]:
    return {"token_ids": [], "index": 0, "finish_reason": reason}


def _logprobs(logits: torch.Tensor, token_id: int, num_top: int) -> dict[str, Any]:
    """`log_probs` and, for one alternative or more, `top_logprobs` of one position; the selected token is included."""
    log_probs = logits.log_softmax(0)
    chunk: dict[str, Any] = {"log_probs": [float(log_probs[token_id])]}
    if num_top:
        ids = log_probs.topk(num_top).indices.tolist()
        entries = [
            {"rank": int((log_probs > log_probs[i]).sum()) + 1, "token_id": i, "logprob": float(log_probs[i])}
            for i in (ids if token_id in ids else [*ids, token_id])
        ]
        chunk["top_logprobs"] = [entries]
    return chunk


def _token_ids(value: Any) -> list[int]:
    """The prompt; from ai-dynamo 1.6 it may come as packed little-endian 32-bit numbers."""
    if isinstance(value, bytes | bytearray | memoryview):
        packed = array("I")
        try:
            packed.frombytes(bytes(value))
        except ValueError as error:
            raise InvalidArgument(f"packed token_ids: {error}") from error
        if sys.byteorder != "little":
            packed.byteswap()
        return packed.tolist()
    ids = list(value) if isinstance(value, list | tuple) else None
    if ids is None or not all(isinstance(token_id, int) and token_id >= 0 for token_id in ids):
        raise InvalidArgument("token_ids is a list of numbers, 0 or more")
    return ids


def _whole(options: Mapping[str, Any], name: str, default: int, lowest: int = 0) -> int:
    value = options.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
        raise InvalidArgument(f"{name} is {value!r}; it is a whole number, {lowest} or more")
    return value
