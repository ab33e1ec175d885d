"""Engines that are broken in how they are made."""

from __future__ import annotations

import argparse
import contextlib
import socket
import threading
from typing import Any, ClassVar

from conformance.release import backend, core, is_at_least
from conformance.selftest.mutants import mutant
from conformance.selftest.toy import ToyEngine


@mutant("args.returns_pair", "from_args returns the engine alone")
class EngineAlone(ToyEngine):
    @classmethod
    async def from_args(cls, argv: list[str] | None = None) -> Any:
        return cls(cls.parser().parse_args(argv))


@mutant("args.returns_pair", "from_args returns the pair the wrong way round")
class PairReversed(ToyEngine):
    @classmethod
    async def from_args(cls, argv: list[str] | None = None) -> tuple[Any, Any]:
        engine, config = await super().from_args(argv)
        return config, engine


@mutant("args.returns_pair", "from_args is not async")
class MadeAtOnce(ToyEngine):
    @classmethod
    def from_args(cls, argv: list[str] | None = None) -> Any:
        options = cls.parser().parse_args(argv)
        return cls(options), cls.worker_config(options)


@mutant("args.returns_pair", "from_args is a method of the engine, not of the class")
class NotAClassmethod(ToyEngine):
    async def from_args(self, argv: list[str] | None = None) -> tuple[Any, Any]:  # type: ignore[override]
        return await ToyEngine.from_args(argv)


@mutant("args.returns_pair", "the configuration is a dict")
class ConfigIsDict(ToyEngine):
    @classmethod
    def worker_config(cls, options: argparse.Namespace) -> Any:
        return vars(super().worker_config(options))


@mutant("args.argv_respected", "reads the program's arguments whatever list it is given")
class ReadsSysArgv(ToyEngine):
    @classmethod
    async def from_args(cls, argv: list[str] | None = None) -> tuple[Any, Any]:
        options, rest = cls.parser().parse_known_args(argv)
        if rest or argv is not None:
            options = cls.parser().parse_args()
        return cls(options), cls.worker_config(options)


@mutant("args.argv_respected", "takes an empty list for None", engine_args="--max-num-seqs 2")
class EmptyListIsNone(ToyEngine):
    @classmethod
    async def from_args(cls, argv: list[str] | None = None) -> tuple[Any, Any]:
        return await super().from_args(argv or None)


@mutant("args.argv_respected", "takes None for an empty list", engine_args="--max-num-seqs 2")
class NoneIsEmptyList(ToyEngine):
    @classmethod
    async def from_args(cls, argv: list[str] | None = None) -> tuple[Any, Any]:
        return await super().from_args(argv or [])


@mutant("args.argv_respected", "adds its defaults to the list it is given")
class ChangesTheList(ToyEngine):
    @classmethod
    async def from_args(cls, argv: list[str] | None = None) -> tuple[Any, Any]:
        if argv is not None:
            argv.append("--metrics")
        return await super().from_args(argv)


@mutant("args.reentrant", "gives the same engine every time")
class OneForAll(ToyEngine):
    only: ClassVar[Any] = None

    @classmethod
    async def from_args(cls, argv: list[str] | None = None) -> tuple[Any, Any]:
        if cls.only is None:
            cls.only = await super().from_args(argv)
        return cls.only  # type: ignore[no-any-return]


@mutant("args.reentrant", "all engines keep their requests in one dict of the class")
class SharedRequests(ToyEngine):
    all_open: ClassVar[dict[str, Any]] = {}

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        self.open = self.all_open


@mutant("args.reentrant", "a counter in the class makes every configuration another")
class CountsConfigs(ToyEngine):
    number: ClassVar[int] = 0

    @classmethod
    def worker_config(cls, options: argparse.Namespace) -> Any:
        config = super().worker_config(options)
        CountsConfigs.number += 1
        config.component = f"worker{cls.number}"
        return config


