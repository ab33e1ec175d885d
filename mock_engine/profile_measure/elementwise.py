"""
All in a layer that is neither a matrix product nor attention.

Engines fuse these into a few kernels. In torch each is several, and a decode step has little else to do between reading
weights, so on a GPU they go through `torch.compile`. Where that does not work, they run one by one, and `how` says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from mock_engine.model_config import ModelConfig

Tensor = torch.Tensor

RMS_NORM_EPS = 1e-6  # of no model in particular: it takes no time


class Elementwise:
    """The kernels of one model; compiled where asked for and possible (`settle`)."""

    def __init__(self, config: ModelConfig, is_compiled: bool) -> None:
        self._config = config
        self._wrap: Callable[[Any], Any] = torch.compile if is_compiled else _as_it_is
        self.how = "fused by torch.compile" if is_compiled else "not fused"
        self._bind()

    def add_norm(self, x: Tensor, delta: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """x + delta, and its RMS norm."""
        total, normed = self._add_norm(x, delta, weight, RMS_NORM_EPS)
        return total, normed

    def rotate(self, qkv: Tensor, cos: Tensor, sin: Tensor, norms: Tensor | None) -> tuple[Tensor, Tensor]:
        """Rotated queries (tokens, heads, size), and rotated keys beside values (tokens, 2, KV heads, size)."""
        shape = self._config.shape
        queries, kv = self._rotate(qkv.reshape(len(qkv), -1, shape.head_dim), cos, sin, norms, shape.num_kv_heads)
        return queries, kv

    def gate(self, gate_up: Tensor) -> Tensor:
        """SwiGLU's product."""
        return torch.as_tensor(self._gate(gate_up))

    def settle(self, work: Callable[[], object]) -> None:
        """Run `work`; if it fails with compiled kernels, go on without."""
        if self._wrap is _as_it_is:
            return
        try:
            work()
        except Exception as error:  # a missing compiler, an old GPU: torch raises all sorts
            self._wrap = _as_it_is
            self.how = f"not fused (torch.compile failed: {type(error).__name__})"
            self._bind()

    def _bind(self) -> None:
        self._add_norm = self._wrap(_add_norm)
        self._rotate = self._wrap(_rotate)
        self._gate = self._wrap(_gate)


def _as_it_is(function: Any) -> Any:
    return function


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def _add_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + delta
    return total, _norm(total, weight, eps)


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor, norms: Tensor | None, num_kv_heads: int) -> tuple[Tensor, Tensor]:
    queries, keys, values = heads.tensor_split(
        [heads.shape[1] - 2 * num_kv_heads, heads.shape[1] - num_kv_heads], dim=1
    )
    if norms is not None:
        queries, keys = _norm(queries, norms[0], 1e-6), _norm(keys, norms[1], 1e-6)
    return _rotated(queries, cos, sin), torch.stack([_rotated(keys, cos, sin), values], dim=1)


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = heads.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


def _gate(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
