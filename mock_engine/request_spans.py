"""
A request in the trace of whoever sent it: what Dynamo's `engine.generate` span says of it, and three spans under that.

    spans = start_spans(context)             a `RequestSpans`, or `NO_SPANS` if nobody records any
    stream.on_started = spans.started        it was first taken into a step: `queue` ends, `prefill` begins
    spans.sent(live)                         tokens go out: at the first, `prefill` ends and `decode` begins
    spans.ended(live)                        before the last chunk goes out, or when the request is let go of

Dynamo's facade (ai-dynamo 1.3 and later) opens a span now, and ends it when it is told to, on any thread. So spans are
objects that a request has, and no context managers: nothing is held across a yield. Names of attributes are those of
vLLM's tracing (gen_ai.*), which follow OpenTelemetry's conventions for generative AI.

The facade warns once a process if it is used where nothing records. Whether something does is known from the same two
variables that Dynamo itself goes by: DYN_LOGGING_JSONL and OTEL_EXPORT_ENABLED.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from mock_engine.live_request import LiveRequest

_TRUE = {"1", "true", "on", "yes"}


def is_traced(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether Dynamo exports spans."""
    return all(
        environment.get(name, "").strip().lower() in _TRUE for name in ("DYN_LOGGING_JSONL", "OTEL_EXPORT_ENABLED")
    )


class NoSpans:
    """What is done for a request that nobody traces."""

    def started(self) -> None:
        """It was first taken into a step."""

    def sent(self, live: LiveRequest) -> None:
        """Some of its tokens go out now."""

    def ended(self, live: LiveRequest) -> None:
        """It has ended. Safe twice."""


NO_SPANS = NoSpans()


class RequestSpans(NoSpans):
    """The spans of one request."""

    def __init__(self, context: Any) -> None:
        self._context = context
        self._generate = context.current_span()
        self._open: Any = context.start_span("queue", None)
        self._is_first = True
        self._is_ended = False

    def started(self) -> None:
        """It was first taken into a step."""
        if not self._is_ended:
            self._go_on("prefill")

    def sent(self, live: LiveRequest) -> None:
        """Some of its tokens go out now."""
        if self._is_first:
            self._is_first = False
            self._generate.add_event("first_token", None)
            self._go_on("decode")
        if live.is_ended:
            self.ended(live)

    def ended(self, live: LiveRequest) -> None:
        """It has ended. Safe twice."""
        if self._is_ended:
            return
        self._is_ended = True
        for name, value in _attributes(live).items():
            self._generate.set_attribute(name, value)
        self._open.close()

    def _go_on(self, name: str) -> None:
        self._open.close()
        self._open = self._context.start_span(name, None)


def start_spans(context: Any) -> NoSpans:
    """The spans of a request that has just arrived. Only where `is_traced`, and Dynamo has spans (1.3 and later)."""
    return RequestSpans(context) if hasattr(context, "start_span") else NO_SPANS


def _attributes(live: LiveRequest) -> dict[str, Any]:
    """What there is to know about it at its end. Seconds are model seconds, as in a recording."""
    stream = live.stream
    first = stream.sequences[0]
    attributes: dict[str, Any] = {
        "gen_ai.request.id": live.request_id,
        "gen_ai.request.n": len(stream.sequences),
        "gen_ai.usage.prompt_tokens": first.request.isl_tokens,
        "gen_ai.usage.completion_tokens": live.num_sent,
        "gen_ai.usage.cached_tokens": first.num_cached_tokens or 0,
        "gen_ai.response.finish_reasons": ",".join(live.finish_reasons()),
        "mock_engine.num_preemptions": sum(sequence.num_preemptions for sequence in stream.sequences),
        "mock_engine.dp_rank": stream.drive.dp_rank,
    }
    if live.max_tokens is not None:
        attributes["gen_ai.request.max_tokens"] = live.max_tokens
    started_s = min((at_s for at_s in stream.started_s if at_s is not None), default=None)
    if started_s is not None:
        attributes["gen_ai.latency.time_in_queue"] = started_s - stream.arrival_s
    firsts = [sent_s[0] for sent_s in stream.sent_s if sent_s]
    if firsts and started_s is not None:
        last_s = max(sent_s[-1] for sent_s in stream.sent_s if sent_s)
        attributes["gen_ai.latency.time_to_first_token"] = min(firsts) - stream.arrival_s
        attributes["gen_ai.latency.time_in_model_prefill"] = min(firsts) - started_s
        attributes["gen_ai.latency.time_in_model_decode"] = last_s - min(firsts)
        attributes["gen_ai.latency.e2e"] = last_s - stream.arrival_s
    return attributes
