"""
A small engine as Dynamo's bridge drives it, on a loop whose time jumps.

    async with serving("--fault", "slow") as engine:
        answer = await answer_of(engine, max_tokens=5)

Needs the fixture `no_wall_clock` of conftest.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from conformance.bridge import BridgeStream
from conformance.context import RequestContext
from mock_engine.llm_engine import MockLLMEngine
from tests.helpers.jumping_loop import now_s
from tests.helpers.workloads import check_blocks

NUM_BLOCKS = 24
BLOCK_SIZE = 8
MAX_MODEL_LEN = 128
DEFAULT_OSL = 12
SMALL = (
    f"--max-model-len {MAX_MODEL_LEN} --block-size {BLOCK_SIZE} --num-gpu-blocks-override {NUM_BLOCKS} "
    f"--max-num-seqs 4 --max-num-batched-tokens 32 --default-osl {DEFAULT_OSL} --jitter 0"
).split()
PROMPT = tuple(range(100, 140))


@asynccontextmanager
async def serving(*flags: str) -> AsyncIterator[MockLLMEngine]:
    """An engine that has started. When the block is over, nothing of any request may be left."""
    threads = set(threading.enumerate())
    engine, _ = await MockLLMEngine.from_args([*SMALL, *flags])
    await engine.start(1)
    try:
        async with asyncio.timeout(1000):  # of the loop's time, so a read that never ends fails at once
            yield engine
        check_nothing_left(engine)
    finally:
        await engine.cleanup()
    check_nothing_left(engine)
    assert set(threading.enumerate()) <= threads


def check_nothing_left(engine: MockLLMEngine) -> None:
    """No request is remembered, and no block taken but by a fault."""
    for drive in engine._drives:
        scheduler = drive.core.scheduler
        check_blocks(drive.core)
        assert scheduler.blocks.num_used == scheduler.num_held_blocks
        assert not scheduler.num_held_blocks or not engine.faults.is_empty
        assert not scheduler.num_running
        assert not scheduler.waiting
        assert not drive.streams
        assert not drive._arrivals
    assert not engine._open


@dataclass
class Answer:
    """What came of one request, and at which of the loop's seconds."""

    tokens: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    error: Exception | None = None


async def answer_of(
    engine: MockLLMEngine,
    max_tokens: int = 5,
    prompt: tuple[int, ...] = PROMPT,
    context: RequestContext | None = None,
    request_id: str = "r",
) -> Answer:
    """Send a request and read all of its answer."""
    request = {"token_ids": list(prompt), "stop_conditions": {"max_tokens": max_tokens, "ignore_eos": True}}
    stream = BridgeStream(engine, request, context or RequestContext(request_id))
    answer = Answer()
    try:
        while (chunk := await stream.read()) is not None:
            answer.tokens += chunk["token_ids"]
            answer.times_s += [now_s()] * len(chunk["token_ids"])
            answer.finish_reason = chunk.get("finish_reason")
            answer.usage = chunk.get("completion_usage", {})
    except Exception as error:
        answer.error = error
    finally:
        await stream.drop()
    return answer
