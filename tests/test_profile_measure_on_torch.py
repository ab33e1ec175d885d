"""Measuring with torch, on the CPU: the right arithmetic is timed, in the right order, and a profile comes of it."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="measuring runs its passes with torch")

from rich.console import Console  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from mock_engine.cli import main, parse  # noqa: E402
from mock_engine.errors import ConfigError  # noqa: E402
from mock_engine.profile import load_profile  # noqa: E402
from mock_engine.profile_measure import gpus, timers  # noqa: E402
from mock_engine.profile_measure.attention_backend import AttentionBackend  # noqa: E402
from mock_engine.profile_measure.command import measure_command  # noqa: E402
from mock_engine.profile_measure.elementwise import Elementwise  # noqa: E402
from mock_engine.profile_measure.grid import NUM_LEVELS  # noqa: E402
from mock_engine.profile_measure.measured_models import read_measured  # noqa: E402
from mock_engine.profile_measure.settings import MeasureSettings  # noqa: E402
from mock_engine.profile_measure.transformer import RandomTransformer, causal_mask  # noqa: E402
from mock_engine.step import PrefillChunk, StepLoad  # noqa: E402
from tests.test_cli import complain  # noqa: E402

torch.set_num_threads(1)  # more would wait for each other, in a process that shares its cores
KV_TOKENS = 256
TINY = {
    "model_type": "qwen3",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 97,
    "max_position_embeddings": 128,
    "attention_bias": True,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def config(folder):
    return read_measured(folder)


@pytest.fixture(scope="module")
def model(config):
    return RandomTransformer(config, KV_TOKENS, "bf16", "cpu")


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_model_has_as_many_weights_as_its_config_counts(tmp_path, is_tied):
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"tie_word_embeddings": is_tied}), encoding="utf-8")
    config = read_measured(tmp_path)
    model = RandomTransformer(config, KV_TOKENS, "bf16", "cpu")
    weights = [model._embedding, model._head, model._final_norm]
    for layer in model._layers:
        weights += [getattr(layer, name) for name in layer.__dataclass_fields__ if name != "kv"]
    sizes = {weight.data_ptr(): weight.numel() for weight in weights}
    assert sum(sizes.values()) == config.shape.num_params


def plain_attention(queries, keys, values, seen):
    """Queries (n, heads, size), keys and values (m, KV heads, size); `seen` (n, m) says which keys each may see."""
    group = queries.shape[1] // keys.shape[1]
    keys, values = keys.float().repeat_interleave(group, 1), values.float().repeat_interleave(group, 1)
    scores = torch.einsum("nhd,mhd->hnm", queries.float(), keys) / queries.shape[2] ** 0.5
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("hnm,mhd->nhd", weights, values).flatten(1)


@given(new=st.integers(1, 40), past=st.integers(0, 60), start=st.integers(0, 20))
@settings(max_examples=40)
def test_prefill_attention_sees_all_that_is_past_and_what_is_new_up_to_itself(model, new, past, start):
    layer, queries = model._layers[1], model._queries(new)
    keys, values = layer.kv[start : start + past + new].unbind(1)
    seen = torch.arange(past + new) <= torch.arange(new)[:, None] + past
    attended = model._attend_chunk(layer, queries, start, past, causal_mask(new, past))
    torch.testing.assert_close(attended.float(), plain_attention(queries, keys, values, seen), atol=0.03, rtol=0.03)


@given(batch=st.integers(1, 6), context=st.integers(1, 30), start=st.integers(0, 20))
@settings(max_examples=40)
def test_decode_attention_sees_its_own_sequence_and_no_other(model, batch, context, start):
    layer, queries = model._layers[2], model._queries(batch)
    keys, values = layer.kv[start : start + batch * context].unbind(1)
    of_token = torch.arange(batch * context) // context
    attended = model._attend_decode(layer, queries, start, context)
    expected = plain_attention(queries, keys, values, of_token == torch.arange(batch)[:, None])
    torch.testing.assert_close(attended.float(), expected, atol=0.03, rtol=0.03)


@pytest.mark.parametrize(
    "load",
    [
        StepLoad((PrefillChunk(7, 0),), 0, 0),
        StepLoad((PrefillChunk(7, 5), PrefillChunk(1, 9)), 0, 0),
        StepLoad((), 6, 6 * 11),
        StepLoad((PrefillChunk(9, 3),), 4, 4 * 8),
    ],
)
def test_a_whole_pass_gives_each_sequence_a_token_and_writes_the_kv_cache_of_its_new_ones_alone(model, config, load):
    for layer in model._layers:
        layer.kv.normal_()  # what another test has left may be just what is written now
    before = [layer.kv.clone() for layer in model._layers]
    tokens = model.step(load)()
    assert tokens.shape == (len(load.prefill_chunks) + load.decode_batch_size,)
    assert (tokens >= 0).all()
    assert (tokens < config.shape.vocab_size).all()
    for layer, old in zip(model._layers, before, strict=True):
        assert int((layer.kv != old).flatten(1).any(1).sum()) == load.num_tokens


def test_a_pass_chooses_the_same_tokens_however_its_prompt_is_cut_and_whoever_else_is_in_it(model, monkeypatch):
    """Random weights, so by chance one in 97 is the same; rounding may turn a close choice now and then."""

    def choose(token_ids, *chunks, decode=0):
        load = StepLoad(tuple(PrefillChunk(*chunk) for chunk in chunks), int(decode > 0), decode)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "randint", lambda _high, size, **_: token_ids[: size[0]])
            return model.step(load)().tolist()

    agreeing = []
    for seed in range(10):
        ids = torch.randint(97, (40,), generator=torch.Generator().manual_seed(seed))
        whole, other = choose(ids[:12], (12, 0)), choose(ids[12:30], (18, 0))
        agreeing.append(choose(ids[:30], (12, 0), (18, 0)) == whole + other)
        choose(ids[:5], (5, 0))
        agreeing.append(choose(ids[5:12], (7, 5)) == whole)
        choose(ids[:11], (11, 0))
        agreeing.append(choose(ids[11:12], decode=12) == whole)
    assert sum(agreeing) >= 24, agreeing


def test_parts_run_as_many_layers_as_asked_for_each_with_its_own_weights_and_cache(model):
    addresses = {layer.qkv.data_ptr() for layer in model._layers} | {layer.kv.data_ptr() for layer in model._layers}
    assert len(addresses) == 6
    for num_layers in (1, 3):
        before = [layer.kv.clone() for layer in model._layers]
        stream, delta = model.linear(5, num_layers)()
        assert torch.isfinite(stream + delta).all()
        changed = [bool((layer.kv != old).any()) for layer, old in zip(model._layers, before, strict=True)]
        assert changed == [True] * num_layers + [False] * (3 - num_layers)
        assert len(model.prefill_attention(4, 3, num_layers)()) == num_layers
        assert len(model.decode_attention(4, 3, num_layers)()) == num_layers
    assert model.head(5)().shape == (5,)


@pytest.mark.parametrize(
    "load",
    [
        StepLoad((PrefillChunk(20, 0),), 0, 0),
        StepLoad((PrefillChunk(20, 30),), 0, 0),
        StepLoad((), 6, 6 * 11),
        StepLoad((PrefillChunk(9, 3), PrefillChunk(17, 0)), 4, 4 * 8),
    ],
)
def test_a_whole_pass_does_the_arithmetic_of_its_parts_no_more_and_no_less(model, config, load):
    """Operations of matrix products and attention, as torch counts them."""

    def count(*works):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # the one whose products it sees
            for work in works:
                work()
        return counter.get_total_flops()

    num_layers, batch_size = config.shape.num_layers, load.decode_batch_size
    parts = [model.linear(load.num_tokens, num_layers), model.head(len(load.prefill_chunks) + batch_size)]
    attention = [model.prefill_attention(*chunk, num_layers) for chunk in load.prefill_chunks]
    if batch_size:
        attention.append(model.decode_attention(batch_size, load.context_tokens // batch_size, num_layers))
    assert count(*attention) > 0
    assert count(model.step(load)) == count(*parts, *attention)
    layer_params = config.shape.num_layer_params - config.shape.hidden_size  # norms multiply no matrices
    norms_and_biases = num_layers * (2 * 32 + 2 * 16 + 8 * 16)
    assert count(parts[0]) == 2 * load.num_tokens * (layer_params - norms_and_biases)


def test_element_wise_kernels_are_those_of_the_model(config):
    kernels = Elementwise(config, is_compiled=False)
    x, delta, weight = torch.randn(5, 32), torch.randn(5, 32), torch.rand(32)
    total, normed = kernels.add_norm(x, delta, weight)
    torch.testing.assert_close(total, x + delta)
    torch.testing.assert_close(normed, torch.nn.functional.rms_norm(x + delta, (32,), weight, 1e-6))
    gate, up = torch.randn(5, 48), torch.randn(5, 48)
    torch.testing.assert_close(kernels.gate(torch.cat([gate, up], 1)), torch.nn.functional.silu(gate) * up)
    qkv, angles = torch.randn(5, 8 * 16), torch.randn(5, 1, 8)
    queries, kv = kernels.rotate(qkv, angles.cos(), angles.sin(), None)
    heads = torch.view_as_complex(torch.stack(qkv.view(5, 8, 16).chunk(2, -1), -1)) * torch.polar(
        torch.ones(5, 1, 8), angles
    )
    rotated = torch.cat([heads.real, heads.imag], -1)
    torch.testing.assert_close(queries, rotated[:, :4])
    torch.testing.assert_close(kv[:, 0], rotated[:, 4:6])
    torch.testing.assert_close(kv[:, 1], qkv.view(5, 8, 16)[:, 6:])


def test_where_nothing_can_be_compiled_the_profile_says_so_and_measuring_goes_on(config, monkeypatch):
    def refuse(_function):
        def fail(*_arguments):
            raise ValueError("no compiler")

        return fail

    monkeypatch.setattr(torch, "compile", refuse)
    kernels = Elementwise(config, is_compiled=True)
    assert kernels.how == "fused by torch.compile"
    kernels.settle(lambda: kernels.gate(torch.ones(2, 4)))
    assert kernels.how == "not fused (torch.compile failed: ValueError)"
    assert kernels.gate(torch.ones(2, 4)).shape == (2, 2)


@pytest.mark.parametrize("num_failing", [0, 1, 2, 3])
def test_the_first_attention_kernel_that_works_is_used_and_no_other(num_failing):
    chosen, tried = AttentionBackend(), []
    assert chosen.how == "torch's own choice of attention"

    def attempt():
        with chosen.only():
            cuda = torch.backends.cuda
            enabled = (cuda.flash_sdp_enabled(), cuda.cudnn_sdp_enabled(), cuda.mem_efficient_sdp_enabled())
            tried.append((*enabled, cuda.math_sdp_enabled()))
        if len(tried) <= num_failing:
            raise RuntimeError("No available kernel")

    chosen.choose(attempt)
    names = ("flash attention", "cuDNN attention", "memory-efficient attention", "plain attention")
    assert chosen.how.startswith(f"torch's {names[num_failing]}")
    assert tried == [tuple(i == j for j in range(4)) for i in range(num_failing + 1)]


def test_a_model_tries_its_own_attention(config):
    """The way it goes on a GPU, where the choice is ours."""
    model = RandomTransformer(config, KV_TOKENS, "bf16", "cpu")
    model.attention_backend.choose(model.try_attention)
    assert model.attention_backend.how == "torch's flash attention"  # the CPU has one, too


@pytest.mark.parametrize(("took_s", "wanted", "expected"), [(1e-3, 20, 20), (0.125, 20, 8), (9.0, 20, 5), (9.0, 3, 3)])
def test_slow_work_is_repeated_less_often(took_s, wanted, expected):
    """Both timers: after two runs to warm up, one for the first figure, then as many as there is time for."""
    now_s, runs = [0.0], []

    def work():
        runs.append(now_s[0])
        now_s[0] += took_s

    assert timers.CpuTimer(1024, clock=lambda: now_s[0]).time(work, wanted) == pytest.approx([took_s] * expected)
    assert len(runs) == expected + 2


class FakeCuda:
    """What `GpuTimer` uses of torch, written down in `done`."""

    def __init__(self, replay_ms):
        self.done = []
        note, done = (lambda word: lambda *_a, **_k: self.done.append(word)), self.done

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            record, synchronize = note("record"), note("synchronize")

            def elapsed_time(self, _end):
                return replay_ms

        self.empty = lambda *_size, **_kwargs: SimpleNamespace(zero_=note("flush"))
        stream = SimpleNamespace(wait_stream=note("wait"))
        self.cuda = SimpleNamespace(
            Event=Event,
            Stream=lambda: stream,
            current_stream=lambda: stream,
            stream=lambda _stream: contextlib.nullcontext(),
            synchronize=note("all done"),
            CUDAGraph=lambda: SimpleNamespace(replay=note("replay"), reset=note("reset")),
            graph=lambda _graph: contextlib.nullcontext(done.append("capture")),
        )
        self.int8 = None


def test_a_gpu_is_warmed_up_captured_once_and_each_replay_finds_an_empty_cache(monkeypatch):
    fake = FakeCuda(replay_ms=2.0)
    monkeypatch.setattr(timers, "torch", fake)
    seconds = timers.GpuTimer(1024).time(lambda: fake.done.append("work"), 4)
    assert seconds == [2e-3] * 4
    replay = [*["flush"] * 5, "record", "replay", "record", "synchronize"]
    warm_up = ["wait", "work", "work", "wait", "all done", "capture", "work"]
    assert fake.done == [*warm_up, *replay * 5, "reset"]  # the first replay is not counted


def fake_gpu(monkeypatch, name, answer):
    """A GPU of that name, and a driver that answers so (None: there is no nvidia-smi)."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _i: SimpleNamespace(uuid="12-ab", L2_cache_size=50 << 20)
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _i: name)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _i: (140 * 10**9, 150 * 10**9))
    monkeypatch.setattr("shutil.which", lambda _name: None if answer is None else "nvidia-smi")
    asked = []

    def ask(argv, **_kwargs):
        asked.append(argv)
        if isinstance(answer, Exception):
            raise answer
        return SimpleNamespace(stdout=answer)

    monkeypatch.setattr(subprocess, "run", ask)
    return asked


