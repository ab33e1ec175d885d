"""Engines that start wrongly, or say wrong things of themselves when they do."""

from __future__ import annotations

import asyncio
import signal
import struct
import sys
from pathlib import Path
from typing import Any

from conformance.release import backend
from conformance.selftest.mutants import mutant
from conformance.selftest.toy import ToyEngine

HAS_LLM = hasattr(backend(), "LlmRegistration")


class _WithNumbers(ToyEngine):
    """Advertises other numbers than the toy engine does."""

    numbers: dict[str, Any]

    def engine_config(self) -> Any:
        config = super().engine_config()
        holder = config.llm if HAS_LLM else config
        for name, value in self.numbers.items():
            setattr(holder, name, value)
        return config


@mutant("start.model", "the model's name is empty")
class EmptyModel(ToyEngine):
    def engine_config(self) -> Any:
        config = super().engine_config()
        config.model = ""
        return config


@mutant("start.model", "the model is a Path")
class ModelIsPath(ToyEngine):
    def engine_config(self) -> Any:
        config = super().engine_config()
        config.model = Path("toy")
        return config


@mutant("start.model", "start returns nothing")
class NoConfig(ToyEngine):
    def engine_config(self) -> Any:
        return None


@mutant("start.config_types", "context_length is a float")
class FloatLength(_WithNumbers):
    numbers = {"context_length": 96.0}  # noqa: RUF012


@mutant("start.config_types", "total_kv_blocks is a str")
class BlocksAreText(_WithNumbers):
    numbers = {"total_kv_blocks": "200"}  # noqa: RUF012


@mutant("start.config_types", "-1 for no limit")
class MinusOne(_WithNumbers):
    numbers = {"max_num_batched_tokens": -1}  # noqa: RUF012


@mutant("start.config_types", "a length that does not fit 32 bits")
class TooLong(_WithNumbers):
    numbers = {"context_length": 2**32}  # noqa: RUF012


@mutant("start.config_types", "a port that does not fit 16 bits")
class Port70000(_WithNumbers):
    numbers = {"bootstrap_host": "127.0.0.1", "bootstrap_port": 70000}  # noqa: RUF012


@mutant("start.config_types", "a bool for a number")
class BoolForNumber(_WithNumbers):
    numbers = {"max_num_seqs": True}  # noqa: RUF012


@mutant("start.config_consistent", "context_length is 0")
class NoLength(_WithNumbers):
    numbers = {"context_length": 0}  # noqa: RUF012


@mutant("start.config_consistent", "a bootstrap port without a host")
class PortWithoutHost(_WithNumbers):
    numbers = {"bootstrap_port": 9000}  # noqa: RUF012


if HAS_LLM:

    @mutant("start.config_consistent", "KV event sources without a block size", engine_args="--kv-events")
    class NoBlockSize(_WithNumbers):
        numbers = {"kv_cache_block_size": None}  # noqa: RUF012

    @mutant("start.config_consistent", "metrics of a rank that is not advertised", engine_args="--metrics")
    class RankOutside(ToyEngine):
        def component_metrics_dp_ranks(self) -> list[int]:
            return [0, 1]

    @mutant("start.config_consistent", "KV events of a rank below the advertised ones", engine_args="--kv-events")
    class StartRankForgotten(_WithNumbers):
        numbers = {"data_parallel_start_rank": 2, "data_parallel_size": 2}  # noqa: RUF012

    class _FlatConfig:
        """The shape of ai-dynamo 1.2, where all numbers were side by side."""

        def __init__(self, config: Any) -> None:
            vars(self).update(vars(config.llm))
            self.model = config.model
            self.served_model_name = None

    @mutant("start.config_shape", "the numbers are on the configuration itself, as in 1.2")
    class FlatShape(ToyEngine):
        def engine_config(self) -> Any:
            return _FlatConfig(super().engine_config())

    @mutant("start.config_shape", "llm is a dict")
    class LlmIsDict(ToyEngine):
        def engine_config(self) -> Any:
            config = super().engine_config()
            config.llm = vars(config.llm)
            return config

    @mutant("start.runtime_data_json", "runtime_data has a set in it")
    class DataWithSet(ToyEngine):
        def engine_config(self) -> Any:
            config = super().engine_config()
            config.runtime_data = {"features": {"lora", "logprobs"}}
            return config

    @mutant("start.runtime_data_json", "runtime_data has numbers for keys")
    class DataWithIntKeys(ToyEngine):
        def engine_config(self) -> Any:
            config = super().engine_config()
            config.runtime_data = {"ranks": {0: "host-a"}}
            return config

    @mutant("start.runtime_data_json", "runtime_data is a list")
    class DataIsList(ToyEngine):
        def engine_config(self) -> Any:
            config = super().engine_config()
            config.runtime_data = ["toy"]
            return config


