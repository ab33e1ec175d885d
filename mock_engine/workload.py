"""
What clients send in a simulation: AIPerf's load flags, checked, and the requests that they stand for.

    workload = Workload.from_flags(flags)
    for session in workload.sessions(block_size):    made up or read from a trace, one at a time
        ...

A request is its lengths, when it is sent, and hashes of the KV blocks that it may share; there are no words.
The same flags and seed give the same sessions, each time and on each machine.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice, repeat
from pathlib import Path
from typing import Self

import numpy as np

from mock_engine.engine_settings import flag_of
from mock_engine.errors import ConfigError
from mock_engine.session import Session, Turn, chain_turns, num_full_blocks
from mock_engine.trace_files import check_dataset_type, read_trace

__all__ = ["DEFAULT_CONCURRENCY", "DEFAULT_ISL", "DEFAULT_OSL", "LoadFlags", "Session", "Turn", "Workload"]

DEFAULT_ISL, DEFAULT_OSL = 512, 128
DEFAULT_CONCURRENCY = 8
_DEFAULT_REQUEST_COUNT = 1000
_SESSIONS_AT_ONCE = 1024
_MAX_DRAWN = 2**31 - 1
_ARRIVAL_PATTERNS = ("constant", "poisson", "gamma", "concurrency_burst")
_NO_TRACE = "is about a trace; name one with --input-file, or leave it out"
_LENGTHS = ("isl", "osl", "isl_stddev", "osl_stddev")
_CONVERSATIONS = (
    "random_range_ratio",
    "conversation_num",
    "conversation_turn_mean",
    "conversation_turn_stddev",
    "conversation_turn_delay_mean",
    "conversation_turn_delay_stddev",
    "shared_system_prompt_length",
    "num_prefix_prompts",
    "prefix_prompt_length",
)


@dataclass(frozen=True, slots=True)
class LoadFlags:
    """The flags that AIPerf and a simulation both take; None: not given. Raises `ConfigError` for what cannot be."""

    isl: int | None = None
    osl: int | None = None
    isl_stddev: float | None = None
    osl_stddev: float | None = None
    concurrency: int | None = None
    request_rate: float | None = None
    request_count: int | None = None
    input_file: Path | None = None
    custom_dataset_type: str | None = None
    fixed_schedule: bool = False

    def __post_init__(self) -> None:
        self._check_at_least(1, "isl", "osl", "concurrency", "request_count")
        self._check_at_least(0, "isl_stddev", "osl_stddev")
        if self.request_rate is not None and not 0 < self.request_rate < math.inf:
            raise ConfigError(f"--request-rate is {self.request_rate:g}; it must be above 0, in requests a second")
        if self.input_file is None:
            self._refuse(_NO_TRACE, "fixed_schedule", "custom_dataset_type")
            return
        if not self.input_file.is_file():
            raise ConfigError(f"--input-file {self.input_file} does not exist or is no file. Name a trace file")
        if self.custom_dataset_type is None:
            raise ConfigError("--input-file needs --custom-dataset-type, such as mooncake_trace, to say what it holds")
        self._refuse_lengths(*_LENGTHS)
        if self.fixed_schedule and (self.request_rate is not None or self.concurrency is not None):
            raise ConfigError(
                "--fixed-schedule sends at the trace's own times; leave out --request-rate and --concurrency"
            )

    @classmethod
    def from_flags(cls, flags: argparse.Namespace) -> Self:
        """The load in what a parser with `flags.add_load_flags`, or `simulate_flags`, has parsed."""
        return cls(**{name: getattr(flags, name) for name in cls.__dataclass_fields__})

    def max_total_tokens(self) -> int:
        """Prompt and output of the longest made-up request, if all lengths are the mean ones; 0 for a trace."""
        return 0 if self.input_file else (self.isl or DEFAULT_ISL) + (self.osl or DEFAULT_OSL)

    def check_fits(self, max_model_len: int) -> None:
        """Raise `ConfigError` if made-up requests of this length can never be served."""
        isl, osl = self.isl or DEFAULT_ISL, self.osl or DEFAULT_OSL
        total = self.max_total_tokens()
        before = f", and {total - isl - osl} before them," if total > isl + osl else ""
        if total > max_model_len:
            raise ConfigError(
                f"--isl {isl} and --osl {osl}{before} are {total} tokens; the context length is {max_model_len}. "
                f"Lower them, or raise --max-model-len."
            )

    def _check_at_least(self, minimum: int, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and not minimum <= value < math.inf:
                limit = "0 or more" if minimum == 0 else f"at least {minimum}"
                raise ConfigError(f"{flag_of(name)} is {value:g}; it must be {limit}")

    def _refuse(self, reason: str, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and value is not False:
                raise ConfigError(f"{flag_of(name)} {reason}")

    def _refuse_lengths(self, *names: str) -> None:
        assert self.input_file is not None
        self._refuse(f"is for made-up prompts; {self.input_file.name} brings its own lengths", *names)


@dataclass(frozen=True, slots=True)
class Workload(LoadFlags):
    """
    What a simulation sends. Fields are AIPerf's flags (0.13.0), in its units; None: not given.

    `sessions` acts on lengths and arrivals. What depends on how requests fare is left to the simulation: how many are
    under way (`max_concurrency`, the ramp to it), cancelling, and when the benchmark ends if there are no arrivals.
    """

    random_range_ratio: float | None = None  # vLLM's: lengths are uniform within this share of their mean
    concurrency_ramp_duration: float | None = None  # s
    arrival_pattern: str | None = None
    arrival_smoothness: float | None = None  # shape of gamma arrivals; vLLM's burstiness
    benchmark_duration: float | None = None  # s
    conversation_num: int | None = None
    conversation_turn_mean: int | None = None
    conversation_turn_stddev: float | None = None
    conversation_turn_delay_mean: float | None = None  # ms
    conversation_turn_delay_stddev: float | None = None  # ms
    shared_system_prompt_length: int | None = None  # tokens
    num_prefix_prompts: int | None = None
    prefix_prompt_length: int | None = None  # tokens
    request_cancellation_rate: float | None = None  # percent of requests
    request_cancellation_delay: float | None = None  # s
    fixed_schedule_start_offset: int | None = None  # ms of the trace
    fixed_schedule_end_offset: int | None = None  # ms of the trace
    synthesis_speedup_ratio: float | None = None
    synthesis_max_isl: int | None = None
    synthesis_max_osl: int | None = None
    random_seed: int | None = None

    def __post_init__(self) -> None:
        LoadFlags.__post_init__(self)  # super() does not find it in a class with slots
        self._check_values()
        self._check_trace()
        self._check_arrivals()
        self._check_conversations()
        if self.request_cancellation_delay is not None and not self.request_cancellation_rate:
            raise ConfigError("--request-cancellation-delay needs --request-cancellation-rate, a percentage above 0")

    @property
    def num_requests(self) -> int | None:
        """How many requests are sent at most; None: something else ends it, such as the end of a trace."""
        is_bounded = self.input_file or self.conversation_num or self.benchmark_duration
        return self.request_count or (None if is_bounded else _DEFAULT_REQUEST_COUNT)

    @property
    def max_concurrency(self) -> int | None:
        """How many requests may be under way at once; None: any number."""
        is_open = self.request_rate is not None or self.fixed_schedule
        return self.concurrency or (None if is_open else DEFAULT_CONCURRENCY)

    def max_total_tokens(self) -> int:
        """Prompt and output of the last turn of a conversation of mean lengths; 0 for a trace."""
        if self.input_file is not None:
            return 0
        num_turns = self.conversation_turn_mean or 1
        return self._prefix_tokens + num_turns * LoadFlags.max_total_tokens(self)

    def sessions(self, block_size: int) -> Iterator[Session]:
        """
        All that is sent, in that order and one at a time; `block_hashes` are for KV blocks of `block_size`.

        Made-up requests end after `request_count` of them (1000), after `conversation_num` sessions, or with
        `benchmark_duration`; a trace ends with its file at the latest. At a request rate each turn counts: a session
        of three turns leaves two arrivals free for those to come. Raises `ConfigError` for a wrong trace.
        """
        for_lengths, for_arrivals = np.random.default_rng(self.random_seed or 0).spawn(2)
        if self.fixed_schedule:
            sessions = self._scheduled(block_size)
        elif self.input_file is not None:
            sessions = self._sent((session.turns for session in self._recorded(block_size)), for_arrivals)
        else:
            sessions = self._sent(self._made_up(block_size, for_lengths), for_arrivals)
        requests_left = self.num_requests or sys.maxsize
        end_s = self.benchmark_duration or math.inf
        is_empty = True
        for session in islice(sessions, self.conversation_num):
            arrival_s, turns = session
            if arrival_s is not None and arrival_s >= end_s:
                break
            is_empty = False
            if len(turns) >= requests_left:
                yield Session(arrival_s, turns[:requests_left])
                break
            requests_left -= len(turns)
            yield session
        if is_empty:
            limits = "--synthesis-max-isl, --benchmark-duration, or the offsets of the schedule"
            raise ConfigError(f"{self.input_file} has requests, but all are beyond the limits. Widen {limits}")

    @property
    def _prefix_tokens(self) -> int:
        """Tokens that the prompts of several sessions begin with."""
        return self.shared_system_prompt_length or self.prefix_prompt_length or 0

    @property
    def _pattern(self) -> str | None:
        """AIPerf's help has hyphens in the names, its pages have underscores."""
        return None if self.arrival_pattern is None else self.arrival_pattern.replace("-", "_")

    def _recorded(self, block_size: int) -> Iterator[Session]:
        assert self.input_file is not None
        assert self.custom_dataset_type is not None
        return read_trace(
            self.input_file,
            self.custom_dataset_type,
            block_size,
            max_isl=self.synthesis_max_isl,
            max_osl=self.synthesis_max_osl,
        )

    def _scheduled(self, block_size: int) -> Iterator[Session]:
        """The trace at its own times, those of the window (both ends included) from its start on."""
        start_s = (self.fixed_schedule_start_offset or 0) / 1000
        end_s = math.inf if self.fixed_schedule_end_offset is None else self.fixed_schedule_end_offset / 1000
        for number, (arrival_s, turns) in enumerate(self._recorded(block_size), 1):
            if arrival_s is None:
                raise ConfigError(
                    f"{self.input_file}: session {number} has no time, which --fixed-schedule needs. "
                    "Leave it out, and give --request-rate or --concurrency"
                )
            if arrival_s > end_s:
                return
            if arrival_s >= start_s:
                yield Session((arrival_s - start_s) / (self.synthesis_speedup_ratio or 1.0), turns)

    def _sent(self, conversations: Iterator[Sequence[Turn]], rng: np.random.Generator) -> Iterator[Session]:
        """The sessions of these turns, at the request rate if there is one."""
        if self.request_rate is None:
            return map(Session, repeat(None), conversations)
        return _at_arrivals(conversations, self._arrivals_s(self.request_rate, rng))

    def _arrivals_s(self, rate: float, rng: np.random.Generator) -> Iterator[float]:
        """When each request is sent, without end; the first at once."""
        if self._pattern == "constant":
            yield from (number / rate for number in count())
        shape = self.arrival_smoothness or 1.0  # gamma gaps of shape 1 are exponential
        now_s = 0.0
        yield now_s
        while True:
            arrivals_s = now_s + np.cumsum(rng.gamma(shape, 1 / rate / shape, _SESSIONS_AT_ONCE))
            yield from arrivals_s.tolist()
            now_s = arrivals_s[-1]

    def _made_up(self, block_size: int, rng: np.random.Generator) -> Iterator[Sequence[Turn]]:
        """Conversations without end, drawn some at a time; lengths and waits are distributed as AIPerf's."""
        isl, osl, ratio = self.isl or DEFAULT_ISL, self.osl or DEFAULT_OSL, self.random_range_ratio
        turn_mean, turn_stddev = self.conversation_turn_mean or 1, self.conversation_turn_stddev or 0.0
        delay_ms, delay_stddev_ms = self.conversation_turn_delay_mean or 0.0, self.conversation_turn_delay_stddev or 0.0
        num_prefixes = self.num_prefix_prompts or 1
        prefix_blocks = self._prefix_tokens // block_size
        first_own_id = num_prefixes * prefix_blocks  # those below are the prefixes'
        while True:
            turn_counts = _draw_integers(rng, turn_mean, turn_stddev, _SESSIONS_AT_ONCE)
            num_turns = sum(turn_counts)
            isls = _draw_lengths(rng, isl, self.isl_stddev or 0.0, ratio, num_turns)
            osls = _draw_lengths(rng, osl, self.osl_stddev or 0.0, ratio, num_turns)
            if num_turns == _SESSIONS_AT_ONCE and not self._prefix_tokens:
                for pair in zip(isls, osls, strict=True):
                    yield (Turn(*pair),)
                continue
            thinks_s = (delay / 1000 for delay in _draw_delays(rng, delay_ms, delay_stddev_ms, num_turns))
            lengths = zip(isls, osls, thinks_s, strict=True)
            prefixes = rng.integers(num_prefixes, size=_SESSIONS_AT_ONCE).tolist()
            for turn_count, prefix in zip(turn_counts, prefixes, strict=True):
                shared_ids = range(prefix * prefix_blocks, (prefix + 1) * prefix_blocks)
                own_lengths = islice(lengths, turn_count)
                turns = chain_turns(own_lengths, block_size, first_own_id, shared_ids, self._prefix_tokens)
                first_own_id += num_full_blocks(turns, block_size)
                yield turns

    def _check_values(self) -> None:
        self._check_at_least(1, "conversation_num", "conversation_turn_mean", "shared_system_prompt_length")
        self._check_at_least(1, "num_prefix_prompts", "prefix_prompt_length", "synthesis_max_isl", "synthesis_max_osl")
        self._check_at_least(0, "conversation_turn_stddev", "conversation_turn_delay_mean", "random_seed")
        self._check_at_least(0, "conversation_turn_delay_stddev", "request_cancellation_delay")
        self._check_at_least(0, "fixed_schedule_start_offset", "fixed_schedule_end_offset")
        above_0 = ("concurrency_ramp_duration", "benchmark_duration", "arrival_smoothness", "synthesis_speedup_ratio")
        for name in above_0:
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{flag_of(name)} is {value:g}; it must be above 0")
        if self.random_range_ratio is not None and not 0 <= self.random_range_ratio < 1:
            raise ConfigError(f"--random-range-ratio is {self.random_range_ratio:g}; it must be from 0 to below 1")
        if self.request_cancellation_rate is not None and not 0 <= self.request_cancellation_rate <= 100:
            raise ConfigError(
                f"--request-cancellation-rate is {self.request_cancellation_rate:g}; it is a percentage, from 0 to 100"
            )

    def _check_trace(self) -> None:
        if self.input_file is None:
            self._refuse(_NO_TRACE, "synthesis_speedup_ratio", "synthesis_max_isl", "synthesis_max_osl")
        else:
            check_dataset_type(self.custom_dataset_type or "")
            self._refuse_lengths(*_CONVERSATIONS)
        if not self.fixed_schedule:
            reason = "is about the trace's own times; add --fixed-schedule, or leave it out"
            self._refuse(reason, "fixed_schedule_start_offset", "fixed_schedule_end_offset", "synthesis_speedup_ratio")
        start, end = self.fixed_schedule_start_offset, self.fixed_schedule_end_offset
        if start is not None and end is not None and start > end:
            raise ConfigError(
                f"--fixed-schedule-start-offset is {start}, after --fixed-schedule-end-offset {end}; it must be before"
            )

    def _check_arrivals(self) -> None:
        pattern = self._pattern
        if pattern is not None and pattern not in _ARRIVAL_PATTERNS:
            raise ConfigError(f"--arrival-pattern is {pattern}; it must be one of {', '.join(_ARRIVAL_PATTERNS)}")
        if self.request_rate is None:
            reason = "is about arrivals at a rate; give --request-rate, or leave it out"
            self._refuse(reason, "arrival_smoothness")
            if pattern != "concurrency_burst" or self.fixed_schedule:
                self._refuse(reason, "arrival_pattern")
        elif pattern == "concurrency_burst":
            raise ConfigError("--arrival-pattern concurrency_burst sends at no rate; leave out --request-rate")
        if self.arrival_smoothness is not None and pattern not in (None, "gamma"):
            raise ConfigError(
                f"--arrival-smoothness is for --arrival-pattern gamma, not {pattern}; leave one of them out"
            )
        if self.max_concurrency is None:
            self._refuse("needs --concurrency, up to which it goes", "concurrency_ramp_duration")

    def _check_conversations(self) -> None:
        if self.random_range_ratio is not None:
            reason = "and --random-range-ratio are two ways to spread lengths; leave one of them out"
            self._refuse(reason, "isl_stddev", "osl_stddev")
        if (self.num_prefix_prompts is None) != (self.prefix_prompt_length is None):
            raise ConfigError("--num-prefix-prompts and --prefix-prompt-length belong together; give both or neither")
        if self.shared_system_prompt_length is not None:
            reason = "and --shared-system-prompt-length are two kinds of shared prefix; leave one of them out"
            self._refuse(reason, "num_prefix_prompts", "prefix_prompt_length")
        if self.conversation_turn_mean in (None, 1) and not self.conversation_turn_stddev:
            reason = "is a wait between turns; give --conversation-turn-mean, or leave it out"
            self._refuse(reason, "conversation_turn_delay_mean", "conversation_turn_delay_stddev")
        if self.conversation_turn_delay_mean is None:
            reason = "needs --conversation-turn-delay-mean, around which the waits are"
            self._refuse(reason, "conversation_turn_delay_stddev")


