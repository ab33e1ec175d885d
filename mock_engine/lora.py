"""
LoRA adapters: which there are, which are loaded, and how long a request waits for one.

    adapters = Adapters({"ada": 0.5}, max_loras=1)       seconds to load each
    wait_s = adapters.wait_s("ada", now_s, in_use)       0.0: loaded; None: all slots are in use, ask again

The first request for an adapter that is not loaded pays for loading it; those that come
meanwhile wait for the same load. At most `max_loras` are loaded; one more takes the place of
the one used least recently, and waits while requests run on all of them. An adapter changes
neither step times nor words, and KV blocks of different adapters are not shared (`prompt`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from mock_engine.errors import ConfigError, RequestError

DEFAULT_LOAD_S = 0.5  # not measured: about what vLLM takes for 100 MB on a local disk


def parse_lora_modules(modules: Sequence[str]) -> dict[str, float]:
    """Seconds to load by name, of texts like `ada` and `ada=1.5`. Raises `ConfigError`."""
    found: dict[str, float] = {}
    for module in modules:
        name, _, seconds = module.partition("=")
        try:
            load_s = float(seconds) if seconds else DEFAULT_LOAD_S
        except ValueError:
            load_s = -1.0
        if not name or not 0 <= load_s < float("inf"):
            raise ConfigError(f"--lora-modules has {module!r}; it must be NAME, or NAME=SECONDS to load it")
        if name in found:
            raise ConfigError(f"--lora-modules has {name!r} twice; every adapter needs a name of its own")
        found[name] = load_s
    return found


class Adapters:
    """The adapters of one engine."""

    def __init__(self, load_s: Mapping[str, float], max_loras: int) -> None:
        self.names = tuple(load_s)
        self._load_s = load_s
        self._max_loras = max_loras
        self._ready_s: dict[str, float] = {}  # when each that has a slot is loaded; the least recently used is first

    def name_in(self, wire: Mapping[str, Any]) -> str | None:
        """The adapter that a wire request asks for; None for the base model. Raises `RequestError` if it is unknown."""
        name = (wire.get("routing") or {}).get("lora_name")
        if name is None:
            model = wire.get("model")
            return model if model in self._load_s else None
        if name not in self._load_s:
            allowed = ", ".join(self.names) or "none"
            raise RequestError(f"there is no adapter {name!r}; those of this engine are: {allowed}")
        return str(name)

    def wait_s(self, name: str, now_s: float, in_use: Collection[str]) -> float | None:
        """
        Seconds until the adapter is loaded; a slot is taken for it if it has none. None if there is none to take.

        `in_use` are the adapters of requests that run.
        """
        ready_s = self._ready_s.pop(name, None)
        if ready_s is None:
            if len(self._ready_s) >= self._max_loras and not self._give_up_one(now_s, in_use):
                return None
            ready_s = now_s + self._load_s[name]
        self._ready_s[name] = ready_s
        return max(0.0, ready_s - now_s)

    def _give_up_one(self, now_s: float, in_use: Collection[str]) -> bool:
        for name, ready_s in self._ready_s.items():
            if name not in in_use and ready_s <= now_s:
                del self._ready_s[name]
                return True
        return False