@mutant("start.worker_id_opaque", "packs the worker_id as a signed number")
class SignedId(ToyEngine):
    async def start(self, worker_id: int) -> Any:
        self.machine = struct.pack("<q", worker_id)
        return await super().start(worker_id)


@mutant("start.worker_id_opaque", "takes worker_id 0 for none")
class ZeroIsNone(ToyEngine):
    async def start(self, worker_id: int) -> Any:
        if not worker_id:
            raise ValueError("no worker_id")
        return await super().start(worker_id)


@mutant("start.worker_id_opaque", "the worker_id chooses the capacity")
class CapacityFromId(ToyEngine):
    async def start(self, worker_id: int) -> Any:
        config = await super().start(worker_id)
        (config.llm if HAS_LLM else config).total_kv_blocks = 200 + worker_id % 2
        return config


@mutant("start.ready", "start returns while the engine is still loading")
class StillLoading(ToyEngine):
    async def start(self, worker_id: int) -> Any:
        config = await super().start(worker_id)
        self.is_running = False
        self.loading = asyncio.get_running_loop().create_task(self.load(), name="toy-load")
        return config

    async def load(self) -> None:
        await asyncio.sleep(0.2)
        self.is_running = True


@mutant("start.ready", "start raises")
class DoesNotStart(ToyEngine):
    async def start(self, worker_id: int) -> Any:
        raise RuntimeError(f"no device for worker {worker_id}")


@mutant("start.typed_failure", "a fault in start is a RuntimeError")
class UntypedFailure(ToyEngine):
    def reach(self, point: str) -> None:
        try:
            super().reach(point)
        except Exception as error:
            raise RuntimeError(str(error)) from None


@mutant("start.typed_failure", "a fault in start ends the program")
class ExitsInStart(ToyEngine):
    async def start(self, worker_id: int) -> Any:
        try:
            return await super().start(worker_id)
        except Exception:
            sys.exit(1)


@mutant("start.typed_failure", "a task that cannot be made in start ends the program")
class ExitsWithoutProbe(ExitsInStart):
    conformance_probe = None  # type: ignore[assignment]


@mutant("start.typed_failure", "an EngineShutdown inside start comes out as a RuntimeError")
class LosesTheType(ToyEngine):
    conformance_probe = None  # type: ignore[assignment]

    async def start(self, worker_id: int) -> Any:
        try:
            return await super().start(worker_id)
        except Exception as error:
            raise RuntimeError(f"start failed: {error}") from None


if HAS_LLM:  # from 1.3 on

    @mutant("start.no_signal_handlers", "start puts a SIGTERM handler on the loop")
    class LoopHandler(ToyEngine):
        async def start(self, worker_id: int) -> Any:
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self.stop_now)
            return await super().start(worker_id)

        def stop_now(self) -> None:
            self.is_running = False

    @mutant("start.no_signal_handlers", "start ignores SIGINT")
    class IgnoresSigint(ToyEngine):
        async def start(self, worker_id: int) -> Any:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            return await super().start(worker_id)
