"""A served fleet, watched as in production: Prometheus, promtool, dcgm-exporter's names, OpenTelemetry."""

from __future__ import annotations

import shutil
import sys
from collections import defaultdict

import pytest

from mock_engine.processes import http_json
from tests.helpers.processes import serving, wait_for
from tests.helpers.telemetry import NOT_OURS, Collector, lint, prometheus, read

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
    pytest.mark.skipif(not shutil.which("prometheus"), reason="needs the program prometheus"),
    pytest.mark.skipif(not shutil.which("promtool"), reason="needs the program promtool"),
]

NUM_REQUESTS = 6
OSL = 20
SPANS = {"engine.generate", "queue", "prefill", "decode"}


@pytest.fixture
def collector():
    collector = Collector()
    yield collector
    collector.stop()


def spans_of(collector):
    """Spans by trace id and name, where the protocol's classes are installed."""
    service = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
    traces = defaultdict(dict)
    for body in collector.bodies:
        for resource in service.ExportTraceServiceRequest.FromString(body).resource_spans:
            for scope in resource.scope_spans:
                for span in scope.spans:
                    traces[span.trace_id][span.name] = span
    return traces


def traces_of_requests(collector):
    """Those of which all spans have come; they come in batches."""
    return [spans for spans in spans_of(collector).values() if spans.keys() >= SPANS]


def test_what_is_served_can_be_watched(tmp_path, monkeypatch, collector):
    for name, value in collector.environment.items():
        monkeypatch.setenv(name, value)
    with serving(tmp_path, "--workers", "2") as (command, facts):
        for name, url in facts["metrics_urls"].items():
            if name != "frontend":
                assert http_json(url.replace("/metrics", "/health"))["status"] == "ready"
        before = [read(url) for url in facts["metrics_urls"].values()]
        assert "vllm:" not in before[0]
        assert all("# TYPE vllm:generation_tokens_total counter" in text for text in before[1:])

        jobs = {"engine": list(facts["metrics_urls"].values()), "dcgm": list(facts["dcgm_urls"].values())}
        with prometheus(tmp_path, jobs) as server:
            made_before = server.value("sum(vllm:generation_tokens_total)")
            message = {"role": "user", "content": "hello"}
            body = {"model": facts["model"], "messages": [message], "max_tokens": OSL, "ignore_eos": True}
            for _ in range(NUM_REQUESTS):
                http_json(f"{facts['url']}/v1/chat/completions", body, 60)

            made = NUM_REQUESTS * OSL
            quantile = "histogram_quantile(0.99, sum by(le) (rate(vllm:inter_token_latency_seconds_bucket[1m])))"
            # Each is waited for, as Prometheus takes a target for gone when it has answered one scrape too late.
            for query, is_right in {
                "sum(vllm:generation_tokens_total)": lambda value: value - made_before == made,
                "sum(increase(vllm:e2e_request_latency_seconds_count[1m]))": lambda value: value > 0,
                quantile: lambda value: 0.001 < value < 1,
                "max(DCGM_FI_DEV_POWER_USAGE)": lambda value: value > 0,
                "count(DCGM_FI_DEV_GPU_UTIL)": lambda value: value == 2,
                "sum(increase(DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION[1m]))": lambda value: value > 0,
            }.items():
                wait_for(
                    lambda query=query, is_right=is_right: is_right(server.value(query)),
                    lambda query=query: f"{query} is right, but {server.query(query)}",
                )

        expositions = [read(url) for urls in jobs.values() for url in urls]
        for complaint in [line for text in expositions[1:] for line in lint(text)]:
            assert any(known in complaint for known in NOT_OURS), complaint
        lint(expositions[0])

        # `serve` has asked once, too; of the last request of each worker Dynamo ends one span only with the next.
        num_complete = NUM_REQUESTS + 1 - 2
        wait_for(lambda: len(traces_of_requests(collector)) >= num_complete, "spans of all but the last have come")
    assert "telemetry call is a no-op" not in command.output
    traces = [spans for spans in spans_of(collector).values() if "engine.generate" in spans]
    assert len(traces) >= NUM_REQUESTS
    for spans in traces:
        generate, queue, prefill, decode = (spans[name] for name in ("engine.generate", "queue", "prefill", "decode"))
        assert all(span.parent_span_id == generate.span_id for span in (queue, prefill, decode))
        assert queue.end_time_unix_nano <= prefill.start_time_unix_nano
        assert prefill.end_time_unix_nano <= decode.start_time_unix_nano
        attributes = {each.key for each in generate.attributes}
        assert {"gen_ai.usage.prompt_tokens", "gen_ai.latency.time_to_first_token"} <= attributes
