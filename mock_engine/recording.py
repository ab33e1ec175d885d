"""
A worker's recording while it runs: states four times a second, requests as they end.

    recording = Recording(Recorder(folder, status_path), drives, num_open)
    recording.start()
    recording.add(live)              on any thread
    await recording.stop()
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from mock_engine.drive_realtime import RealTimeDrive
from mock_engine.live_request import LiveRequest
from mock_engine.recorder import Recorder, RequestRow, TimelineRow
from mock_engine.speculation import SpeculationCounts

INTERVAL_S = 0.25


class Recording:
    """Writes what `drives` do. `num_open` counts the requests that somebody waits for."""

    def __init__(self, recorder: Recorder, drives: Sequence[RealTimeDrive], num_open: Callable[[], int]) -> None:
        self._recorder = recorder
        self._drives = drives
        self._num_open = num_open
        self._ended: deque[RequestRow] = deque()  # written by `_write`, which alone touches the files
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to write, on the current event loop."""
        self._task = asyncio.get_running_loop().create_task(self._run(), name="mock-engine-record")

    def add(self, live: LiveRequest) -> None:
        """This request has ended, in whatever way."""
        if self._recorder.keeps_requests:
            self._ended.extend(live.rows())

    async def stop(self) -> None:
        """Write what is left, and close the files."""
        if self._task is not None:  # else the engine did not start, and there is nothing to tell
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._write()
        self._recorder.close()

    async def _run(self) -> None:
        while True:
            self._write()
            await asyncio.sleep(INTERVAL_S)

    def _write(self) -> None:
        while self._ended:
            self._recorder.add_request(self._ended.popleft())
        drives = self._drives
        schedulers = [drive.core.scheduler for drive in drives]
        counts = SpeculationCounts.total(filter(None, (scheduler.speculation_counts for scheduler in schedulers)))
        self._recorder.add_state(
            TimelineRow(
                unix_s=time.time(),
                time_s=drives[0].now_s(),
                num_open_requests=self._num_open(),
                num_running=sum(scheduler.num_running for scheduler in schedulers),
                num_waiting=sum(drive.num_waiting for drive in drives),
                kv_used_blocks=sum(scheduler.blocks.num_used for scheduler in schedulers),
                kv_cached_blocks=sum(scheduler.blocks.num_cached for scheduler in schedulers),
                kv_total_blocks=sum(scheduler.blocks.num_blocks for scheduler in schedulers),
                num_output_tokens=sum(drive.num_output_tokens for drive in drives),
                num_preemptions=sum(scheduler.num_preemptions for scheduler in schedulers),
                prefix_queries_tokens=sum(scheduler.num_prefix_queries_tokens for scheduler in schedulers),
                prefix_hits_tokens=sum(scheduler.num_prefix_hits_tokens for scheduler in schedulers),
                lateness_p50_s=_worst(drives, 0.5),
                lateness_p99_s=_worst(drives, 0.99),
                cpu_s=time.process_time(),
                num_tasks=len(asyncio.all_tasks()),
                num_threads=threading.active_count(),
                num_drafts=counts.num_drafts,
                num_draft_tokens=counts.num_draft_tokens,
                num_accepted_tokens=counts.num_accepted_tokens,
            )
        )


def _worst(drives: Sequence[RealTimeDrive], quantile: float) -> float | None:
    """That quantile of tokens' lateness, of the rank where it is largest."""
    found = [drive.lateness.quantile_s(quantile) for drive in drives]
    return max((value for value in found if value is not None), default=None)
