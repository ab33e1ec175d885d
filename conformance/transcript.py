"""
What was said in one request, with times; and the pure checks' way to say that a rule is broken.

Recording is asynchronous (`streams`), checking is not: a check takes transcripts
and raises `Violation` through `expect`.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from conformance.release import CANCELLED

_SHORT = reprlib.Repr()
_SHORT.maxdict = 12
_SHORT.maxlist = _SHORT.maxtuple = 12
_SHORT.maxstring = _SHORT.maxother = 120
_SHORT.maxlevel = 5


class Violation(AssertionError):
    """A rule is broken. The message says what was found and what the rule wants."""

    def __init__(
        self,
        message: str,
        transcripts: Sequence[Transcript] = (),
        *,
        shows: str = "",
        code: str = "",
        is_should: bool = False,
    ) -> None:
        super().__init__(message)
        self.transcripts = list(transcripts)
        self.shows = shows
        self.code = code
        self.is_should = is_should


def expect(
    condition: object,
    message: str,
    *transcripts: Transcript,
    shows: str = "",
    code: str = "",
    is_should: bool = False,
) -> None:
    """
    Raise `Violation` unless `condition`.

    `is_should`: this part of a MUST rule is only a SHOULD. The reproducing script is made from one of these:

    `shows`: a Python expression over `chunks` (those of the first transcript; `others` has the chunks of
    the rest) that is true where the rule holds. `code`: where no conversation shows it, the lines of an
    `async def main()` that do, with the names `Engine`, `ARGV` and `asyncio`; they raise where the rule is broken.
    """
    if not condition:
        raise Violation(message, transcripts, shows=shows, code=code, is_should=is_should)


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened, seconds after the conversation was opened."""

    time_s: float
    # chunk, end, error; stop, kill, abort, drop, cancel: done by the suite; hang: not over in time;
    # of the worker driver only, gone: Dynamo's bridge let go of a stopped stream before it had ended; refused: it
    # did not take a chunk, and told the client so
    kind: str
    value: Any = None


@dataclass(slots=True)
class Transcript:
    """One request and all that happened to it."""

    request_id: str
    request: Mapping[str, Any]
    events: list[Event] = field(default_factory=list)

    def of_kind(self, *kinds: str) -> list[Event]:
        return [event for event in self.events if event.kind in kinds]

    @property
    def chunks(self) -> list[Any]:
        return [event.value for event in self.events if event.kind == "chunk"]

    @property
    def error(self) -> BaseException | None:
        errors = self.of_kind("error")
        return errors[0].value if errors else None

    @property
    def refusal(self) -> BaseException | None:
        """What the client got instead of a chunk that Dynamo's bridge did not take."""
        refusals = self.of_kind("refused")
        return refusals[0].value if refusals else None

    @property
    def is_hung(self) -> bool:
        return bool(self.of_kind("hang"))

    @property
    def was_let_go(self) -> bool:
        """Nobody knows how it would have ended: the real bridge reads two more chunks of a stopped stream, no more."""
        return bool(self.of_kind("gone"))

    @property
    def terminals(self) -> list[int]:
        """Which chunks have a finish_reason."""
        return [i for i, chunk in enumerate(self.chunks) if isinstance(chunk, Mapping) and chunk.get("finish_reason")]

    @property
    def last(self) -> Mapping[str, Any]:
        """The terminal chunk; {} if there is none."""
        terminals = self.terminals
        return self.chunks[terminals[-1]] if terminals else {}

    @property
    def finish_reason(self) -> Any:
        return self.last.get("finish_reason")

    @property
    def is_cancelled(self) -> bool:
        return isinstance(self.finish_reason, str) and self.finish_reason in CANCELLED

    @property
    def token_ids(self) -> list[int]:
        """All output tokens in order, over all choices. Chunks of a wrong shape count as empty."""
        tokens: list[int] = []
        for chunk in self.chunks:
            tokens.extend(tokens_of(chunk))
        return tokens

    def chunks_after(self, *kinds: str) -> list[Any]:
        """The chunks that came after the first event of one of `kinds`."""
        for i, event in enumerate(self.events):
            if event.kind in kinds:
                return [later.value for later in self.events[i + 1 :] if later.kind == "chunk"]
        return []

    def seconds_from(self, kind: str) -> float:
        """Seconds from the first `kind` to the last event."""
        return self.events[-1].time_s - self.of_kind(kind)[0].time_s

    def lines(self) -> list[str]:
        """For people: one line an event."""
        return [f"{event.time_s:9.4f} s  {event.kind:<6}  {_short(event)}".rstrip() for event in self.events]

    def request_json(self) -> str:
        return json.dumps(self.request, default=repr)


def tokens_of(chunk: Any) -> list[int]:
    """The token ids of one chunk; [] if it has none that can be read."""
    if not isinstance(chunk, Mapping):
        return []
    token_ids = chunk.get("token_ids")
    if isinstance(token_ids, str) or not isinstance(token_ids, Sequence | set | frozenset):
        return []
    return list(token_ids)


def _short(event: Event) -> str:
    if event.value is None:
        return ""
    if isinstance(event.value, BaseException):
        return f"{type(event.value).__name__}: {event.value}"
    return _SHORT.repr(event.value)