@mutant("args.cheap", "the constructor starts a thread")
class ThreadTooEarly(ToyEngine):
    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        self.is_over = threading.Event()
        threading.Thread(target=self.is_over.wait, args=(10,), name="toy-steps", daemon=True).start()

    def __del__(self) -> None:
        self.is_over.set()


@mutant("args.cheap", "the constructor opens a socket")
class SocketTooEarly(ToyEngine):
    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        self.socket = socket.socket()

    def __del__(self) -> None:
        self.socket.close()


@mutant("args.config_valid", "the namespace is empty")
class NoNamespace(ToyEngine):
    @classmethod
    def worker_config(cls, options: argparse.Namespace) -> Any:
        config = super().worker_config(options)
        config.namespace = ""
        return config


@mutant("args.config_valid", "an endpoint type is misspelt")
class EndpointMisspelt(ToyEngine):
    @classmethod
    def worker_config(cls, options: argparse.Namespace) -> Any:
        config = super().worker_config(options)
        config.endpoint_types = "chat,completion"
        return config


@mutant("args.config_valid", "asks for text instead of tokens")
class WantsText(ToyEngine):
    @classmethod
    def worker_config(cls, options: argparse.Namespace) -> Any:
        config = super().worker_config(options)
        config.model_input = core("ModelInput").Text
        return config


@mutant("args.config_valid", "the component is None")
class NoComponent(ToyEngine):
    @classmethod
    def worker_config(cls, options: argparse.Namespace) -> Any:
        config = super().worker_config(options)
        config.component = None
        return config


@mutant("args.config_valid", "the role is a str")
class RoleIsText(ToyEngine):
    @classmethod
    def worker_config(cls, options: argparse.Namespace) -> Any:
        return backend().WorkerConfig(namespace="toy", disaggregation_mode=options.disaggregation_mode)


@mutant("args.config_valid", "a decode worker says that it sends to encoders", role="decode")
class DecodeRoutesToEncoder(ToyEngine):
    @classmethod
    def worker_config(cls, options: argparse.Namespace) -> Any:
        config = super().worker_config(options)
        config.route_to_encoder = options.disaggregation_mode == "decode"
        return config


if is_at_least("1.6"):

    @mutant("args.config_valid", "wants a response plane that there is not")
    class UnknownPlane(ToyEngine):
        @classmethod
        def worker_config(cls, options: argparse.Namespace) -> Any:
            config = super().worker_config(options)
            config.response_plane = "udp"
            return config


@mutant("args.bad_flag", "ignores flags that it does not know")
class IgnoresFlags(ToyEngine):
    @classmethod
    async def from_args(cls, argv: list[str] | None = None) -> tuple[Any, Any]:
        options, _ = cls.parser().parse_known_args(argv)
        return cls(options), cls.worker_config(options)


@mutant("args.bad_flag", "a wrong flag is exit status 1")
class ExitsWithOne(ToyEngine):
    @classmethod
    async def from_args(cls, argv: list[str] | None = None) -> tuple[Any, Any]:
        try:
            return await super().from_args(argv)
        except SystemExit:
            raise SystemExit("toy: wrong flags") from None


@mutant("args.bad_flag", "a wrong flag is a RuntimeError")
class RaisesRuntimeError(ToyEngine):
    @classmethod
    async def from_args(cls, argv: list[str] | None = None) -> tuple[Any, Any]:
        try:
            return await super().from_args(argv)
        except SystemExit:
            raise RuntimeError("wrong flags") from None


@mutant("args.bad_flag", "a thread that was started before the flags were read stays")
class LeavesAThread(ToyEngine):
    @classmethod
    async def from_args(cls, argv: list[str] | None = None) -> tuple[Any, Any]:
        is_over = threading.Event()
        threading.Thread(target=is_over.wait, args=(2,), name="toy-telemetry", daemon=True).start()
        pair = await super().from_args(argv)
        with contextlib.suppress(RuntimeError):
            is_over.set()
        return pair
