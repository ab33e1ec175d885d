"""
A mock engine for the tests of whatever talks to an LLM: an OpenAI base URL in a second.

    with MockEngineServer(workers=2, seed=7) as server:
        client = openai.OpenAI(base_url=server.base_url, api_key=server.api_key)
        client.chat.completions.create(model=server.model, messages=[...])
        server.wait_until(lambda status: status.num_running == 0)

Settings are the flags of `mock-engine serve`, as keywords (`max_num_seqs=4`, `enable_prefix_caching=False`)
or as one text (`MockEngineServer("--max-num-seqs 4 --no-enable-prefix-caching")`). Two differ by default:
the port is any free one, and model time runs `SPEEDUP_RATIO` times as fast as real time.

In a coroutine, `async with` leaves the event loop free meanwhile. Tests under pytest need none of this: they
ask for the fixture `mock_engine_server` (`pytest_plugin`).
"""

from __future__ import annotations

import argparse
import asyncio
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import NoReturn, Self

from mock_engine.engine_settings import flag_of
from mock_engine.errors import ConfigError, ProcessError
from mock_engine.flags import OneLineParser, add_serving_flags
from mock_engine.fleet import Fleet, FleetSettings
from mock_engine.recorder import TimelineRow

# A token takes 0.7 ms. At 0, as fast as the host can, answers are over before a test can cancel one or fill
# a queue, and most of their tokens come in one chunk; 1 is for tests of times.
SPEEDUP_RATIO = 10.0
API_KEY = "mock-engine"  # any will do; clients insist on one

_NUM_STARTS = 3
_FRESH_STATUS_TIMEOUT_S = 10.0
_POLL_S = 0.01


@dataclass(frozen=True, slots=True)
class ServerStatus:
    """What all workers together are doing; `workers` has each by itself."""

    workers: tuple[TimelineRow, ...]

    @property
    def num_running(self) -> int:
        """Sequences that are being computed."""
        return sum(worker.num_running for worker in self.workers)

    @property
    def num_waiting(self) -> int:
        """Sequences in the queue."""
        return sum(worker.num_waiting for worker in self.workers)

    @property
    def num_open_requests(self) -> int:
        """Requests that somebody still waits for."""
        return sum(worker.num_open_requests for worker in self.workers)

    @property
    def kv_used_blocks(self) -> int:
        """KV blocks that running sequences hold."""
        return sum(worker.kv_used_blocks for worker in self.workers)

    @property
    def kv_cached_blocks(self) -> int:
        """KV blocks that nobody holds, kept for prompts that begin in the same way."""
        return sum(worker.kv_cached_blocks for worker in self.workers)

    @property
    def kv_total_blocks(self) -> int:
        """KV blocks there are."""
        return sum(worker.kv_total_blocks for worker in self.workers)

    @property
    def num_output_tokens(self) -> int:
        """Tokens that were made since the start."""
        return sum(worker.num_output_tokens for worker in self.workers)

    @property
    def num_preemptions(self) -> int:
        """Sequences that lost their KV blocks to others since the start."""
        return sum(worker.num_preemptions for worker in self.workers)

    def __str__(self) -> str:
        return (
            f"{self.num_running} running, {self.num_waiting} waiting, {self.kv_used_blocks} of "
            f"{self.kv_total_blocks} KV blocks used, {self.num_output_tokens} tokens made"
        )


