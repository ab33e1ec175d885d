"""
How long a KV cache takes from a prefill worker to a decode worker.

    transfer_s(1024, profile, bandwidth=64.0)      seconds for a prompt of that many tokens

In virtual time and in real time the same holds: each worker has a link that sends, and one that receives, one KV cache
at a time, at full bandwidth, first come, first served. `deployment` models links by simpy's resources, `kv_sender` and
`kv_fetcher` by messages between the workers.
"""

from __future__ import annotations

import math

from mock_engine.errors import ConfigError
from mock_engine.profile import Profile

DEFAULT_BANDWIDTH = 64.0  # GB/s
# Real seconds that a KV cache waits for a decode worker to ask for it, which ours does as soon as it gets the request
# (vLLM's when it has room; its NIXL connector gives up after 480 s).
DEFAULT_TIMEOUT_S = 5.0
TRANSFER_MODES = ("full_prompt", "destination_missing")


def check_bandwidth(bandwidth: float) -> None:
    """Raise `ConfigError` for what is no `--kv-transfer-bandwidth`."""
    if not 0 < bandwidth < math.inf:
        raise ConfigError(f"--kv-transfer-bandwidth is {bandwidth:g}; it must be above 0, in GB/s")


def transfer_s(num_tokens: int, profile: Profile, bandwidth: float) -> float:
    """Seconds on the links for the KV cache of `num_tokens`, at `bandwidth` GB/s."""
    return num_tokens * profile.kv_bytes_per_token / (bandwidth * 1e9)
