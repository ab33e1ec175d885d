"""
One worker behind Dynamo's frontend, under load for half an hour, while everything is done to it that can be.

    python reports/soak.py --minutes 30 --out reports/soak.md

64 streams of random lengths, a third of which are cancelled; some ask for log probabilities, JSON, tools, an adapter or
to be served first. Two data-parallel ranks decode speculatively and tell Dynamo's KV router what they hold, with too
few KV blocks for all; every few seconds a fault is switched on and off again, or a control is called. Nothing may be
left: memory must be flat, no token later at the end than before, and every block back. Exits 1 if it is not so.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import shlex
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil  # type: ignore[import-untyped]

from mock_engine.bench_results import find_commit
from mock_engine.engine_settings import EngineSettings
from mock_engine.fleet import Fleet, FleetSettings
from mock_engine.plot_style import BLUE, DPI, ORANGE, plain
from mock_engine.processes import http_json
from mock_engine.router_settings import RouterSettings
from mock_engine.worker_settings import WorkerSettings

_NUM_STREAMS = 64
_NUM_RANKS = 2
_NUM_BLOCKS = 700  # of each rank: about half of what its streams would like to have
_SAMPLE_S = 2.0
_ON_S = (1.0, 4.0)  # for how long something is switched on
_OFF_S = (0.5, 2.0)
_WARM_UP = 0.3  # share of the run in which memory may still grow
_MAX_GROWTH = 0.02  # of the memory, over the rest of it
_MAX_LATER_S = 0.02  # the median token, at the end against the end of the warm-up
_CLIENT_TIMEOUT_S = 15.0

_ADAPTER = "soak-adapter"
_SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "degrees": {"type": "integer"}},
    "required": ["city", "degrees"],
    "additionalProperties": False,
}
_TOOL = {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": _SCHEMA}}
# What requests ask for beside tokens; the first, nothing, as often as all others together.
_WISHES: tuple[dict[str, Any], ...] = (
    {"logprobs": True, "top_logprobs": 3},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "weather", "schema": _SCHEMA}}},
    {"tools": [_TOOL]},
    {"model": _ADAPTER},
    {"nvext": {"agent_hints": {"priority": 5}}},
    {"stop": ["word"]},
)

# Found by running each fault and each wish alone, with ai-dynamo 1.4.2: unset, the same load has no step.
_STEP = (
    "Where RUST_BACKTRACE=1 is set, as it was here, memory steps up once by some 50 MB: when Dynamo's runtime prints "
    "its first stack backtrace (a client has gone, and a pipe is broken), it reads the symbols of its library and "
    "keeps them. Unset, there is no step."
)

# What is done, and what undoes it: the path after /engine/, and the body.
Call = tuple[str, dict[str, Any]]
_NO_FAULTS: Call = ("update/faults", {"faults": []})
_SCALE_ONE: Call = ("update/timing", {"scale": 1})
_LIMITS: Call = ("update/scheduler", {"max_num_seqs": 256})
_ACTIONS: dict[str, tuple[Call, Call]] = {
    **{
        fault: (("update/faults", {"faults": [fault]}), _NO_FAULTS)
        for fault in (
            "kv:share=0.8",
            "kv:share=1,for=2",
            "stall:seconds=0.3,rate=0.05",
            "slow:factor=3,rank=1",
            "error:rate=0.2",
            "error:rate=0.3,tokens=5,type=InvalidArgument",
            "hang:rate=0.1,tokens=3",
            "slow-ttft:seconds=1,rate=0.5",
            "kv-events:rate=0.3",
        )
    },
    "pause_generation": (("control/pause_generation", {}), ("control/resume_generation", {})),
    "pause_generation, abort": (("control/pause_generation", {"mode": "abort"}), ("control/resume_generation", {})),
    "sleep, level 1": (("control/sleep", {"level": 1}), ("control/wake_up", {})),
    "sleep, level 2, keep": (("control/sleep", {"level": 2, "mode": "keep"}), ("control/wake_up", {"seconds": 1})),
    "reset_prefix_cache": (("control/reset_prefix_cache", {}), ("control/reset_prefix_cache", {})),
    "start_profile": (("control/start_profile", {}), ("control/stop_profile", {})),
    "scale=1.5": (("update/timing", {"scale": 1.5}), _SCALE_ONE),
    "max_num_seqs=8": (("update/scheduler", {"max_num_seqs": 8}), _LIMITS),
}


@dataclass(slots=True)
class Soak:
    """What happened."""

    times_s: list[float] = field(default_factory=list)
    worker_mb: list[float] = field(default_factory=list)
    lateness_p50_ms: list[float] = field(default_factory=list)
    lateness_p99_ms: list[float] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    actions: Counter[str] = field(default_factory=Counter)
    failed_calls: list[str] = field(default_factory=list)
    num_tokens: int = 0
    num_preemptions: int = 0
    clock_drift_ms: float = 0.0
    final: dict[str, Any] = field(default_factory=dict)


class Soaker:
    """Clients, a disturber and a sampler of one fleet."""

    def __init__(self, fleet: Fleet, seed: int) -> None:
        self.soak = Soak()
        self._fleet = fleet
        self._random = random.Random(seed)
        self._is_over = False
        self._worker = psutil.Process(fleet.parts[-1].process.pid)
        self._engine = fleet.metrics_urls["worker-0"].removesuffix("/metrics") + "/engine"

    async def run(self, seconds: float) -> Soak:
        first = await self._state()
        offset_s = first["time_s"] - time.monotonic()
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=_CLIENT_TIMEOUT_S)
        ) as session:
            clients = [asyncio.create_task(self._client(session)) for _ in range(_NUM_STREAMS)]
            disturber = asyncio.create_task(self._disturb())
            sampler = asyncio.create_task(self._sample())
            await asyncio.sleep(seconds)
            self._is_over = True
            await asyncio.gather(disturber, sampler, *clients)
        for path, body in (_NO_FAULTS, _SCALE_ONE):
            await self._call(path, body)
        await asyncio.sleep(1.0)
        last = await self._state()
        self.soak.clock_drift_ms = abs(last["time_s"] - time.monotonic() - offset_s) * 1e3
        self.soak.final = last
        status = self._fleet.status(0)
        assert status is not None
        self.soak.num_tokens, self.soak.num_preemptions = status.num_output_tokens, status.num_preemptions
        return self.soak

    async def _state(self) -> dict[str, Any]:
        return await self._call("update/faults", {})

    async def _call(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer: dict[str, Any] = await asyncio.to_thread(http_json, f"{self._engine}/{path}", body, 30.0)
        if answer["status"] != "ok":
            self.soak.failed_calls.append(f"{path} {body}: {answer['message']}")
        return answer

    async def _client(self, session: aiohttp.ClientSession) -> None:
        while not self._is_over:
            outcome = await self._request(session)
            self.soak.outcomes[outcome] += 1
            if outcome != "answered":
                await asyncio.sleep(0.05)

    async def _request(self, session: aiohttp.ClientSession) -> str:
        draw = self._random
        num_words, max_tokens = draw.randint(1, 400), draw.randint(1, 300)
        cancel_after = draw.randint(0, max_tokens) if draw.random() < 1 / 3 else None
        words = f"{draw.randint(0, 9)} word " * num_words  # ten families of prompts that share their beginnings
        body = {
            "model": self._fleet.model,
            "messages": [{"role": "user", "content": words}],
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "stream": True,
            **(draw.choice(_WISHES) if draw.random() < 0.5 else {}),
        }
        try:
            async with session.post(f"{self._fleet.url}/v1/chat/completions", json=body) as response:
                if response.status != 200:
                    return f"HTTP {response.status}"
                num_lines = 0
                async for line in response.content:
                    if line.startswith(b'data: {"error"'):
                        return "an error mid-stream"
                    num_lines += line.startswith(b"data: {")
                    if cancel_after is not None and num_lines >= cancel_after:
                        return "cancelled by the client"
            return "answered"
        except TimeoutError:
            return "given up by the client"
        except aiohttp.ClientError as error:
            return type(error).__name__

    async def _disturb(self) -> None:
        while not self._is_over:
            names = list(_ACTIONS)
            self._random.shuffle(names)
            for name in names:
                if self._is_over:
                    return
                on, off = _ACTIONS[name]
                await self._call(*on)
                await asyncio.sleep(self._random.uniform(*_ON_S))
                await self._call(*off)
                self.soak.actions[name] += 1
                await asyncio.sleep(self._random.uniform(*_OFF_S))

    async def _sample(self) -> None:
        start_s = time.monotonic()
        while not self._is_over:
            await asyncio.sleep(_SAMPLE_S)
            self._fleet.check()
            status = self._fleet.status(0)
            if status is None or status.lateness_p50_s is None or status.lateness_p99_s is None:
                continue
            self.soak.times_s.append(time.monotonic() - start_s)
            self.soak.worker_mb.append(self._worker.memory_info().rss / 1e6)
            self.soak.lateness_p50_ms.append(status.lateness_p50_s * 1e3)
            self.soak.lateness_p99_ms.append(status.lateness_p99_s * 1e3)


def verdicts(soak: Soak) -> list[tuple[str, bool, str]]:
    """What is asked, whether it is so, and the figures."""
    times_s, worker_mb = np.array(soak.times_s), np.array(soak.worker_mb)
    is_warm = times_s >= _WARM_UP * times_s[-1]
    slope_mb_per_s = float(np.polyfit(times_s[is_warm], worker_mb[is_warm], 1)[0])
    growth_mb = slope_mb_per_s * float(times_s[-1] - times_s[is_warm][0])
    warm, end = soak.lateness_p50_ms[int(np.argmax(is_warm))], soak.lateness_p50_ms[-1]
    final = soak.final
    in_use = {name: final[name] for name in ("num_running", "num_waiting", "kv_used_blocks", "kv_held_blocks")}
    return [
        (
            "memory is flat",
            growth_mb <= _MAX_GROWTH * worker_mb[-1],
            f"RSS {worker_mb[is_warm][0]:.1f} MB after the warm-up, {worker_mb[-1]:.1f} MB at the end; the line "
            f"through it grows by {growth_mb:.2f} MB, {slope_mb_per_s * 3600:.1f} MB an hour",
        ),
        (
            "no drift",
            end - warm <= _MAX_LATER_S * 1e3 and soak.clock_drift_ms < 50,
            f"the median token is {end:.2f} ms late, {warm:.2f} ms at the end of the warm-up (p99 "
            f"{soak.lateness_p99_ms[-1]:.1f} ms); model time is off by {soak.clock_drift_ms:.1f} ms, with an HTTP call",
        ),
        (
            "every block is back",
            not any(in_use.values()),
            ", ".join(f"{name} {number}" for name, number in in_use.items()) + f" of {final['kv_total_blocks']} blocks",
        ),
        ("every call did what it was to", not soak.failed_calls, f"{soak.failed_calls[:3] or 'none failed'}"),
        (
            "clients were served",
            soak.outcomes["answered"] > 0,
            ", ".join(f"{number:,} {what}" for what, number in soak.outcomes.most_common()),
        ),
    ]


def report(soak: Soak, minutes: float, picture: Path | None) -> str:
    """The page."""
    lines = [
        f"# {minutes:g} minutes of everything",
        "",
        f"    python {shlex.join(['reports/soak.py', '--minutes', f'{minutes:g}'])}",
        "",
        f"Commit {find_commit()}; mock-engine {version('mock-engine')}, ai-dynamo {version('ai-dynamo')}, "
        f"Python {sys.version.split()[0]}; {os.cpu_count()} cores.",
        f"One worker of {_NUM_RANKS} data-parallel ranks with {_NUM_BLOCKS} KV blocks each, KV routing, {_NUM_STREAMS} "
        f"streams, draft tokens, priorities, thoughts, tools, an adapter; "
        f"{minutes:g} minutes, {soak.num_tokens:,} tokens, {soak.num_preemptions:,} preemptions.",
        "",
        "| | | |",
        "|---|---|---|",
    ]
    lines += [f"| {what} | {'pass' if is_so else '**FAIL**'} | {figures} |" for what, is_so, figures in verdicts(soak)]
    lines += ["", "What was switched on and off again, and how often:", ""]
    lines += [f"- `{name}`: {number}" for name, number in sorted(soak.actions.items())]
    if picture is not None:
        lines += ["", f"![Memory and lateness over the run]({picture.name})"]
    if os.environ.get("RUST_BACKTRACE", "0") != "0":
        lines += ["", _STEP]
    return "\n".join(lines) + "\n"


def draw(soak: Soak, path: Path) -> None:
    """Memory and lateness over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (memory, late) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 4.5))
    minutes = np.array(soak.times_s) / 60
    memory.plot(minutes, soak.worker_mb, color=BLUE)
    memory.set(ylabel="RSS, MB", ylim=(0, max(soak.worker_mb) * 1.15))
    late.plot(minutes, soak.lateness_p50_ms, color=BLUE, label="p50")
    late.plot(minutes, soak.lateness_p99_ms, color=ORANGE, label="p99")
    late.set(ylabel="lateness so far, ms", xlabel="minutes", yscale="log")
    late.legend(frameon=False)
    for panel in (memory, late):
        plain(panel)
    figure.tight_layout()
    figure.savefig(path, dpi=DPI)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a page, and a picture beside it")
    flags = parser.parse_args(argv)
    os.environ["DYN_LOG"] = "error"
    engine = EngineSettings(
        num_gpu_blocks_override=_NUM_BLOCKS,
        max_model_len=2048,
        max_num_seqs=256,
        num_speculative_tokens=2,
        scheduling_policy="priority",
        seed=flags.seed,
    )
    worker = WorkerSettings(
        engine,
        data_parallel_size=_NUM_RANKS,
        lora_modules=(f"{_ADAPTER}=0.5",),
        reasoning_ratio=0.3,
    )
    settings = FleetSettings(worker, router=RouterSettings(router_mode="kv"), port=0)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        os.environ["TMPDIR"] = folder  # where profiled steps go
        with Fleet(settings, Path(folder) / "fleet") as fleet:
            soak = asyncio.run(Soaker(fleet, flags.seed).run(flags.minutes * 60))
    for what, is_so, figures in verdicts(soak):
        print(f"{'pass' if is_so else 'FAIL'}  {what}: {figures}")
    if flags.out is not None:
        picture = flags.out.with_suffix(".png")
        draw(soak, picture)
        flags.out.write_text(report(soak, flags.minutes, picture), encoding="utf-8")
    return 0 if all(is_so for _, is_so, _ in verdicts(soak)) else 1


if __name__ == "__main__":
    sys.exit(main())
