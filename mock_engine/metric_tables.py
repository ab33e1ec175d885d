"""
What engines of each type call their metrics on /metrics: names, types, labels and buckets, as data.

    for metric in metrics_of("vllm", max_model_len): ...

`Metric.series` says which of our figures (`engine_stats`) a metric shows; `exposition` brings the two together. A
metric that is not in a table is one more row, if the figure is there.

Sources. vLLM: `vllm/v1/metrics/loggers.py` of v0.10.2 to v0.11, whose names, labels and buckets the example Grafana
dashboard (examples/online_serving/prometheus_grafana) asks for. Two that later releases dropped stay, because
dashboards still ask for them: time_per_output_token_seconds (to 0.10, the same as inter_token_latency_seconds) and
gpu_cache_usage_perc (to 0.9). SGLang and TensorRT-LLM: what a Dynamo worker of each exposes
(docs/observability/metrics_examples of ai-dynamo/dynamo), as far as we have the figure.

Counters have the `_total` that they have on the wire. `vllm:iteration_tokens_total` is a histogram all the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

# Edges in seconds.
TTFT_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
ITL_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
NUM_CHOICES = (1, 2, 5, 10, 20)

_SGLANG_TTFT_S = (
    *(0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 2.0, 4.0, 6.0, 8.0, 10.0),
    *(20.0, 40.0, 60.0, 80.0, 100.0, 200.0, 400.0),
)
_SGLANG_ITL_S = (
    *(0.002, 0.004, 0.006, 0.008, 0.010, 0.015, 0.020, 0.025, 0.030, 0.035, 0.040, 0.060, 0.080),
    *(0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 2.0, 4.0, 6.0, 8.0),
)
_SGLANG_REQUEST_S = (*_SGLANG_TTFT_S, 600.0, 1200.0, 1800.0, 2400.0)
_SGLANG_QUEUE_S = (
    *(0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0, 90.0),
    *(100.0, 200.0, 300.0, 400.0, 500.0, 600.0, 700.0, 800.0, 900.0, 1000.0),
    *(1200.0, 1400.0, 1600.0, 1800.0, 2000.0, 2500.0, 3000.0),
)
_LATENESS_S = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_STEP_S = (0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.5, 1.0, 2.0)


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric of one engine type. `series` is a name of `engine_stats`; a histogram has `edges`."""

    name: str
    kind: str  # "gauge", "counter", "histogram"
    series: str
    text: str
    edges: tuple[float, ...] = ()
    label: str | None = None  # of a counter with one more label: its name; `series` then has a value for each


@dataclass(frozen=True, slots=True)
class EngineLabels:
    """The labels of an engine type: the name of that for the DP rank, and those that are always the same."""

    rank: str = "engine"
    fixed: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


MODEL_LABEL = "model_name"  # all have it
LABELS = {
    "vllm": EngineLabels(),
    "sglang": EngineLabels(
        "dp_rank", MappingProxyType({"engine_type": "unified", "tp_rank": "0", "pp_rank": "0", "moe_ep_rank": "0"})
    ),
    "trtllm": EngineLabels("dp_rank", MappingProxyType({"engine_type": "trtllm"})),  # it has no rank of its own
}
OWN_LABELS = EngineLabels()


def metrics_of(engine_type: str, max_model_len: int, has_drafts: bool = False) -> list[Metric]:
    """
    The metrics that an engine of that type shows. Token counts have buckets up to the context length.

    As in vLLM, draft tokens have metrics only where there are any (`has_drafts`).
    """
    metrics = {"vllm": _vllm, "sglang": _sglang, "trtllm": _trtllm}[engine_type](max_model_len)
    return metrics + _VLLM_DRAFTS if has_drafts and engine_type == "vllm" else metrics


def own_metrics() -> list[Metric]:
    """What only this engine has."""
    return [
        Metric(
            "mock_engine_token_lateness_seconds",
            "histogram",
            "lateness_s",
            "How late a token went out after the moment it was due: what the host adds.",
            _LATENESS_S,
        ),
        Metric("mock_engine_step_seconds", "histogram", "step_s", "Seconds of model time a step took.", _STEP_S),
        Metric("mock_engine_steps_total", "counter", "num_steps", "Steps run."),
        Metric("mock_engine_busy_seconds_total", "counter", "busy_s", "Seconds of model time spent in steps."),
        Metric("mock_engine_model_seconds", "gauge", "model_s", "Model time since the engine started, in seconds."),
        Metric("mock_engine_speedup_ratio", "gauge", "speedup_ratio", "Model seconds per real second; 0: not paced."),
        Metric(
            "mock_engine_health_probes_total", "counter", "num_probes", "Health probes answered, counted nowhere else."
        ),
    ]


