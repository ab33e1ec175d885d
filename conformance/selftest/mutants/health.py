"""Broken engines for the rule on health checks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conformance.selftest.mutants import mutant
from conformance.selftest.toy import ToyEngine, invalid_argument


@mutant("health.payload", "the payload is JSON text")
class PayloadIsText(ToyEngine):
    async def health_check_payload(self) -> Any:
        return '{"token_ids": [1]}'


@mutant("health.payload", "the payload holds bytes")
class PayloadHoldsBytes(ToyEngine):
    async def health_check_payload(self) -> Any:
        return {"token_ids": [1], "extra_args": {"key": b"x"}}


@mutant("health.payload", "the payload has a prompt and no token_ids")
class PayloadHasPrompt(ToyEngine):
    async def health_check_payload(self) -> Any:
        return {"prompt": "hello", "stop_conditions": {"max_tokens": 1}}


@mutant("health.payload", "health_check_payload raises")
class PayloadRaises(ToyEngine):
    async def health_check_payload(self) -> Any:
        raise RuntimeError("no tokenizer")


@mutant("health.payload", "relies on a key that no request has")
class ProbeNeedsOwnKey(ToyEngine):
    async def health_check_payload(self) -> Any:
        return {**(await super().health_check_payload() or {}), "toy_probe": True}

    def admit(self, request: Mapping[str, Any], context: Any) -> Any:
        if request.get("_HEALTH_CHECK") and not request.get("toy_probe"):
            raise invalid_argument("not a probe of mine")
        return super().admit(request, context)


@mutant("health.payload", "the probe has no token to begin with")
class EmptyProbe(ToyEngine):
    async def health_check_payload(self) -> Any:
        return {"token_ids": [], "stop_conditions": {"max_tokens": 1}}


@mutant("health.payload", "the probe ends as cancelled")
class ProbeIsCancelled(ToyEngine):
    def admit(self, request: Mapping[str, Any], context: Any) -> Any:
        work = super().admit(request, context)
        work.is_aborted = request.get("_HEALTH_CHECK") is True
        return work