def test_a_known_gpu_has_its_data_sheet_and_its_own_memory(monkeypatch):
    asked = fake_gpu(monkeypatch, "NVIDIA H200", "570.1, 1755 MHz, 1980 MHz, 700.00 W\n")
    device = gpus.find_device(MeasureSettings(model=Path("x"), out=Path("y")))
    assert (device.gpu, device.product, device.memory_kind) == ("h200-sxm", "NVIDIA H200", "GPU memory")
    assert device.datasheet.memory_bytes_per_s == 4.8e12
    assert device.datasheet.memory_bytes == 150e9
    assert device.free_bytes == 140 * 10**9
    assert device.software.endswith("driver 570.1")
    assert "--id=GPU-12-ab" in asked[0]
    assert (
        gpus.with_clock_now(device).clock == "SM 1755 MHz right after measuring, at most 1980 MHz, power limit 700.00 W"
    )


@pytest.mark.parametrize("answer", [None, "", "570.1", subprocess.TimeoutExpired("nvidia-smi", 20)])
def test_a_driver_that_says_nothing_is_no_obstacle(monkeypatch, answer):
    fake_gpu(monkeypatch, "Foo 1", answer)
    given_ = MeasureSettings(model=Path("x"), out=Path("y"), gpu_tflops=100, gpu_memory_bandwidth=2000)
    device = gpus.find_device(given_)
    assert device.gpu == "foo-1"
    assert device.datasheet.flops_per_s == 1e14
    assert device.datasheet.memory_bytes_per_s == 2e12
    assert device.clock == "not readable"
    with pytest.raises(ConfigError, match="no data sheet is known for 'Foo 1'"):
        gpus.find_device(MeasureSettings(model=Path("x"), out=Path("y")))