def token_edges(max_model_len: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, 50 and so on up to `max_model_len`, as vLLM makes its buckets of tokens."""
    edges = (mantissa * 10**exponent for exponent in range(len(str(max_model_len))) for mantissa in (1, 2, 5))
    return tuple(float(edge) for edge in edges if edge <= max_model_len)


def _vllm(max_model_len: int) -> list[Metric]:
    tokens = token_edges(max_model_len)
    return [
        Metric("vllm:num_requests_running", "gauge", "num_running", "Number of requests in model execution batches."),
        Metric("vllm:num_requests_waiting", "gauge", "num_waiting", "Number of requests waiting to be processed."),
        Metric("vllm:kv_cache_usage_perc", "gauge", "kv_usage", "KV-cache usage. 1 means 100 percent usage."),
        Metric(
            "vllm:gpu_cache_usage_perc",
            "gauge",
            "kv_usage",
            "KV-cache usage, by its name before vLLM 0.10. 1 means all.",
        ),
        Metric(
            "vllm:prefix_cache_queries_total",
            "counter",
            "prefix_queries_tokens",
            "Prefix cache queries, in terms of number of queried tokens.",
        ),
        Metric(
            "vllm:prefix_cache_hits_total",
            "counter",
            "prefix_hits_tokens",
            "Prefix cache hits, in terms of number of cached tokens.",
        ),
        Metric("vllm:num_preemptions_total", "counter", "num_preemptions", "Cumulative number of preemptions."),
        Metric("vllm:prompt_tokens_total", "counter", "prompt_tokens", "Number of prefill tokens processed."),
        Metric("vllm:generation_tokens_total", "counter", "output_tokens", "Number of generation tokens processed."),
        Metric(
            "vllm:request_success_total",
            "counter",
            "ended_by_reason",
            "Count of successfully processed requests.",
            label="finished_reason",
        ),
        Metric(
            "vllm:iteration_tokens_total",
            "histogram",
            "step_tokens",
            "Histogram of number of tokens per engine_step.",
            STEP_TOKENS,
        ),
        Metric(
            "vllm:request_prompt_tokens",
            "histogram",
            "isl_tokens",
            "Number of prefill tokens processed, by request.",
            tokens,
        ),
        Metric(
            "vllm:request_generation_tokens",
            "histogram",
            "osl_tokens",
            "Number of tokens generated, by request.",
            tokens,
        ),
        Metric(
            "vllm:request_max_num_generation_tokens",
            "histogram",
            "longest_osl_tokens",
            "Histogram of maximum number of generation tokens over the choices of a request.",
            tokens,
        ),
        Metric(
            "vllm:request_params_n", "histogram", "num_choices", "Histogram of the n request parameter.", NUM_CHOICES
        ),
        Metric(
            "vllm:request_params_max_tokens",
            "histogram",
            "max_tokens",
            "Histogram of the max_tokens request parameter.",
            tokens,
        ),
        Metric("vllm:time_to_first_token_seconds", "histogram", "ttft_s", "Histogram of time to first token.", TTFT_S),
        Metric("vllm:inter_token_latency_seconds", "histogram", "itl_s", "Histogram of inter-token latency.", ITL_S),
        Metric(
            "vllm:time_per_output_token_seconds",
            "histogram",
            "itl_s",
            "Histogram of inter-token latency, by its name before vLLM 0.11.",
            ITL_S,
        ),
        Metric(
            "vllm:request_time_per_output_token_seconds",
            "histogram",
            "tpot_s",
            "Histogram of the mean time between output tokens, by request.",
            ITL_S,
        ),
        Metric(
            "vllm:e2e_request_latency_seconds", "histogram", "e2e_s", "Histogram of e2e request latency.", REQUEST_S
        ),
        Metric(
            "vllm:request_queue_time_seconds", "histogram", "queue_s", "Histogram of time in WAITING phase.", REQUEST_S
        ),
        Metric(
            "vllm:request_inference_time_seconds",
            "histogram",
            "inference_s",
            "Histogram of time in RUNNING phase.",
            REQUEST_S,
        ),
        Metric(
            "vllm:request_prefill_time_seconds",
            "histogram",
            "prefill_s",
            "Histogram of time in PREFILL phase.",
            REQUEST_S,
        ),
        Metric(
            "vllm:request_decode_time_seconds", "histogram", "decode_s", "Histogram of time in DECODE phase.", REQUEST_S
        ),
    ]


_VLLM_DRAFTS = [
    Metric("vllm:spec_decode_num_drafts_total", "counter", "num_drafts", "Number of spec decoding drafts."),
    Metric("vllm:spec_decode_num_draft_tokens_total", "counter", "num_draft_tokens", "Number of draft tokens."),
    Metric(
        "vllm:spec_decode_num_accepted_tokens_total", "counter", "num_accepted_tokens", "Number of accepted tokens."
    ),
    Metric(
        "vllm:spec_decode_num_accepted_tokens_per_pos_total",
        "counter",
        "accepted_by_position",
        "Accepted tokens per draft position.",
        label="position",
    ),
]


def _sglang(max_model_len: int) -> list[Metric]:
    del max_model_len  # none of these has buckets of tokens
    return [
        Metric("sglang:num_running_reqs", "gauge", "num_running", "The number of running requests."),
        Metric("sglang:num_queue_reqs", "gauge", "num_waiting", "The number of requests in the waiting queue."),
        Metric("sglang:token_usage", "gauge", "kv_usage", "The token usage."),
        Metric("sglang:num_used_tokens", "gauge", "kv_used_tokens", "The number of used tokens."),
        Metric(
            "sglang:max_total_num_tokens", "gauge", "kv_total_tokens", "Maximum total number of tokens in the KV pool."
        ),
        Metric("sglang:cache_hit_rate", "gauge", "prefix_hit_rate", "The prefix cache hit rate."),
        Metric("sglang:prompt_tokens_total", "counter", "prompt_tokens", "Number of prefill tokens processed."),
        Metric("sglang:generation_tokens_total", "counter", "output_tokens", "Number of generation tokens processed."),
        Metric("sglang:cached_tokens_total", "counter", "prefix_hits_tokens", "Number of cached prompt tokens."),
        Metric("sglang:num_requests_total", "counter", "num_ended", "Number of requests processed."),
        Metric("sglang:num_aborted_requests_total", "counter", "num_aborted", "Number of requests aborted."),
        Metric(
            "sglang:time_to_first_token_seconds",
            "histogram",
            "ttft_s",
            "Histogram of time to first token.",
            _SGLANG_TTFT_S,
        ),
        Metric(
            "sglang:inter_token_latency_seconds",
            "histogram",
            "itl_s",
            "Histogram of inter-token latency.",
            _SGLANG_ITL_S,
        ),
        Metric(
            "sglang:e2e_request_latency_seconds",
            "histogram",
            "e2e_s",
            "Histogram of End-to-end request latency.",
            _SGLANG_REQUEST_S,
        ),
        Metric("sglang:queue_time_seconds", "histogram", "queue_s", "Histogram of queueing time.", _SGLANG_QUEUE_S),
    ]


def _trtllm(max_model_len: int) -> list[Metric]:
    del max_model_len
    return [
        Metric(
            "trtllm_request_success_total",
            "counter",
            "ended_by_reason",
            "Count of successfully processed requests.",
            label="finished_reason",
        ),
        Metric(
            "trtllm_e2e_request_latency_seconds", "histogram", "e2e_s", "Histogram of e2e request latency.", REQUEST_S
        ),
        Metric(
            "trtllm_time_to_first_token_seconds", "histogram", "ttft_s", "Histogram of time to first token.", TTFT_S
        ),
        Metric(
            "trtllm_time_per_output_token_seconds", "histogram", "tpot_s", "Histogram of time per output token.", ITL_S
        ),
        Metric(
            "trtllm_request_queue_time_seconds",
            "histogram",
            "queue_s",
            "Histogram of time in WAITING phase.",
            REQUEST_S,
        ),
    ]
