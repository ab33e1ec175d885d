"""
Which of torch's attention kernels runs: the first on a list of ours that works for this model on this GPU.

On the CPU torch chooses by itself.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable

from torch.nn.attention import SDPBackend, sdpa_kernel

# The fastest that have grouped-query attention and no padding come first.
_IN_ORDER = {
    "flash attention": SDPBackend.FLASH_ATTENTION,
    "cuDNN attention": SDPBackend.CUDNN_ATTENTION,
    "memory-efficient attention": SDPBackend.EFFICIENT_ATTENTION,
    "plain attention (no fused kernel works here)": SDPBackend.MATH,
}


class AttentionBackend:
    """Torch's own choice until `choose` makes another."""

    def __init__(self) -> None:
        self.how = "torch's own choice of attention"
        self._backend: SDPBackend | None = None

    def choose(self, attempt: Callable[[], None]) -> None:
        """Take the first kernel with which `attempt` runs; it does a little attention within `only`."""
        for how, backend in _IN_ORDER.items():
            self.how, self._backend = f"torch's {how}", backend
            with warnings.catch_warnings(), contextlib.suppress(RuntimeError):
                warnings.simplefilter("ignore")  # torch says of each kernel why it does not work
                attempt()
                return

    def only(self) -> contextlib.AbstractContextManager[None]:
        """Within this, no other kernel runs."""
        if self._backend is None:
            return contextlib.nullcontext()
        return sdpa_kernel(self._backend)
