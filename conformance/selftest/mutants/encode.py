"""Broken encode workers, and workers that stand behind one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conformance.selftest.mutants import mutant
from conformance.selftest.toy import ToyEngine

ROUTED = "--route-to-encoder"


class OwnEncoding(ToyEngine):
    """A toy encode worker that ends with something else."""

    async def encode(self, request: Mapping[str, Any], context: Any) -> dict[str, Any]:
        chunk = await super().encode(request, context)
        if "encoder_result" in chunk:
            self.change(chunk)
        return chunk

    def change(self, chunk: dict[str, Any]) -> None:
        raise NotImplementedError


@mutant("encode.terminal", "no encoder_result", role="encode")
class EncodesNothing(OwnEncoding):
    def change(self, chunk: dict[str, Any]) -> None:
        del chunk["encoder_result"]


@mutant("encode.terminal", "encoder_result is a str", role="encode")
class EncoderResultIsText(OwnEncoding):
    def change(self, chunk: dict[str, Any]) -> None:
        chunk["encoder_result"] = chunk["encoder_result"]["handle"]


@mutant("encode.terminal", "the encoder gives a token", role="encode")
class EncoderGivesToken(OwnEncoding):
    def change(self, chunk: dict[str, Any]) -> None:
        chunk["token_ids"] = [0]


@mutant("encode.terminal", "encoder_result holds a tensor's bytes", role="encode")
class EncoderResultHoldsBytes(OwnEncoding):
    def change(self, chunk: dict[str, Any]) -> None:
        chunk["encoder_result"]["embedding"] = b"\x00" * 8


@mutant("encode.require", "serves without encoder_result", engine_args=ROUTED)
@mutant("encode.require", "a prefill worker serves without encoder_result", engine_args=ROUTED, role="prefill")
class ServesWithoutEncoder(ToyEngine):
    def check_handover(self, request: Mapping[str, Any]) -> None:
        del request


@mutant("encode.require", "anything counts as encoder_result, object or not", engine_args=ROUTED)
class TakesAnyEncoderResult(ToyEngine):
    def check_handover(self, request: Mapping[str, Any]) -> None:
        if not request.get("encoder_result"):
            super().check_handover(request)
