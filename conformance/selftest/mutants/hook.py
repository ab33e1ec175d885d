"""Engines with broken hooks. All of these hooks are from ai-dynamo 1.3 on."""

from __future__ import annotations

from typing import Any

from conformance.release import backend, submodule
from conformance.selftest.mutants import mutant
from conformance.selftest.toy import ToyEngine, Work

engine_module: Any = submodule("engine")
HAS_ENDPOINT_HOOK = hasattr(backend().LLMEngine, "on_endpoint_ready")
HAS_LOGITS = hasattr(engine_module, "LogitsProcessorSpec")


class ForcingToy(ToyEngine):
    """Correct: with `--logits`, each answer begins with the forced tokens."""

    def next_token(self, work: Work) -> int:
        return self.forced(work, len(work.output)) if self.logits_spec and self.role != "prefill" else self.own(work)

    def own(self, work: Work) -> int:
        return super().next_token(work)

    def forced(self, work: Work, place: int) -> int:
        token_ids = self.logits_spec.entries[0].token_ids
        return int(token_ids[place]) if place < len(token_ids) else self.own(work)


if HAS_ENDPOINT_HOOK:

    @mutant("hook.on_endpoint_ready", "on_endpoint_ready raises")
    class EndpointRefused(ToyEngine):
        async def on_endpoint_ready(self, endpoint: Any) -> None:
            raise NotImplementedError("this engine has no use for an endpoint")

    @mutant("hook.on_endpoint_ready", "serves only after a second call of on_endpoint_ready")
    class WaitsForSecond(ToyEngine):
        num_endpoints = 0

        async def on_endpoint_ready(self, endpoint: Any) -> None:
            del endpoint
            self.num_endpoints += 1
            self.is_running = self.num_endpoints > 1


if HAS_LOGITS:

    @mutant("hook.logits_spec", "the spec is a list of its entries", engine_args="--logits")
    class SpecIsList(ToyEngine):
        def make_logits_spec(self) -> Any:
            return list(super().make_logits_spec().entries)

    @mutant("hook.logits_spec", "an entry is a dict", engine_args="--logits")
    class EntryIsDict(ToyEngine):
        def make_logits_spec(self) -> Any:
            return engine_module.LogitsProcessorSpec(entries=({"token_ids": [7, 8], "eos_token_id": 2},))

    @mutant("hook.logits_spec", "the forced tokens cannot be written as JSON", engine_args="--logits")
    class ForcedSet(ToyEngine):
        def make_logits_spec(self) -> Any:
            forced = engine_module.ForcedTokenSequenceSpec(token_ids=("7", b"8"), eos_token_id=2)
            return engine_module.LogitsProcessorSpec(entries=(forced,))

    @mutant("hook.logits_spec", "the factory gives all requests the same processor", engine_args="--logits")
    class OneProcessor(ToyEngine):
        def make_logits_spec(self) -> Any:
            processor = object()
            entry = engine_module.PythonProcessorSpec(factory=lambda: processor)
            return engine_module.LogitsProcessorSpec(entries=(entry,))

    @mutant("hook.logits_spec", "one place in the forced tokens for all requests", engine_args="--logits")
    class SharedPlace(ForcingToy):
        place = -1

        def forced(self, work: Work, place: int) -> int:
            del place
            self.place += 1
            return super().forced(work, self.place)

    @mutant("hook.logits_spec", "forces tokens on a prefill worker too", engine_args="--logits", role="prefill")
    class ForcesPrefill(ForcingToy):
        def next_token(self, work: Work) -> int:
            return self.forced(work, len(work.output))
