"""
Dynamo's own TokenSpeed engine, unchanged, over a stand-in for the native part that needs a GPU.

    pytest --engine=tests.engines.tokenspeed_stub:TokenSpeedEngine

Flags are `--disaggregation-mode prefill` and `decode` (from 1.6; where the host's name is a local one, prefill
also wants DYN_TOKENSPEED_BOOTSTRAP_HOST) and the native ones below.

Importing this module puts the stand-in into `sys.modules`. ai-dynamo 1.2.1 to 1.6.1 ship the engine; what it
expects of the native part was read from there and from TokenSpeed's public sources (lightseekorg/tokenspeed):

* `generate_request` is an async generator of dicts with `output_ids` and `meta_info`. The ids are the new ones
  if `stream_output` is set, all so far if not; the first may repeat the end of the prompt. What has come since
  the last read is one dict.
* `meta_info` counts `completion_tokens` from the start; `finish_reason` is a dict, None before the last.
* `abort_request` forgets the request at once and ignores an id that it does not know. Nobody then wakes a
  reader who waits: that stream ends only when it is closed or dropped.
* `shutdown` ends the processes behind; it does not wake a reader either.
* An answer has one token before its length is looked at, and its length is looked at before its stop tokens;
  those, too, are off with `ignore_eos`. A prompt of context length is a ValueError, an empty one an IndexError.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

STEP_S = 0.001  # of loop time, for one token of every request that runs
VOCAB_SIZE = 256
EOS_TOKEN_ID = 2
_NUM_ECHOED_TOKENS = 5  # of the prompt, in the first output


class ServerArgs:
    """Settings of the native engine: the flags that Dynamo's part reads, and one positional model."""

    @staticmethod
    def add_cli_args(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("model_path", nargs="?", default="tokenspeed-stand-in")
        parser.add_argument("--served-model-name")
        for flag, default in {
            "--block-size": 16,
            "--max-model-len": 512,
            "--max-num-seqs": 8,
            "--max-total-tokens": 4096,
            "--chunked-prefill-size": 512,
            "--disaggregation-bootstrap-port": 8998,
        }.items():
            parser.add_argument(flag, type=int, default=default)
        parser.add_argument("--disaggregation-mode", choices=["null", "prefill", "decode"], default="null")
        parser.add_argument("--kv-events-config")

    @staticmethod
    def from_cli_args(flags: argparse.Namespace) -> SimpleNamespace:
        given = vars(flags)
        return SimpleNamespace(model=given.pop("model_path"), host="127.0.0.1", stream_output=False, **given)


@dataclass(eq=False)
class GenerateReqInput:
    """One request, as Dynamo's part makes it."""

    input_ids: list[int]
    sampling_params: dict[str, Any]
    stream: bool = False
    bootstrap_host: str | None = None
    bootstrap_port: int | None = None
    bootstrap_room: int | None = None
    rid: str | None = field(default=None, init=False)


@dataclass(eq=False)
class _State:
    """A request that the native engine knows of."""

    obj: GenerateReqInput
    max_new_tokens: int
    output_ids: list[int] = field(default_factory=list)
    num_read: int = 0
    finish_reason: dict[str, Any] | None = None
    event: asyncio.Event = field(default_factory=asyncio.Event)

    def add_token(self) -> None:
        params = self.obj.sampling_params
        seed = params.get("seed") if (params.get("temperature") or 0) > 0 else None
        token_id = random.Random(repr((self.obj.input_ids, seed, len(self.output_ids)))).randrange(VOCAB_SIZE)
        is_stop = token_id == EOS_TOKEN_ID or token_id in params.get("stop_token_ids", ())
        self.output_ids.append(token_id)
        if len(self.output_ids) >= self.max_new_tokens:
            self.finish_reason = {"type": "length", "length": self.max_new_tokens}
        elif is_stop and not params.get("ignore_eos") and len(self.output_ids) >= params.get("min_new_tokens", 0):
            self.finish_reason = {"type": "stop", "matched": token_id}
        self.event.set()

    def take(self, is_delta: bool) -> dict[str, Any]:
        output_ids = self.output_ids[self.num_read if is_delta else 0 :]
        if self.num_read == 0:
            output_ids = self.obj.input_ids[-_NUM_ECHOED_TOKENS:] + output_ids
        self.num_read = len(self.output_ids)
        meta_info = {
            "id": self.obj.rid,
            "finish_reason": self.finish_reason,
            "prompt_tokens": len(self.obj.input_ids),
            "completion_tokens": len(self.output_ids),
            "cached_tokens": 0,
        }
        return {"text": "", "output_ids": output_ids, "meta_info": meta_info}


class _AsyncLLM:
    """The native front end. All on one loop, and no task: a timer makes the steps while there is work."""

    def __init__(self, server_args: Any) -> None:
        self._server_args = server_args
        self.context_len: int = server_args.max_model_len
        self.rid_to_state: dict[str, _State] = {}  # requests open now: empty when nothing leaks
        self._timer: asyncio.TimerHandle | None = None
        self._is_stopped = False

    async def generate_request(self, obj: GenerateReqInput) -> AsyncGenerator[dict[str, Any], None]:
        _ = obj.input_ids[0]  # the real one finds out here whether it is a batch
        obj.rid = obj.rid or uuid.uuid4().hex
        state = self.rid_to_state[obj.rid] = _State(obj, self._max_new_tokens(obj))
        self._set_timer()
        try:
            while True:
                await state.event.wait()
                state.event.clear()
                is_last = state.finish_reason is not None
                if is_last:
                    del self.rid_to_state[obj.rid]
                yield state.take(self._server_args.stream_output)
                if is_last:
                    return
        finally:
            self.abort_request(obj.rid)

    def abort_request(self, rid: str) -> None:
        self.rid_to_state.pop(rid, None)
        self._set_timer()

    def stop(self) -> None:
        self._is_stopped = True
        self._set_timer()

    def _max_new_tokens(self, obj: GenerateReqInput) -> int:
        isl_tokens = len(obj.input_ids)
        if isl_tokens > self.context_len - 1:
            raise ValueError(f"the input has {isl_tokens} tokens, more than {self.context_len - 1}")
        room = self.context_len - isl_tokens
        wanted = obj.sampling_params.get("max_new_tokens")
        if wanted is None:
            return room
        if wanted < 0 or not 0 <= obj.sampling_params.get("min_new_tokens", 0) <= min(wanted, room):
            raise ValueError(f"max_new_tokens is {wanted}: it is 0 or more, and min_new_tokens not above it")
        return min(wanted, room)

    def _running(self) -> list[_State]:
        if self._is_stopped:
            return []
        unfinished = [state for state in self.rid_to_state.values() if state.finish_reason is None]
        return unfinished[: self._server_args.max_num_seqs]

    def _set_timer(self) -> None:
        if self._running() and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(STEP_S, self._step)
        elif not self._running() and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _step(self) -> None:
        self._timer = None
        for state in self._running():
            state.add_token()
        self._set_timer()


class Engine:
    """The native engine. `tokenizer_manager` is what Dynamo's part talks to."""

    def __init__(self, server_args: Any) -> None:
        self.tokenizer_manager = _AsyncLLM(server_args)
        self.scheduler_info = {
            "max_model_len": server_args.max_model_len,
            "max_total_num_tokens": server_args.max_total_tokens,
            "max_num_seqs": server_args.max_num_seqs,
            "chunked_prefill_size": server_args.chunked_prefill_size,
        }

    def shutdown(self) -> None:
        self.tokenizer_manager.stop()


def install() -> None:
    """Let `import tokenspeed...` find the stand-in from now on."""
    for name, contents in {
        "tokenspeed": (),
        "tokenspeed.runtime": (),
        "tokenspeed.runtime.utils": (),
        "tokenspeed.runtime.utils.server_args": (ServerArgs,),
        "tokenspeed.runtime.engine": (),
        "tokenspeed.runtime.engine.io_struct": (GenerateReqInput,),
        "tokenspeed.runtime.entrypoints": (),
        "tokenspeed.runtime.entrypoints.engine": (Engine,),
    }.items():
        module = sys.modules[name] = ModuleType(name)
        for content in contents:
            setattr(module, content.__name__, content)


install()
from dynamo.tokenspeed.llm_engine import TokenspeedLLMEngine as TokenSpeedEngine  # noqa: E402

__all__ = ["TokenSpeedEngine", "install"]
