"""
Clients of a real-time drive, on a loop whose time jumps.

    times = await consume(drive, drive.submit([request]))
    await send_all(drive, workload)
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from mock_engine.drive_realtime import RealTimeDrive, Stream
from tests.helpers.jumping_loop import now_s
from tests.helpers.workloads import Arrival


async def consume(drive: RealTimeDrive, stream: Stream, seconds_per_token: float = 0.0) -> list[float]:
    """Take everything; return the loop's time at which each token came out."""
    times = []
    while tokens := await stream.next_tokens():
        drive.note_sent(stream, tokens)
        for _ in tokens:
            times.append(now_s())
            await asyncio.sleep(seconds_per_token)
        if tokens[-1].is_last:
            break
    return times


async def send_all(drive: RealTimeDrive, workload: Sequence[Arrival]) -> None:
    """Send each request at its time, cancel it at its time, and read it to its end: it is whole, or cancelled."""

    async def client(arrival: Arrival) -> None:
        await asyncio.sleep(arrival.at_step * 0.005)
        stream = drive.submit([arrival.request])
        if arrival.cancel_at_step is not None:
            asyncio.get_running_loop().call_later(
                (arrival.cancel_at_step - arrival.at_step) * 0.004, drive.cancel, stream
            )
        times = await consume(drive, stream)
        assert stream.is_cancelled or len(times) == arrival.request.osl_tokens

    await asyncio.gather(*map(client, workload))
