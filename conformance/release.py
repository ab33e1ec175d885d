"""
The installed release of Dynamo: what the suite takes from it, and what differs between releases.

Nothing else in the suite imports dynamo.
"""

from __future__ import annotations

import re
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any


@cache
def backend() -> ModuleType:
    """`dynamo.common.backend` in 1.2 to 1.6; its README announces the move to `dynamo.backend`."""
    try:
        return import_module("dynamo.common.backend")
    except ModuleNotFoundError:
        return import_module("dynamo.backend")


def submodule(name: str) -> ModuleType | None:
    """`dynamo.common.backend.<name>`; None where this release has no such module."""
    try:
        return import_module(f"{backend().__name__}.{name}")
    except ModuleNotFoundError:
        return None


@cache
def dynamo_version() -> str:
    """The installed release of ai-dynamo, "1.4.2"."""
    try:
        return version("ai-dynamo")
    except PackageNotFoundError:
        return version("ai-dynamo-runtime")


def release_tuple(release: str) -> tuple[int, ...]:
    """(1, 4, 2) of "1.4.2" or "1.4.2.dev3"; missing parts count as 0."""
    parts = re.findall(r"\d+", release)[:3]
    return tuple(int(part) for part in parts) + (0,) * (3 - len(parts))


def is_at_least(release: str) -> bool:
    """Whether the installed release is `release` or newer."""
    return release_tuple(dynamo_version()) >= release_tuple(release)


def core(name: str) -> Any:
    """A class of the bindings, `dynamo._core.<name>`; None where this release has none."""
    return getattr(import_module("dynamo._core"), name, None)


def exceptions(*names: str) -> tuple[type[BaseException], ...]:
    """Those of Dynamo's typed exceptions that this release has."""
    module = import_module("dynamo.llm.exceptions")
    return tuple(getattr(module, name) for name in names if hasattr(module, name))


def disaggregation_modes() -> dict[str, Any]:
    """Role name ("agg", "prefill", ...) to Dynamo's `DisaggregationMode`."""
    modes = import_module("dynamo.common.constants").DisaggregationMode
    return {mode.value: mode for mode in modes}


FINISH_REASONS = frozenset({"eos", "length", "stop", "cancelled", "abort", "content_filter"})
CANCELLED = frozenset({"cancelled", "abort"})


def is_known_finish_reason(reason: Any) -> bool:
    """Whether the bridge of the installed release accepts `reason`. Observed on the real worker."""
    if isinstance(reason, dict):
        return list(reason) == ["error"] and isinstance(reason["error"], str)
    if not isinstance(reason, str):
        return False
    if reason == "error":
        return is_at_least("1.5.1")
    if reason.startswith("error:"):
        return is_at_least("1.4.0")
    return reason in FINISH_REASONS
