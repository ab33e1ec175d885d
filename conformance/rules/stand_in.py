"""What takes the place of an object of Dynamo's that only a real worker has, such as its endpoint."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any


class StandIn:
    """
    Anything goes: every attribute is there, every call works and may be awaited, and gives the same again.

    `touched` has the names that were asked for: an engine that fails with it may have needed the real one.
    """

    def __init__(self) -> None:
        self.touched: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        self.touched.append(name)
        return self

    def __call__(self, *_: Any, **__: Any) -> Any:
        return self

    def __await__(self) -> Generator[None, None, Any]:
        yield
        return self

    def __int__(self) -> int:
        return 1

    __index__ = __int__
