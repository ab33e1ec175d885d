"""Measuring a GPU, without one and without torch: grids, memory, medians, the overhead fitted, and every mistake."""

from __future__ import annotations

import itertools
import json
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mock_engine.cli import main
from mock_engine.errors import ConfigError
from mock_engine.gpu_datasheets import DATASHEETS, NAMES_IN_CUDA
from mock_engine.profile import WEIGHT_BYTES, check_profile, load_profile
from mock_engine.profile_measure.gpus import Device, known_datasheet
from mock_engine.profile_measure.grid import NUM_LEVELS, PART_NAMES, Point, axis, levels, points_at
from mock_engine.profile_measure.measured_models import read_measured
from mock_engine.profile_measure.measuring import Plan, interleaved, layers_in_run, measure
from mock_engine.profile_measure.memory import USABLE_SHARE, Limits, plan_memory
from mock_engine.profile_measure.overhead import Comparison, fit_overhead
from mock_engine.profile_measure.profile_document import NO_OVERHEAD, compare, jitter_of, make_tables, measured_document
from mock_engine.profile_measure.report import load_text, report_markdown
from mock_engine.profile_measure.settings import MeasureSettings
from mock_engine.profile_writing import write_folder
from mock_engine.roofline import Roofline
from mock_engine.step import PrefillChunk, StepLoad
from mock_engine.timing import TimingModel
from tests.test_cli import complain

LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
    "max_position_embeddings": 131_072,
    "rope_theta": 500_000.0,
    "rms_norm_eps": 1e-5,
}
H200 = Device(
    "cuda", "h200-sxm", "NVIDIA H200", DATASHEETS["h200-sxm", "bf16"], 140 * 10**9, 50 << 20, "torch 9.9", "1,980 MHz"
)
LIMITS = st.builds(
    lambda longest, seqs, more: Limits(longest, seqs, seqs + more),
    st.integers(2, 20_000),
    st.integers(2, 600),
    st.integers(0, 9_000),
)


def write_config(folder: Path, **changes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLAMA_8B | changes), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return read_measured(write_config(tmp_path_factory.mktemp("models") / "Llama-3.1-8B"))


class FakeModel:
    """Pieces of work that know how long they take: parts in proportion to the layers that are run."""

    def __init__(self, config, step_s=50e-6, per_seq_s=1e-6):
        self._num_layers = config.shape.num_layers
        self._step_s, self._per_seq_s = step_s, per_seq_s

    def seconds(self, table, *at):
        """Of all layers; grows with each argument."""
        slope = {"linear": 3e-6, "head": 1e-6, "prefill_attention": 2e-7, "decode_attention": 3e-8}[table]
        return 1e-4 + slope * at[0] * (1 + (at[1] if len(at) > 1 else 0) / 64)

    def _layers(self, table, *at, num_layers):
        assert 1 <= num_layers <= self._num_layers
        return Timed(self.seconds(table, *at) * num_layers / self._num_layers)

    def linear(self, tokens, num_layers):
        return self._layers("linear", tokens, num_layers=num_layers)

    def head(self, sequences):
        return Timed(self.seconds("head", sequences))

    def prefill_attention(self, new_tokens, past_tokens, num_layers):
        return self._layers("prefill_attention", new_tokens, past_tokens, num_layers=num_layers)

    def decode_attention(self, batch_size, context_tokens, num_layers):
        return self._layers("decode_attention", batch_size, context_tokens, num_layers=num_layers)

    def step(self, load):
        sequences = len(load.prefill_chunks) + load.decode_batch_size
        seconds = self._step_s + self._per_seq_s * sequences
        seconds += self.seconds("linear", load.num_tokens) + self.seconds("head", sequences)
        seconds += sum(self.seconds("prefill_attention", *chunk) for chunk in load.prefill_chunks)
        if load.decode_batch_size:
            context_tokens = load.context_tokens // load.decode_batch_size
            seconds += self.seconds("decode_attention", load.decode_batch_size, context_tokens)
            seconds -= 1e-4 if load.prefill_chunks else 0.0  # one launch for both
        return Timed(seconds)


