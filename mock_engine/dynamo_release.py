"""
What differs between the Dynamo releases we support (1.2.1 to 1.6.1), and nothing else.

Everything that the rest of the package takes from Dynamo comes from here.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

try:
    # 1.2 to 1.6 have it here; its README announces the move to `dynamo.backend`.
    _backend = import_module("dynamo.common.backend")
except ModuleNotFoundError:
    _backend = import_module("dynamo.backend")

from dynamo.llm import exceptions as _exceptions
from dynamo.llm.exceptions import EngineShutdown, InvalidArgument

from mock_engine import faults

if TYPE_CHECKING:
    LLMEngine = Any
else:
    LLMEngine = _backend.LLMEngine

WorkerConfig: Any = _backend.WorkerConfig
run_backend: Any = import_module(f"{_backend.__name__}.run").run

DisaggregationMode: Any = import_module(f"{_backend.__name__.rpartition('.')[0]}.constants").DisaggregationMode
# Kubernetes' rolling updates set workers apart by a suffix (DYN_NAMESPACE_WORKER_SUFFIX).
worker_namespace: Callable[[str], str] = import_module("dynamo.common.utils.namespace").get_worker_namespace
ERROR_TYPES: dict[str, type[Exception]] = {name: getattr(_exceptions, name) for name in faults.ERROR_TYPES}

HAS_DRAIN = hasattr(LLMEngine, "drain")  # of 1.2 only; where the base class has none, nobody calls it
HAS_KV_ROUTING = hasattr(WorkerConfig, "enable_kv_routing")  # from 1.3 on workers publish KV events and loads

__all__ = [
    "ERROR_TYPES",
    "HAS_DRAIN",
    "HAS_KV_ROUTING",
    "DisaggregationMode",
    "EngineShutdown",
    "InvalidArgument",
    "LLMEngine",
    "WorkerConfig",
    "add_metrics",
    "component_snapshot",
    "dynamo_version",
    "engine_config",
    "health_check_payload",
    "list_of_token_ids",
    "push_source",
    "run_backend",
    "worker_namespace",
]


def dynamo_version() -> str:
    """The installed release of ai-dynamo."""
    try:
        return version("ai-dynamo")
    except PackageNotFoundError:
        return "unknown"


def engine_config(
    *,
    model: str,
    served_model_name: str,
    context_length: int,
    kv_cache_block_size: int,
    total_kv_blocks: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    data_parallel_size: int = 1,
) -> Any:
    """
    Dynamo's `EngineConfig`. From 1.3 the numbers live in `llm=LlmRegistration(...)`;
    1.2 has them flat, and no data-parallel ranks. Flat ones are silently ignored from 1.3 on.
    """
    numbers = {
        "context_length": context_length,
        "kv_cache_block_size": kv_cache_block_size,
        "total_kv_blocks": total_kv_blocks,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens,
    }
    if hasattr(_backend, "LlmRegistration"):
        return _backend.EngineConfig(
            model=model,
            served_model_name=served_model_name,
            llm=_backend.LlmRegistration(**numbers, data_parallel_size=data_parallel_size),
        )
    return _backend.EngineConfig(model=model, served_model_name=served_model_name, **numbers)


def push_source(on_ready: Callable[[Any], None], dp_rank: int) -> Any:
    """Dynamo's `PushSource`: its worker calls `on_ready` with a `KvEventPublisher` of that rank. From 1.3 on."""
    return import_module(f"{_backend.__name__}.publisher").PushSource(on_ready=on_ready, dp_rank=dp_rank)


def component_snapshot(dp_rank: int, num_used_blocks: int, num_blocks: int, hit_rate: float | None) -> Any:
    """Dynamo's `ComponentSnapshot` of one rank. From 1.3 on."""
    return import_module(f"{_backend.__name__}.publisher").ComponentSnapshot(
        kv_used_blocks=num_used_blocks,
        kv_total_blocks=num_blocks,
        gpu_cache_usage=num_used_blocks / num_blocks,
        dp_rank=dp_rank,
        kv_cache_hit_rate=hit_rate,
    )


def health_check_payload(token_id: int) -> dict[str, Any] | None:
    """
    What Dynamo is to send as its health check: a prompt of that token, to be answered with one, and its marker.

    DYN_HEALTH_CHECK_PAYLOAD goes before. None for 1.2, which never asks.
    """
    try:
        health_check = import_module(f"{_backend.__name__}.health_check")
    except ModuleNotFoundError:
        return None
    payload: dict[str, Any] = health_check.build_health_check_payload(token_id)
    return payload


def add_metrics(metrics: Any, text: Callable[[], str], add_labels: Callable[[Mapping[str, str]], None]) -> None:
    """
    Let what `text` gives be a part of the worker's /metrics; it is called on any thread.

    `add_labels` gets the labels that Dynamo puts onto its own metrics (namespace, component, endpoint, worker).
    `metrics` is what `register_prometheus` is given; it is not kept.
    """
    add_labels(dict(metrics.auto_labels))
    metrics.register_prometheus_expfmt_callback(text)


def list_of_token_ids(token_ids: Any) -> list[int]:
    """
    The prompt as a list of ints.

    From 1.6 the frontend may send packed little-endian int32 (DYN_TOKEN_IDS_AS_BYTES).
    Raises TypeError or ValueError for anything that is not a sequence of ints.
    """
    if isinstance(token_ids, bytes | bytearray | memoryview):
        packed = array("i")
        packed.frombytes(bytes(token_ids))
        if sys.byteorder != "little":
            packed.byteswap()
        return packed.tolist()
    ids = list(token_ids)
    for token_id in ids:
        if not isinstance(token_id, int):
            raise TypeError(f"token_ids holds {token_id!r}")
    return ids
