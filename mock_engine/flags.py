"""
The flags that several commands share, and a parser whose errors are one line.

Spelled as users of the field spell them already: vLLM's and Dynamo mocker's for the engine.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any, NoReturn

from mock_engine.engine_settings import DEFAULT_TOKENIZER, ENGINE_TYPES, EngineSettings, flag_of
from mock_engine.errors import ConfigError
from mock_engine.faults import parse_fault, read_faults
from mock_engine.kv_transfer import DEFAULT_BANDWIDTH, DEFAULT_TIMEOUT_S
from mock_engine.planes import CHOICES, Planes
from mock_engine.roles import ROLES
from mock_engine.router_settings import ROUTER_MODES, RouterSettings
from mock_engine.waiting_queue import SCHEDULING_POLICIES
from mock_engine.worker_settings import WorkerSettings


class OneLineParser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


class _Extend(argparse.Action):
    """Like argparse's `extend`, into a tuple."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        del parser, option_string
        setattr(namespace, self.dest, (*getattr(namespace, self.dest), *values))


def add_engine_flags(parser: argparse.ArgumentParser, is_live: bool = True) -> None:
    """Add one flag for each field of `EngineSettings`, less those that only an engine in real time has a use for."""
    defaults = EngineSettings()
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--profile", default=defaults.profile, help="a name from 'mock-engine profiles list', or a folder (%(default)s)"
    )
    group.add_argument(
        "--engine-type",
        metavar=f"{{{','.join(ENGINE_TYPES)}}}",
        help="whose scheduler it has (default: that of the profile's engine)",
    )
    group.add_argument("--max-num-seqs", type=int, help="sequences running at once (default: the profile's)")
    group.add_argument("--max-num-batched-tokens", type=int, help="token budget of one step (default: the profile's)")
    group.add_argument("--block-size", type=int, help="tokens in a KV block (default: the profile's)")
    group.add_argument("--num-gpu-blocks-override", type=int, help="KV blocks (default: what fits the GPU's memory)")
    group.add_argument("--max-model-len", type=int, help="prompt plus output tokens of one request")
    group.add_argument(
        "--gpu-memory-utilization",
        type=float,
        default=defaults.gpu_memory_utilization,
        help="share of GPU memory that weights and KV cache may use (%(default)s)",
    )
    for name, text in (("prefix_caching", "share KV blocks"), ("chunked_prefill", "compute long prompts in chunks")):
        group.add_argument(
            flag_of(f"enable_{name}"), action=argparse.BooleanOptionalAction, default=True, help=f"{text} (on)"
        )
    group.add_argument(
        "--async-scheduling",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="decide who is in a step when the one before it begins (default: as the profile's engine does)",
    )
    group.add_argument(
        "--scheduling-policy",
        default=defaults.scheduling_policy,
        metavar=f"{{{','.join(SCHEDULING_POLICIES)}}}",
        help="who is served first: who came first, or the most important (%(default)s)",
    )
    group.add_argument(
        "--num-speculative-tokens",
        type=int,
        default=defaults.num_speculative_tokens,
        metavar="N",
        help="draft tokens that a decode step verifies for each sequence; 0: none (%(default)s)",
    )
    group.add_argument(
        "--speculative-acceptance-rate",
        type=float,
        default=defaults.speculative_acceptance_rate,
        metavar="SHARE",
        help="of draft tokens, where all before were accepted (%(default)s)",
    )
    group.add_argument(
        "--speculative-draft-cost",
        type=float,
        default=defaults.speculative_draft_cost,
        metavar="SHARE",
        help="time to draft one token, as a share of a decode pass; n-grams: 0, EAGLE: %(default)s",
    )
    group.add_argument("--seed", type=int, default=defaults.seed, help="seed of tokens and jitter (%(default)s)")
    group.add_argument(
        "--jitter", type=float, help="coefficient of variation of step times; 0: none (default: as measured)"
    )
    if not is_live:
        parser.set_defaults(speedup_ratio=defaults.speedup_ratio, default_osl=defaults.default_osl)
        return
    group.add_argument(
        "--speedup-ratio",
        type=float,
        default=defaults.speedup_ratio,
        help="model seconds per real second; 0: as fast as the host can (%(default)s)",
    )
    group.add_argument(
        "--default-osl",
        type=int,
        default=defaults.default_osl,
        help="mean output tokens of a request that sets no max_tokens (%(default)s)",
    )


