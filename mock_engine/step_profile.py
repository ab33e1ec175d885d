"""
The steps of a live engine as a picture to look into, as a profiler of a real one gives.

    profile = StepProfile(Path("steps.json.gz"), drives)      from now on
    profile.close()                                           until now

The file is Chrome's Trace Event Format, which ui.perfetto.dev opens: each data-parallel rank is a process of it, with a
span for each step, and counters of requests and KV blocks. Times are model microseconds since the engine started.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from mock_engine.core import Step
from mock_engine.drive_realtime import RealTimeDrive
from mock_engine.event_file import EventFile


class StepProfile:
    """Writes `path`, packed if its name ends in .gz. Raises `ConfigError` if it cannot be written."""

    def __init__(self, path: Path, drives: Sequence[RealTimeDrive]) -> None:
        self.path = path
        self.num_steps = 0
        self._file = EventFile(path)
        self._drives = drives
        for drive in drives:
            name = {"name": f"dp rank {drive.dp_rank}"}
            self._file.events.append(_event("M", "process_name", drive.dp_rank, args=name))
            drive.profiler = self._observer_of(drive)

    def close(self) -> None:
        """Write the rest, and close. Safe twice."""
        for drive in self._drives:
            drive.profiler = None
        if not self._file.is_closed:
            self._file.close()

    def _observer_of(self, drive: RealTimeDrive) -> Callable[[Step, float, float], None]:
        def note(step: Step, start_s: float, end_s: float) -> None:
            load, scheduler = step.schedule.load, drive.core.scheduler
            start_us, end_us = self._file.moment(start_s), self._file.moment(end_s)
            num_new = sum(chunk.new_tokens for chunk in load.prefill_chunks)
            kinds = [kind for kind, number in (("prefill", num_new), ("decode", load.decode_batch_size)) if number]
            args = {
                "prefill_tokens": num_new,
                "prefill_sequences": len(load.prefill_chunks),
                "decode_sequences": load.decode_batch_size,
                "context_tokens": load.context_tokens,
            }
            name, rank = " + ".join(kinds), drive.dp_rank
            self._file.events += [
                _event("X", name, rank, start_us, args, dur=end_us - start_us),
                _event("C", "requests", rank, start_us, _requests(drive)),
                _event(
                    "C",
                    "KV blocks",
                    rank,
                    start_us,
                    {"used": scheduler.blocks.num_used, "cached": scheduler.blocks.num_cached},
                ),
            ]
            self.num_steps += 1

        return note


def _requests(drive: RealTimeDrive) -> dict[str, int]:
    return {"running": drive.core.scheduler.num_running, "waiting": drive.num_waiting}


def _event(phase: str, name: str, rank: int, at_us: int = 0, args: object = None, **more: int) -> str:
    event = {"ph": phase, "name": name, "pid": rank + 1, "tid": 1, "ts": at_us, "args": args, **more}
    return json.dumps(event, separators=(",", ":"))
