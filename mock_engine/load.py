"""
What AIPerf sends: the load flags, checked, and the command that they make.

    load = Load.from_flags(flags)
    command = load.aiperf_command(model, url, artifact_folder)
    environment = aiperf_environment(model_path, cache_folder)
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from mock_engine.engine_settings import flag_of
from mock_engine.errors import ConfigError

_DEFAULT_ISL, _DEFAULT_OSL = 512, 128
_DEFAULT_CONCURRENCY = 8
_DEFAULT_REQUEST_COUNT = 64
# On few cores AIPerf (0.13.0) takes a single worker process, whose event loop then adds tens of milliseconds to TTFT.
_WORKERS = "--workers-max"
_MIN_WORKERS = 4
_SYNTHETIC_ONLY = ("isl", "osl", "isl_stddev", "osl_stddev")


TOKENIZER_NAME = "mock-engine/tokenizer"


def aiperf_environment(model_path: Path, cache_folder: Path) -> dict[str, str]:
    """
    The environment for AIPerf: `cache_folder` becomes a Hugging Face cache that holds `model_path` as `TOKENIZER_NAME`.

    AIPerf 0.13.0 takes a plain folder for a tokenizer too, but not where it decodes in parallel, as it does
    for traces: there it goes offline, and looks only into the cache.
    """
    repository = cache_folder / f"models--{TOKENIZER_NAME.replace('/', '--')}"
    revision = "local"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision, encoding="utf-8")
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / revision).symlink_to(model_path.resolve(), target_is_directory=True)
    return {
        **os.environ,
        "HF_HUB_CACHE": str(cache_folder.resolve()),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }


@dataclass(frozen=True, slots=True)
class Load:
    """Fields are AIPerf's flags; None leaves a choice to AIPerf. Raises `ConfigError` for what cannot be."""

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
    goodput: str | None = None
    aiperf_flags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("isl", "osl", "concurrency", "request_count"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{flag_of(name)} is {value}; it must be at least 1")
        for name in ("isl_stddev", "osl_stddev"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ConfigError(f"{flag_of(name)} is {value:g}; it must be 0 or more")
        if self.request_rate is not None and not 0 < self.request_rate < math.inf:
            raise ConfigError(f"--request-rate is {self.request_rate:g}; it must be above 0, in requests a second")
        if self.input_file is None:
            for name in ("fixed_schedule", "custom_dataset_type"):
                if getattr(self, name):
                    raise ConfigError(f"{flag_of(name)} is about a trace; name one with --input-file, or leave it out")
            return
        if not self.input_file.is_file():
            raise ConfigError(
                f"--input-file {self.input_file} does not exist or is no file. Name a trace, one JSON a line"
            )
        if self.custom_dataset_type is None:
            raise ConfigError("--input-file needs --custom-dataset-type, such as mooncake_trace, to say what it holds")
        for name in _SYNTHETIC_ONLY:
            if getattr(self, name) is not None:
                raise ConfigError(
                    f"{flag_of(name)} is for made-up prompts; {self.input_file.name} brings its own lengths"
                )
        if self.fixed_schedule and (self.request_rate is not None or self.concurrency is not None):
            raise ConfigError(
                "--fixed-schedule sends at the trace's own times; leave out --request-rate and --concurrency"
            )

    @classmethod
    def from_flags(cls, flags: argparse.Namespace) -> Load:
        """The load in what a parser with `flags.add_load_flags` has parsed."""
        return cls(**{name: getattr(flags, name) for name in cls.__dataclass_fields__})

    def check_fits(self, max_model_len: int) -> None:
        """Raise `ConfigError` if made-up requests of this length can never be served."""
        isl, osl = self.isl or _DEFAULT_ISL, self.osl or _DEFAULT_OSL
        if self.input_file is None and isl + osl > max_model_len:
            raise ConfigError(
                f"--isl {isl} and --osl {osl} are {isl + osl} tokens; the context length is {max_model_len}. "
                f"Lower them, or raise --max-model-len."
            )

    def aiperf_command(self, model: str, url: str, artifact_folder: Path) -> list[str]:
        """`aiperf profile ...`, to be run with `aiperf_environment`; results go to `artifact_folder`."""
        aiperf = Path(sys.executable).with_name("aiperf")
        command = [str(aiperf), "profile", "--model", model, "--url", url, "--tokenizer", TOKENIZER_NAME]
        command += ["--endpoint-type", "chat", "--streaming", "--artifact-dir", str(artifact_folder)]
        command += ["--ui", "simple" if sys.stderr.isatty() else "none", "--no-gpu-telemetry"]
        # Our engine ends at an eos token now and then, as a model does; a benchmark wants the lengths it asked for.
        command += ["--extra-inputs", "ignore_eos:true"]
        if _WORKERS not in self.aiperf_flags and (os.cpu_count() or 1) < 2 * _MIN_WORKERS:
            command += [_WORKERS, str(_MIN_WORKERS)]
        for name, value in self._values().items():
            command += [flag_of(name)] if value is True else [flag_of(name), str(value)]
        return [*command, *self.aiperf_flags]

    def _values(self) -> dict[str, object]:
        given: dict[str, object] = {
            name: getattr(self, name)
            for name in self.__dataclass_fields__
            if name != "aiperf_flags" and getattr(self, name) not in (None, False)
        }
        defaults: dict[str, object] = {}
        if self.input_file is None:
            defaults = {"isl": _DEFAULT_ISL, "osl": _DEFAULT_OSL, "request_count": _DEFAULT_REQUEST_COUNT}
        if self.request_rate is None and not self.fixed_schedule:
            defaults["concurrency"] = _DEFAULT_CONCURRENCY
        return {**defaults, **given}
