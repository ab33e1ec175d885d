"""
What is to go wrong with an engine on purpose, and when.

    fault = parse_fault("kv:share=0.9,at=10,for=5")     a flag: KIND[:key=value,...]
    faults = read_faults(Path("faults.toml"))           a file: [[fault]] tables with `kind` and the same keys
    fault = make_fault({"kind": "stall", "seconds": 2}) JSON, of a control call
    fault.to_text()                                     the flag again

A mistake is one `ConfigError`. What becomes of faults while an engine runs is up to `fault_injector`; each kind
is described in docs/faults.md. Times are model seconds, from when the fault was set: at the start of the engine, or
by a control call.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from mock_engine.errors import ConfigError

# Of `dynamo.llm.exceptions`, in every release that we support. What each does to clients, and to the worker in Dynamo's
# router: docs/faults.md.
ERROR_TYPES = (
    "Unknown",
    "InvalidArgument",
    "Cancelled",
    "EngineShutdown",
    "StreamIncomplete",
    "Disconnected",
    "CannotConnect",
    "ConnectionTimeout",
)
DEATH_STATUS = 86  # exit status of a process that a fault has ended
KV_EVENTS = ("all", "stored", "removed")
_WINDOW = ("at", "for", "every", "after_requests", "after_tokens", "rank", "worker")
_HITS = (*_WINDOW, "rate", "times")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """
    When a fault is there: from `at_s` on, for `for_s`, and again every `every_s`.

    With `after_requests` or `after_tokens`, seconds count from when the engine has taken so many requests, or made
    so many output tokens, since the fault was set.
    """

    kind: ClassVar[str]
    keys: ClassVar[tuple[str, ...]]  # that this kind has

    at_s: float = 0.0
    for_s: float | None = None  # to the end
    every_s: float | None = None  # once
    rate: float | None = None  # share of what it could hit that it hits; all
    times: int | None = None  # hits at most
    after_requests: int = 0
    after_tokens: int = 0
    rank: int | None = None  # the data-parallel rank that has it; all
    worker: int | None = None  # the worker of `serve` that has it; all

    def __post_init__(self) -> None:
        if self.every_s is not None and self.for_s is not None and self.for_s > self.every_s:
            raise ConfigError(
                f"{self._name}: for={self.for_s:g} is longer than every={self.every_s:g}. Lower the first."
            )

    def window(self, elapsed_s: float) -> int | None:
        """Which of its windows the moment `elapsed_s` after it was set lies in, from 0; None if in none."""
        since_s = elapsed_s - self.at_s
        if since_s < 0:
            return None
        number = 0.0
        if self.every_s is not None:
            number, since_s = divmod(since_s, self.every_s)
        return int(number) if self.for_s is None or since_s < self.for_s else None

    def to_mapping(self) -> dict[str, Any]:
        """What `make_fault` makes it of."""
        given = {name: getattr(self, _KEYS[name].field) for name in self.keys}
        defaults = {field.name: field.default for field in fields(self)}
        changed = {name: value for name, value in given.items() if value != defaults[_KEYS[name].field]}
        return {"kind": self.kind, **changed}

    def to_text(self) -> str:
        """What `parse_fault` makes it of."""
        kind, *rest = self.to_mapping().items()
        values = ",".join(f"{name}={value}" for name, value in rest)
        return f"{kind[1]}:{values}" if values else f"{kind[1]}"

    @property
    def _name(self) -> str:
        return f"fault {self.kind!r}"


@dataclass(frozen=True, slots=True, kw_only=True)
class KvExhaustion(Fault):
    """KV blocks are taken away, as if a sequence held them: `share` of all there are, or so many."""

    kind = "kv"
    keys = ("share", "blocks", *_WINDOW)
    share: float | None = None
    blocks: int | None = None

    def __post_init__(self) -> None:
        super(KvExhaustion, self).__post_init__()
        if (self.share is None) == (self.blocks is None):
            raise ConfigError(f"{self._name} needs one of share=SHARE and blocks=NUMBER")

    def num_blocks(self, total: int) -> int:
        """How many of `total` blocks it takes."""
        return int(self.share * total) if self.share is not None else min(total, self.blocks or 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stall(Fault):
    """A step takes `seconds` more: of each window the first, with `for` or `rate` all or a share of those in it."""

    kind = "stall"
    keys = ("seconds", *_HITS)
    seconds: float = 1.0

    @property
    def is_once(self) -> bool:
        return self.for_s is None and self.rate is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Slow(Fault):
    """Steps take `factor` times as long."""

    kind = "slow"
    keys = ("factor", *_WINDOW)
    factor: float = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SlowStart(Fault):
    """Starting takes `seconds` more."""

    kind = "slow-start"
    keys = ("seconds", "worker")
    seconds: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedStart(Fault):
    """Starting fails, with EngineShutdown and `message`."""

    kind = "failed-start"
    keys = ("message", "worker")
    message: str = "CUDA out of memory (a fault that was asked for)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Death(Fault):
    """The process ends at once, as by SIGKILL: nothing is said to anybody."""

    kind = "die"
    keys = ("at", "after_requests", "after_tokens", "rate", "worker")

    def __post_init__(self) -> None:
        super(Death, self).__post_init__()
        if self.rate is None and not (self.at_s or self.after_requests or self.after_tokens):
            raise ConfigError(f"{self._name} needs at, after_requests, after_tokens or rate: when is it to happen?")


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedRequest(Fault):
    """A request is answered with a Dynamo exception of that `type`, after `tokens` output tokens."""

    kind = "error"
    keys = ("type", "tokens", "message", *_HITS)
    type: str = "Unknown"
    tokens: int = 0
    message: str = "a fault that was asked for"


@dataclass(frozen=True, slots=True, kw_only=True)
class Hang(Fault):
    """A request is not answered, or not beyond `tokens` output tokens, until it is cancelled."""

    kind = "hang"
    keys = ("tokens", *_HITS)
    tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SlowFirstToken(Fault):
    """A request waits `seconds` before it is queued."""

    kind = "slow-ttft"
    keys = ("seconds", *_HITS)
    seconds: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LostKvEvents(Fault):
    """KV events (`event`: stored, removed or all) are not published: a share `rate` of them."""

    kind = "kv-events"
    keys = ("event", *_HITS)
    event: str = "all"


@dataclass(frozen=True, slots=True, kw_only=True)
class SlowCleanup(Fault):
    """Cleaning up takes `seconds` more."""

    kind = "slow-cleanup"
    keys = ("seconds", "worker")
    seconds: float = 5.0


KINDS: dict[str, type[Fault]] = {
    each.kind: each
    for each in (
        KvExhaustion,
        Stall,
        Slow,
        SlowStart,
        FailedStart,
        Death,
        FailedRequest,
        Hang,
        SlowFirstToken,
        LostKvEvents,
        SlowCleanup,
    )
}


@dataclass(frozen=True, slots=True)
class _Key:
    """What users write, the field it goes to, and what it may be."""

    field: str
    type: type
    minimum: float = 0.0
    is_above: bool = False  # it must be more than the minimum
    maximum: float = 1e9
    choices: tuple[str, ...] = ()

    def read(self, name: str, value: object) -> object:
        if self.type is str:
            is_text = isinstance(value, str) and value and "," not in value
            if not is_text or (self.choices and value not in self.choices):
                allowed = f"one of {', '.join(self.choices)}" if self.choices else "a text without commas"
                raise ConfigError(f"{name} is {value!r}; allowed is {allowed}")
            return value
        number = self._number(value)
        if number is None or not self.minimum <= number <= self.maximum or (self.is_above and number == self.minimum):
            low = f"{'above' if self.is_above else 'at least'} {self.minimum:g}"
            high = "" if self.maximum == 1e9 else f" and at most {self.maximum:g}"
            raise ConfigError(
                f"{name} is {value!r}; it must be a {'whole ' if self.type is int else ''}number, {low}{high}"
            )
        return number

    def _number(self, value: object) -> float | None:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            return None
        try:
            return int(str(value)) if self.type is int else float(value)
        except ValueError:
            return None


_KEYS: dict[str, _Key] = {
    "at": _Key("at_s", float),
    "for": _Key("for_s", float, is_above=True),
    "every": _Key("every_s", float, is_above=True),
    "rate": _Key("rate", float, is_above=True, maximum=1.0),
    "times": _Key("times", int, 1),
    "after_requests": _Key("after_requests", int),
    "after_tokens": _Key("after_tokens", int),
    "rank": _Key("rank", int),
    "worker": _Key("worker", int),
    "share": _Key("share", float, is_above=True, maximum=1.0),
    "blocks": _Key("blocks", int, 1),
    "seconds": _Key("seconds", float, is_above=True),
    "factor": _Key("factor", float, is_above=True),
    "message": _Key("message", str),
    "type": _Key("type", str, choices=ERROR_TYPES),
    "tokens": _Key("tokens", int),
    "event": _Key("event", str, choices=KV_EVENTS),
}


def make_fault(given: Mapping[str, object]) -> Fault:
    """The fault of that `kind` with these keys. Raises `ConfigError`."""
    kind = given.get("kind")
    fault_type = KINDS.get(kind) if isinstance(kind, str) else None
    if fault_type is None:
        raise ConfigError(f"there is no fault {kind!r}; there are {', '.join(KINDS)}")
    values: dict[str, Any] = {}
    for name, value in given.items():
        if name == "kind":
            continue
        if name not in fault_type.keys:
            raise ConfigError(f"fault {kind!r} has no {name!r}; it has {', '.join(fault_type.keys)}")
        try:
            values[_KEYS[name].field] = _KEYS[name].read(name, value)
        except ConfigError as error:
            raise ConfigError(f"fault {kind!r}: {error}") from None
    return fault_type(**values)


def parse_fault(text: str) -> Fault:
    """The fault that `KIND[:key=value,...]` says. Raises `ConfigError`."""
    kind, _, rest = text.partition(":")
    given: dict[str, object] = {"kind": kind.strip()}
    for part in rest.split(",") if rest else ():
        name, equals, value = part.partition("=")
        if not equals:
            raise ConfigError(f"fault {text!r}: {part!r} is no key=value. Write KIND[:key=value,...].")
        if name.strip() in given:
            raise ConfigError(f"fault {text!r} says {name.strip()!r} twice")
        given[name.strip()] = value.strip()
    return make_fault(given)


def read_faults(path: Path) -> list[Fault]:
    """The faults of a TOML file: an array of tables `[[fault]]`. Raises `ConfigError`."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"cannot read faults from {path}: {error}") from error
    tables = document.get("fault")
    if set(document) != {"fault"} or not isinstance(tables, list) or not all(isinstance(each, dict) for each in tables):
        raise ConfigError(
            f"{path} has {', '.join(document) or 'nothing'}; it must have [[fault]] tables and nothing else"
        )
    try:
        return [make_fault(table) for table in tables]
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def of_worker(faults: Iterable[Fault], worker: int) -> list[Fault]:
    """What one worker of several has, for that process alone."""
    return [replace(fault, worker=None) for fault in faults if fault.worker in (None, worker)]
