"""Broken engines for the rules on controls and updates."""

from __future__ import annotations

from typing import Any

from conformance.selftest.mutants import mutant
from conformance.selftest.toy import ToyEngine

CONTROLS = "--controls"


@mutant("ctl.sets", "a name with a slash", engine_args=CONTROLS)
class SlashInName(ToyEngine):
    def supported_controls(self) -> Any:
        return {*super().supported_controls(), "profile/start"}


@mutant("ctl.sets", "a name that is no str", engine_args=CONTROLS)
class NumberAsName(ToyEngine):
    def supported_updates(self) -> Any:
        return {"max_num_seqs", 7}


@mutant("ctl.sets", "a name twice", engine_args=CONTROLS)
class NameTwice(ToyEngine):
    def supported_controls(self) -> Any:
        return [*sorted(super().supported_controls()), "sleep"]


@mutant("ctl.sets", "takes the worker's own route", engine_args=CONTROLS)
class TakesModelTaints(ToyEngine):
    def supported_updates(self) -> Any:
        return {*super().supported_updates(), "model_taints"}


@mutant("ctl.sets", "wake_up is there only while it sleeps", engine_args=CONTROLS)
class NamesChange(ToyEngine):
    num_calls = 0

    def supported_controls(self) -> Any:
        self.num_calls += 1
        return super().supported_controls() - ({"wake_up"} if self.num_calls % 2 else set())


@mutant("ctl.dispatch", "an unknown name raises KeyError", engine_args=CONTROLS)
class UnknownControlRaises(ToyEngine):
    async def engine_control(self, control: str, body: dict[str, Any]) -> Any:
        known = {name: name for name in self.supported_controls()}
        return await super().engine_control(known[control], body)


@mutant("ctl.dispatch", "an unknown name is ok", engine_args=CONTROLS)
class UnknownUpdateIsOk(ToyEngine):
    async def engine_update(self, update: str, body: dict[str, Any]) -> Any:
        del update, body
        return {"status": "ok"}


@mutant("ctl.dispatch", "returns nothing", engine_args=CONTROLS)
class ControlReturnsNone(ToyEngine):
    async def engine_control(self, control: str, body: dict[str, Any]) -> Any:
        answer = await super().engine_control(control, body)
        return None if control in self.supported_controls() else answer


@mutant("ctl.dispatch", "the answer holds a set", engine_args=CONTROLS)
class ControlReturnsSet(ToyEngine):
    async def engine_control(self, control: str, body: dict[str, Any]) -> Any:
        return {**await super().engine_control(control, body), "controls": self.supported_controls()}


@mutant("ctl.dispatch", "an advertised update is not implemented", engine_args=CONTROLS)
class AdvertisedNotImplemented(ToyEngine):
    async def engine_update(self, update: str, body: dict[str, Any]) -> Any:
        if update in self.supported_updates():
            raise NotImplementedError(update)
        return await super().engine_update(update, body)


@mutant("ctl.pause_resume", "does not wake up", engine_args=CONTROLS)
class DoesNotWakeUp(ToyEngine):
    async def engine_control(self, control: str, body: dict[str, Any]) -> Any:
        was_asleep = self.is_asleep
        answer = await super().engine_control(control, body)
        self.is_asleep = self.is_asleep or was_asleep
        return answer


@mutant("ctl.pause_resume", "counts how often it was put to sleep", engine_args=CONTROLS)
class CountsSleeps(ToyEngine):
    depth = 0

    async def engine_control(self, control: str, body: dict[str, Any]) -> Any:
        answer = await super().engine_control(control, body)
        self.depth += {"sleep": 1, "wake_up": -1}.get(control, 0)
        self.is_asleep = self.depth > 0
        return answer


@mutant("ctl.pause_resume", "waking up twice raises", engine_args=CONTROLS)
class WakesUpOnce(ToyEngine):
    async def engine_control(self, control: str, body: dict[str, Any]) -> Any:
        if control == "wake_up" and not self.is_asleep:
            raise RuntimeError("not asleep")
        return await super().engine_control(control, body)
