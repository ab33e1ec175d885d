"""Broken engines for the rules on log probabilities."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from conformance.selftest.mutants import mutant
from conformance.selftest.toy import ToyEngine, Work

LOGPROBS = "--logprobs"


class OwnChunk(ToyEngine):
    """A toy engine that changes the chunks that have log probabilities."""

    def chunk(self, work: Work, token: int) -> dict[str, Any]:
        chunk = super().chunk(work, token)
        if "log_probs" in chunk:
            self.change(chunk)
        return chunk

    def change(self, chunk: dict[str, Any]) -> None:
        raise NotImplementedError


@mutant("logp.aligned", "the tokens so far each time", engine_args=LOGPROBS)
class LogProbsCumulative(ToyEngine):
    def chunk(self, work: Work, token: int) -> dict[str, Any]:
        chunk = super().chunk(work, token)
        if "log_probs" in chunk:
            chunk["log_probs"] = chunk["log_probs"] * len(work.output)
        return chunk


@mutant("logp.aligned", "log_probs on a chunk without tokens", engine_args=LOGPROBS)
class LogProbsWithoutToken(ToyEngine):
    def terminal(self, work: Work, reason: str) -> dict[str, Any]:
        chunk = super().terminal(work, reason)
        return {**chunk, "log_probs": [-1.0]} if work.num_logprobs is not None else chunk


@mutant("logp.aligned", "probabilities, not their logarithms", engine_args=LOGPROBS)
class Probabilities(OwnChunk):
    def change(self, chunk: dict[str, Any]) -> None:
        chunk["log_probs"] = [math.exp(value) for value in chunk["log_probs"]]


@mutant("logp.aligned", "NaN", engine_args=LOGPROBS)
class LogProbsNaN(OwnChunk):
    def change(self, chunk: dict[str, Any]) -> None:
        chunk["log_probs"] = [math.nan]


@mutant("logp.top", "entries have no rank", engine_args=LOGPROBS)
class TopWithoutRank(OwnChunk):
    def change(self, chunk: dict[str, Any]) -> None:
        for entries in chunk.get("top_logprobs", ()):
            for entry in entries:
                del entry["rank"]


@mutant("logp.top", "a dict by token id for each token", engine_args=LOGPROBS)
class TopAsDicts(OwnChunk):
    def change(self, chunk: dict[str, Any]) -> None:
        if "top_logprobs" in chunk:
            chunk["top_logprobs"] = [
                {str(entry["token_id"]): entry["logprob"] for entry in entries} for entries in chunk["top_logprobs"]
            ]


@mutant("logp.top", "the entries of one token, without a list around them", engine_args=LOGPROBS)
class TopFlat(OwnChunk):
    def change(self, chunk: dict[str, Any]) -> None:
        if "top_logprobs" in chunk:
            (chunk["top_logprobs"],) = chunk["top_logprobs"]


@mutant("logp.top", "the chosen token is not among them", engine_args=LOGPROBS)
class TopWithoutChosen(OwnChunk):
    def change(self, chunk: dict[str, Any]) -> None:
        for entries in chunk.get("top_logprobs", ()):
            entries[0]["token_id"] += 500


@mutant("logp.top", "always the five best, whatever was asked", engine_args=LOGPROBS)
class TopAlwaysFive(ToyEngine):
    def chunk(self, work: Work, token: int) -> dict[str, Any]:
        asked = work.num_logprobs
        work.num_logprobs = 5 if asked is not None else None
        chunk = super().chunk(work, token)
        work.num_logprobs = asked
        return chunk


@mutant("logp.bad_option", "a bad value raises", engine_args=LOGPROBS)
class BadOptionRaises(ToyEngine):
    def logprob_options(self, request: Mapping[str, Any]) -> tuple[int | None, int | None]:
        options = request.get("output_options") or {}
        for name in ("logprobs", "prompt_logprobs"):
            if options.get(name) is not None:
                int(options[name])
        return super().logprob_options(request)


@mutant("logp.bad_option", "a negative number means all", engine_args=LOGPROBS)
class NegativeMeansAll(ToyEngine):
    def logprob_options(self, request: Mapping[str, Any]) -> tuple[int | None, int | None]:
        logprobs, prompt = super().logprob_options(request)
        asked = (request.get("output_options") or {}).get("logprobs")
        return (5 if isinstance(asked, int) and asked < 0 else logprobs), prompt


@mutant("logp.prompt", "computed and never emitted", seen_in="dynamo#10149", engine_args=LOGPROBS)
class PromptLogProbsLost(ToyEngine):
    def ending(self, work: Work, reason: str) -> dict[str, Any]:
        ending = super().ending(work, reason)
        ending.pop("engine_data", None)
        return ending


@mutant("logp.prompt", "nothing for the first token", engine_args=LOGPROBS)
class PromptLogProbsShort(ToyEngine):
    def prompt_logprobs(self, work: Work) -> Any:
        return super().prompt_logprobs(work)[1:]


@mutant("logp.prompt", "the first token has an entry", engine_args=LOGPROBS)
class PromptLogProbsOfFirst(ToyEngine):
    def prompt_logprobs(self, work: Work) -> Any:
        return [{str(work.prompt[0]): {"logprob": 0.0}}, *super().prompt_logprobs(work)[1:]]


@mutant("logp.prompt", "token ids are ints", engine_args=LOGPROBS)
class PromptLogProbsIntKeys(ToyEngine):
    def prompt_logprobs(self, work: Work) -> Any:
        return [None, *({token: {"logprob": -1.5}} for token in work.prompt[1:])]


@mutant("logp.prompt", "on the first chunk only", engine_args=LOGPROBS)
class PromptLogProbsOnFirstChunk(ToyEngine):
    def chunk(self, work: Work, token: int) -> dict[str, Any]:
        chunk = super().chunk(work, token)
        if work.num_prompt_logprobs is not None and len(work.output) == 1:
            chunk["engine_data"] = {"prompt_logprobs": self.prompt_logprobs(work)}
        return chunk

    def ending(self, work: Work, reason: str) -> dict[str, Any]:
        ending = super().ending(work, reason)
        ending.pop("engine_data", None)
        return ending
