"""
Runs out of the files that benchmarks leave.

    run = read_run(path)

    AIPerf             its artifact folder, or the profile_export.jsonl in it (0.13.0)
    vLLM bench serve   the JSON of --save-result; with --save-detailed each request counts, without only means

What the server reports of a request (`usage`) goes before what the client counted. Requests that failed or were
cancelled, and those of the warm-up, are left out and counted.
"""

from __future__ import annotations

import json
import math
import reprlib
from pathlib import Path
from typing import Any

from mock_engine.errors import ConfigError
from mock_engine.profile_fit.observed import ObservedRequest, ObservedRun, make_run, run_of_means
from mock_engine.trace_files import json_object, read_objects, token_count, wrong_value

AIPERF_RECORDS = "profile_export.jsonl"
_MEANT = (
    f"Name an artifact folder of AIPerf, its {AIPERF_RECORDS}, or the JSON file of 'vllm bench serve --save-result'"
)


def read_run(path: Path) -> ObservedRun:
    """The run in a file or folder. Raises `ConfigError`, with the line or key, for what cannot be read."""
    if path.is_dir():
        for records in (path / AIPERF_RECORDS, path / "aiperf" / AIPERF_RECORDS):
            if records.is_file():
                return _read_aiperf(records, path.name)
        raise ConfigError(f"{path} is a folder without {AIPERF_RECORDS}. {_MEANT}.")
    if not path.is_file():
        raise ConfigError(f"{path} does not exist. {_MEANT}.")
    if path.name.removesuffix(".gz").endswith(".jsonl"):
        return _read_aiperf(path, path.parent.name if path.name == AIPERF_RECORDS else path.stem)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}. {_MEANT}.") from error
    if not isinstance(document, dict) or not {"ttfts", "mean_ttft_ms"} & document.keys():
        raise ConfigError(f"{path} holds neither ttfts nor mean_ttft_ms. {_MEANT}.")
    return _read_vllm(path, document)


def _read_aiperf(path: Path, name: str) -> ObservedRun:
    requests: list[ObservedRequest] = []
    num_left_out = 0
    origin_ns: int | None = None
    for line, record in read_objects(path):
        metadata = json_object(path, line, "metadata", record.get("metadata"))
        is_other = metadata.get("benchmark_phase", "profiling") != "profiling" or metadata.get("was_cancelled")
        if is_other or record.get("error") is not None:
            num_left_out += 1
            continue
        metrics = json_object(path, line, "metrics", record.get("metrics"))
        start_ns = metadata.get("request_start_ns")
        if type(start_ns) is not int:
            raise wrong_value(path, line, "metadata.request_start_ns", start_ns, "a whole number of nanoseconds")
        origin_ns = start_ns if origin_ns is None else origin_ns  # a time of day in seconds has too few digits left
        isl_tokens = _count(path, line, metrics, "usage_prompt_tokens", "input_sequence_length")
        osl_tokens = _count(path, line, metrics, "usage_completion_tokens", "output_sequence_length")
        ttft_ms = _ms(path, line, metrics, "time_to_first_token")
        latency_ms = _ms(path, line, metrics, "request_latency")
        cached = _value(metrics, "usage_prompt_cache_read_tokens") or 0
        requests.append(
            ObservedRequest(
                isl_tokens,
                osl_tokens,
                ttft_ms / 1e3,
                _itl_s((latency_ms - ttft_ms) / 1e3, osl_tokens),
                (start_ns - origin_ns) / 1e9,
                min(int(cached), isl_tokens - 1),
            )
        )
    return make_run(name, requests, num_left_out)


def _value(metrics: dict[str, Any], name: str) -> Any:
    metric = metrics.get(name)
    return metric.get("value") if isinstance(metric, dict) else None


def _count(path: Path, line: int, metrics: dict[str, Any], of_server: str, of_client: str) -> int:
    name = of_client if _value(metrics, of_server) is None else of_server
    value = _value(metrics, name)
    return token_count(path, line, f"metrics.{name}.value", int(value) if _is_whole(value) else value)


def _is_whole(value: Any) -> bool:
    return type(value) is float and value.is_integer()


def _itl_s(decode_s: float, osl_tokens: int) -> float | None:
    """The mean gap between tokens; None where there is none to see: one token, or all of them in one chunk."""
    return decode_s / (osl_tokens - 1) if osl_tokens > 1 and decode_s > 0 else None