def add_worker_flags(parser: argparse.ArgumentParser) -> None:
    """Add one flag for each field of `WorkerSettings` that is the same for all workers of a fleet."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model-path",
        type=Path,
        default=DEFAULT_TOKENIZER,
        help="local model folder with a tokenizer (default: the one we ship)",
    )
    group.add_argument("--model-name", help="name that clients use (default: the profile's model)")
    group = parser.add_argument_group("worker")
    add_data_parallel_flag(group)
    for name, text in (("kv_events", "tell the router what is in the KV cache"), ("kv_routing", "that, and loads")):
        group.add_argument(
            flag_of(f"enable_{name}"),
            action=argparse.BooleanOptionalAction,
            help=f"{text} (default: yes; of serve and bench: with --router-mode kv)",
        )
    add_bandwidth_flag(group)
    group.add_argument(
        "--kv-transfer-timeout",
        type=float,
        default=DEFAULT_TIMEOUT_S,
        metavar="S",
        help="how long a prefill worker keeps a KV cache that no decode worker asks for (%(default)s)",
    )
    _add_answer_flags(parser)
    faults = parser.add_argument_group("faults", "what is to go wrong on purpose, and when: docs/faults.md")
    faults.add_argument(
        "--fault",
        dest="faults",
        action=_AddFaults,
        default=(),
        metavar="KIND[:key=value,...]",
        help="such as kv:share=0.9,at=60,for=10; may be given several times",
    )
    faults.add_argument("--faults", dest="faults", action=_AddFaults, default=(), metavar="FILE", help="TOML")


def _add_answer_flags(parser: argparse.ArgumentParser) -> None:
    """What answers contain."""
    defaults = WorkerSettings()
    group = parser.add_argument_group("answers", "what they contain: docs/requests.md")
    group.add_argument(
        "--tool-call-ratio",
        type=float,
        default=defaults.tool_call_ratio,
        metavar="SHARE",
        help="share of answers that call a tool, where the client offers tools and leaves it open (%(default)s)",
    )
    group.add_argument(
        "--reasoning-ratio",
        type=float,
        default=defaults.reasoning_ratio,
        metavar="SHARE",
        help="share of answers that begin with thoughts (%(default)s)",
    )
    group.add_argument(
        "--reasoning-osl", type=int, default=defaults.reasoning_osl, help="mean tokens of thoughts (%(default)s)"
    )
    group.add_argument(
        "--dyn-tool-call-parser",
        default=defaults.dyn_tool_call_parser,
        metavar="NAME",
        help="in which of Dynamo's formats tools are called; none: not at all (%(default)s)",
    )
    group.add_argument(
        "--dyn-reasoning-parser",
        metavar="NAME",
        help="how Dynamo finds thoughts (default: qwen3 where there are any, none otherwise)",
    )
    group.add_argument(
        "--lora-modules",
        nargs="+",
        action=_Extend,
        default=(),
        metavar="NAME[=SECONDS]",
        help="LoRA adapters that clients may name as model, and the time to load each",
    )
    group.add_argument(
        "--max-loras", type=int, default=defaults.max_loras, help="adapters loaded at once (%(default)s)"
    )


class _AddFaults(argparse.Action):
    """A fault, or a file of them, on top of those given before."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,  # noqa: ARG002
    ) -> None:
        try:
            more = [parse_fault(values)] if self.metavar != "FILE" else read_faults(Path(values))
        except ConfigError as error:
            parser.error(str(error))
        setattr(namespace, self.dest, (*getattr(namespace, self.dest), *more))


def add_dynamo_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say where a worker is found in Dynamo's cluster, and where it records."""
    group = parser.add_argument_group("Dynamo", "defaults come from Dynamo's own environment variables")
    group.add_argument("--namespace", default=os.environ.get("DYN_NAMESPACE", "dynamo"))
    group.add_argument("--component", help="(prefill for a prefill worker, backend for others)")
    group.add_argument("--endpoint", default="generate")
    group.add_argument("--endpoint-types", default="chat,completions")
    group.add_argument("--discovery-backend", default=os.environ.get("DYN_DISCOVERY_BACKEND", "etcd"))
    group.add_argument("--request-plane", default=os.environ.get("DYN_REQUEST_PLANE", "tcp"))
    group.add_argument("--event-plane", default=os.environ.get("DYN_EVENT_PLANE"))
    group.add_argument("--record", type=Path, metavar="DIR", help="write timeline.jsonl and requests.jsonl there")
    group.add_argument("--status", type=Path, metavar="FILE", help="keep the engine's latest state there, as JSON")
    group.add_argument(
        "--dcgm-port", type=int, metavar="PORT", help="show the GPUs as a dcgm-exporter does (default: not at all)"
    )
    group.add_argument("--dcgm-host", default="127.0.0.1", help="address that listens on (%(default)s)")
    group.add_argument(
        "--disaggregation-mode",
        default=ROLES[0],
        metavar=f"{{{','.join(ROLES)}}}",
        help="do all of a request, only its prompt, or what comes after it (%(default)s)",
    )
    group.add_argument(
        "--kv-transfer-host",
        default="127.0.0.1",
        metavar="HOST",
        help="address of this prefill worker that decode workers can reach (%(default)s)",
    )


def add_bandwidth_flag(group: argparse._ArgumentGroup) -> None:
    """Add the flag that says how fast KV caches go from prefill to decode workers."""
    group.add_argument(
        "--kv-transfer-bandwidth",
        type=float,
        default=DEFAULT_BANDWIDTH,
        metavar="GB/S",
        help="of a worker's link from prefill to decode, each way (%(default)s)",
    )


