"""What a request leaves in its trace, whatever becomes of it."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conformance.bridge import BridgeStream
from conformance.context import RequestContext
from mock_engine.llm_engine import MockLLMEngine
from mock_engine.request_spans import is_traced
from tests.helpers.jumping_loop import run

SMALL = (
    *("--max-model-len", "128", "--block-size", "8", "--num-gpu-blocks-override", "24"),
    *("--max-num-seqs", "2", "--jitter", "0"),
)


@pytest.fixture(autouse=True, scope="module")
def _is_traced(no_wall_clock):
    no_wall_clock.setattr("mock_engine.llm_engine.is_traced", lambda: True)


class Span:
    """Records; `close` on any thread, as Dynamo's."""

    def __init__(self, name, clock):
        self.name, self.begin_s, self._clock = name, clock(), clock
        self.ends_s, self.attributes, self.events = [], {}, []

    def set_attribute(self, name, value):
        assert isinstance(value, bool | int | float | str), name
        self.attributes[name] = value

    def add_event(self, name, attributes=None):
        del attributes
        self.events.append(name)

    def close(self):
        self.ends_s.append(self._clock())


class TracedContext(RequestContext):
    def __init__(self, request_id):
        super().__init__(request_id)
        self._clock = asyncio.get_running_loop().time
        self.generate = Span("engine.generate", self._clock)
        self.children = []

    def current_span(self):
        return self.generate

    def start_span(self, name, attributes=None):
        del attributes
        self.children.append(Span(name, self._clock))
        return self.children[-1]


async def talk(engine, number, plan):
    """One client, which leaves after so many reads, or stays."""
    isl_tokens, max_tokens, num_choices, leaves_after, way = plan
    await asyncio.sleep(number * 0.002)
    context = TracedContext(f"r{number}")
    request = {
        "token_ids": list(range(100, 100 + isl_tokens)),
        "stop_conditions": {"max_tokens": max_tokens, "ignore_eos": True},
        "sampling_options": {"n": num_choices},
    }
    stream = BridgeStream(engine, request, context)
    num_reads, has_ended = 0, False
    while not has_ended and (leaves_after is None or num_reads < leaves_after):
        chunk = await stream.read()
        num_reads += 1
        has_ended = chunk is None or "finish_reason" in chunk
    if not has_ended and way == "stop" and num_reads:
        context.stop_generating()
        while (chunk := await stream.read()) is not None and "finish_reason" not in chunk:
            pass
    await stream.drop()
    return context, num_reads, has_ended


plans = st.lists(
    st.tuples(
        st.integers(1, 60),
        st.integers(1, 30),
        st.integers(1, 2),
        st.none() | st.integers(0, 12),
        st.sampled_from(["drop", "stop"]),
    ),
    min_size=1,
    max_size=5,
)


@given(plans=plans)
@settings(max_examples=40)
def test_spans_follow_each_other_without_a_gap_and_all_end_once(plans):
    async def main():
        engine, _ = await MockLLMEngine.from_args(list(SMALL))
        await engine.start(1)
        talks = await asyncio.gather(*(talk(engine, number, plan) for number, plan in enumerate(plans)))
        await engine.cleanup()
        for (context, num_reads, has_ended), (isl_tokens, max_tokens, num_choices, *_) in zip(
            talks, plans, strict=True
        ):
            names = [span.name for span in context.children]
            if not num_reads:
                assert not names  # a generator that was never begun
                continue
            assert names == ["queue", "prefill", "decode"]
            assert all(len(span.ends_s) == 1 for span in context.children)
            for before, after in zip(context.children, context.children[1:], strict=False):
                assert before.ends_s == [after.begin_s]
            said = context.generate.attributes
            assert context.generate.events == ["first_token"]
            assert not context.generate.ends_s  # it is Dynamo's to end
            assert said["gen_ai.usage.prompt_tokens"] == isl_tokens
            assert said["gen_ai.request.max_tokens"] == max_tokens
            assert said["gen_ai.request.n"] == num_choices
            queue, prefill, decode = context.children
            assert said["gen_ai.latency.time_in_queue"] == pytest.approx(queue.ends_s[0] - queue.begin_s, abs=1e-6)
            assert said["gen_ai.latency.time_in_model_prefill"] == pytest.approx(
                prefill.ends_s[0] - prefill.begin_s, abs=1e-6
            )
            if has_ended:
                assert said["gen_ai.usage.completion_tokens"] == max_tokens * num_choices
                assert said["gen_ai.response.finish_reasons"] == ",".join(["length"] * num_choices)
                decode_s = said["gen_ai.latency.time_in_model_decode"]
                assert decode_s == pytest.approx(decode.ends_s[0] - decode.begin_s, abs=1e-6)

    run(main())


def test_a_request_that_is_dropped_while_it_waits_ends_in_its_queue():
    async def main():
        engine, _ = await MockLLMEngine.from_args([*SMALL, "--max-num-seqs", "1"])
        await engine.start(1)
        first = BridgeStream(engine, {"token_ids": [1] * 20}, RequestContext("first"))
        await first.read()
        context = TracedContext("second")
        second = BridgeStream(engine, {"token_ids": [2] * 20}, context)
        read = asyncio.create_task(second.read())
        await asyncio.sleep(0.05)
        context.stop_generating()
        await read
        await second.drop()
        await first.drop()
        await engine.cleanup()
        (queue,) = context.children
        assert queue.name == "queue"
        assert queue.ends_s == pytest.approx([queue.begin_s + 0.05], abs=0.03)
        assert context.generate.attributes["gen_ai.response.finish_reasons"] == "cancelled"
        assert "gen_ai.latency.time_to_first_token" not in context.generate.attributes

    run(main())


@pytest.mark.parametrize(
    ("environment", "is_on"),
    [
        ({}, False),
        ({"DYN_LOGGING_JSONL": "1"}, False),
        ({"OTEL_EXPORT_ENABLED": "true"}, False),
        ({"DYN_LOGGING_JSONL": "0", "OTEL_EXPORT_ENABLED": "1"}, False),
        ({"DYN_LOGGING_JSONL": "True", "OTEL_EXPORT_ENABLED": "on"}, True),
    ],
)
def test_spans_are_made_only_where_dynamo_exports_them(environment, is_on):
    assert is_traced(environment) == is_on


def test_without_tracing_dynamos_facade_is_not_touched():
    """It would warn, once a process."""

    class Untouchable(RequestContext):
        def current_span(self):
            raise AssertionError("somebody asked for a span")

        start_span = current_span

    async def main():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("mock_engine.llm_engine.is_traced", lambda: False)
            engine, _ = await MockLLMEngine.from_args(list(SMALL))
        await engine.start(1)
        chunks = await BridgeStream(engine, {"token_ids": [1, 2]}, Untouchable("r")).read_all()
        assert chunks[-1]["finish_reason"] in ("length", "eos")
        await engine.cleanup()

    run(main())
