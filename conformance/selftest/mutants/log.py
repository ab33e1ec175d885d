"""Engines that say too much, or too loudly."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from conformance.selftest.mutants import mutant
from conformance.selftest.toy import ToyEngine, Work

logger = logging.getLogger(__name__)


@mutant("log.levels", "a warning for each request")
class WarnsForEach(ToyEngine):
    async def generate(self, request: Mapping[str, Any], context: Any) -> AsyncGenerator[dict[str, Any], None]:
        logger.warning("request %s has %d tokens", context.id(), len(request["token_ids"]))
        async for chunk in super().generate(request, context):
            yield chunk


@mutant("log.levels", "an error in the log for a request that was cancelled")
class ErrorForCancel(ToyEngine):
    def cancelled(self, work: Work) -> dict[str, Any]:
        logger.error("request %s failed", work.request_id)
        return super().cancelled(work)


@mutant("log.levels", "cancelled requests are logged at INFO")
class InfoForCancel(ToyEngine):
    def cancelled(self, work: Work) -> dict[str, Any]:
        logger.info("request %s: cancelled by its client", work.request_id)
        return super().cancelled(work)


@mutant("log.levels", "an aborted request is a warning of a logger that does not propagate")
class WarnsForAbort(ToyEngine):
    own_logger = logging.getLogger("toy_that_does_not_propagate")
    own_logger.propagate = False
    own_logger.addHandler(logging.NullHandler())

    async def abort(self, context: Any) -> None:
        self.own_logger.warning("aborting %s", context.id())
        await super().abort(context)


@mutant("log.levels", "a stack trace for a prompt that the client made too long")
class ErrorForClient(ToyEngine):
    def check_lengths(self, prompt: Sequence[int]) -> None:
        try:
            super().check_lengths(prompt)
        except Exception:
            logger.exception("cannot serve a prompt of %d tokens", len(prompt))
            raise


@mutant("log.levels", "a task for each cancelled request ends with an error that nobody asks for")
class ForgottenTask(ToyEngine):
    def cancelled(self, work: Work) -> dict[str, Any]:
        asyncio.get_running_loop().create_task(self.tell(work), name="toy-tell")
        return super().cancelled(work)

    async def tell(self, work: Work) -> None:
        raise KeyError(work.request_id)
