"""
What can be asked of a live engine over its worker's system port, and what comes of it.

    controls = Controls(drives, faults, engine, settings, profile_folder, cancel_all)
    answer = await controls.control("sleep", {"level": 1})       a JSON object: "status" is "ok" or "error"
    answer = await controls.update("timing", {"speedup_ratio": 10})
    controls.close()

Names and bodies are those of Dynamo's own workers where they have them (`POST /engine/control/<name>`);
docs/controls.md has a command line for each. All of them act between two steps, may be repeated, and answer
with the engine's state. Nothing raises: what is wrong with a call is in its answer.

Dynamo's part: before pause_generation, sleep and release_memory_occupation the worker takes itself out of discovery, so
that nobody sends it requests, and after the counterpart it is back.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from mock_engine.drive_realtime import RealTimeDrive
from mock_engine.engine_settings import Engine, EngineSettings
from mock_engine.errors import ConfigError, MockEngineError, RequestError
from mock_engine.fault_injector import FaultInjector
from mock_engine.faults import KINDS, Fault, make_fault, parse_fault
from mock_engine.step_profile import StepProfile
from mock_engine.timing import StepJitter

# Where weights come from when a sleeping engine wakes up: from the host's memory over PCIe 5.0 x16 (63 GB/s less
# protocol) at level 1, each GPU its share; from a local NVMe drive at level 2, all of them. A body with `seconds`
# says it better.
HOST_BYTES_PER_S = 50e9
STORAGE_BYTES_PER_S = 5e9

_MEMORY = frozenset({"weights", "kv_cache"})  # what sleeps; vLLM's tags
_MODES = ("abort", "keep")

Answer = dict[str, Any]
Handler = Callable[[Mapping[str, Any]], Awaitable[Answer]]
T = TypeVar("T")


class Controls:
    """The controls and updates of one engine; `profile_folder` is where steps are written that are profiled."""

    def __init__(
        self,
        drives: Sequence[RealTimeDrive],
        faults: FaultInjector,
        engine: Engine,
        settings: EngineSettings,
        profile_folder: Path,
        cancel_all: Callable[[], None],
    ) -> None:
        """`cancel_all` ends every open request, also one that a fault lets hang."""
        self._drives = drives
        self._faults = faults
        self._engine = engine
        self._seed = settings.seed
        self._profile_folder = profile_folder
        self._cancel_all = cancel_all
        self._lock = asyncio.Lock()
        self._is_paused = False
        self._asleep: set[str] = set()
        self._sleep_level = 1
        self._profile: StepProfile | None = None
        self._num_profiles = 0
        self._scales = (1.0, 1.0)

    def close(self) -> None:
        """Finish what is being written. Safe twice."""
        if self._profile is not None:
            self._profile.close()
            self._profile = None

    async def control(self, name: str, body: Mapping[str, Any]) -> Answer:
        """Carry out one of `CONTROLS`."""
        return await self._answer(CONTROLS, "control", name, body)

    async def update(self, name: str, body: Mapping[str, Any]) -> Answer:
        """Carry out one of `UPDATES`."""
        return await self._answer(UPDATES, "update", name, body)

    def state(self) -> Answer:
        """What there is to know now; numbers are of all ranks together."""
        schedulers = [drive.core.scheduler for drive in self._drives]
        blocks = [scheduler.blocks for scheduler in schedulers]
        return {
            "is_paused": self._is_paused,
            "is_sleeping": bool(self._asleep),
            "is_profiling": self._profile is not None,
            "speedup_ratio": self._drives[0].speedup_ratio,
            "time_s": round(self._drives[0].now_s(), 6),
            "num_running": sum(scheduler.num_running for scheduler in schedulers),
            "num_waiting": sum(drive.num_waiting for drive in self._drives),
            "kv_used_blocks": sum(each.num_used for each in blocks),
            "kv_cached_blocks": sum(each.num_cached for each in blocks),
            "kv_held_blocks": sum(scheduler.num_held_blocks for scheduler in schedulers),
            "kv_total_blocks": sum(each.num_blocks for each in blocks),
        }

    async def _answer(
        self,
        table: Mapping[str, Callable[[Controls, Mapping[str, Any]], Awaitable[Answer]]],
        what: str,
        name: str,
        body: Any,
    ) -> Answer:
        handler = table.get(name)
        if handler is None:
            return {"status": "error", "message": f"unsupported engine {what}: {name}; there are {', '.join(table)}"}
        try:
            if not isinstance(body, Mapping):
                raise RequestError("the body must be a JSON object")
            async with self._lock:
                answer = await handler(self, body)
        except (MockEngineError, RuntimeError, OSError) as error:
            return {"status": "error", "message": str(error), **self.state()}
        return {"status": "ok", **answer, **self.state()}

    async def _each(self, call: Callable[[RealTimeDrive], T]) -> list[T]:
        """What `call` returns for each drive, between two of its steps."""
        return await asyncio.gather(*(drive.between_steps(partial(call, drive)) for drive in self._drives))

    # Controls.

    async def _pause_generation(self, body: Mapping[str, Any]) -> Answer:
        mode = _choice(body, "mode", _MODES, default="keep")
        await self._stop_steps()
        self._is_paused = True
        await self._let_go(mode, body.get("clear_cache") is True)
        return {"mode": mode}

    async def _resume_generation(self, _: Mapping[str, Any]) -> Answer:
        if self._asleep:
            raise RequestError("the engine sleeps; wake_up first")
        self._is_paused = False
        await self._start_steps()
        return {}

    async def _sleep(self, body: Mapping[str, Any]) -> Answer:
        level = _number(body, "level", default=1, minimum=1)
        if level not in (1, 2):
            raise RequestError(f"level is {level:g}; allowed is 1 (KV cache dropped) or 2 (weights too)")
        mode = _choice(body, "mode", _MODES, default="abort")
        tags = _tags(body)
        await self._stop_steps()
        if not self._asleep:
            self._sleep_level = int(level)
        self._asleep |= tags
        await self._let_go(mode, clears_cache=True)
        return {"level": self._sleep_level}

    async def _wake_up(self, body: Mapping[str, Any]) -> Answer:
        waking = self._asleep & _tags(body)
        load_s = 0.0
        if "weights" in waking:
            load_s = _number(body, "seconds", default=self._weights_load_s, minimum=0)
            await asyncio.sleep(self._drives[0].real_s(load_s))
        self._asleep -= waking
        if not self._asleep:
            self._is_paused = False
            await self._start_steps()
        return {"load_s": round(load_s, 6)}

    async def _reset_prefix_cache(self, _: Mapping[str, Any]) -> Answer:
        dropped = await self._each(lambda drive: drive.core.scheduler.blocks.drop_cached())
        return {"num_dropped_blocks": sum(dropped)}

    async def _start_profile(self, body: Mapping[str, Any]) -> Answer:
        if self._profile is None:
            folder = Path(_text(body, "output_dir", str(self._profile_folder)))
            prefix = Path(_text(body, "profile_prefix", "steps")).name
            folder.mkdir(parents=True, exist_ok=True)
            self._num_profiles += 1
            path = folder / f"{prefix}-{os.getpid()}-{self._num_profiles}.json.gz"
            self._profile = StepProfile(path, self._drives)
        return {"path": str(self._profile.path)}

    async def _stop_profile(self, _: Mapping[str, Any]) -> Answer:
        profile = self._profile
        self.close()
        return {} if profile is None else {"path": str(profile.path), "num_steps": profile.num_steps}

    # Updates.

    async def _update_faults(self, body: Mapping[str, Any]) -> Answer:
        _check_keys(body, ("faults", "add", "clear"))
        now_s = self._drives[0].now_s()
        wrong = [kind for kind in _list(body, "clear") if not isinstance(kind, str) or kind not in KINDS]
        if wrong:
            raise RequestError(f"clear has {wrong[0]!r}; there are {', '.join(KINDS)}")
        faults, more = _faults(_list(body, "faults")), _faults(_list(body, "add"))
        for kind in _list(body, "clear"):
            self._faults.clear(kind)
        if "faults" in body:
            self._faults.set(faults, now_s)
        self._faults.add(more, now_s)
        return {"faults": self._faults.describe(now_s)}

    async def _update_timing(self, body: Mapping[str, Any]) -> Answer:
        _check_keys(body, ("speedup_ratio", "jitter", "scale", "prefill_scale", "decode_scale"))
        speedup_ratio = _number(body, "speedup_ratio", default=self._drives[0].speedup_ratio, minimum=0)
        jitter_cv = _number(body, "jitter", default=0, minimum=0, maximum=1)
        both = _number(body, "scale", default=0, minimum=1e-6)
        old_prefill, old_decode = (both, both) if "scale" in body else self._scales
        prefill = _number(body, "prefill_scale", default=old_prefill, minimum=1e-6)
        decode = _number(body, "decode_scale", default=old_decode, minimum=1e-6)

        def set_times(drive: RealTimeDrive) -> None:
            times = drive.core.times
            times.set_scale(prefill, decode)
            if "jitter" in body:
                times.set_jitter(StepJitter(jitter_cv, self._seed + drive.dp_rank))

        await self._each(set_times)
        self._scales = (prefill, decode)
        for drive in self._drives:
            if drive.speedup_ratio != speedup_ratio:
                await drive.set_speedup_ratio(speedup_ratio)
        return {"prefill_scale": prefill, "decode_scale": decode}

    async def _update_scheduler(self, body: Mapping[str, Any]) -> Answer:
        _check_keys(body, ("max_num_seqs", "max_num_batched_tokens"))
        old = self._drives[0].core.scheduler.config
        config = replace(
            old,
            max_num_seqs=_whole(body, "max_num_seqs", old.max_num_seqs),
            max_num_batched_tokens=_whole(body, "max_num_batched_tokens", old.max_num_batched_tokens),
        )

        def check(drive: RealTimeDrive) -> None:
            running = drive.core.scheduler.num_running
            tokens_each = 1 if config.speculation is None else 1 + config.speculation.num_tokens
            if running * tokens_each > config.max_num_batched_tokens:
                raise ConfigError(
                    f"max_num_batched_tokens is {config.max_num_batched_tokens}, but {running} sequences run, each of "
                    f"which needs {tokens_each} a step. Lower max_num_seqs first."
                )

        def set_limits(drive: RealTimeDrive) -> None:
            drive.core.scheduler.config = config

        await self._each(check)
        await self._each(set_limits)
        return {"max_num_seqs": config.max_num_seqs, "max_num_batched_tokens": config.max_num_batched_tokens}

    # What they are made of.

    @property
    def _weights_load_s(self) -> float:
        profile = self._engine.profile
        if self._sleep_level == 1:
            return profile.weights_bytes / profile.tp / HOST_BYTES_PER_S
        return profile.weights_bytes / STORAGE_BYTES_PER_S

    async def _stop_steps(self) -> None:
        await asyncio.gather(*(drive.set_paused(True) for drive in self._drives))

    async def _start_steps(self) -> None:
        await asyncio.gather(*(drive.set_paused(False) for drive in self._drives))

    async def _let_go(self, mode: str, clears_cache: bool) -> None:
        """Of paused engines: end the requests that are open, or let them compute again what they lose."""
        if mode == "abort":
            self._cancel_all()
        if clears_cache:
            if mode == "keep":
                await self._each(lambda drive: drive.core.scheduler.preempt_all())
            await self._each(lambda drive: drive.core.scheduler.blocks.drop_cached())


CONTROLS: dict[str, Callable[[Controls, Mapping[str, Any]], Awaitable[Answer]]] = {
    "pause_generation": Controls._pause_generation,
    "resume_generation": Controls._resume_generation,
    "sleep": Controls._sleep,
    "wake_up": Controls._wake_up,
    "release_memory_occupation": Controls._sleep,  # SGLang's and TensorRT-LLM's name
    "resume_memory_occupation": Controls._wake_up,
    "reset_prefix_cache": Controls._reset_prefix_cache,
    "flush_cache": Controls._reset_prefix_cache,  # the name of Dynamo's vLLM and SGLang workers
    "start_profile": Controls._start_profile,
    "stop_profile": Controls._stop_profile,
}
UPDATES: dict[str, Callable[[Controls, Mapping[str, Any]], Awaitable[Answer]]] = {
    "faults": Controls._update_faults,
    "timing": Controls._update_timing,
    "scheduler": Controls._update_scheduler,
}


def _faults(given: Sequence[object]) -> list[Fault]:
    faults = []
    for each in given:
        if not isinstance(each, str | Mapping):
            raise RequestError(f"a fault is {each!r}; write KIND[:key=value,...], or an object with kind and keys")
        fault = parse_fault(each) if isinstance(each, str) else make_fault(each)
        if fault.worker is not None:
            raise RequestError("a fault names a worker; this one is asked already. Leave it out.")
        faults.append(fault)
    return faults


def _check_keys(body: Mapping[str, Any], allowed: Sequence[str]) -> None:
    for key in body:
        if key not in allowed:
            raise RequestError(f"the body has {key!r}; allowed is {', '.join(allowed)}")


def _number(body: Mapping[str, Any], key: str, default: float, minimum: float, maximum: float = float("inf")) -> float:
    value = body.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not minimum <= value <= min(maximum, 1e12):
        high = "" if maximum == float("inf") else f" and at most {maximum:g}"
        raise RequestError(f"{key} is {value!r}; it must be a number, at least {minimum:g}{high}")
    return value


def _whole(body: Mapping[str, Any], key: str, default: int) -> int:
    value = _number(body, key, default, minimum=1)
    if value != int(value):
        raise RequestError(f"{key} is {value!r}; it must be a whole number")
    return int(value)


def _choice(body: Mapping[str, Any], key: str, allowed: Sequence[str], default: str) -> str:
    value = body.get(key)
    if value is None:
        return default
    if value not in allowed:
        raise RequestError(f"{key} is {value!r}; allowed is {', '.join(allowed)}")
    return str(value)


def _text(body: Mapping[str, Any], key: str, default: str) -> str:
    value = body.get(key)
    if value is None:
        return default
    if not isinstance(value, str) or not value:
        raise RequestError(f"{key} is {value!r}; it must be a text")
    return value


def _list(body: Mapping[str, Any], key: str) -> list[Any]:
    value = body.get(key)
    if value is None:
        return []
    if not isinstance(value, list):
        raise RequestError(f"{key} is {value!r}; it must be a list")
    return value


def _tags(body: Mapping[str, Any]) -> frozenset[str]:
    """What a body says of: weights, kv_cache, or both."""
    tags = _list(body, "tags") or sorted(_MEMORY)
    wrong = [tag for tag in tags if not isinstance(tag, str) or tag not in _MEMORY]
    if wrong:
        raise RequestError(f"tags has {wrong[0]!r}; allowed is {', '.join(sorted(_MEMORY))}")
    return frozenset(tags)
