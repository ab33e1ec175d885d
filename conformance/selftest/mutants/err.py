"""Engines that break the rules on errors."""

# ruff: noqa: ARG002  (what is overridden keeps its parameters)

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from importlib import import_module
from typing import Any

from conformance.selftest.mutants import mutant
from conformance.selftest.toy import CONTEXT_LENGTH, VOCABULARY, ToyEngine, Work, engine_shutdown, invalid_argument

Chunk = dict[str, Any]


class Failing(ToyEngine):
    """The toy engine with another way to tell what fails: `failed` gives the last chunk, or raises."""

    async def generate(self, request: Mapping[str, Any], context: Any) -> AsyncGenerator[Any, None]:
        try:
            async for chunk in ToyEngine.generate(self, request, context):
                yield chunk
        except Exception as error:
            failed = self.failed(error)
        else:
            return
        yield failed

    def failed(self, error: Exception) -> Chunk:
        raise error


# What is raised.


@mutant("err.typed", "a prompt that is too long gives a KeyError", seen_in="dynamo#3780")
class KeyErrorForLongPrompt(ToyEngine):
    def check_lengths(self, prompt: Sequence[int]) -> None:
        if len(prompt) >= CONTEXT_LENGTH:
            raise KeyError(len(prompt))
        super().check_lengths(prompt)


@mutant("err.typed", "an empty prompt gives an AssertionError")
class AssertsPrompt(ToyEngine):
    def check_lengths(self, prompt: Sequence[int]) -> None:
        assert prompt
        super().check_lengths(prompt)


@mutant("err.typed", "a token id beyond the vocabulary gives an IndexError")
class IndexErrorForToken(ToyEngine):
    def prompt_of(self, request: Mapping[str, Any]) -> list[int]:
        vocabulary = range(VOCABULARY)
        return [vocabulary[token] for token in super().prompt_of(request)]


@mutant("err.typed", "n > 1 gives a NotImplementedError")
class NotImplementedForChoices(ToyEngine):
    def check_choices(self, n: int | None) -> None:
        if n is not None and n > 1:
            raise NotImplementedError("n > 1")


@mutant("err.typed", "a bug leaks as TypeError, which blames the client")
class BugBlamesClient(ToyEngine):
    def admit(self, request: Mapping[str, Any], context: Any) -> Work:
        top_k = (request.get("sampling_options") or {}).get("top_k", 0)
        if top_k is not None and top_k > 20:
            top_k += None
        return super().admit(request, context)


@mutant("err.typed", "whatever fails inside is raised as InvalidArgument")
class AllIsInvalid(Failing):
    def failed(self, error: Exception) -> Chunk:
        raise invalid_argument(str(error))


@mutant("err.typed", "whatever fails inside is raised as ValueError", role="prefill")
class AllIsValueError(Failing):
    def failed(self, error: Exception) -> Chunk:
        raise ValueError(str(error))


@mutant("err.no_evict", "a wrong request is raised as EngineShutdown")
class ShutdownForWrongRequest(ToyEngine):
    def check_lengths(self, prompt: Sequence[int]) -> None:
        try:
            super().check_lengths(prompt)
        except Exception as error:
            raise engine_shutdown(str(error)) from error


@mutant("err.no_evict", "a failure of one request is raised as StreamIncomplete")
class IncompleteForFailure(Failing):
    def failed(self, error: Exception) -> Chunk:
        if isinstance(error, RuntimeError):
            raise import_module("dynamo.llm.exceptions").StreamIncomplete(str(error))
        raise error


@mutant("err.no_evict", "n > 1 is raised as GeneratorExit")
class ExitForChoices(ToyEngine):
    def check_choices(self, n: int | None) -> None:
        if n is not None and n > 1:
            raise GeneratorExit


@mutant("err.no_evict", "a missing prefill_result is raised as EngineShutdown", role="decode")
class ShutdownWithoutHandover(ToyEngine):
    def check_handover(self, request: Mapping[str, Any]) -> None:
        try:
            super().check_handover(request)
        except Exception as error:
            raise engine_shutdown("the prefill worker is gone") from error


# What is left.


@mutant("err.recover", "a prompt that is too long ends the engine for everybody", seen_in="dynamo#3780, dynamo#6605")
class LongPromptEndsEngine(ToyEngine):
    def check_lengths(self, prompt: Sequence[int]) -> None:
        if len(prompt) >= CONTEXT_LENGTH:
            self.is_running = False
            raise RuntimeError("CUDA out of memory")
        super().check_lengths(prompt)


@mutant("err.recover", "a refused request keeps its place")
class RefusedKeepsPlace(ToyEngine):
    def check_lengths(self, prompt: Sequence[int]) -> None:
        self.num_slots_used += 1
        super().check_lengths(prompt)
        self.num_slots_used -= 1


@mutant("err.recover", "a request that fails on its way keeps its place")
class FailedKeepsPlace(ToyEngine):
    async def step(self, work: Work, context: Any) -> None:
        try:
            await super().step(work, context)
        except RuntimeError:
            work.has_slot = False
            raise


@mutant("err.recover", "after an error every request is taken for cancelled")
class ErrorCancelsLater(Failing):
    has_failed = False

    def failed(self, error: Exception) -> Chunk:
        self.has_failed = True
        raise error

    def is_cancelled(self, work: Work, context: Any) -> bool:
        return self.has_failed or super().is_cancelled(work, context)


@mutant("err.recover", "an error is kept and raised for the next request")
class ErrorComesAgain(Failing):
    kept: Exception | None = None

    def failed(self, error: Exception) -> Chunk:
        self.kept = error
        raise error

    def admit(self, request: Mapping[str, Any], context: Any) -> Work:
        kept, self.kept = self.kept, None
        if kept is not None:
            raise kept
        return super().admit(request, context)


# How it is told.


@mutant("err.no_bare_error_chunk", "an error is a chunk with finish_reason 'error'", seen_in="dynamo#8549")
class BareErrorChunk(Failing):
    def failed(self, error: Exception) -> Chunk:
        return {"token_ids": [], "index": 0, "finish_reason": "error"}


@mutant("err.no_bare_error_chunk", "an error is a chunk with its text as finish_reason", seen_in="dynamo#13984")
class ErrorTextChunk(Failing):
    def failed(self, error: Exception) -> Chunk:
        return {"token_ids": [], "index": 0, "finish_reason": f"error: {error}"}


@mutant("err.no_bare_error_chunk", "an error is a chunk with an object as finish_reason")
class ErrorObjectChunk(Failing):
    def failed(self, error: Exception) -> Chunk:
        return {"token_ids": [], "index": 0, "finish_reason": {"error": str(error)}}


@mutant("err.no_bare_error_chunk", "a refused request ends with the library's own 'abort'", seen_in="dynamo#5566")
class RawAbortForError(Failing):
    def failed(self, error: Exception) -> Chunk:
        return {"token_ids": [], "index": 0, "finish_reason": "abort"}