@dataclass(frozen=True)
class Timed:
    seconds: float

    def __call__(self):
        raise AssertionError("a timer that reads seconds off has no need to run it")


class FakeTimer:
    """One repeat in three is slow, one fast; the median is what the work says. `clock` moves by what was timed."""

    def __init__(self):
        self.now_s = 0.0

    def clock(self):
        return self.now_s

    def time(self, work, repeats):
        found = [work.seconds * factor for factor in (1.0, 3.0, 0.9)] * (repeats // 3)
        self.now_s += sum(found)
        return found


def make_plan(config, limits, kv_tokens, max_s=1e9):
    return Plan(limits, kv_tokens, Roofline(config.shape, H200.datasheet, 1, 2, "bf16"), 3, max_s)


def measure_fake(config, limits, kv_tokens, max_s=1e9, **overhead):
    timer, seen = FakeTimer(), []
    plan = make_plan(config, limits, kv_tokens, max_s)
    on_point = lambda *where: seen.append(where)  # noqa: E731
    return plan, measure(FakeModel(config, **overhead), timer, plan, on_point, timer.clock), seen


# Grids


@given(limits=LIMITS, room=st.integers(0, 10**6))
@settings(max_examples=200)
def test_a_grid_is_sorted_unique_and_within_memory_and_each_level_adds_to_the_one_before(limits, room):
    kv_tokens = max(limits.max_model_len, limits.max_num_batched_tokens, limits.max_num_seqs) + room
    found = [points_at(limits, kv_tokens, level) for level in range(NUM_LEVELS)]
    for points in found:
        assert len(set(points)) == len(points)
        for table in PART_NAMES:
            at = [point.at for point in points if point.table == table]
            assert at == sorted(at)
            assert len(at) >= 2  # what a table needs
        for point in points:
            if point.table == "linear":
                assert 1 <= point.at[0] <= limits.max_num_batched_tokens
            elif point.table == "head":
                assert 1 <= point.at[0] <= limits.max_num_seqs
            elif point.table == "prefill_attention":
                assert point.at[0] >= 1
                assert sum(point.at) <= limits.max_model_len
            elif point.table == "decode_attention":
                assert 1 <= point.at[1] <= limits.max_model_len
                assert point.at[0] * point.at[1] <= kv_tokens
    for coarse, fine in itertools.pairwise(found):
        assert set(coarse) <= set(fine)
    assert sorted(map(repr, found[-1])) == sorted(repr(point) for level in levels(limits, kv_tokens) for point in level)


@given(limits=LIMITS, room=st.integers(0, 10**6))
@settings(max_examples=200)
def test_whole_passes_fit_into_the_kv_cache_and_the_token_budget(limits, room):
    kv_tokens = max(limits.max_model_len, limits.max_num_batched_tokens, limits.max_num_seqs) + room
    loads = [point.load for level in levels(limits, kv_tokens) for point in level if point.load is not None]
    for load in loads:
        assert sum(map(sum, load.prefill_chunks)) + load.context_tokens <= kv_tokens
        assert 1 <= load.num_tokens <= limits.max_num_batched_tokens
        assert load.decode_batch_size <= limits.max_num_seqs
        assert load.context_tokens >= load.decode_batch_size
        assert all(sum(chunk) <= limits.max_model_len for chunk in load.prefill_chunks)
    assert any(load.decode_batch_size for load in loads)
    assert any(load.prefill_chunks for load in loads)


@given(first=st.integers(1, 300), more=st.integers(0, 10**5), level=st.integers(0, NUM_LEVELS - 1))
def test_an_axis_has_both_ends_and_no_gap_larger_than_its_level_s(first, more, level):
    values = axis(first, first + more, level)
    assert values[0] == first
    assert values[-1] == first + more
    assert values == sorted(set(values))
    assert all(b / a <= (4, 2, 2)[level] for a, b in itertools.pairwise(values))


def test_where_time_ends_all_tables_are_refined_about_as_far():
    points = [Point("linear", (n,)) for n in range(30)] + [Point("head", (n,)) for n in range(3)]
    mixed = interleaved(points)
    assert sorted(mixed) == sorted(points)
    assert [mixed.index(Point("head", (n,))) // 10 for n in range(3)] == [0, 1, 2]


# Measuring


@given(limits=LIMITS, room=st.integers(0, 10**5))
@settings(max_examples=20)
def test_a_part_is_the_median_of_its_repeats_for_all_layers_however_many_were_run(llama, limits, room):
    kv_tokens = max(limits.max_model_len, limits.max_num_batched_tokens, limits.max_num_seqs) + room
    _, measured, _ = measure_fake(llama, limits, kv_tokens)
    for found in measured:
        if found.point.load is None:
            assert found.seconds == pytest.approx(FakeModel(llama).seconds(found.point.table, *found.point.at))
        assert found.cv == pytest.approx(statistics.stdev([1, 3, 0.9]) / statistics.mean([1, 3, 0.9]))
    assert any(found.num_layers < llama.shape.num_layers for found in measured) or limits.max_num_batched_tokens < 2048


@given(whole_s=st.floats(1e-9, 10), num_layers=st.integers(1, 200))
def test_a_run_has_four_layers_at_least_and_no_more_than_the_model(whole_s, num_layers):
    layers = layers_in_run(whole_s, num_layers)
    assert min(4, num_layers) <= layers <= num_layers
    assert layers_in_run(2 * whole_s, num_layers) <= layers


def test_the_coarsest_grid_is_finished_whatever_the_time_and_finer_ones_while_it_lasts(llama):
    limits, kv_tokens = Limits(4096, 64, 2048), 50_000
    coarse, *finer = levels(limits, kv_tokens)
    _, measured, seen = measure_fake(llama, limits, kv_tokens, max_s=1e-9)
    assert {found.point for found in measured} == set(coarse)
    assert seen[-1] == (0, len(coarse), len(coarse))
    _, everything, seen = measure_fake(llama, limits, kv_tokens)
    assert len(everything) == len(coarse) + sum(map(len, finer))
    assert [where[0] for where in seen] == sorted(where[0] for where in seen)
    total_s = sum(sum(found.repeats_s) for found in everything)
    _, some, _ = measure_fake(llama, limits, kv_tokens, max_s=total_s / 2)
    assert some == everything[: len(some)]
    assert len(coarse) < len(some) < len(everything)
    assert sum(sum(found.repeats_s) for found in some[:-1]) < total_s / 2


# What comes of it


def write_fake(tmp_path, config, limits, kv_tokens, **overhead):
    plan, measured, _ = measure_fake(config, limits, kv_tokens, **overhead)
    settings_ = MeasureSettings(model=Path("x"), out=tmp_path)
    tables = make_tables(measured)
    facts = (settings_, config, H200, plan, ("flash", "fused"), "2026-01-01", jitter_of(measured))
    comparisons = compare(measured_document(*facts, NO_OVERHEAD), tables, measured)
    fit = fit_overhead(comparisons)
    document = measured_document(*facts, fit)
    return write_folder(tmp_path, document, tables), measured, comparisons, fit, document


@given(limits=LIMITS, room=st.integers(0, 10**5))
@settings(max_examples=8)
def test_a_written_profile_is_accepted_and_gives_back_each_measured_point(tmp_path_factory, llama, limits, room):
    folder = tmp_path_factory.mktemp("profile")
    kv_tokens = max(limits.max_model_len, limits.max_num_batched_tokens, limits.max_num_seqs) + room
    _, measured, _, _, _ = write_fake(folder, llama, limits, kv_tokens)
    assert check_profile(folder) == []
    profile = load_profile(folder)
    assert profile.name == "h200-sxm/llama-3.1-8b/torch-tp1-bf16"
    for found in measured:
        if found.point.load is None:
            table = profile.latency[found.point.table]
            row = np.flatnonzero((table.points == found.point.at).all(axis=1))
            assert table.seconds[row] == pytest.approx(found.seconds, rel=1e-5)
    assert sum(len(table.seconds) for table in profile.latency.values()) == sum(
        found.point.load is None for found in measured
    )


def test_the_overhead_of_whole_passes_is_found_and_a_simulated_step_takes_what_was_measured(tmp_path, llama):
    limits = Limits(8192, 64, 2048)
    profile, measured, comparisons, fit, _ = write_fake(tmp_path, llama, limits, 200_000, step_s=4e-4, per_seq_s=2e-6)
    assert fit.step_s == pytest.approx(4e-4, rel=0.02)
    assert fit.per_seq_s == pytest.approx(2e-6, rel=0.05)
    assert fit.mean_after < 0.005 < fit.mean_before
    assert max(fit.errors_before) < 0
    timing = TimingModel(profile)
    for found in measured:
        if found.point.load is not None:
            assert timing.step_s(found.point.load) == pytest.approx(found.seconds, rel=0.02)
    assert len(comparisons) == len([found for found in measured if found.point.load is not None])


@given(
    passes=st.lists(
        st.tuples(st.integers(1, 500), st.floats(1e-4, 1e-1), st.floats(-0.3, 0.3)), min_size=2, max_size=12
    )
)
def test_no_overhead_is_negative_and_it_never_makes_the_fit_worse(passes):
    comparisons = [
        Comparison(StepLoad((), batch, batch), whole_s, whole_s * (1 + error)) for batch, whole_s, error in passes
    ]
    fit = fit_overhead(comparisons)
    assert fit.step_s >= 0
    assert fit.per_seq_s >= 0
    assert np.sum(np.square(fit.errors_after)) <= np.sum(np.square(fit.errors_before)) + 1e-12


def test_the_report_opens_with_the_command_and_shows_every_whole_pass(tmp_path, llama):
    _, measured, comparisons, fit, document = write_fake(tmp_path, llama, Limits(4096, 8, 512), 40_000)
    report = report_markdown(document, measured, comparisons, fit, 3.0)
    assert report.splitlines()[2] == "    mock-engine profiles measure --model llama-3.1-8b --dtype bf16 --out DIR"
    assert "flash over a padded, unpaged KV cache" in report
    for comparison in comparisons:
        assert f"| {load_text(comparison.load)} | {comparison.whole_s * 1e3:.3f} |" in report
    assert "an engine's own is not in it" in report


def test_a_pass_in_words():
    assert load_text(StepLoad((PrefillChunk(512, 1024),), 3, 300)) == "prefill 512 after 1,024, decode 3 x 100"


# Models


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mixtral"}, "model_type is 'mixtral'; measured are dense decoders"),
        ({"num_local_experts": 8, "num_experts_per_tok": 2}, "model_type is 'llama' with experts; measured are dense"),
        ({"quantization_config": {"bits": 4}}, "quantization_config says the model is quantized"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only silu is measured"),
        ({"sliding_window": 4096}, "with --max-model-len 4096 or less"),
        ({"hidden_size": 0}, "hidden_size is 0; allowed is"),
        ({"head_dim": 63}, "head_dim is 63; rotary positions need an even one"),
    ],
)
def test_a_model_that_is_not_measured_is_one_line(capsys, tmp_path, changes, message):
    folder = write_config(tmp_path / "model", **changes)
    line = complain(capsys, "profiles", "measure", "--model", str(folder), "--out", str(tmp_path / "out"))
    assert message in line
    assert not (tmp_path / "out").exists()


# Memory and devices


@given(free=st.integers(30 * 10**9, 200 * 10**9), limits=LIMITS)
def test_weights_working_space_and_kv_cache_fit_into_the_usable_share(llama, free, limits):
    plan = plan_memory(llama, limits, free, "GPU memory")
    kv_bytes = plan.kv_tokens * llama.shape.kv_bytes_per_token("bf16")
    assert plan.weights_bytes == llama.shape.num_params * WEIGHT_BYTES["bf16"]
    assert plan.weights_bytes + plan.workspace_bytes + kv_bytes <= free * USABLE_SHARE
    assert plan.kv_tokens >= max(limits.max_model_len, limits.max_num_batched_tokens, limits.max_num_seqs)


def test_a_model_that_does_not_fit_says_what_it_needs_and_what_is_there(llama):
    with pytest.raises(ConfigError) as error:
        plan_memory(llama, Limits(131_072, 256, 2048), 24 * 10**9, "GPU memory")
    line = str(error.value)
    assert "weights 16.06 GB" in line
    assert "KV cache of 131,072 tokens 17.18 GB" in line
    assert "24.00 GB free GPU memory 90% are used, 21.60 GB" in line
    assert "Lower --max-model-len" in line


@pytest.mark.parametrize("product", NAMES_IN_CUDA)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_each_gpu_known_by_name_has_a_data_sheet(product, dtype):
    settings_ = MeasureSettings(model=Path("x"), out=Path("y"), dtype=dtype)
    assert known_datasheet(product, settings_) == DATASHEETS[NAMES_IN_CUDA[product], dtype]


def test_another_gpu_needs_its_figures_from_flags():
    settings_ = MeasureSettings(model=Path("x"), out=Path("y"), gpu_tflops=100.0)
    with pytest.raises(ConfigError, match=r"no data sheet is known for 'Foo 1'.*--gpu-memory-bandwidth \(GB/s\)"):
        known_datasheet("Foo 1", settings_)
    assert known_datasheet("Foo 1", replace(settings_, gpu_memory_bandwidth=1000.0)).nvlink_bytes_per_s > 0


def test_limits_are_vllm_s_for_such_a_gpu_unless_given(llama):
    settings_ = MeasureSettings(model=Path("x"), out=Path("y"))
    assert H200.limits(llama, settings_) == Limits(131_072, 1024, 8192)
    a100 = replace(H200, gpu="a100-sxm")
    assert a100.limits(llama, replace(settings_, max_model_len=4096)) == Limits(4096, 256, 2048)
    assert a100.limits(llama, replace(settings_, max_num_seqs=4096)).max_num_batched_tokens == 4096
    with pytest.raises(ConfigError, match="Raise the first or lower the second"):
        H200.limits(llama, replace(settings_, max_num_seqs=64, max_num_batched_tokens=32))
    with pytest.raises(ConfigError, match=r"has positions for 131072\. Use --max-model-len 131072 or less"):
        H200.limits(llama, replace(settings_, max_model_len=200_000))


# Mistakes on the command line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tp", "2"], "--tp is 2; only --tp 1 is measured: one GPU"),
        (["--repeats", "2"], "--repeats is 2; it must be at least 3"),
        (["--max-num-seqs", "1"], "--max-num-seqs is 1; it must be at least 2"),
        (["--max-model-len", "0"], "--max-model-len is 0; it must be at least 2"),
        (["--max-minutes", "0"], "--max-minutes is 0; it must be above 0"),
        (["--gpu-tflops", "nan"], "--gpu-tflops is nan; it must be above 0"),
        (["--dtype", "fp8"], "argument --dtype: invalid choice: 'fp8'"),
        (["--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
        (["--json", "no/where.json"], "--json no/where.json: there is no folder no"),
        (["--model", "nowhere.json"], "nowhere.json: the file is missing"),
        (["--model", __file__], "cannot be read as JSON"),
    ],
)
def test_a_wrong_flag_is_one_line(capsys, tmp_path, flags, message):
    folder = write_config(tmp_path / "model")
    argv = ["profiles", "measure", "--model", str(folder), "--out", str(tmp_path / "out"), *flags]
    assert message in complain(capsys, *argv)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_in_it_is_left_alone(capsys, tmp_path):
    folder = write_config(tmp_path / "model")
    line = complain(capsys, "profiles", "measure", "--model", str(folder), "--out", str(folder))
    assert "is not an empty folder; name a new one" in line


def test_without_torch_the_line_says_which_extra_to_install(capsys, tmp_path, monkeypatch):
    found = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "torch" else found(name))
    folder = write_config(tmp_path / "model")
    line = complain(capsys, "profiles", "measure", "--model", str(folder), "--out", str(tmp_path / "out"))
    assert "Run: pip install 'mock-engine[torch]'" in line


def test_help_of_measure_comes_without_torch(capsys):
    with pytest.raises(SystemExit):
        main(["profiles", "measure", "--help"])
    assert "--max-minutes" in capsys.readouterr().out
