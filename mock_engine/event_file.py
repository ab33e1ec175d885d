"""
A file of Chrome's Trace Event Format, written while it grows.

    file = EventFile(Path("timeline.json.gz"))
    at_us = file.moment(time_s)
    file.events.append('{"ph":"B",...}')       JSON, in ASCII
    file.close()
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path

from mock_engine.errors import ConfigError

_BATCH = 1024  # events written at once


class EventFile:
    """A JSON document that ends in an array of events. Those appended to `events` are written now and then."""

    def __init__(self, path: Path) -> None:
        self.events: list[str] = []
        self.now_us = 0  # the last moment there was
        self._path = path
        self._between = ""
        self._pack: Callable[[bytes], bytes] = bytes
        self._pack_rest: Callable[[], bytes] = bytes
        if path.suffix == ".gz":
            gzip = zlib.compressobj(wbits=31)  # with a header that holds neither name nor time
            self._pack, self._pack_rest = gzip.compress, gzip.flush
        try:
            self._file = path.open("wb", buffering=0)
        except OSError as error:
            raise self._cannot_write(error) from error
        self._write(b'{"displayTimeUnit":"ms","traceEvents":[\n')

    @property
    def is_closed(self) -> bool:
        return self._file.closed

    def moment(self, time_s: float) -> int:
        """That time in microseconds; something happens then."""
        if len(self.events) >= _BATCH:
            self._write_events()
        at_us = round(time_s * 1e6)
        self.now_us = max(self.now_us, at_us)
        return at_us

    def close(self) -> None:
        """Write the rest, and close."""
        self._write_events()
        self._write(b"\n]}\n")
        self._pack = lambda _: self._pack_rest()
        self._write(b"")
        self._file.close()

    def _write_events(self) -> None:
        if self.events:
            self._write((self._between + ",\n".join(self.events)).encode("ascii"))

    def _write(self, data: bytes) -> None:
        packed = map(self._pack, (data,))
        try:
            # From here on there is one call, into C: no interrupt comes between forgetting, packing and writing.
            self._between = ",\n" if self.events else ""
            del self.events[:]
            self._file.writelines(packed)
        except OSError as error:
            self._file.close()
            raise self._cannot_write(error) from error

    def _cannot_write(self, error: OSError) -> ConfigError:
        return ConfigError(f"cannot write the timeline to {self._path}: {error.strerror}. Name another file.")
