"""
What AIPerf sends: the load flags, checked, and the command that they make.

    load = Load.from_flags(flags)
    command = load.aiperf_command(model, url, artifact_folder)
    environment = aiperf_environment(model_path, cache_folder)
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mock_engine.engine_settings import flag_of
from mock_engine.slos import parse_slos, to_aiperf_goodput
from mock_engine.workload import DEFAULT_CONCURRENCY, DEFAULT_ISL, DEFAULT_OSL, LoadFlags

_DEFAULT_REQUEST_COUNT = 64
# On few cores AIPerf (0.13.0) takes a single worker process, whose event loop then adds tens of milliseconds to TTFT.
_WORKERS = "--workers-max"
_MIN_WORKERS = 4


TOKENIZER_NAME = "mock-engine/tokenizer"


def aiperf_environment(model_path: Path, cache_folder: Path, dcgm_urls: Sequence[str] = ()) -> dict[str, str]:
    """
    The environment for AIPerf: `cache_folder` becomes a Hugging Face cache that holds `model_path` as `TOKENIZER_NAME`.

    `dcgm_urls` take the place of the endpoints (localhost:9400 and 9401) that AIPerf 0.13.0 looks for beside those it
    is told of, and warns about.

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
        **({"AIPERF_GPU_DEFAULT_DCGM_ENDPOINTS": ",".join(dcgm_urls)} if dcgm_urls else {}),
    }


@dataclass(frozen=True, slots=True)
class Load(LoadFlags):
    """The flags that go to AIPerf; None leaves a choice to it."""

    goodput: str | None = None
    aiperf_flags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        LoadFlags.__post_init__(self)  # super() does not find it in a class with slots
        if self.goodput is not None:
            parse_slos(self.goodput)

    def aiperf_command(
        self,
        model: str,
        url: str,
        artifact_folder: Path,
        tokenizer: str = TOKENIZER_NAME,
        endpoint_type: str = "chat",
        metrics_urls: Sequence[str] = (),
        dcgm_urls: Sequence[str] = (),
    ) -> list[str]:
        """
        `aiperf profile ...`; results go to `artifact_folder`. With our own tokenizer, it is to be run with
        `aiperf_environment`. It reads the metrics at the URLs while it runs, unless our own flags for AIPerf say which.
        """
        aiperf = Path(sys.executable).with_name("aiperf")
        command = [str(aiperf), "profile", "--model", model, "--url", url, "--tokenizer", tokenizer]
        command += ["--endpoint-type", endpoint_type, "--streaming", "--artifact-dir", str(artifact_folder)]
        command += ["--ui", "simple" if sys.stderr.isatty() else "none"]
        if not {"--gpu-telemetry", "--no-gpu-telemetry"}.intersection(self.aiperf_flags):
            command += ["--gpu-telemetry", *dcgm_urls] if dcgm_urls else ["--no-gpu-telemetry"]
        if metrics_urls and not {"--server-metrics", "--no-server-metrics"}.intersection(self.aiperf_flags):
            command += ["--server-metrics", *metrics_urls]
        # Our engine ends at an eos token now and then, as a model does; a benchmark wants the lengths it asked for.
        command += ["--extra-inputs", "ignore_eos:true"]
        if _WORKERS not in self.aiperf_flags and (os.cpu_count() or 1) < 2 * _MIN_WORKERS:
            command += [_WORKERS, str(_MIN_WORKERS)]
        for name, value in self.values().items():
            command += [flag_of(name)] if value is True else [flag_of(name), str(value)]
        return [*command, *self.aiperf_flags]

    def values(self) -> dict[str, object]:
        """Each flag that AIPerf gets, those that were not given and have a default of ours among them."""
        given: dict[str, object] = {
            name: getattr(self, name)
            for name in self.__dataclass_fields__
            if name not in ("goodput", "aiperf_flags") and getattr(self, name) not in (None, False)
        }
        if self.goodput is not None:
            given["goodput"] = to_aiperf_goodput(parse_slos(self.goodput))
        defaults: dict[str, object] = {}
        if self.input_file is None:
            defaults = {"isl": DEFAULT_ISL, "osl": DEFAULT_OSL, "request_count": _DEFAULT_REQUEST_COUNT}
        if self.request_rate is None and not self.fixed_schedule:
            defaults["concurrency"] = DEFAULT_CONCURRENCY
        return {**defaults, **given}
