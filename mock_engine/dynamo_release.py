"""
What differs between the Dynamo releases we support (1.2.1 to 1.6.1), and nothing else.

Everything that the rest of the package takes from Dynamo comes from here.
"""

from __future__ import annotations

import operator
import sys
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import reduce
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from mock_engine.errors import ConfigError

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

HAS_ADAPTERS = hasattr(LLMEngine, "on_endpoint_ready")  # from 1.3 on: without the endpoint none can be announced
HAS_DRAIN = hasattr(LLMEngine, "drain")  # of 1.2 only; where the base class has none, nobody calls it
HAS_KV_ROUTING = hasattr(WorkerConfig, "enable_kv_routing")  # from 1.3 on workers publish KV events and loads

__all__ = [
    "ERROR_TYPES",
    "HAS_ADAPTERS",
    "HAS_DRAIN",
    "HAS_KV_ROUTING",
    "DisaggregationMode",
    "EngineShutdown",
    "InvalidArgument",
    "LLMEngine",
    "WorkerConfig",
    "add_metrics",
    "check_answers",
    "component_snapshot",
    "dynamo_version",
    "engine_config",
    "health_check_payload",
    "list_of_token_ids",
    "push_source",
    "register_adapter",
    "run_backend",
    "tool_options",
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


def check_answers(tool_call_parser: str | None, reasoning_parser: str | None, adapters: Sequence[str]) -> None:
    """Raise `ConfigError` for what this release does not have: it would stop the worker, or be ignored."""
    core = import_module("dynamo._core")
    for flag, name, known in (
        ("--dyn-tool-call-parser", tool_call_parser, core.get_tool_parser_names()),
        ("--dyn-reasoning-parser", reasoning_parser, core.get_reasoning_parser_names()),
    ):
        if name is not None and name not in known:
            raise ConfigError(f"{flag} is {name!r}; ai-dynamo {dynamo_version()} has: none, {', '.join(sorted(known))}")
    if adapters and not HAS_ADAPTERS:
        raise ConfigError(
            f"--lora-modules needs ai-dynamo 1.3 or newer, and this is {dynamo_version()}, "
            f"where an engine cannot tell the frontend of adapters. Leave it out."
        )


def tool_options(tool_call_parser: str | None) -> dict[str, Any]:
    """
    What of `WorkerConfig` lets tools come to the engine: a structural tag with all schemas, for every `tool_choice`.

    From 1.3 on; 1.6 has it in one option. In 1.2 an engine hears only of tools that it must call.
    """
    options: dict[str, Any] = {"tool_call_parser": tool_call_parser}
    if tool_call_parser is None:
        return options
    known = {each.name for each in fields(WorkerConfig)}
    if "structural_tag_mode" in known:
        options.update(structural_tag_mode="on", structural_tag_scope="always", structural_tag_schema="strict")
    elif "structural_tag" in known:
        options["structural_tag"] = {"scope": "always", "schema": "strict"}
    return options


async def register_adapter(
    endpoint: Any, name: str, model_path: str, block_size: int, max_loras: int, worker_config: Any
) -> None:
    """
    Announce a LoRA adapter, so that the frontend lists it as a model of this worker.

    The frontend takes it only once it knows the worker's own model, of which no engine is told (1.3 to 1.6).
    """
    llm = import_module("dynamo.llm")
    runtime = llm.ModelRuntimeConfig()
    runtime.tool_call_parser = worker_config.tool_call_parser
    runtime.reasoning_parser = worker_config.reasoning_parser
    tags = tool_options(worker_config.tool_call_parser)
    if "structural_tag_mode" in tags:
        runtime.set_structural_tag_mode(tags["structural_tag_mode"])
        runtime.set_structural_tag_scope(tags["structural_tag_scope"])
        runtime.set_structural_tag_schema(tags["structural_tag_schema"])
    elif "structural_tag" in tags:
        runtime.set_structural_tag(tags["structural_tag"])
    kinds = {"chat": llm.ModelType.Chat, "completions": llm.ModelType.Completions}
    types = [kinds[kind] for kind in worker_config.endpoint_types.split(",") if kind in kinds]
    await llm.register_model(
        llm.ModelInput.Tokens,
        reduce(operator.or_, types or kinds.values()),
        endpoint,
        model_path,
        worker_type=llm.WorkerType.Aggregated,
        kv_cache_block_size=block_size,
        runtime_config=runtime,
        lora_name=name,
        base_model_path=model_path,
        max_gpu_lora_count=max_loras,
    )


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
