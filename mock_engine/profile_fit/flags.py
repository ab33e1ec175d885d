"""
What the user asked `mock-engine profiles fit` and `profiles record` for.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from mock_engine.errors import ConfigError
from mock_engine.profile_fit.start import Server

DEFAULT_CONCURRENCIES = "1,4,16,64"
DEFAULT_ISL, DEFAULT_ISL_STDDEV = 600, 300
DEFAULT_OSL, DEFAULT_OSL_STDDEV = 200, 80
_MIN_REQUESTS, _REQUESTS_EACH = 64, 8  # of a run; for each of those that are under way at once


@dataclass(frozen=True, slots=True)
class FitSettings:
    """The flags of `fit`, checked as far as they can be without reading anything."""

    runs: tuple[Path, ...]
    out: Path
    start: str | None
    gpu: str | None
    model: str | None
    engine: str | None
    tp: int | None
    server: Server
    async_scheduling: bool | None
    only_overhead: bool

    @classmethod
    def from_flags(cls, flags: argparse.Namespace) -> FitSettings:
        """The settings in parsed flags. Raises `ConfigError`."""
        check_new_folder(flags.out)
        if flags.json is not None and not flags.json.parent.is_dir():
            raise ConfigError(
                f"--json {flags.json}: there is no folder {flags.json.parent}. Make it, or name another file."
            )
        filters = {name: getattr(flags, name) for name in ("gpu", "model", "engine", "tp")}
        given = [f"--{name}" for name, value in filters.items() if value is not None]
        if flags.start is not None and given:
            raise ConfigError(f"--from names the start profile, and {given[0]} looks for one; leave out either")
        server = Server(flags.name, flags.max_num_seqs, flags.max_num_batched_tokens, flags.num_gpu_blocks_override)
        return cls(
            tuple(flags.runs),
            flags.out,
            flags.start,
            **filters,
            server=server,
            async_scheduling=flags.async_scheduling,
            only_overhead=flags.only_overhead,
        )


@dataclass(frozen=True, slots=True)
class RecordSettings:
    """The flags of `record`, checked."""

    url: str
    model: str
    out: Path
    concurrencies: tuple[int, ...]
    tokenizer: str
    endpoint_type: str
    isl: int
    isl_stddev: float
    osl: int
    osl_stddev: float
    request_count: int | None
    aiperf_flags: tuple[str, ...]

    @classmethod
    def from_flags(cls, flags: argparse.Namespace) -> RecordSettings:
        """The settings in parsed flags. Raises `ConfigError`."""
        check_new_folder(flags.out)
        if not flags.url.startswith(("http://", "https://")):
            raise ConfigError(f"--url is {flags.url!r}; it must begin with http:// or https://")
        texts = flags.concurrency.split(",")
        if not all(text.isascii() and text.isdigit() and 0 < int(text) <= 100_000 for text in texts):
            raise ConfigError(
                f"--concurrency is {flags.concurrency!r}; "
                f"it must be counts of at least 1, such as {DEFAULT_CONCURRENCIES}"
            )
        concurrencies = tuple(sorted({int(text) for text in texts}))
        return cls(
            flags.url.rstrip("/"),
            flags.model,
            flags.out,
            concurrencies,
            flags.tokenizer or flags.model,
            flags.endpoint_type,
            flags.isl,
            flags.isl_stddev,
            flags.osl,
            flags.osl_stddev,
            flags.request_count,
            flags.aiperf_flags,
        )

    def num_requests(self, concurrency: int) -> int:
        """Of the run at that concurrency: enough for its figures, and for most of it to be under full load."""
        return self.request_count or max(_MIN_REQUESTS, _REQUESTS_EACH * concurrency)


def check_new_folder(folder: Path) -> None:
    """Raise `ConfigError` unless `folder` is new or empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"--out {folder} is not an empty folder; name a new one")


def add_fit_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `profiles fit`, all but `--json`."""
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="AIPerf's artifact folder or profile_export.jsonl, or the JSON of 'vllm bench serve --save-result'",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the new profile's folder")
    group = parser.add_argument_group("start")
    group.add_argument(
        "--from", dest="start", metavar="PROFILE", help="a name from the list, or a folder (default: the nearest)"
    )
    group.add_argument(
        "--only-overhead", action="store_true", help="leave its tables as they are: the server is slower by a constant"
    )
    group.add_argument("--gpu", help="look for the nearest among those of this GPU, such as h100-sxm")
    group.add_argument("--model", help="and of this model, such as llama-3.1-8b")
    group.add_argument("--engine", help="and of this engine, such as vllm")
    group.add_argument("--tp", type=int, help="and of so many GPUs")
    group = parser.add_argument_group("server", "what you know of it; default: as in the start profile")
    group.add_argument("--name", metavar="GPU/MODEL/ENGINE-tpN-DTYPE", help="of the new profile; pieces may be empty")
    group.add_argument("--max-num-seqs", type=int, help="sequences running at once")
    group.add_argument("--max-num-batched-tokens", type=int, help="token budget of one step")
    group.add_argument(
        "--async-scheduling", action=argparse.BooleanOptionalAction, help="whether it does (default: what fits better)"
    )
    group.add_argument("--num-gpu-blocks-override", type=int, help="KV blocks that the server reported")


def add_record_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `profiles record`, spelled as AIPerf spells them."""
    parser.add_argument("--url", required=True, help="where the server listens, such as http://my-server:8000")
    parser.add_argument("--model", required=True, help="the model's name there")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the runs, one each")
    parser.add_argument("--tokenizer", help="a name or a folder (default: the model's name)")
    parser.add_argument("--endpoint-type", default="chat", help="(%(default)s)")
    parser.add_argument(
        "--concurrency", default=DEFAULT_CONCURRENCIES, metavar="N,N,...", help="one run for each (%(default)s)"
    )
    parser.add_argument("--request-count", type=int, help="of each run (default: 64, or 8 for each that is under way)")
    lengths = (("isl", DEFAULT_ISL, DEFAULT_ISL_STDDEV), ("osl", DEFAULT_OSL, DEFAULT_OSL_STDDEV))
    for name, mean, stddev in lengths:
        what = "prompt" if name == "isl" else "output"
        parser.add_argument(f"--{name}", type=int, default=mean, help=f"mean {what} tokens (%(default)s)")
        parser.add_argument(f"--{name}-stddev", type=float, default=stddev, help="and their spread (%(default)s)")
