"""
Tells Dynamo's frontend of LoRA adapters, each a model of its own that this worker serves.

Dynamo's worker announces its own model itself, after `on_endpoint_ready`, and tells no engine when
that is done. The frontend drops an adapter whose base model it does not know yet ("base model card for LoRA
adapter is not registered", 1.4.2), for good. So adapters are announced a while after the
endpoint can be found.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

from mock_engine.dynamo_release import register_adapter

logger = logging.getLogger(__name__)

_DELAY_S = 2.0


class Announcement:
    """The adapters `names` of one worker. `start` and `stop` belong on the event loop."""

    def __init__(self, worker_config: Any, names: Sequence[str], max_loras: int, block_size: int) -> None:
        self._worker_config = worker_config
        self._names = names
        self._max_loras = max_loras
        self._block_size = block_size
        self._task: asyncio.Task[None] | None = None

    def start(self, endpoint: Any) -> None:
        """Announce them when the time has come. Nothing to do without adapters."""
        if self._names:
            self._task = asyncio.get_running_loop().create_task(self._announce(endpoint), name="mock-engine-adapters")

    def stop(self) -> None:
        """Announce no more. Safe twice."""
        if self._task is not None:
            self._task.cancel()
            self._task = None

    async def _announce(self, endpoint: Any) -> None:
        try:
            client = await endpoint.client()
            await client.wait_for_instances()
            await asyncio.sleep(_DELAY_S)
            for name in self._names:
                await register_adapter(
                    endpoint,
                    name,
                    self._worker_config.model_name,
                    self._block_size,
                    self._max_loras,
                    self._worker_config,
                )
            logger.info("announced the LoRA adapters %s", ", ".join(self._names))
        except Exception:
            logger.exception("the LoRA adapters %s could not be announced", ", ".join(self._names))