class MockEngineServer:
    """
    Dynamo's frontend and mock workers, as long as the `with` block lasts. Works on any thread.

    Raises `ConfigError` for wrong settings at once, and `ProcessError`, with the end of a log, when it does not
    start. The processes end with this one, even if that is killed (Linux).
    """

    api_key = API_KEY

    def __init__(self, args: str | Sequence[str] = (), **settings: object) -> None:
        self.settings = read_settings(args, **settings)
        self._folder: TemporaryDirectory[str] | None = None
        self._fleet: Fleet | None = None

    def start(self) -> Self:
        """What `with` does on entering: returns when the model has answered."""
        if self._fleet is not None:
            raise RuntimeError(f"{self} is running already")
        for attempt in range(1, _NUM_STARTS + 1):
            folder = TemporaryDirectory(prefix="mock-engine-")
            try:
                self._fleet = Fleet(self.settings, Path(folder.name)).__enter__()
            except BaseException as error:
                folder.cleanup()
                # Somebody may take a free port that we found before the frontend does; it then says this.
                is_lost_port = isinstance(error, ProcessError) and "already in use" in str(error)
                if not (is_lost_port and self.settings.port == 0 and attempt < _NUM_STARTS):
                    raise
                continue
            self._folder = folder
            break
        return self

    def stop(self) -> None:
        """What `with` does on leaving: returns when all processes are gone. Safe twice."""
        fleet, folder = self._fleet, self._folder
        self._fleet = self._folder = None
        if fleet is not None and folder is not None:
            fleet.stop()
            folder.cleanup()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    async def __aenter__(self) -> Self:
        start = asyncio.create_task(asyncio.to_thread(self.start))
        try:
            return await asyncio.shield(start)
        except asyncio.CancelledError:  # a thread cannot be cancelled: stop what it will have started
            await asyncio.gather(start, return_exceptions=True)
            self.stop()
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.stop)

    @property
    def is_running(self) -> bool:
        """Whether it was started and not stopped; a process of it may have died all the same (`check`)."""
        return self._fleet is not None

    @property
    def url(self) -> str:
        """Where it listens, such as `http://127.0.0.1:40123`."""
        return self.fleet.url

    @property
    def base_url(self) -> str:
        """What OpenAI clients take: `url` and `/v1`."""
        return f"{self.url}/v1"

    @property
    def model(self) -> str:
        """The model's name in requests."""
        return self.fleet.model

    @property
    def profile(self) -> str:
        """The name of the profile whose times it takes."""
        return self.fleet.engine.profile.name

    @property
    def fleet(self) -> Fleet:
        """The processes behind it. Raises `RuntimeError` if they do not run."""
        if self._fleet is None:
            raise RuntimeError("the mock engine is not running: use it in a 'with' statement, or call start()")
        return self._fleet

    def env(self) -> dict[str, str]:
        """What programs with an OpenAI client take from the environment."""
        return {"OPENAI_BASE_URL": self.base_url, "OPENAI_API_KEY": self.api_key}

    def check(self) -> None:
        """Raise `ProcessError`, with its last words, if a process has died."""
        self.fleet.check()

    def status(self) -> ServerStatus:
        """The state of all workers, no older than this call: they tell it four times a second, so this waits."""
        asked_unix_s = time.time()
        deadline_s = time.monotonic() + _FRESH_STATUS_TIMEOUT_S
        while True:
            self.check()
            rows = [self.fleet.status(worker) for worker in range(len(self.settings.roles))]
            fresh = tuple(row for row in rows if row is not None and row.unix_s >= asked_unix_s)
            if len(fresh) == len(rows):
                return ServerStatus(fresh)
            if time.monotonic() > deadline_s:
                raise ProcessError(f"no state from a worker of {self.url} within {_FRESH_STATUS_TIMEOUT_S:g} s.")
            time.sleep(_POLL_S)

    def wait_until(self, condition: Callable[[ServerStatus], bool], timeout_s: float = 10.0) -> ServerStatus:
        """The first status for which `condition` holds. Raises `TimeoutError`, with the last one, if there is none."""
        deadline_s = time.monotonic() + timeout_s
        while not condition(status := self.status()):
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"the mock engine did not get there within {timeout_s:g} s: {status}")
        return status

    def logs(self) -> dict[str, str]:
        """What each process has logged, by its name (`frontend`, `worker-0`, ...)."""
        return {part.name: part.log_path.read_text(encoding="utf-8", errors="replace") for part in self.fleet.parts}

    def __repr__(self) -> str:
        where = "stopped" if self._fleet is None else f"{self.model} at {self.base_url}"
        return f"<{type(self).__name__}: {where}>"


def read_settings(args: str | Sequence[str] = (), **settings: object) -> FleetSettings:
    """Settings given as flags, or as keywords, which count more. Raises `ConfigError` for what `serve` has not."""
    parser = _RaisingParser(prog="mock-engine serve", add_help=False, allow_abbrev=False)
    add_serving_flags(parser, default_port=0)
    parser.set_defaults(speedup_ratio=SPEEDUP_RATIO)
    try:
        words = shlex.split(args) if isinstance(args, str) else [*args]
    except ValueError as error:
        raise ConfigError(f"{args!r} is not a list of flags: {error}. Quote as in a shell.") from None
    return FleetSettings.from_flags(parser.parse_args([*words, *_to_argv(parser, settings)]))


class _RaisingParser(OneLineParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{' '.join(message.split())}. 'mock-engine serve --help' has all settings.")


def _to_argv(parser: argparse.ArgumentParser, settings: dict[str, object]) -> list[str]:
    actions = {option: action for action in parser._actions for option in action.option_strings}
    argv = []
    for name, value in settings.items():
        flag = flag_of(name)
        if flag not in actions:
            near = get_close_matches(name, [option[2:].replace("-", "_") for option in actions], n=1)
            hint = f"did you mean {near[0]}?" if near else "'mock-engine serve --help' has all there are."
            raise ConfigError(f"there is no setting {name!r}; {hint}")
        if isinstance(value, bool) and actions[flag].nargs == 0:
            argv += [option for option in [flag if value else flag_of(f"no_{name}")] if option in actions]
        elif value is not None:
            argv += [f"{flag}={item}" for item in (value if isinstance(value, list | tuple) else [value])]
    return argv
