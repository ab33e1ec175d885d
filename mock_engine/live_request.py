"""
One request of Dynamo's while it is answered: its stream of tokens, and the chunks that it becomes.

    live = LiveRequest(request_id, answers, stream)
    while not live.is_ended:
        tokens = await live.stream.next_tokens()
        for chunk in live.chunks(tokens):        to be yielded, in order

Nothing here waits, so all of it works on any thread.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from mock_engine.core import Token
from mock_engine.drive_realtime import Stream
from mock_engine.fault_injector import RequestFault
from mock_engine.prompt import Answer
from mock_engine.recorder import RequestRow


class LiveRequest:
    """The choices of one prompt, which live and die together."""

    def __init__(
        self,
        request_id: str,
        answers: Sequence[Answer],
        stream: Stream,
        num_cached_tokens: int | None = None,
        max_tokens: int | None = None,
        is_probe: bool = False,
        fault: RequestFault | None = None,
        adapter: str | None = None,
    ) -> None:
        self.request_id = request_id
        self.adapter = adapter  # the LoRA adapter that it runs with
        self.answers = answers
        self.stream = stream
        self._num_cached_tokens = num_cached_tokens  # of a prompt that was computed elsewhere
        self.max_tokens = max_tokens  # what the client asked for
        self.is_probe = is_probe  # asked by Dynamo's health check, and of no interest to anybody else
        self.is_closed = False  # nothing of it goes out any more
        self.is_cancelled = False
        self.fault = fault if fault is not None and fault.breaks else None
        self._num_sent = [0] * len(answers)  # tokens of each choice
        self._num_left = len(answers)
        self._arrival_unix_s = time.time()

    @property
    def num_sent(self) -> int:
        """Tokens, over all choices."""
        return sum(self._num_sent)

    @property
    def is_ended(self) -> bool:
        """Whether the last token of the last choice has been made into a chunk."""
        return self._num_left == 0

    @property
    def is_awaited(self) -> bool:
        """Whether somebody still waits for the answer, as far as it is known."""
        return not (self.stream.is_cancelled or self.stream.is_stopped())

    def cancel(self) -> None:
        """Let go of the tokens that are still to come. Safe at any time, twice, and on any thread."""
        self.is_cancelled = True
        self.stream.drive.cancel(self.stream)

    @property
    def is_broken(self) -> bool:
        """Whether a fault lets no more of it out."""
        return self.fault is not None and self.num_sent >= self.fault.num_whole_tokens and not self.is_ended

    def chunks(self, tokens: Sequence[Token]) -> list[dict[str, Any]]:
        """
        A chunk for each choice that `tokens` belong to; they go out now.

        The last of all has `finish_reason` and usage: one terminal chunk ends every choice, because
        Dynamo's adapter stops reading at the first.
        """
        if self.fault is not None:
            tokens = tokens[: self.fault.num_whole_tokens - self.num_sent]
            if not tokens:
                return []
        self.stream.drive.note_sent(self.stream, tokens)
        chunks: dict[int, dict[str, Any]] = {}
        for token in tokens:
            choice = token.sequence.request.choice
            chunk = chunks.setdefault(choice, {"token_ids": [], "index": choice})
            chunk["token_ids"].append(self.answers[choice].token_ids[token.output_index])
            self._num_sent[choice] += 1
            self._num_left -= token.is_last
        for choice, chunk in chunks.items():
            logprobs = self.answers[choice].logprobs
            if logprobs is not None:
                num_sent = self._num_sent[choice]
                chunk.update(logprobs.of(num_sent - len(chunk["token_ids"]), num_sent))
        last = list(chunks.values())[-1]
        if self.is_ended:
            answer = self.answers[last["index"]]
            last.update(finish_reason=answer.finish_reason, completion_usage=self.usage())
            if answer.engine_data is not None:
                last["engine_data"] = answer.engine_data
        return list(chunks.values())

    def cancelled_chunk(self) -> dict[str, Any]:
        """The terminal chunk of a request that was cancelled."""
        return {"token_ids": [], "index": 0, "finish_reason": "cancelled", "completion_usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """`completion_usage` of what has been sent, over all choices; the prompt counts once."""
        first = self.stream.sequences[0]
        num_cached_tokens = first.num_cached_tokens if self._num_cached_tokens is None else self._num_cached_tokens
        usage: dict[str, Any] = {
            "prompt_tokens": first.request.isl_tokens,
            "completion_tokens": self.num_sent,
            "total_tokens": first.request.isl_tokens + self.num_sent,
        }
        if num_cached_tokens is not None:
            usage["prompt_tokens_details"] = {"cached_tokens": num_cached_tokens}
        details: dict[str, int] = {}
        num_drafts = sum(sequence.num_draft_tokens for sequence in self.stream.sequences)
        if num_drafts:
            num_accepted = sum(sequence.num_accepted_tokens for sequence in self.stream.sequences)
            details = {
                "accepted_prediction_tokens": num_accepted,
                "rejected_prediction_tokens": num_drafts - num_accepted,
            }
        num_reasoning = sum(map(min, self._num_sent, (answer.num_reasoning_tokens for answer in self.answers)))
        if num_reasoning:
            details["reasoning_tokens"] = num_reasoning
        if details:
            usage["completion_tokens_details"] = details
        return usage

    def finish_reasons(self) -> list[str]:
        """Why each choice has ended. One without all its tokens was cancelled."""
        return [
            answer.finish_reason if len(sent_s) == len(answer.token_ids) else "cancelled"
            for sent_s, answer in zip(self.stream.sent_s, self.answers, strict=True)
        ]

    def rows(self) -> list[RequestRow]:
        """What there is to be recorded, one row a choice."""
        stream = self.stream
        return [
            RequestRow(
                self.request_id,
                choice,
                round(self._arrival_unix_s, 6),
                round(stream.arrival_s, 6),
                sequence.request.isl_tokens,
                sequence.request.osl_tokens,
                sequence.num_cached_tokens or 0,
                sequence.num_preemptions,
                reason,
                [round(due_s, 6) for due_s in stream.due_s[choice]],
                [round(sent_s, 6) for sent_s in stream.sent_s[choice]],
                stream.drive.dp_rank,
            )
            for choice, (sequence, reason) in enumerate(zip(stream.sequences, self.finish_reasons(), strict=True))
        ]
