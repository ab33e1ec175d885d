"""
A decoder of the given shape with random weights, cut into the parts that are measured.

    model = RandomTransformer(config, kv_tokens, dtype, device)
    model.linear(tokens, num_layers)                 a piece of work: call it to run it
    model.head(sequences)
    model.prefill_attention(new, past, num_layers)
    model.decode_attention(batch, context, num_layers)
    model.step(load)                                 a whole pass

The linear part is all that each token meets in a layer but attention: norms, projections, rotary positions, writing
the KV cache, SwiGLU. Every layer has weights and KV cache of its own, so a run over several reads no byte twice.
Sequences lie in the cache one after the other, all of it of random numbers, and equally long ones form a padded batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from mock_engine.model_config import ModelConfig
from mock_engine.profile_measure.attention_backend import AttentionBackend
from mock_engine.profile_measure.elementwise import Elementwise
from mock_engine.profile_measure.measuring import Work
from mock_engine.step import StepLoad

Tensor = torch.Tensor

TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
ROPE_THETA = 10_000.0  # of no model in particular: angles take the same time whatever they are


@dataclass(frozen=True, slots=True)
class _Layer:
    """Weights of one layer, (out, in) as `F.linear` takes them, and its KV cache, (tokens, 2, KV heads, head size)."""

    first_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    head_norms: Tensor | None  # (2, head size): of queries, of keys
    out: Tensor
    second_norm: Tensor
    gate_up: Tensor
    down: Tensor
    kv: Tensor


Attend = Callable[[_Layer, Tensor], Tensor]  # queries (tokens, heads, head size) to (tokens, heads * head size)


class RandomTransformer:
    """The model on its device, with a KV cache of `kv_tokens`."""

    def __init__(self, config: ModelConfig, kv_tokens: int, dtype: str, device: str, seed: int = 0) -> None:
        self._config = config
        self._device = device
        self._dtype = TORCH_DTYPES[dtype]
        self._generator = torch.Generator(device).manual_seed(seed)
        shape = config.shape
        self._embedding = self._random(shape.vocab_size, shape.hidden_size, spread=1.0)
        is_tied = shape.tie_word_embeddings
        self._head = self._embedding if is_tied else self._random(shape.vocab_size, shape.hidden_size)
        self._final_norm = self._ones(shape.hidden_size)
        self._layers = [self._random_layer(kv_tokens) for _ in range(shape.num_layers)]
        self.elementwise = Elementwise(config, is_compiled=device == "cuda")
        self.attention_backend = AttentionBackend()
        if device == "cuda":
            self.attention_backend.choose(self.try_attention)
        self.elementwise.settle(self.linear(min(4, kv_tokens), 1))

    def linear(self, tokens: int, num_layers: int) -> Work:
        """All of the first `num_layers` layers but attention, over that many tokens."""
        x, nothing = self._random(tokens, self._config.shape.hidden_size, spread=1.0), self._zeros(tokens)
        places = torch.arange(tokens, device=self._device)
        rotation = self._rotation(places)

        def attend(_layer: _Layer, queries: Tensor) -> Tensor:
            return queries.flatten(1)

        return _without_gradients(lambda: self._run_layers(x, nothing, num_layers, rotation, places, attend))

    def head(self, sequences: int) -> Work:
        """The last norm, the LM head and the choice of the likeliest token."""
        x, nothing = self._random(sequences, self._config.shape.hidden_size, spread=1.0), self._zeros(sequences)
        return _without_gradients(lambda: self._choose(x, nothing))

    def prefill_attention(self, new_tokens: int, past_tokens: int, num_layers: int) -> Work:
        """Causal attention of one sequence in the first `num_layers` layers."""
        queries, mask = self._queries(new_tokens), causal_mask(new_tokens, past_tokens)
        return _without_gradients(
            lambda: [self._attend_chunk(layer, queries, 0, past_tokens, mask) for layer in self._layers[:num_layers]]
        )

    def decode_attention(self, batch_size: int, context_tokens: int, num_layers: int) -> Work:
        """Attention of one token in each of `batch_size` sequences of `context_tokens`, likewise."""
        queries = self._queries(batch_size)
        return _without_gradients(
            lambda: [self._attend_decode(layer, queries, 0, context_tokens) for layer in self._layers[:num_layers]]
        )

    def step(self, load: StepLoad) -> Work:
        """A whole pass, from token ids to the next ones. Decoding sequences are equally long."""
        batch_size = load.decode_batch_size
        context = load.context_tokens // batch_size if batch_size else 0
        starts = [0, *accumulate(chunk.new_tokens + chunk.past_tokens for chunk in load.prefill_chunks)]
        masks = [causal_mask(*chunk) for chunk in load.prefill_chunks]
        places, positions, last_rows, num_rows = [], [], [], 0
        for start, chunk in zip(starts, load.prefill_chunks, strict=False):
            positions.append(torch.arange(chunk.past_tokens, chunk.past_tokens + chunk.new_tokens))
            places.append(positions[-1] + start)
            num_rows += chunk.new_tokens
            last_rows.append(num_rows - 1)
        if batch_size:
            positions.append(torch.full((batch_size,), context - 1))
            places.append(starts[-1] + torch.arange(batch_size) * context + context - 1)
            last_rows.extend(range(num_rows, num_rows + batch_size))

        def attend(layer: _Layer, queries: Tensor) -> Tensor:
            found, row = [], 0
            for start, chunk, mask in zip(starts, load.prefill_chunks, masks, strict=False):
                rows = queries[row : row + chunk.new_tokens]
                found.append(self._attend_chunk(layer, rows, start, chunk.past_tokens, mask))
                row += chunk.new_tokens
            if batch_size:
                found.append(self._attend_decode(layer, queries[row:], starts[-1], context))
            return found[0] if len(found) == 1 else torch.cat(found)

        slots = torch.cat(places).to(self._device)
        rotation = self._rotation(torch.cat(positions).to(self._device))
        last = torch.tensor(last_rows, device=self._device)
        nothing = self._zeros(load.num_tokens)
        token_ids = torch.randint(
            self._config.shape.vocab_size, (load.num_tokens,), device=self._device, generator=self._generator
        )

        def work() -> Tensor:
            x = F.embedding(token_ids, self._embedding)
            x, delta = self._run_layers(x, nothing, len(self._layers), rotation, slots, attend)
            return self._choose(x[last], delta[last])

        return _without_gradients(work)

    def _run_layers(
        self,
        x: Tensor,
        delta: Tensor,
        num_layers: int,
        rotation: tuple[Tensor, Tensor],
        slots: Tensor,
        attend: Attend,
    ) -> tuple[Tensor, Tensor]:
        """The residual stream after that many layers, and what the last one has yet to add to it."""
        kernels = self.elementwise
        for layer in self._layers[:num_layers]:
            x, normed = kernels.add_norm(x, delta, layer.first_norm)
            qkv = F.linear(normed, layer.qkv, layer.qkv_bias)
            queries, kv = kernels.rotate(qkv, *rotation, layer.head_norms)
            layer.kv.index_copy_(0, slots, kv)
            delta = F.linear(attend(layer, queries), layer.out)
            x, normed = kernels.add_norm(x, delta, layer.second_norm)
            delta = F.linear(kernels.gate(F.linear(normed, layer.gate_up)), layer.down)
        return x, delta

    def _choose(self, x: Tensor, delta: Tensor) -> Tensor:
        _, normed = self.elementwise.add_norm(x, delta, self._final_norm)
        return F.linear(normed, self._head).float().argmax(-1)

    def _attend_chunk(
        self, layer: _Layer, queries: Tensor, start: int, past_tokens: int, mask: Tensor | None
    ) -> Tensor:
        """`queries` follow `past_tokens` of their sequence, which begins at `start` in the cache."""
        keys, values = self._cached(layer, start, 1, past_tokens + queries.shape[0])
        with self.attention_backend.only():
            attended = F.scaled_dot_product_attention(
                queries.transpose(0, 1).unsqueeze(0),
                keys,
                values,
                attn_mask=mask,
                is_causal=mask is None,
                enable_gqa=keys.shape[1] < queries.shape[1],
            )
        return attended[0].transpose(0, 1).flatten(1)

    def _attend_decode(self, layer: _Layer, queries: Tensor, start: int, context_tokens: int) -> Tensor:
        """One query in each sequence; all of `context_tokens`, from `start` on in the cache."""
        keys, values = self._cached(layer, start, queries.shape[0], context_tokens)
        with self.attention_backend.only():
            attended = F.scaled_dot_product_attention(
                queries.unsqueeze(2), keys, values, enable_gqa=keys.shape[1] < queries.shape[1]
            )
        return attended.flatten(1)

    def _cached(self, layer: _Layer, start: int, batch_size: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values, each (batch, KV heads, length, head size), as they lie in the cache."""
        kv = layer.kv[start : start + batch_size * length].view(batch_size, length, *layer.kv.shape[1:])
        return kv[:, :, 0].transpose(1, 2), kv[:, :, 1].transpose(1, 2)

    def try_attention(self) -> None:
        """Both kinds of attention on a few tokens; raises what torch raises."""
        layer = self._layers[0]
        with torch.no_grad():
            self._attend_chunk(layer, self._queries(1), 0, 1, causal_mask(1, 1))
            self._attend_chunk(layer, self._queries(2), 0, 0, None)
            self._attend_decode(layer, self._queries(1), 0, 2)

    def _random_layer(self, kv_tokens: int) -> _Layer:
        config, shape = self._config, self._config.shape
        qkv_size = config.query_size + 2 * config.kv_size
        return _Layer(
            first_norm=self._ones(shape.hidden_size),
            qkv=self._random(qkv_size, shape.hidden_size),
            qkv_bias=self._random(qkv_size, spread=0.1) if config.has_qkv_bias else None,
            head_norms=self._ones(2, shape.head_dim) if config.has_head_norms else None,
            out=self._random(shape.hidden_size, config.query_size),
            second_norm=self._ones(shape.hidden_size),
            gate_up=self._random(2 * config.intermediate_size, shape.hidden_size),
            down=self._random(shape.hidden_size, config.intermediate_size),
            kv=self._random(kv_tokens, 2, shape.num_kv_heads, shape.head_dim, spread=1.0),
        )

    def _random(self, *size: int, spread: float | None = None) -> Tensor:
        """Normal numbers; of weights so that what comes out is about as large as what goes in."""
        tensor = torch.empty(size, dtype=self._dtype, device=self._device)
        return tensor.normal_(0.0, spread or 1 / math.sqrt(size[-1]), generator=self._generator)

    def _ones(self, *size: int) -> Tensor:
        return torch.ones(size, dtype=self._dtype, device=self._device)

    def _zeros(self, rows: int) -> Tensor:
        return torch.zeros(rows, self._config.shape.hidden_size, dtype=self._dtype, device=self._device)

    def _queries(self, rows: int) -> Tensor:
        return self._random(rows, self._config.shape.num_heads, self._config.shape.head_dim, spread=1.0)

    def _rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, each (tokens, 1, half a head)."""
        half = self._config.shape.head_dim // 2
        frequencies = ROPE_THETA ** (-torch.arange(half, device=self._device, dtype=torch.float32) / half)
        angles = (positions[:, None].float() * frequencies).unsqueeze(1)
        return angles.cos().to(self._dtype), angles.sin().to(self._dtype)


def causal_mask(new_tokens: int, past_tokens: int) -> Tensor | None:
    """What torch wants for new tokens that see all past ones; None without past: it knows that one by a flag."""
    return causal_lower_right(new_tokens, past_tokens + new_tokens) if past_tokens else None


def _without_gradients(work: Work) -> Work:
    def run() -> object:
        with torch.no_grad():
            return work()

    return run