def add_role_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags that say how many workers there are of each role; none has a default of its own."""
    group.add_argument("--workers", type=int, metavar="N", help="workers that do all of a request (1)")
    group.add_argument("--prefill-workers", type=int, metavar="N", help="workers that only compute prompts")
    group.add_argument("--decode-workers", type=int, metavar="N", help="workers that only make output tokens")


def add_fleet_flags(parser: argparse.ArgumentParser, default_port: int) -> None:
    """Add the flags that say how many workers there are, and where the frontend listens."""
    group = parser.add_argument_group("deployment")
    add_role_flags(group)
    group.add_argument("--host", default="127.0.0.1", help="address the frontend listens on (%(default)s)")
    group.add_argument(
        "--port", type=int, default=default_port, help="port it listens on; 0: any free one (%(default)s)"
    )
    group.add_argument(
        "--migration-limit",
        type=int,
        metavar="N",
        help="how often a request of a worker that stops or dies is sent to another (DYN_MIGRATION_LIMIT, or 0)",
    )
    add_router_flags(parser)


def add_router_flags(parser: argparse.ArgumentParser) -> None:
    """Add one flag for each field of `RouterSettings`."""
    router = RouterSettings()
    group = parser.add_argument_group("router", "spelled as in 'python -m dynamo.frontend'")
    group.add_argument(
        "--router-mode", default=router.router_mode, metavar="MODE", help=f"{', '.join(ROUTER_MODES)} (%(default)s)"
    )
    group.add_argument(
        "--router-kv-overlap-score-credit",
        type=float,
        default=router.router_kv_overlap_score_credit,
        metavar="X",
        help="of a cached block, against one to prefill (%(default)s)",
    )
    group.add_argument(
        "--router-prefill-load-scale",
        type=float,
        default=router.router_prefill_load_scale,
        metavar="X",
        help="of a block to prefill, against one that decodes (%(default)s)",
    )
    group.add_argument(
        "--router-temperature",
        type=float,
        default=router.router_temperature,
        metavar="X",
        help="of the draw by cost; 0: always the lowest (%(default)s)",
    )


def add_data_parallel_flag(group: argparse._ArgumentGroup) -> None:
    """Add the flag that says how many engines a worker has."""
    group.add_argument(
        "--data-parallel-size", type=int, default=1, metavar="N", help="engines in each worker (%(default)s)"
    )


def add_serving_flags(parser: argparse.ArgumentParser, default_port: int) -> None:
    """Add all that says what is served, and where: `FleetSettings.from_flags` reads it."""
    add_fleet_flags(parser, default_port)
    add_engine_flags(parser)
    add_worker_flags(parser)
    add_plane_flags(parser)


def add_plane_flags(parser: argparse.ArgumentParser) -> None:
    """Add one flag for each field of `Planes`."""
    group = parser.add_argument_group("Dynamo", "etcd and NATS are where ETCD_ENDPOINTS and NATS_SERVER say")
    for (name, choices), text in zip(
        CHOICES.items(),
        ("how the parts find each other", "what requests go over", "what KV events go over"),
        strict=True,
    ):
        default = getattr(Planes(), name)
        group.add_argument(
            flag_of(name), default=default, metavar=f"{{{','.join(choices)}}}", help=f"{text} ({default})"
        )


def add_load_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what AIPerf sends, spelled as AIPerf spells them."""
    group = parser.add_argument_group("load")
    add_shared_load_flags(group, request_count="64", dataset_type="such as mooncake_trace")
    group.add_argument("--goodput", metavar="SLOS", help="e.g. 'time_to_first_token:200ms inter_token_latency:20ms'")
    group.add_argument(
        "--output-dir", type=Path, metavar="DIR", help="where the report goes (bench-<date>-<time>, here)"
    )


def add_shared_load_flags(group: argparse._ArgumentGroup, request_count: str, dataset_type: str) -> None:
    """Add the flags that a benchmark and a simulation share; the texts say what they do without the last two."""
    group.add_argument("--isl", type=int, help="mean input tokens of a request (512)")
    group.add_argument("--osl", type=int, help="mean output tokens of a request (128)")
    group.add_argument("--isl-stddev", type=float, help="spread of the input tokens (0)")
    group.add_argument("--osl-stddev", type=float, help="spread of the output tokens (0)")
    group.add_argument("--concurrency", type=int, help="requests under way at any time (8, unless there is a rate)")
    group.add_argument("--request-rate", type=float, help="requests a second")
    group.add_argument("--request-count", type=int, help=f"requests in all ({request_count})")
    group.add_argument("--input-file", type=Path, metavar="FILE", help="a trace to send, instead of made-up prompts")
    group.add_argument("--custom-dataset-type", metavar="TYPE", help=f"what the file is, {dataset_type}")
    group.add_argument("--fixed-schedule", action="store_true", help="send at the trace's own times")
