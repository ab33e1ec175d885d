"""Step times of every shipped profile: they never fall, have no jumps, and meet what was measured."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mock_engine.monotone import MonotoneCurve, MonotoneSurface, between_points, in_order, without_dips
from mock_engine.profile import Profile, list_profiles, load_profile
from mock_engine.profile_import.accuracy import left_out
from mock_engine.step import PrefillChunk, StepLoad
from mock_engine.timing import StepJitter, TimingModel, curve

NAMES = list_profiles()
# What is drawn at random is drawn for these. Of the others, some tables rise in steps that break the limits below:
# mixed passes of Qwen3-32B tp1 under vLLM on H100 take up to 12 % more than their parts, those of Llama-2-70B tp8 under
# SGLang on A100 up to 2.5 %, and matrices of 129 rows were measured 20 % slower there than those of 128.
SAMPLE = [
    "h100-sxm/llama-3.1-8b/vllm-tp1-bf16",
    "h100-sxm/llama-3.1-70b/vllm-tp4-bf16",
    "h100-sxm/llama-3.3-70b/vllm-tp2-fp8",
    "h100-sxm/llama-3.3-70b/vllm-tp4-fp8",
    "h100-sxm/llama-3.3-70b/vllm-tp8-fp8",
    "a100-sxm/llama-2-70b/splitwise-tp8-fp16",
    "a100-sxm/llama-3.1-8b/vllm-tp1-bf16",
    "a100-sxm/llama-3.1-70b/vllm-tp4-bf16",
]
KERNELS, STEPS = "kernels", "steps"

log_tokens = st.floats(0, 17).map(lambda exponent: int(2**exponent))
chunks = st.builds(PrefillChunk, log_tokens, st.one_of(st.just(0), log_tokens))
chunk_lists = st.lists(chunks, max_size=3).map(tuple)
batch_sizes = st.floats(0, 11).map(lambda exponent: int(2**exponent))
more = st.one_of(st.integers(0, 3), log_tokens)


@cache
def profile_of(name: str) -> Profile:
    return load_profile(name)


@cache
def model_of(name: str) -> TimingModel:
    return TimingModel(profile_of(name))


def decode(batch_size: int, context_tokens_each: int) -> StepLoad:
    return StepLoad((), batch_size, batch_size * context_tokens_each)


def prefill(new_tokens: int, past_tokens: int = 0) -> StepLoad:
    return StepLoad((PrefillChunk(new_tokens, past_tokens),), 0, 0)


def never_less(longer_s: float, shorter_s: float) -> bool:
    return longer_s >= shorter_s * (1 - 1e-12)


@pytest.mark.parametrize("name", SAMPLE)
@given(batch_size=batch_sizes, each=log_tokens, odd=st.integers(0, 3), num_steps=st.integers(1, 60))
@settings(max_examples=100)
def test_decode_steps_computed_at_once_take_what_they_take_one_by_one(name, batch_size, each, odd, num_steps):
    """To the last bit: a simulator may take either way. Within, at the edge of and far outside the measured range."""
    model, context_tokens = model_of(name), batch_size * each + odd
    one_by_one = [
        model.step_s(StepLoad((), batch_size, context_tokens + batch_size * step)) for step in range(num_steps)
    ]
    assert model.decode_run_s(batch_size, context_tokens, num_steps).tolist() == one_by_one


@pytest.mark.parametrize("name", NAMES)
@given(
    chunks=chunk_lists,
    batch_size=st.one_of(st.just(0), batch_sizes),
    each=log_tokens,
    extra=st.tuples(more, more, more, more),
    chunk=chunks,
)
@settings(max_examples=150)
def test_more_work_never_takes_less_time(name, chunks, batch_size, each, extra, chunk):
    """More new tokens, more past, longer contexts, more sequences of the same length, one more prompt, draft tokens."""
    assume(chunks or batch_size)
    timing = model_of(name)
    more_new, more_past, more_sequences, more_context = extra
    base_s = timing.step_s(StepLoad(chunks, batch_size, batch_size * each))
    assert base_s > 0
    if chunks:
        first, *others = chunks
        longer = first._replace(new_tokens=first.new_tokens + more_new)
        assert never_less(timing.step_s(StepLoad((longer, *others), batch_size, batch_size * each)), base_s)
        deeper = first._replace(past_tokens=first.past_tokens + more_past)
        assert never_less(timing.step_s(StepLoad((deeper, *others), batch_size, batch_size * each)), base_s)
    assert never_less(timing.step_s(StepLoad((*chunks, chunk), batch_size, batch_size * each)), base_s)
    if batch_size:
        load = StepLoad(chunks, batch_size, batch_size * each + more_context)
        assert never_less(timing.step_s(load), base_s)
        larger = batch_size + more_sequences
        assert never_less(timing.step_s(StepLoad(chunks, larger, larger * each)), base_s)
        drafted_s = timing.step_s(StepLoad(chunks, batch_size, batch_size * each, more_new))
        assert never_less(drafted_s, base_s)
        more_drafted_s = timing.step_s(StepLoad(chunks, batch_size, batch_size * each, more_new + more_past))
        assert never_less(more_drafted_s, drafted_s)


@pytest.mark.parametrize("name", [name for name in SAMPLE if profile_of(name).tables == KERNELS])
def test_draft_tokens_go_through_the_matrices_and_the_lm_head_and_attention_is_as_without_them(name):
    profile, timing = profile_of(name), model_of(name)
    roofline, latency = profile.roofline, profile.latency
    parts = [curve(latency["linear"], roofline.linear_s), curve(latency["head"], roofline.head_s)]
    if "communication" in latency:
        parts.append(curve(latency["communication"], roofline.communication_s))
    without_s, with_s = timing.step_s(StepLoad((), 64, 64_000)), timing.step_s(StepLoad((), 64, 64_000, 192))
    assert with_s - without_s == pytest.approx(sum(part(256) - part(64) for part in parts))


@pytest.mark.parametrize("name", SAMPLE)
@given(batch_size=batch_sizes, num_drafts=st.integers(1, 7), each=log_tokens)
@settings(max_examples=100)
def test_draft_tokens_cost_no_more_than_as_many_sequences_that_read_the_context_again(
    name, batch_size, num_drafts, each
):
    timing = model_of(name)
    larger = batch_size * (1 + num_drafts)
    drafted_s = timing.step_s(StepLoad((), batch_size, batch_size * each, batch_size * num_drafts))
    assert never_less(timing.step_s(StepLoad((), larger, larger * each)), drafted_s)


@pytest.mark.parametrize("name", SAMPLE)
@given(chunks=st.lists(chunks, min_size=1, max_size=3).map(tuple), batch_size=batch_sizes, each=log_tokens)
@settings(max_examples=150)
def test_a_mixed_pass_costs_less_than_its_parts_apart_and_no_less_than_either(name, chunks, batch_size, each):
    """Save that on H100 matrices of more than 2,000 rows were measured up to 4 % slower than two smaller ones."""
    timing = model_of(name)
    prefill_s = timing.step_s(StepLoad(chunks, 0, 0))
    decode_s = timing.step_s(decode(batch_size, each))
    mixed_s = timing.step_s(StepLoad(chunks, batch_size, batch_size * each))
    assert never_less(mixed_s, max(prefill_s, decode_s))
    allowed = 1.05 if batch_size > 256 and profile_of(name).tables == KERNELS else 1.0
    assert never_less(allowed * (prefill_s + decode_s), mixed_s)


@pytest.mark.parametrize("name", [name for name in NAMES if profile_of(name).tables == KERNELS])
def test_a_small_chunk_rides_along_for_a_fraction_of_a_pass_of_its_own(name):
    """Weights are read once: 64 decoding sequences and 64 prompt tokens are far from two passes."""
    timing = model_of(name)
    alone_s = timing.step_s(decode(64, 1000))
    mixed_s = timing.step_s(StepLoad((PrefillChunk(64, 0),), 64, 64_000))
    assert mixed_s - alone_s < 0.5 * timing.step_s(prefill(64))


# Whole prefill passes over several prompts at once: (profile, prompts, tokens of each, ms), kernels only,
# asked of aiconfigurator-core 0.12.0, which measured attention over batches of prompts too.
BATCHED_PREFILL = [
    ("h100-sxm/llama-3.1-8b/vllm-tp1-bf16", 4, 128, 11.886),
    ("h100-sxm/llama-3.1-8b/vllm-tp1-bf16", 4, 512, 42.299),
    ("h100-sxm/llama-3.1-8b/vllm-tp1-bf16", 4, 2048, 180.616),
]


@pytest.mark.parametrize(("name", "prompts", "tokens", "recorded_ms"), BATCHED_PREFILL)
def test_several_prompts_in_one_pass_share_its_launches(name, prompts, tokens, recorded_ms):
    """Tables have single prompts only; summing them would count the launch of a kernel for each prompt."""
    profile, timing = profile_of(name), model_of(name)
    predicted_s = timing.step_s(StepLoad((PrefillChunk(tokens, 0),) * prompts, 0, 0))
    kernels_s = predicted_s - profile.overhead_step_s - prompts * profile.overhead_per_seq_s
    assert kernels_s * 1e3 == pytest.approx(recorded_ms, rel=0.04)


# Steps of real vLLM on H100: (profile, sequences in the batch, ms if all decode, ms if one of them computes the last 1
# to 16 tokens of a prompt that is otherwise in the prefix cache). Medians of 26 to 169 steps each; inference-sim/
# inference-sim, branch stepml-experiments 9293b222, Apache-2.0.
JOINED = [
    ("h100-sxm/llama-2-70b/vllm-tp4-bf16", 40, 18.544, 18.724),
    ("h100-sxm/llama-2-70b/vllm-tp4-bf16", 54, 19.100, 19.150),
    ("h100-sxm/codellama-34b/vllm-tp2-bf16", 28, 14.613, 14.822),
]


@pytest.mark.parametrize(("name", "batch_size", "decoding_ms", "joined_ms"), JOINED)
def test_a_cached_prompt_that_joins_decoding_sequences_costs_hardly_more_than_one_of_them(
    name, batch_size, decoding_ms, joined_ms
):
    timing = model_of(name)
    all_decode_s = timing.step_s(decode(batch_size, 700))
    one_joins_s = timing.step_s(StepLoad((PrefillChunk(1, 570),), batch_size - 1, (batch_size - 1) * 700))
    assert one_joins_s / all_decode_s == pytest.approx(joined_ms / decoding_ms, abs=0.02)


def test_beyond_the_grids_time_grows_in_proportion():
    curve = MonotoneCurve(np.array([1.0, 10.0]), np.array([2.0, 5.0]))
    assert [curve(0.5), curve(1), curve(5.5), curve(10), curve(30)] == [2.0, 2.0, 3.5, 5.0, 15.0]
    surface = MonotoneSurface(np.array([1.0, 3.0]), np.array([0.0, 4.0]), np.array([[1.0, 2.0], [3.0, 8.0]]))
    assert [surface(1, 0), surface(2, 2), surface(3, 4), surface(6, 4), surface(6, 8)] == [1.0, 3.5, 8.0, 16.0, 32.0]


@pytest.mark.parametrize("name", SAMPLE)
@given(new=log_tokens, past=log_tokens, batch_size=batch_sizes, each=log_tokens)
@settings(max_examples=150)
def test_there_are_no_jumps(name, new, past, batch_size, each):
    """
    One token more is worth at most what its share of the work allows, and steps in the measurements
    (a matrix of 161 rows can take 6 % more than one of 160) some more.
    """
    timing = model_of(name)
    assert timing.step_s(prefill(new + 1)) <= timing.step_s(prefill(new)) * (1.07 + 2 / new)
    assert timing.step_s(prefill(new, past + 1)) <= timing.step_s(prefill(new, past)) * (1.01 + 2 / past)
    one_more = StepLoad((), batch_size, batch_size * each + 1)
    assert timing.step_s(one_more) <= timing.step_s(decode(batch_size, each)) * (1.01 + 2 / each)


MEASURED_AS = {
    "linear": lambda tokens: prefill(tokens),
    "communication": lambda tokens: prefill(tokens),
    "head": lambda sequences: decode(sequences, 1024),
    "prefill_attention": prefill,
    "decode_attention": decode,
    "prefill": lambda tokens: prefill(tokens),
    "decode": decode,
}


def load_at(table: str, point: np.ndarray) -> StepLoad:
    return MEASURED_AS[table](*(int(value) for value in point))


@pytest.mark.parametrize("name", [name for name in NAMES if profile_of(name).tables == STEPS])
def test_measured_passes_come_out_as_measured(name):
    """All of them within 0.4 % (the largest dip that was taken out), nearly all to the last digit."""
    profile, timing = profile_of(name), model_of(name)
    for table in ("prefill", "decode"):
        measured = profile.latency[table]
        predicted_s = np.array([timing.step_s(load_at(table, point)) for point in measured.points])
        off = np.abs(predicted_s / measured.seconds - 1)
        assert off.max() < 0.004
        assert np.median(off) < 1e-9


@pytest.mark.parametrize("name", [name for name in NAMES if profile_of(name).tables == KERNELS])
def test_measured_kernels_come_out_as_measured(name):
    """
    Decode attention at (batch, context) plus the linear layers at that batch, as the tables have
    them: within 5.5 % of a step everywhere (matrix products have dips that deep; those of experts
    9 %), half within 1.3 %.
    """
    profile, timing = profile_of(name), model_of(name)
    off = []
    for table in ("decode_attention", "prefill_attention"):
        for point, attention_s in zip(profile.latency[table].points, profile.latency[table].seconds, strict=True):
            load = load_at(table, point)
            parts = {"linear": load.num_tokens, "head": max(1, load.decode_batch_size)}
            parts |= {"communication": load.num_tokens} if "communication" in profile.latency else {}
            if any(value not in profile.latency[part].points for part, value in parts.items()):
                continue
            measured_s = attention_s + profile.overhead_step_s + profile.overhead_per_seq_s * parts["head"]
            for part, value in parts.items():
                measured = profile.latency[part]
                measured_s += measured.seconds[np.flatnonzero(measured.points[:, 0] == value)[0]]
            off.append(abs(timing.step_s(load) / measured_s - 1))
    assert len(off) > 100
    assert max(off) < (0.09 if profile.shape.num_expert_params else 0.055)
    assert np.median(off) < 0.013


# Median and 95th percentile of |predicted - measured| / step time, with a margin of a fifth over what was found.
LEAVE_ONE_OUT = {
    (KERNELS, "linear"): (0.049, 0.243),
    (KERNELS, "prefill_attention"): (0.0035, 0.026),
    (KERNELS, "decode_attention"): (0.0085, 0.064),
    (KERNELS, "communication"): (0.004, 0.089),
    (KERNELS, "head"): (0.003, 0.008),
    (STEPS, "decode"): (0.018, 0.18),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_point_left_out_is_found_again_by_its_neighbours(name):
    """The roofline with an interpolated correction predicts inside the measured hull."""
    profile, timing = profile_of(name), model_of(name)
    for table, measured in profile.latency.items():
        if (profile.tables, table) not in LEAVE_ONE_OUT:
            continue
        pass_s = np.array([timing.step_s(load_at(table, point)) for point in measured.points])
        off = np.abs(left_out(measured, getattr(profile.roofline, f"{table}_s")) - measured.seconds) / pass_s
        off = off[~np.isnan(off)]
        median, p95 = LEAVE_ONE_OUT[profile.tables, table]
        assert len(off) >= 10
        assert np.median(off) < median, table
        assert profile.expected_error[table] == pytest.approx(np.median(off), abs=0.00006), table
        assert np.quantile(off, 0.95) < p95, table


@pytest.mark.parametrize("name", SAMPLE)
def test_a_point_left_out_is_what_a_table_without_it_says(name):
    """One inverse of all points holds the predictions of each from the others."""
    profile = profile_of(name)
    for measured in profile.latency.values():
        values = np.log(measured.seconds)
        found = measured.left_out(values)
        for i in range(0, len(values), 7):
            others = measured.without(i)
            if others.covers(*measured.points[i]):
                alone = others.interpolate(np.log(others.seconds), *measured.points[i][:, np.newaxis])[0]
                assert found[i] == pytest.approx(alone, abs=0.01)  # the level is the median of all, or of all but one


@pytest.mark.parametrize("name", NAMES)
def test_a_profile_says_where_it_was_measured(name):
    profile, timing = profile_of(name), model_of(name)
    decode_table = "decode_attention" if profile.tables == KERNELS else "decode"
    for point in profile.latency[decode_table].points:
        assert timing.is_measured_at(load_at(decode_table, point))
    assert not timing.is_measured_at(decode(4096, 1000))
    assert not timing.is_measured_at(decode(1, 1_000_000))
    assert timing.is_measured_at(prefill(1000))
    assert not timing.is_measured_at(prefill(100_000))
    assert timing.is_measured_at(prefill(500, 2000)) == (profile.tables == KERNELS)


@pytest.mark.parametrize("name", [name for name in list_profiles() if load_profile(name).tables == KERNELS])
@pytest.mark.parametrize("context_tokens", [2, 7, 15])
def test_a_short_hello_is_no_reason_for_a_warning(name, context_tokens):
    """Kernel tables begin at 16 tokens of context; a shorter one costs the same launch, and counts as measured."""
    timing = TimingModel(load_profile(name))
    load, smallest = StepLoad((), 1, context_tokens), StepLoad((), 1, 16)
    assert timing.is_measured_at(load)
    assert timing.step_s(load) == pytest.approx(timing.step_s(smallest), rel=0.01)


def test_a_table_covers_the_hull_of_its_points_and_no_more():
    """Large batches were measured over short contexts only: a triangle, not a square."""
    table = load_profile("h100-sxm/llama-3.1-8b/vllm-tp1-bf16").latency["decode_attention"]
    assert table.covers(3, 30_000)
    assert table.covers(700, 200)
    assert not table.covers(700, 30_000)
    assert not table.covers(0, 100)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), st.floats(0.1, 10)), min_size=1, max_size=30))
def test_dips_are_taken_out_and_the_rest_is_met(rows):
    places = {(x, y): value for x, y, value in rows}
    points, values = np.array(list(places), dtype=float), np.array(list(places.values()))
    ordered = in_order(points, values)
    for i, point in enumerate(points):
        after = (points >= point).all(axis=1)
        assert (ordered[after] >= ordered[i] * (1 - 1e-12)).all()
        if (values[after] >= values[i]).all() and (values[(points <= point).all(axis=1)] <= values[i]).all():
            assert ordered[i] == values[i]
    measured = np.full((9, 9), np.nan)
    measured[points[:, 0].astype(int) - 1, points[:, 1].astype(int) - 1] = ordered
    noise = np.random.default_rng(0).lognormal(size=(9, 9))
    grid = between_points(noise, measured)
    assert (np.diff(grid, axis=0) >= -1e-12).all()
    assert (np.diff(grid, axis=1) >= -1e-12).all()
    assert grid[~np.isnan(measured)] == pytest.approx(measured[~np.isnan(measured)], rel=1e-12)


def test_values_in_order_are_left_alone():
    values = np.add.outer(np.arange(4.0), np.arange(5.0))
    assert (without_dips(values) == values).all()


@pytest.mark.parametrize("cv", [0.01, 0.029, 0.2])
def test_jitter_keeps_the_mean_and_has_the_spread_asked_for(cv):
    jitter = StepJitter(cv, seed=7)
    factors = np.array([jitter.draw() for _ in range(40_000)])
    assert factors.mean() == pytest.approx(1.0, abs=4 * cv / 200)
    assert factors.std() == pytest.approx(cv, rel=0.02)
    assert factors.min() > 0


@given(st.lists(st.tuples(st.integers(1, 1500), st.integers(0, 1500), st.booleans()), max_size=8))
def test_factors_of_jitter_that_were_only_looked_at_stay_the_next_ones(moves):
    jitter, plain = StepJitter(0.03, 1), StepJitter(0.03, 1)
    for num_shown, num_used, is_drawn in moves:
        shown = jitter.peek(num_shown).tolist()
        num_used = min(num_used, num_shown)
        jitter.skip(num_used)
        assert shown[:num_used] == [plain.draw() for _ in range(num_used)]
        if is_drawn:
            assert jitter.draw() == plain.draw()


def test_jitter_repeats_with_its_seed_and_is_off_at_zero():
    first, second, other = StepJitter(0.03, 1), StepJitter(0.03, 1), StepJitter(0.03, 2)
    drawn = [first.draw() for _ in range(3000)]
    assert drawn == [second.draw() for _ in range(3000)]
    assert drawn != [other.draw() for _ in range(3000)]
    assert [StepJitter(0.0, 1).draw() for _ in range(10)] == [1.0] * 10
