"""Engines that do with the context what Dynamo's Context does not document."""

from __future__ import annotations

import argparse
import weakref
from typing import Any

from conformance.selftest.mutants import mutant
from conformance.selftest.toy import ToyEngine, Work


@mutant("ctx.surface", "asks the context for its deadline")
class AsksForDeadline(ToyEngine):
    def is_cancelled(self, work: Work, context: Any) -> bool:
        return getattr(context, "deadline_s", None) == 0 or super().is_cancelled(work, context)


@mutant("ctx.surface", "looks for a private controller when a request is aborted")
class PrivateController(ToyEngine):
    async def abort(self, context: Any) -> None:
        if not hasattr(context, "_controller"):
            await super().abort(context)


@mutant("ctx.surface", "keeps its own mark on the context")
class MarksTheContext(ToyEngine):
    def admit(self, request: Any, context: Any) -> Work:
        work = super().admit(request, context)
        context.toy_work = work
        return work


@mutant("ctx.surface", "keeps requests in a dict with weak references to contexts")
class WeakContexts(ToyEngine):
    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        self.by_context: weakref.WeakKeyDictionary[Any, Work] = weakref.WeakKeyDictionary()

    def admit(self, request: Any, context: Any) -> Work:
        work = self.by_context[context] = super().admit(request, context)
        return work
