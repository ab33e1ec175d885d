"""What a run of the suite was asked for."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from importlib import import_module
from inspect import isabstract
from typing import Any, Literal

from conformance.streams import DriverName

Role = Literal["agg", "prefill", "decode", "encode"]
Clock = Literal["auto", "virtual", "real"]
DRIVERS: tuple[DriverName, ...] = ("plain", "bridge", "worker")
ROLES: tuple[Role, ...] = ("agg", "prefill", "decode", "encode")
CLOCKS: tuple[Clock, ...] = ("auto", "virtual", "real")


class SuiteError(Exception):
    """The run cannot be made as asked. The message says what was found, what is allowed and what to do."""


@dataclass(frozen=True, slots=True)
class SuiteSettings:
    """All options of a run. `engine` is "my_pkg:Engine"."""

    engine: str
    engine_args: str = ""
    driver: DriverName = "bridge"
    role: Role | None = None  # None: what the engine's own WorkerConfig says
    clock: Clock = "auto"
    max_examples: int | None = None  # None: the default of the profile that fits the clock
    seed: int | None = None

    @property
    def argv(self) -> list[str]:
        return shlex.split(self.engine_args)

    def engine_class(self) -> Any:
        """Import it. Raises SuiteError with one line."""
        module_name, _, class_name = self.engine.partition(":")
        if not module_name or not class_name:
            raise SuiteError(f"--engine is {self.engine!r}; it must be MODULE:CLASS, such as my_pkg.engine:MyEngine")
        try:
            module = import_module(module_name)
        except ModuleNotFoundError as error:
            missing = str(error.name)
            advice = "Run pytest where Python finds it, or install it."
            if not f"{module_name}.".startswith(f"{missing}."):
                advice = f"It is {module_name} that imports {missing!r}; install what that needs."
            raise SuiteError(f"--engine {self.engine}: cannot import {module_name!r} ({error}). {advice}") from error
        except Exception as error:
            raise SuiteError(
                f"--engine {self.engine}: {module_name!r} cannot be imported: {type(error).__name__}: {error}"
            ) from error
        found: Any = module
        for part in class_name.split("."):
            if not hasattr(found, part):
                classes = [
                    name
                    for name, thing in vars(module).items()
                    if hasattr(thing, "from_args") and not isabstract(thing)
                ]
                raise SuiteError(
                    f"--engine {self.engine}: {module_name!r} has no {class_name!r}; "
                    f"engine classes in it: {', '.join(classes) or 'none'}."
                )
            found = getattr(found, part)
        if not isinstance(found, type):
            raise SuiteError(f"--engine {self.engine} is {type(found).__name__}; it must be a class, an LLMEngine.")
        lacks = [
            name for name in ("from_args", "start", "generate", "cleanup") if not callable(getattr(found, name, None))
        ]
        if lacks:
            raise SuiteError(f"--engine {self.engine} is no LLMEngine: it has no {', '.join(lacks)}.")
        return found
