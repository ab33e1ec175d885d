"""Data-sheet times: they never fall, and experts cost what of them is used."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mock_engine.profile import load_profile
from mock_engine.profile_import.known_models import MODELS
from mock_engine.roofline import ModelShape, Roofline

DENSE = load_profile("h100-sxm/llama-3.1-8b/vllm-tp1-bf16").shape
MIXTRAL = MODELS["mixtral-8x7b"].shape
GPU = load_profile("h100-sxm/llama-3.1-8b/vllm-tp1-bf16").datasheet

counts = st.lists(st.integers(1, 200_000), min_size=2, max_size=20).map(lambda values: np.array(sorted(values), float))
expert_shapes = st.builds(
    lambda num_experts, share, params: replace(
        DENSE,
        num_experts=num_experts,
        num_experts_per_tok=max(1, round(share * num_experts)),
        num_expert_params=params,
    ),
    st.integers(2, 512),
    st.floats(0, 1),
    st.integers(1, DENSE.num_layer_params),
)


@given(shape=st.one_of(st.sampled_from([DENSE, MIXTRAL]), expert_shapes), tokens=counts, tp=st.sampled_from([1, 2, 8]))
def test_more_tokens_never_take_less_time(shape, tokens, tp):
    roofline = Roofline(shape, GPU, tp, 2, "bf16")
    for of_pass in (roofline.linear_s, roofline.head_s, roofline.communication_s, roofline.prefill_s):
        assert (np.diff(of_pass(tokens)) >= 0).all()


@given(shape=expert_shapes, tokens=counts)
def test_experts_cost_no_more_than_a_dense_model_of_their_size(shape, tokens):
    dense = replace(shape, num_experts=1, num_experts_per_tok=1, num_expert_params=0)
    assert (
        Roofline(shape, GPU, 1, 2, "bf16").linear_s(tokens)
        <= Roofline(dense, GPU, 1, 2, "bf16").linear_s(tokens) * (1 + 1e-9)
    ).all()


@pytest.mark.parametrize(("tokens", "experts_read"), [(1, 2.0), (2, 3.5), (100, 8.0)])
def test_memory_is_read_for_the_experts_that_tokens_take(tokens, experts_read):
    """Two of eight for one token; for two tokens 8 * (1 - (6/8)^2) on average; all of them for many."""
    shared = MIXTRAL.num_layer_params - MIXTRAL.num_expert_params
    read_bytes = 2 * (shared + MIXTRAL.num_expert_params * experts_read / 8)
    fast = replace(GPU, flops_per_s=1e30)
    assert Roofline(MIXTRAL, fast, 1, 2, "bf16").linear_s(np.array([float(tokens)]))[0] == pytest.approx(
        read_bytes / GPU.memory_bytes_per_s, rel=1e-6
    )


def test_a_head_that_is_the_embedding_counts_once():
    tied = ModelShape(1_235_814_400, 16, 2048, 32, 8, 64, 128_256, tie_word_embeddings=True)
    assert tied.num_layer_params == 1_235_814_400 - 128_256 * 2048


@given(
    shape=st.one_of(st.sampled_from([DENSE, MIXTRAL]), expert_shapes),
    batch_size=st.integers(1, 1024),
    context_tokens=st.integers(1, 131_072),
    tp=st.sampled_from([1, 2, 8, 16]),
)
def test_decode_attention_reads_the_kv_cache_in_its_own_dtype(shape, batch_size, context_tokens, tp):
    """Keys and values: layers x KV heads on a GPU (one at least) x head_dim x bytes, for each token of a context."""
    for kv_cache_dtype, num_bytes in (("bf16", 2), ("fp8", 1)):
        roofline = Roofline(shape, GPU, tp, 2, kv_cache_dtype)
        heads = max(1, shape.num_kv_heads / tp)
        read_bytes = batch_size * context_tokens * 2 * shape.num_layers * heads * shape.head_dim * num_bytes
        seconds = roofline.decode_attention_s(np.array([float(batch_size)]), np.array([float(context_tokens)]))[0]
        assert seconds == pytest.approx(read_bytes / GPU.memory_bytes_per_s)


def test_an_fp8_kv_cache_halves_what_attention_reads_and_nothing_else():
    """Where arithmetic costs nothing, prefill attention takes half; matrices, head and all-reduces take the same."""
    fast, tokens, past = replace(GPU, flops_per_s=1e30), np.array([1.0, 500.0]), np.array([0.0, 9000.0])
    wide, narrow = (Roofline(DENSE, fast, 4, 1, kv_cache_dtype) for kv_cache_dtype in ("bf16", "fp8"))
    assert narrow.prefill_attention_s(tokens, past) == pytest.approx(wide.prefill_attention_s(tokens, past) / 2)
    for part in ("linear_s", "head_s", "communication_s"):
        assert (getattr(narrow, part)(tokens) == getattr(wide, part)(tokens)).all()
