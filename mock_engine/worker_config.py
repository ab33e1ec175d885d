"""
`mock-engine worker`'s command line, and what Dynamo is told of the worker.
"""

from __future__ import annotations

import argparse
from typing import Any

from mock_engine.dynamo_release import HAS_KV_ROUTING, DisaggregationMode, WorkerConfig, tool_options, worker_namespace
from mock_engine.flags import OneLineParser, add_dynamo_flags, add_engine_flags, add_worker_flags
from mock_engine.worker_settings import WorkerSettings


def worker_parser() -> OneLineParser:
    """The flags of `WorkerSettings`, and those that say where in Dynamo's cluster the worker is."""
    parser = OneLineParser(prog="mock-engine worker", description="One Dynamo worker for an existing cluster.")
    add_engine_flags(parser)
    add_worker_flags(parser)
    add_dynamo_flags(parser)
    return parser


def worker_config(settings: WorkerSettings, flags: argparse.Namespace, served_model_name: str) -> Any:
    """Dynamo's `WorkerConfig`."""
    return WorkerConfig(
        namespace=worker_namespace(flags.namespace),
        component=flags.component or ("prefill" if settings.disaggregation_mode == "prefill" else "backend"),
        endpoint=flags.endpoint,
        model_name=str(settings.model_path),
        served_model_name=served_model_name,
        endpoint_types=flags.endpoint_types,
        discovery_backend=flags.discovery_backend,
        request_plane=flags.request_plane,
        event_plane=flags.event_plane,
        disaggregation_mode=DisaggregationMode(settings.disaggregation_mode),
        **({"enable_kv_routing": settings.enable_kv_routing is not False} if HAS_KV_ROUTING else {}),
        reasoning_parser=settings.reasoning_parser,
        **tool_options(settings.tool_call_parser),
    )
