"""
Several requests at once, and everything a client can do to each, in any order.

The moves are Hypothesis's to choose. After all of them every stream must have
ended as the moves allow, nothing may be held, and the engine must still serve.
"""

from __future__ import annotations

import math
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, multiple, rule

from conformance.bench import Bench
from conformance.resources import probe_of
from conformance.streams import Stream
from conformance.transcript import expect
from conformance.wire import requests, wire_request


def concurrent_requests(bench: Bench) -> type[RuleBasedStateMachine]:
    """A state machine on the bench's engine."""
    limit = bench.facts.numbers.get("max_num_seqs")
    is_one = bench.facts.role == "prefill"  # one token, whatever max_tokens says
    most = min(limit if isinstance(limit, int) else 8, 8) + 3  # some have to wait for a place

    class ConcurrentRequests(RuleBasedStateMachine):
        tries: Any = None
        streams = Bundle("streams")

        @initialize(
            target=streams,
            batch=st.lists(requests(), min_size=2, max_size=most),
            steps=st.sampled_from([1.3, 0.3, 0.0, 3.5]),
            how=st.sampled_from(["abort", "stop", "drop", "stay"]),
        )
        def start(self, batch: Any, steps: float, how: str) -> Any:
            """Some at once to begin with, and one leaves: what comes then may be little, as Hypothesis sees fit."""
            self.tries.num += 1
            self.all: list[Stream] = []
            self.is_broken = True
            bench.begin_example()
            bench.run(bench.ensure_engine())
            opened = [self._open(request) for request in batch]
            self.let_time_pass(steps)
            self.let_leave(opened[0], how)
            return multiple(*opened)

        def _open(self, request: Any) -> Stream:
            stream: Stream = self._do(bench.open(request))
            self.all.append(stream)
            return stream

        def _do(self, coroutine: Any) -> Any:
            try:
                return bench.run(coroutine)
            except Exception as error:
                self.tries.failure, self.tries.transcripts = error, list(bench.transcripts)
                raise

        @rule(target=streams, request=requests())
        def generate(self, request: Any) -> Any:
            if len(self.all) >= 2 * most:  # not how many are open, which time decides: Hypothesis counts on the same
                return multiple()
            return self._open(request)

        @rule(steps=st.sampled_from([0.0, 0.3, 1.0, 3.5]))
        def some_time(self, steps: float) -> None:
            self.let_time_pass(steps)

        def let_time_pass(self, steps: float) -> None:
            self._do(bench.let_pass(steps * max(bench.facts.gap_s, 0.001)))

        @rule(stream=streams, num_chunks=st.integers(1, 4))
        def read(self, stream: Stream, num_chunks: int) -> None:
            self._do(stream.wait_chunks(len(stream.transcript.chunks) + num_chunks, bench.answer_within_s()))

        @rule(stream=streams, how=st.sampled_from(["stop", "abort", "drop", "abort and drop"]))
        def leave(self, stream: Stream, how: str) -> None:
            self.let_leave(stream, how)

        def let_leave(self, stream: Stream, how: str) -> None:
            if how == "stop":
                stream.stop()
            if "drop" in how:
                self._do(stream.drop())
            if "abort" in how:
                self._do(stream.abort())

        @rule()
        def abort_nobody(self) -> None:
            self._do(bench.engine.abort(bench.context("nobody")))

        def teardown(self) -> None:
            if not hasattr(self, "all"):
                return
            try:
                self._do(self._judge())
                self.is_broken = False
            finally:
                bench.end_example(is_broken=self.is_broken)

        async def _judge(self) -> None:
            for stream in self.all:
                transcript = await stream.finish(bench.answer_within_s())
                expect(
                    not transcript.is_hung,
                    "a stream never ended",
                    transcript,
                    *bench.transcripts,
                    shows="chunks[-1].get('finish_reason')",
                )
                if transcript.of_kind("drop"):
                    continue
                others = [other for other in bench.transcripts if other is not transcript]
                was_stopped = bool(transcript.of_kind("stop", "abort"))
                error = transcript.error
                expect(
                    error is None,
                    f"a valid request beside others raised {type(error).__name__}: {error}",
                    transcript,
                    *others,
                    shows="'raised' not in chunks[-1]",
                )
                num_chunks = len(transcript.chunks)
                expect(
                    transcript.terminals == [num_chunks - 1],
                    f"beside others, finish_reason is on chunks {transcript.terminals} of {num_chunks}",
                    transcript,
                    *others,
                    shows="[i for i, chunk in enumerate(chunks) if chunk.get('finish_reason')] == [len(chunks) - 1]",
                )
                expect(
                    was_stopped or not transcript.is_cancelled,
                    "a request that nobody stopped ended as cancelled",
                    transcript,
                    *others,
                    shows="chunks[-1].get('finish_reason') not in ('cancelled', 'abort')",
                )
                budget = transcript.request["stop_conditions"]["max_tokens"]
                expect(
                    len(transcript.token_ids) <= (budget if budget is not None else math.inf),
                    f"{len(transcript.token_ids)} tokens for max_tokens={budget}",
                    transcript,
                    shows=f"sum(len(chunk['token_ids']) for chunk in chunks) <= {budget}",
                )
                expect(
                    transcript.finish_reason != "length" or is_one or len(transcript.token_ids) == budget,
                    f"beside others, finish_reason is 'length' after {len(transcript.token_ids)} tokens of "
                    f"max_tokens={budget}",
                    transcript,
                    *others,
                    shows=f"sum(len(chunk['token_ids']) for chunk in chunks) == {budget}",
                )
            probe = probe_of(bench.engine)
            if probe is not None:
                if bench.is_virtual:
                    await bench.let_pass(bench.cancel_within_s)
                await bench.let_threads_run(lambda: not any(probe.in_use().values()))
                left = {name: value for name, value in probe.in_use().items() if value}
                expect(not left, f"when all requests are over the engine still holds {left}", *bench.transcripts)
            await bench.answer(wire_request([1, 2, 3], max_tokens=3))

    return ConcurrentRequests