def _ms(path: Path, line: int, metrics: dict[str, Any], name: str) -> float:
    value = _value(metrics, name)
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise wrong_value(path, line, f"metrics.{name}.value", value, "milliseconds above 0; AIPerf needs --streaming")
    return float(value)


def _read_vllm(path: Path, document: dict[str, Any]) -> ObservedRun:
    if document.get("ttfts"):
        return _read_vllm_requests(path, document)
    num_requests = _whole(path, document, "completed")
    concurrency = document.get("max_concurrency") or document.get("max_concurrent_requests") or num_requests
    if document.get("request_rate", "inf") not in ("inf", math.inf) and not document.get("max_concurrency"):
        raise ConfigError(
            f"{path} has only means, of requests sent at a rate; which were under way together cannot be told. "
            "Run it again with --save-detailed."
        )
    osl_tokens = max(1, round(_whole(path, document, "total_output_tokens") / num_requests))
    return run_of_means(
        path.stem,
        isl_tokens=max(1, round(_whole(path, document, "total_input_tokens") / num_requests)),
        osl_tokens=osl_tokens,
        concurrency=int(concurrency),
        num_requests=num_requests,
        ttft_s=_seconds(path, document, "mean_ttft_ms"),
        itl_s=_seconds(path, document, "mean_tpot_ms") if osl_tokens > 1 else None,
    )


def _read_vllm_requests(path: Path, document: dict[str, Any]) -> ObservedRun:
    """
    Columns with an entry for each request, in the order in which they were sent. Failed ones have no first token.

    `start_times` came late to vLLM; without, requests were sent as `max_concurrency` allowed, or all at once.
    """
    isls, osls, ttfts, itls = (_column(path, document, name) for name in ("input_lens", "output_lens", "ttfts", "itls"))
    starts = document.get("start_times")
    requests, num_failed = [], 0
    for index, (isl, osl, ttft, gaps) in enumerate(zip(isls, osls, ttfts, itls, strict=True)):
        if not ttft or not osl:
            num_failed += 1
            continue
        where = f"{path}, request {index}"
        if type(isl) is not int or isl < 1 or type(osl) is not int or osl < 1 or not isinstance(gaps, list):
            found = f"input {reprlib.repr(isl)}, output {reprlib.repr(osl)}, itls {reprlib.repr(gaps)}"
            raise ConfigError(f"{where}: found {found}; lengths are whole numbers from 1 up, and itls is a list")
        try:
            decode_s, ttft_s = float(sum(gaps)), float(ttft)
            start_s = float(starts[index]) if starts else None
        except (TypeError, ValueError, IndexError) as error:
            raise ConfigError(f"{where}: ttfts, itls and start_times must be numbers of seconds ({error})") from error
        requests.append(ObservedRequest(isl, osl, ttft_s, _itl_s(decode_s, osl), start_s))
    if starts:
        return make_run(path.stem, requests, num_failed)
    if document.get("request_rate", "inf") not in ("inf", math.inf):
        raise ConfigError(
            f"{path} has no start_times, and its requests were sent at a rate, so it cannot be told when. "
            "Run it with --request-rate inf and --max-concurrency, or with a vLLM that writes start_times."
        )
    concurrency = int(document.get("max_concurrency") or len(requests))
    return ObservedRun(path.stem, tuple(requests), min(concurrency, max(len(requests), 1)), num_failed)


def _column(path: Path, document: dict[str, Any], name: str) -> list[Any]:
    column = document.get(name)
    if not isinstance(column, list) or len(column) != len(document["ttfts"]):
        found = f"{name} has {len(column)} entries" if isinstance(column, list) else f"{name} is missing"
        raise ConfigError(f"{path}: {found}; there must be one for each of {len(document['ttfts'])} ttfts")
    return column


def _whole(path: Path, document: dict[str, Any], name: str) -> int:
    value = document.get(name)
    if type(value) is not int or value < 1:
        raise ConfigError(f"{path}: {name} is {reprlib.repr(value)}; it must be a whole number from 1 up")
    return value


def _seconds(path: Path, document: dict[str, Any], name: str) -> float:
    value = document.get(name)
    if type(value) not in (int, float) or not 0 < value < math.inf:  # type: ignore[operator]
        raise ConfigError(f"{path}: {name} is {reprlib.repr(value)}; it must be milliseconds above 0")
    return float(value) / 1e3  # type: ignore[arg-type]