def _at_arrivals(conversations: Iterator[Sequence[Turn]], arrivals_s: Iterator[float]) -> Iterator[Session]:
    for turns in conversations:
        yield Session(next(arrivals_s), turns)
        for _ in turns[1:]:
            next(arrivals_s)


def _draw_lengths(rng: np.random.Generator, mean: int, stddev: float, ratio: float | None, num: int) -> list[int]:
    if not ratio:
        return _draw_integers(rng, mean, stddev, num)
    low, high = (round(mean * (1 + share), 9) for share in (-ratio, ratio))  # 100 * 1.1 is 110.00000000000001
    drawn: list[int] = rng.integers(max(1, math.floor(low)), math.ceil(high), num, endpoint=True).tolist()
    return drawn


def _draw_delays(rng: np.random.Generator, mean: float, stddev: float, num: int) -> Sequence[float]:
    return _draw_integers(rng, mean, stddev, num) if stddev else [mean] * num


def _draw_integers(rng: np.random.Generator, mean: float, stddev: float, num: int) -> list[int]:
    """From a normal distribution cut off at 0, rounded up, as AIPerf 0.13.0 does it."""
    if not stddev:
        return [int(mean)] * num
    values = rng.normal(mean, stddev, num)
    while (is_below := values < 0).any():
        values[is_below] = rng.normal(mean, stddev, np.count_nonzero(is_below))
    drawn: list[int] = np.clip(np.ceil(values), 1, _MAX_DRAWN).astype(np.int64).tolist()
    return drawn