def test_no_gpu_means_that_nothing_can_be_measured(capsys, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = complain(capsys, "profiles", "measure", "--model", str(folder), "--out", str(tmp_path / "out"))
    assert "no GPU was found" in line
    assert "Use a shipped profile" in line
    assert "its times say nothing of a GPU" in line
    assert not (tmp_path / "out").exists()


ON_CPU = ["--device", "cpu", "--max-num-seqs", "4", "--max-num-batched-tokens", "64", "--max-model-len", "64"]


def test_memory_that_runs_out_is_one_line(capsys, folder, tmp_path, monkeypatch):
    def run_out(*_arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("mock_engine.profile_measure.transformer.RandomTransformer.step", run_out)
    status = main(["profiles", "measure", "--model", str(folder), "--out", str(tmp_path / "out"), *ON_CPU])
    captured = capsys.readouterr()
    assert status == 2
    assert "ran out of memory, though" in captured.err
    assert captured.err.count("\n") == 1


class SteadyTimer:
    """Runs each piece of work once; all take as long."""

    def time(self, work, repeats):
        work()
        return [1e-3] * repeats


def test_on_a_terminal_a_bar_shows_how_far_it_is_and_goes_away(folder, tmp_path):
    screen = io.StringIO()
    argv = ["profiles", "measure", "--model", str(folder), "--out", str(tmp_path / "p"), *ON_CPU, "--repeats", "3"]
    console = Console(file=screen, force_terminal=True, width=150)
    assert measure_command(parse(argv), console, make_timer=lambda _device: SteadyTimer()) == 0
    assert f"grid {NUM_LEVELS} of {NUM_LEVELS}" in screen.getvalue()
    profile = load_profile(tmp_path / "p")
    assert profile.jitter_cv == 0
    assert set(profile.latency["head"].seconds) == {1e-3}
    assert profile.overhead_step_s == 0  # all that takes as long as each of its parts is missing nothing


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_the_command_measures_a_tiny_model_and_the_simulator_runs_on_it(capsys, folder, tmp_path, dtype):
    out, results = tmp_path / "profile", tmp_path / "results.json"
    argv = ["profiles", "measure", "--model", str(folder), "--out", str(out), "--json", str(results), "--dtype", dtype]
    assert main([*argv, *ON_CPU, "--repeats", "3", "--max-minutes", "1e-6"]) == 0
    printed = capsys.readouterr().out
    assert "tiny in " + dtype in printed
    assert "The sum of parts differs from" in printed
    assert f"mock-engine simulate --profile {out}" in printed
    assert main(["profiles", "check", str(out)]) == 0
    profile = load_profile(out)
    assert profile.name == f"cpu/tiny/torch-tp1-{dtype}"
    assert profile.is_measured
    assert "says nothing of any GPU" in profile.how_measured
    found = json.loads(results.read_text(encoding="utf-8"))
    assert all(len(point["repeats_s"]) == 3 for point in found["points"])
    assert "| decode 4 x " in (out / "report.md").read_text(encoding="utf-8")
    assert str(tmp_path) not in "".join(file.read_text(encoding="utf-8") for file in out.iterdir())
    assert main(["simulate", "--profile", str(out), "--isl", "20", "--osl", "10", "--request-count", "5"]) == 0
