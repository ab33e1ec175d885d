"""Importers: what ships is what they build, and a wrong source is said in one line."""

from __future__ import annotations

import csv
import importlib.util
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mock_engine.cli import main
from mock_engine.errors import ProfileError
from mock_engine.gpu_datasheets import DATASHEETS
from mock_engine.latency_table import make_table
from mock_engine.model_config import model_of_config
from mock_engine.profile import PROFILES_DIR, Profile, check_profile, list_profiles, load_profile
from mock_engine.profile_import import import_dynamo_sweep, import_kernel_tables, import_splitwise, import_step_rows
from mock_engine.profile_import.catalogue import build, read_catalogue
from mock_engine.profile_import.fit_overhead import Experiment, fit, read_experiments
from mock_engine.profile_import.kernel_tables import REPORTED_MEMORY, KernelTables
from mock_engine.profile_import.known_models import MODELS
from mock_engine.profile_import.outliers import without_outliers
from mock_engine.profile_import.overhead import H100_VLLM
from mock_engine.profile_writing import Origin, Target, make_document
from mock_engine.step import PrefillChunk, StepLoad
from mock_engine.timing import TimingModel

DATA = Path(__file__).parents[2] / "shared" / "data"

needs_kernel_tables = pytest.mark.skipif(
    importlib.util.find_spec("aiconfigurator_core") is None, reason="needs pip install aiconfigurator-core==0.12.0"
)
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs the published figures (see profiles/README.md)")
OWN_MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_attention_heads": 24,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128_256,
    "max_position_embeddings": 131_072,
    "tie_word_embeddings": True,
}
# The wheel's own dependencies warn while they are imported.
third_party_warnings = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


CATALOGUE = read_catalogue(PROFILES_DIR / "catalogue.toml")
# One of each engine on each GPU, and what is special: experts, heads that were not measured, fp8.
REBUILT = [
    "h100-sxm/llama-3.1-8b/vllm-tp1-bf16",
    "h100-sxm/llama-3.1-70b/vllm-tp4-bf16",
    "h100-sxm/mixtral-8x7b/trtllm-tp2-bf16",
    "h100-sxm/llama-3.3-70b/trtllm-tp2-fp8",
    "h100-sxm/qwen3-32b/sglang-tp1-bf16",
    "a100-sxm/llama-3.1-8b/vllm-tp1-bf16",
    "a100-sxm/llama-3.1-70b/vllm-tp4-bf16",
    "a100-sxm/codellama-34b/trtllm-tp2-bf16",
    "a100-sxm/qwen3-14b/sglang-tp1-bf16",
]


def test_the_catalogue_names_what_ships_but_what_was_measured_here_and_nothing_else():
    measured_here = {name for name in list_profiles() if load_profile(name).engine == "torch"}
    assert {entry.name for entry in CATALOGUE} == set(list_profiles()) - measured_here


@needs_kernel_tables
@third_party_warnings
@pytest.mark.parametrize("name", REBUILT)
def test_shipped_kernel_profiles_are_what_the_importer_builds(name, tmp_path):
    entry = next(entry for entry in CATALOGUE if entry.name == name)
    assert entry.importer == "kernels"
    assert build(entry, tmp_path, tmp_path).name == name
    assert_same_files(tmp_path / name, PROFILES_DIR / name)


@needs_data
@pytest.mark.parametrize("entry", [entry for entry in CATALOGUE if entry.importer != "kernels"], ids=lambda e: e.name)
def test_shipped_profiles_of_whole_passes_are_what_the_importer_builds(entry, tmp_path):
    build(entry, DATA, tmp_path)
    assert_same_files(tmp_path / entry.name, PROFILES_DIR / entry.name)


def assert_same_files(built: Path, shipped: Path) -> None:
    assert {path.name: path.read_text() for path in built.iterdir()} == {
        path.name: path.read_text() for path in shipped.iterdir()
    }


@needs_kernel_tables
@needs_data
@third_party_warnings
@pytest.mark.parametrize(
    ("system", "model", "tp"),
    [
        ("h100_sxm", "llama-3.1-8b", 1),
        ("h100_sxm", "llama-3.1-70b", 4),
        ("a100_sxm", "llama-3.1-8b", 1),
        ("a100_sxm", "llama-3.1-70b", 4),
    ],
)
def test_parts_add_up_to_the_whole_pass_of_the_source(system, model, tp):
    """Recorded: the same wheel asked for whole passes, not for parts."""
    kernels = KernelTables(system, MODELS[model], tp, "bf16", "vllm")
    checked = 0
    with (DATA / "aic_static_h100_a100.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            key = (row["system"], row["backend"], row["model"], row["tp"], row["gemm"])
            if key != (system, "vllm", MODELS[model].hub_name, str(tp), "bf16"):
                continue
            batch, isl = int(row["batch"]), int(row["isl"])
            if row["kind"] == "decode":
                parts = kernels.decode_parts(batch, isl)
            elif batch == 1:
                parts = kernels.prefill_parts(isl)
            else:
                continue
            assert sum(parts.values()) == pytest.approx(float(row["ms"]), rel=1e-9)
            checked += 1
    assert checked >= 50


@needs_kernel_tables
@needs_data
@third_party_warnings
def test_the_overhead_in_use_is_the_one_that_fits():
    result = fit(read_experiments(DATA / "vllm_h100_step_cycles.csv.gz"))
    assert result.per_layer_s == pytest.approx(H100_VLLM.per_layer_s, abs=0.25e-6)
    assert result.per_seq_s == pytest.approx(H100_VLLM.per_seq_s, abs=1e-6)
    assert result.mean_after < 0.035 < 0.05 < result.mean_before
    assert np.median(np.abs(np.concatenate(list(result.held_out.values())))) < 0.027
    assert abs(result.per_finished_s) < 2 * result.per_finished_sd_s, "nothing that the model leaves out"
    assert result.jitter_cv == pytest.approx(H100_VLLM.jitter_cv, abs=0.001)


def test_the_fit_finds_what_was_put_in():
    rng = np.random.default_rng(3)
    runs = []
    for num_layers, kernels_s in ((32, 8e-3), (80, 15e-3)):
        num_seqs = rng.integers(1, 20, 3000).astype(float)
        num_finished = rng.integers(0, 2, 3000).astype(float)
        clean_s = kernels_s + num_layers * 10e-6 + 8e-6 * num_seqs + 50e-6 * num_finished
        measured_s = clean_s * rng.normal(1, 0.02, 3000)
        name, kernels = f"{num_layers} layers", np.full(3000, kernels_s)
        runs.append(Experiment(name, num_layers, num_seqs, num_seqs, num_finished, measured_s, kernels))
    result = fit(runs)
    assert result.per_layer_s == pytest.approx(10e-6 + 25e-6 / 56, abs=1.5e-6)  # what ends is spread over all
    assert result.per_seq_s == pytest.approx(8e-6, abs=4e-6)
    assert result.per_finished_s == pytest.approx(50e-6, abs=3 * result.per_finished_sd_s)
    assert result.per_finished_sd_s < 20e-6
    assert result.jitter_cv == pytest.approx(0.025, abs=0.005)
    assert result.mean_after < result.mean_before
    assert all(np.median(np.abs(errors)) < 0.02 for errors in result.held_out.values())


def test_kernel_tables_say_which_package_is_missing(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "aiconfigurator_core", None)
    monkeypatch.setitem(sys.modules, "aiconfigurator_core.sdk", None)
    with pytest.raises(ProfileError, match="pip install aiconfigurator-core"):
        import_kernel_tables("h100_sxm", "llama-3.1-8b", 1, "bf16", "vllm", tmp_path)


@needs_kernel_tables
@third_party_warnings
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("h100_sxm", "gpt-5", 1, "bf16", "vllm"), r"no model 'gpt-5' is known .* known are llama.* or a config\.json"),
        (("h100_sxm", "llama-3.1-8b", 1, "int3", "vllm"), "no kernel tables for dtype 'int3'; there are .* bf16, fp8"),
        (("toaster", "llama-3.1-8b", 1, "bf16", "vllm"), "no tables for toaster; it has tables for .*a100_sxm"),
        (("h100_sxm", "llama-3.1-8b", 1, "bf16", "llama.cpp"), "llama.cpp on h100_sxm; .* vllm, trtllm, sglang"),
        (("h100_sxm", "llama-3.1-8b", 3, "bf16", "vllm"), "tp 3 does not divide 32 attention heads"),
        (("h100_sxm", "llama-3.1-8b", 16, "bf16", "vllm"), "no all-reduce over 16 GPUs .*; there are tables for 1, 2"),
        (("a100_sxm", "llama-3.1-8b", 1, "fp8", "vllm"), "no matrix products in fp8 .*; there are tables for bf16"),
        (("h100_sxm", "mixtral-8x7b", 2, "fp8", "sglang"), "no experts like these"),
        (("h100_sxm", "llama-3.1-70b", 1, "bf16", "vllm"), "needs 142.3 GB on each GPU"),
    ],
)
def test_kernel_tables_say_what_they_do_not_have(arguments, message, tmp_path):
    with pytest.raises(ProfileError, match=message) as caught:
        import_kernel_tables(*arguments, tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@needs_kernel_tables
@third_party_warnings
@pytest.mark.parametrize(
    ("engine", "kv_cache_dtype", "prefill_mode"),
    [
        ("trtllm", "bf16", "bfloat16"),
        ("trtllm", "fp8", "fp8"),
        ("vllm", "bf16", "bfloat16"),
        ("vllm", "fp8", "bfloat16"),
        ("sglang", "bf16", "bfloat16"),
        ("sglang", "fp8", "fp8"),
    ],
)
def test_attention_over_a_kv_cache_is_what_was_measured_over_one_of_its_dtype(engine, kv_cache_dtype, prefill_mode):
    """80 layers, each as the source's own table has it: 64 sequences of 4,096 tokens, 16 heads and 2 KV heads."""
    model = MODELS["llama-3.3-70b"]
    kernels = KernelTables("h100_sxm", model, 4, "fp8", engine, None, kv_cache_dtype)
    assert kernels.prefill_attention_mode == prefill_mode
    (package,) = importlib.util.find_spec("aiconfigurator_core").submodule_search_locations
    folder = Path(package) / "systems/data/h100_sxm/attention" / engine / kernels.engine_version
    rows = importlib.import_module("pandas").read_parquet(folder / "generation_attention_perf.parquet")
    wanted = {"num_heads": 16, "num_key_value_heads": 2, "head_dim": 128, "window_size": 0}
    wanted |= {"batch_size": 64, "step": 4095, "kv_cache_dtype": {"bf16": "bfloat16", "fp8": "fp8"}[kv_cache_dtype]}
    (latency_ms,) = rows[(rows[list(wanted)] == list(wanted.values())).all(axis=1)]["latency"]
    assert kernels.decode_parts(64, 4096)["attention"] == pytest.approx(80 * latency_ms, rel=0.005)
    points = rows[(rows[list(wanted)[:4]] == list(wanted.values())[:4]).all(axis=1)]
    points = points[points["kv_cache_dtype"] == wanted["kv_cache_dtype"]]
    assert kernels.decode_points() == sorted(set(zip(points["batch_size"], points["step"] + 1, strict=True)))


@needs_kernel_tables
@third_party_warnings
@pytest.mark.parametrize("system", ["h100_sxm", "l40s"], ids=["our data sheet", "the data sheet of the source"])
def test_weights_scaled_by_blocks_have_matrix_products_of_their_own(system, tmp_path):
    """As in Qwen3's FP8 checkpoints, which say nothing of the KV cache: 16 bit. The rest is that of fp8."""
    profiles = {
        dtype: import_kernel_tables(
            system, "llama-3.1-8b", 1, dtype, "trtllm", tmp_path / dtype, kv_cache_dtype=kv_cache_dtype
        )
        for dtype, kv_cache_dtype in (("fp8", "bf16"), ("fp8_block", None))
    }
    whole, blocks = profiles["fp8"], profiles["fp8_block"]
    assert blocks.name == f"{system.replace('_', '-')}/llama-3.1-8b/trtllm-tp1-fp8_block"
    assert blocks.kv_cache_dtype == "bf16"
    assert blocks.datasheet == whole.datasheet
    assert blocks.total_kv_blocks() == whole.total_kv_blocks()
    folders = [tmp_path / dtype / profile.name for dtype, profile in profiles.items()]
    for table in ("head.csv", "prefill_attention.csv", "decode_attention.csv"):
        assert (folders[0] / table).read_text() == (folders[1] / table).read_text()
    assert (folders[0] / "linear.csv").read_text() != (folders[1] / "linear.csv").read_text()


@needs_kernel_tables
@third_party_warnings
def test_heads_that_were_measured_over_one_kv_cache_and_not_over_another_are_said_to_be_interpolated():
    """TensorRT-LLM's decode attention of 96 heads and 4 KV heads was measured over a 16 bit KV cache alone."""
    model = model_of_config(OWN_MODEL | {"num_attention_heads": 96, "num_key_value_heads": 4}, "wide", "wide")
    wide, narrow = (KernelTables("h100_sxm", model, 1, "fp8", "trtllm", None, dtype) for dtype in ("bf16", "fp8"))
    assert "generation attention" not in wide.interpolated()
    assert "generation attention (nearest: " in narrow.interpolated()


@needs_kernel_tables
@third_party_warnings
def test_the_dtype_of_the_kv_cache_can_be_chosen(tmp_path):
    """Another than the usual one is in the name, the file and the command; the usual one needs no flag."""
    argv = ["profiles", "import", "kernels", "--system", "h100_sxm", "--model", "llama-3.3-70b", "--tp", "8"]
    argv += ["--dtype", "fp8", "--backend", "trtllm", "--kv-cache-dtype"]
    assert main([*argv, "bf16", "--out", str(tmp_path)]) == main([*argv, "fp8", "--out", str(tmp_path)]) == 0
    usual, wide = (load_profile(tmp_path / f"h100-sxm/llama-3.3-70b/trtllm-tp8-fp8{end}") for end in ("", "-kv-bf16"))
    assert (usual.kv_cache_dtype, wide.kv_cache_dtype) == ("fp8", "bf16")
    assert "--kv-cache-dtype bf16" in wide.build_command
    assert "--kv-cache-dtype" not in usual.build_command
    assert "KV cache in fp8; prefill attention computes in fp8." in usual.how_measured
    assert "KV cache" not in wide.how_measured
    assert usual.kv_bytes_per_token * 2 == wide.kv_bytes_per_token
    for load in (StepLoad((), 64, 64 * 4000), StepLoad((PrefillChunk(8192, 0),), 0, 0)):
        assert TimingModel(usual).step_s(load) < 0.99 * TimingModel(wide).step_s(load)
    for table in ("linear.csv", "head.csv", "communication.csv"):
        assert (tmp_path / usual.name / table).read_text() == (tmp_path / wide.name / table).read_text()
    assert_same_files(tmp_path / usual.name, PROFILES_DIR / usual.name)


def test_a_kv_capacity_that_was_reported_holds_for_the_kv_cache_it_was_reported_of():
    target = Target("h100-sxm", MODELS["llama-2-70b"], "vllm", "0.24.0", 4, "bf16", DATASHEETS["h100-sxm", "bf16"])
    origin = Origin("", "", "", "", "")
    assert make_document(target, origin, "kernels", {})["kv_cache"]["measured_kv_blocks"] == 31_356
    assert "kv_cache" not in make_document(target._replace(kv_cache_dtype="fp8"), origin, "kernels", {})


@needs_kernel_tables
@third_party_warnings
@pytest.mark.parametrize(
    ("system", "kv_cache_dtype", "message"),
    [
        ("a100_sxm", "fp8", r"no attention over a KV cache in fp8 for vllm .* on a100_sxm; .* for bf16\. Use it"),
        ("h100_sxm", "int4", "no kernel tables for a KV cache in 'int4'; there are tables for bf16, fp8"),
    ],
)
def test_a_kv_cache_that_was_not_measured_is_one_clear_line(system, kv_cache_dtype, message, tmp_path):
    with pytest.raises(ProfileError, match=message) as caught:
        import_kernel_tables(system, "llama-3.1-8b", 1, "bf16", "vllm", tmp_path, kv_cache_dtype=kv_cache_dtype)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@needs_kernel_tables
@third_party_warnings
def test_kernel_tables_say_which_versions_there_are(tmp_path):
    with pytest.raises(ProfileError, match=r"no tables for vllm 0\.1 on h100_sxm; it has tables for 0\.24\.0"):
        import_kernel_tables("h100_sxm", "llama-3.1-8b", 1, "bf16", "vllm", tmp_path, engine_version="0.1")


@needs_kernel_tables
@third_party_warnings
def test_any_model_and_gpu_that_the_tables_cover_can_be_imported(tmp_path):
    """A model of one's own on a GPU of which nothing ships: its data sheet comes with the tables."""
    folder = tmp_path / "My Own-3B"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(OWN_MODEL))
    out = tmp_path / "out.json"
    argv = ["profiles", "import", "kernels", "--system", "l40s", "--model", str(folder), "--backend", "sglang"]
    assert main([*argv, "--out", str(tmp_path / "profiles"), "--json", str(out)]) == 0
    (written,) = json.loads(out.read_text())
    assert written["name"] == "l40s/my-own-3b/sglang-tp1-bf16"
    profile = load_profile(written["folder"])
    assert profile.datasheet.memory_bytes_per_s == 864e9
    assert 45e9 < profile.datasheet.memory_bytes < 48 * 2**30
    assert profile.shape.tie_word_embeddings
    assert profile.max_num_batched_tokens == 4096


@needs_kernel_tables
@pytest.mark.parametrize(("gpu", "dtype"), DATASHEETS)
def test_our_data_sheets_say_what_those_of_the_kernel_tables_say(gpu, dtype):
    """Which of them is taken makes no difference to a profile: within 1 %, memory as CUDA reports it."""
    (package,) = importlib.util.find_spec("aiconfigurator_core").submodule_search_locations
    text = (Path(package) / "systems" / f"{gpu.replace('-', '_')}.yaml").read_text(encoding="utf-8")
    figures = importlib.import_module("yaml").safe_load(text)
    datasheet = DATASHEETS[gpu, dtype]
    assert datasheet.flops_per_s == pytest.approx(
        figures["gpu"]["fp8_tc_flops" if dtype.startswith("fp8") else "bfloat16_tc_flops"], rel=0.01
    )
    assert datasheet.memory_bytes_per_s == pytest.approx(figures["gpu"]["mem_bw"], rel=0.01)
    assert datasheet.memory_bytes == pytest.approx(REPORTED_MEMORY * figures["gpu"]["mem_capacity"], rel=0.01)
    assert datasheet.nvlink_bytes_per_s == pytest.approx(figures["node"]["intra_node_bw"], rel=0.01)


DYNAMO_HEADER = "hw,model,kind,tp,ver,isl,ms,ctx,batch"
DYNAMO_MODEL = "nvidia/Llama-3.3-70B-Instruct-FP8"


def dynamo_row(kind: str, tp: int, isl: str, ms: float, context: str = "", batch: str = "") -> str:
    return f"h100_sxm,{DYNAMO_MODEL},{kind},{tp},0.10.1.1,{isl},{ms},{context},{batch}"


def test_known_defects_of_the_dynamo_sweep_are_left_out(tmp_path):
    rows = [DYNAMO_HEADER]
    rows += [dynamo_row("prefill", 8, isl, ms) for isl, ms in (("100", 19), ("6205", 498), ("8240", 321))]
    rows += [dynamo_row("decode", 8, "", ms, "350", batch) for batch, ms in (("1", 9), ("256", 20), ("277", 42))]
    source = tmp_path / "sweep.csv"
    source.write_text("\n".join(rows))
    profile = import_dynamo_sweep(source, tmp_path, tp=8)
    assert profile.latency["prefill"].points[:, 0].tolist() == [100, 8240]
    assert profile.latency["decode"].points.tolist() == [[1, 350], [256, 350]]
    assert profile.latency["decode"].seconds.tolist() == [0.009, 0.02]


def test_pre_swept_results_of_dynamo_are_read(tmp_path):
    folder = tmp_path / "sweep"
    folder.mkdir()
    tp = np.array([[8], [4]])
    np.savez(
        folder / "prefill.npz",
        tp=tp,
        framework_version=np.array([["0.10"], ["0.10"]]),
        prefill_isl=np.array([[1, 2], [100, 2000]]),
        prefill_ttft=np.array([[1.0, 2.0], [23.0, 132.0]]),
    )
    np.savez(
        folder / "decode.npz",
        tp=tp,
        max_kv_tokens=np.array([[1000], [1000]]),
        x_kv_usage=np.array([[0.1, 0.2], [0.1, 0.4]]),
        y_context_length=np.array([[100.0, 100.0], [100.0, 100.0]]),
        z_itl=np.array([[1.0, 2.0], [12.0, 14.0]]),
    )
    profile = import_dynamo_sweep(folder, tmp_path, tp=4)
    assert profile.latency["prefill"].seconds.tolist() == [0.023, 0.132]
    assert profile.latency["decode"].points.tolist() == [[1, 100], [4, 100]]
    with pytest.raises(ProfileError, match="cannot be read as a Dynamo sweep with tp 3"):
        import_dynamo_sweep(folder, tmp_path, tp=3)


PREFILL_RESULTS = {"prefill_isl": [100, 1000, 4000], "prefill_ttft": [20.5, 61.0, 240.0]}
DECODE_RESULTS = {
    "x_kv_usage": [0.001, 0.016, 0.1, 0.8],
    "y_context_length": [1000.0, 1000.0, 2000.0, 4000.0],
    "z_itl": [8.0, 8.75, 10.5, 19.0],
    "max_kv_tokens": 1_000_000,
}


def write_results(folder: Path, form: str) -> None:
    """The profiler's results as it writes them, as .npz in folders of their own or as one .json each."""
    for phase, results in (("prefill", PREFILL_RESULTS), ("decode", DECODE_RESULTS)):
        if form == "json":
            (folder / f"{phase}_raw_data.json").write_text(json.dumps(results))
        else:
            (folder / f"selected_{phase}_interpolation").mkdir()
            np.savez(
                folder / f"selected_{phase}_interpolation" / "raw_data.npz",
                **{key: np.atleast_1d(value) for key, value in results.items()},
            )


@pytest.mark.parametrize("form", ["npz", "json"])
def test_the_profilers_results_come_out_as_measured(form, tmp_path):
    write_results(tmp_path, form)
    profile = import_dynamo_sweep(tmp_path, tmp_path, model="llama-3.1-8b", tp=2, dtype="bf16", engine="sglang")
    timing = TimingModel(profile)
    for isl, ms in zip(PREFILL_RESULTS["prefill_isl"], PREFILL_RESULTS["prefill_ttft"], strict=True):
        assert timing.step_s(StepLoad((PrefillChunk(isl, 0),), 0, 0)) == pytest.approx(ms / 1e3, rel=0.004)
    batch_sizes = [1, 16, 50, 200]  # usage times capacity over context
    for batch_size, context, ms in zip(
        batch_sizes, DECODE_RESULTS["y_context_length"], DECODE_RESULTS["z_itl"], strict=True
    ):
        assert timing.step_s(StepLoad((), batch_size, int(batch_size * context))) == pytest.approx(ms / 1e3)
    assert profile.name == "h100-sxm/llama-3.1-8b/sglang-tp2-bf16"
    assert profile.is_measured
    assert profile.total_kv_blocks(0.9) == 1_000_000 // profile.block_size


def test_the_mockers_grid_is_read_and_said_not_to_be_measured(tmp_path):
    """On a grid that is a plane, interpolation is exact: 5 ms, and 10 us for 1,000 tokens in the KV cache."""
    kv_tokens, contexts = np.linspace(0, 400_000, 100), np.linspace(1, 8192, 100)
    grid = tmp_path / "perf_data.npz"
    np.savez(
        grid,
        prefill_isl=np.linspace(100, 10_000, 100),
        prefill_ttft_ms=np.linspace(10, 600, 100),
        decode_active_kv_tokens=kv_tokens,
        decode_context_length=contexts,
        decode_itl=5 + kv_tokens[:, np.newaxis] * 1e-5 + 0 * contexts,
    )
    profile = import_dynamo_sweep(grid, tmp_path, model="llama-3.1-8b", tp=1, dtype="bf16")
    assert not profile.is_measured
    table = profile.latency["decode"]
    assert len(table.seconds) > 30
    batch_sizes, contexts_of_each = table.points.T
    assert (batch_sizes >= 1).all()
    assert (batch_sizes * contexts_of_each).max() <= 400_000
    assert table.seconds == pytest.approx((5 + batch_sizes * contexts_of_each * 1e-5) / 1e3, rel=1e-5)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        pytest.param({"z_itl": [8.0]}, "cannot be read as a Dynamo sweep", id="too short"),
        pytest.param({"z_itl": [8.0, -1.0, 10.5, 19.0]}, r"found a pass of \(16, 1000, -1.0\)", id="negative"),
        pytest.param({"z_itl": [8.0, None, 10.5, 19.0]}, "cannot be read as a Dynamo sweep", id="null"),
        pytest.param({"y_context_length": [0.0, 1, 1, 1]}, "found a pass of|cannot be read", id="no context"),
        pytest.param({"max_kv_tokens": {}}, "cannot be read as a Dynamo sweep", id="no capacity"),
    ],
)
def test_wrong_results_of_the_profiler_are_one_clear_line(spoil, message, tmp_path):
    (tmp_path / "prefill_raw_data.json").write_text(json.dumps(PREFILL_RESULTS))
    (tmp_path / "decode_raw_data.json").write_text(json.dumps(DECODE_RESULTS | spoil))
    with pytest.raises(ProfileError, match=message) as caught:
        import_dynamo_sweep(tmp_path, tmp_path, tp=2)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_half_of_the_profilers_results_is_not_enough(tmp_path):
    (tmp_path / "prefill_raw_data.json").write_text(json.dumps(PREFILL_RESULTS))
    with pytest.raises(ProfileError, match="found none of Dynamo's results; allowed are a folder with"):
        import_dynamo_sweep(tmp_path, tmp_path, tp=2)


STEP_HEADER = "time,prefill_tokens,decode_batch_size,context_tokens,ms"


def write_steps(path: Path, rows: list[tuple[int, int, int, float]]) -> Path:
    path.write_text("\n".join([STEP_HEADER, *(f"0,{p},{b},{c},{ms!r}" for p, b, c, ms in rows)]))
    return path


def import_steps(path: Path, out_dir: Path) -> Profile:
    return import_step_rows(
        path, out_dir, system="h100_sxm", model="qwen3-14b", tp=2, dtype="bf16", engine="vllm", engine_version="0.24.0"
    )


@given(
    prefill=st.dictionaries(st.integers(1, 20_000), st.floats(1, 50), min_size=2, max_size=8),
    decode=st.dictionaries(
        st.tuples(st.integers(1, 300), st.integers(1, 9000)), st.floats(1, 50), min_size=2, max_size=12
    ),
)
@settings(max_examples=40)
def test_steps_come_back_from_the_profile_as_they_were_logged(prefill, decode):
    """Whatever was logged: the tables hold each load once, with its time to six digits."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = [(tokens, 0, 0, ms) for tokens, ms in prefill.items()]
        rows += [(0, batch, batch * each, ms) for (batch, each), ms in decode.items()]
        profile = import_steps(write_steps(folder / "steps.csv", rows), folder)
    for table, logged in (("prefill", {(tokens,): ms for tokens, ms in prefill.items()}), ("decode", decode)):
        found = profile.latency[table]
        assert {tuple(int(v) for v in point) for point in found.points} == set(logged)
        for point, seconds in zip(found.points, found.seconds, strict=True):
            assert seconds * 1e3 == pytest.approx(logged[tuple(int(v) for v in point)], rel=1e-5)


def test_repeated_steps_become_their_median_and_mixed_ones_are_left_out(tmp_path):
    rows = [(0, 4, 4000, ms) for ms in (9.0, 10.0, 11.0)] + [(0, 8, 8000, 12.0), (500, 0, 0, 30.0), (900, 0, 0, 45.0)]
    profile = import_steps(write_steps(tmp_path / "steps.csv", [*rows, (500, 4, 4000, 33.0)]), tmp_path)
    assert profile.latency["decode"].points.tolist() == [[4, 1000], [8, 1000]]
    assert profile.latency["decode"].seconds.tolist() == [0.010, 0.012]
    assert profile.latency["prefill"].seconds.tolist() == [0.030, 0.045]
    assert profile.jitter_cv == pytest.approx(0.1)
    assert "6 steps" in profile.how_measured
    assert "left out because they do both: 1." in profile.how_measured
    assert profile.name == "h100-sxm/qwen3-14b/vllm-tp2-bf16"
    assert check_profile(tmp_path / profile.name) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "line 1: the columns prefill_tokens, decode_batch_size, context_tokens, ms are missing"),
        (f"{STEP_HEADER}\n0,0,0,0,5\n", "line 2: neither prefill_tokens nor decode_batch_size is above 0"),
        (f"{STEP_HEADER}\n0,5,0,0,fast\n", "line 2, column ms: found 'fast'; allowed is a number above 0"),
        (f"{STEP_HEADER}\n0,5,0,0,nan\n", "line 2, column ms: found 'nan'"),
        (f"{STEP_HEADER}\n0,1.5,0,0,5\n", "column prefill_tokens: found '1.5'; allowed is a whole number"),
        (f"{STEP_HEADER}\n0,5\n", "column decode_batch_size: found None"),
        (f"{STEP_HEADER}\n0,5,0,0,5\n", "found 1 different steps that only prefill; needed are 2"),
        (f"{STEP_HEADER}\n0,5,0,0,5\n0,6,0,0,5\n", "found 0 different steps that only decode; needed are 2"),
    ],
)
def test_wrong_steps_are_one_clear_line(text, message, tmp_path):
    source = tmp_path / "steps.csv"
    source.write_text(text)
    with pytest.raises(ProfileError, match=message) as caught:
        import_steps(source, tmp_path)
    assert str(source) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_splitwise_takes_medians_of_the_repeats(tmp_path):
    rows = ["model,hardware,prompt_size,batch_size,token_size,prompt_time,token_time,tensor_parallel"]
    for repeat in (1.0, 1.0, 1.0, 1.02, 3.0):
        for prompt, batch in ((512, 1), (1024, 1), (512, 4)):
            rows.append(f"llama2-70b,a100-80gb,{prompt},{batch},128,{90 * repeat * batch},{40 + repeat + batch},8")
    source = tmp_path / "perf_model.csv"
    source.write_text("\n".join(rows))
    profile = import_splitwise(source, tmp_path)
    assert profile.latency["prefill"].points[:, 0].tolist() == [512, 1024]
    assert profile.latency["prefill"].seconds.tolist() == [0.09, 0.09]
    assert profile.latency["decode"].points.tolist() == [[1, 576], [1, 1088], [4, 576]]
    assert profile.jitter_cv == pytest.approx(np.std([1, 1, 1, 1.02, 3], ddof=1) / 1.404, abs=1e-4)


@pytest.mark.parametrize(
    "build_from", [lambda path, out: import_dynamo_sweep(path, out, tp=4), import_splitwise, import_steps]
)
@pytest.mark.parametrize("text", [None, "a,b\n1,2\n", ""])
def test_a_wrong_source_is_one_clear_line(build_from, text, tmp_path):
    source = tmp_path / "source.csv"
    if text is not None:
        source.write_text(text)
    with pytest.raises(ProfileError, match=r"source\.csv"):
        build_from(source, tmp_path)


def test_a_file_like_splitwises_says_who_measured_it(tmp_path):
    """Without a source it is Splitwise's own; nothing of another's file must be laid at their door."""
    rows = ["model,hardware,prompt_size,batch_size,token_size,prompt_time,token_time,tensor_parallel"]
    rows += [f"ours,box,{prompt},1,128,{prompt / 8},{20 + prompt / 1000},2" for prompt in (512, 1024, 2048)]
    source = tmp_path / "ours.csv"
    source.write_text("\n".join(rows))
    argv = ["profiles", "import", "splitwise", str(source), "--system", "h100_sxm", "--model", "qwen3-14b", "--tp", "2"]
    argv += ["--file-model", "ours", "--file-hardware", "box", "--backend", "trtllm", "--source-name", "our lab"]
    assert main([*argv, "--out", str(tmp_path)]) == 0
    profile = load_profile(tmp_path / "h100-sxm/qwen3-14b/trtllm-tp2-fp16")
    assert (profile.source, profile.licence, profile.engine_version) == ("our lab", "not stated", "not stated")
    assert "2023" not in profile.how_measured
    assert "ours.csv --system h100_sxm" in profile.build_command
    assert "No repeats in this source" in profile.jitter_source


def test_splitwise_says_what_the_file_has_instead(tmp_path):
    source = tmp_path / "perf_model.csv"
    header = "model,hardware,prompt_size,batch_size,token_size,prompt_time,token_time,tensor_parallel"
    source.write_text(f"{header}\nbloom-176b,a100-80gb,512,1,128,90,40,8\n")
    with pytest.raises(ProfileError, match=r"no rows for llama2-70b .* it has bloom-176b on a100-80gb with 8"):
        import_splitwise(source, tmp_path)


@given(data=st.data())
@settings(max_examples=60)
def test_outliers_go_and_what_is_in_order_stays(data):
    """Of a table in order but for noise nothing is lost; of spoilt points none remains far out of order."""
    sizes = np.array([(b, c) for b in (1, 2, 4, 8, 16) for c in (64, 256, 1024, 4096)], dtype=float)
    noise = data.draw(st.lists(st.floats(0.95, 1.05), min_size=len(sizes), max_size=len(sizes)))
    seconds = (1 + sizes[:, 0] * sizes[:, 1] / 1e4) * np.array(noise)
    table = make_table("decode_attention", ("batch_size", "context_tokens_per_sequence"), sizes, seconds)
    assert without_outliers(table) == (table, 0)
    spoilt = data.draw(st.lists(st.integers(0, len(sizes) - 1), min_size=1, max_size=3, unique=True))
    seconds = table.seconds.copy()
    seconds[spoilt] *= 40
    kept, num_left_out = without_outliers(make_table(table.name, table.columns, table.points, seconds))
    assert num_left_out <= len(spoilt)
    assert len(kept.seconds) == len(seconds) - num_left_out
    after = (kept.points[:, np.newaxis] >= kept.points[np.newaxis]).all(axis=2)
    assert not (after & (kept.seconds[:, np.newaxis] * 1.25 < kept.seconds[np.newaxis])).any()


def complain(capsys, *argv) -> str:
    """What the command line says on stderr: one line, and status 2."""
    try:
        status = main(["profiles", "import", *map(str, argv)])
    except SystemExit as end:
        status = end.code
    assert status == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


TARGET = ("--system", "h100_sxm", "--model", "llama-3.1-8b")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "the following arguments are required: SOURCE"),
        (("rumours",), "invalid choice: 'rumours'"),
        (("kernels", "--model", "llama-3.1-8b"), "required: --system"),
        (("steps", "x.csv", *TARGET, "--tp", "0"), "--tp is 0; allowed is a whole number of at least 1"),
        (("steps", "x.csv", *TARGET, "--dtype", "int3"), "invalid choice: 'int3'"),
        (("steps", "x.csv", *TARGET), "x.csv: cannot be read as CSV"),
        (("dynamo", "nowhere", *TARGET), "nowhere: no such file or folder"),
        (("splitwise", "x.csv", *TARGET), "x.csv: cannot be read as Splitwise's"),
        (("steps", "x.csv", "--system", "toaster", "--model", "llama-3.1-8b"), "no data sheet for toaster in bf16"),
        (("steps", "x.csv", "--system", "h100-sxm", "--model", "gpt-5"), "no model 'gpt-5' is known to the importer"),
        (("catalogue", "--data", "d", "--catalogue", "x.toml"), "x.toml: cannot be read as a catalogue"),
    ],
)
def test_a_wrong_command_is_one_clear_line(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in complain(capsys, *argv)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[rumours]]\n", "unknown section rumours; known are kernels, dynamo, splitwise"),
        ("[[splitwise]]\nsystem = 'a100_sxm'\n", "found the keys system; needed are source, system, tps"),
        ("[[splitwise]\n", "cannot be read as a catalogue"),
    ],
)
def test_a_wrong_catalogue_is_one_clear_line(text, message, capsys, tmp_path):
    catalogue = tmp_path / "catalogue.toml"
    catalogue.write_text(text)
    assert message in complain(capsys, "catalogue", "--data", tmp_path, "--catalogue", catalogue, "--out", tmp_path)


def test_the_command_writes_a_profile_that_the_engine_takes(capsys, tmp_path):
    rows = [(0, b, b * 500, 8.0 + b / 8) for b in (1, 8, 64)] + [(tokens, 0, 0, tokens / 40) for tokens in (400, 4000)]
    source = write_steps(tmp_path / "steps.csv", rows)
    argv = ["profiles", "import", "steps", str(source), *TARGET, "--source-name", "our lab", "--licence", "CC0"]
    assert main([*argv, "--out", str(tmp_path)]) == 0
    folder = tmp_path / "h100-sxm/llama-3.1-8b/vllm-tp1-bf16"
    assert f"{folder}: 5 points, 451,168 KV tokens" in capsys.readouterr().out
    assert main(["profiles", "check", str(folder)]) == 0
    assert main(["profiles", "show", str(folder)]) == 0
    assert "our lab not stated" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "name", "bits"),
    [
        (("--backend", "vllm"), "vllm-tp1-fp8", 16),
        (("--backend", "vllm", "--kv-cache-dtype", "fp8"), "vllm-tp1-fp8-kv-fp8", 8),
        (("--backend", "trtllm"), "trtllm-tp1-fp8", 8),
        (("--backend", "trtllm", "--kv-cache-dtype", "bf16"), "trtllm-tp1-fp8-kv-bf16", 16),
    ],
)
def test_whole_passes_are_of_an_engine_with_its_usual_kv_cache_or_the_one_that_is_said(flags, name, bits, tmp_path):
    write_results(tmp_path, "json")
    rows = [(0, b, b * 500, 8.0 + b / 8) for b in (1, 8, 64)] + [(tokens, 0, 0, tokens / 40) for tokens in (400, 4000)]
    steps = write_steps(tmp_path / "steps.csv", rows)
    for number, argv in enumerate((["dynamo", str(tmp_path)], ["steps", str(steps)])):
        out = tmp_path / str(number)
        assert main(["profiles", "import", *argv, *TARGET, "--dtype", "fp8", *flags, "--out", str(out)]) == 0
        profile = load_profile(out / "h100-sxm/llama-3.1-8b" / name)
        assert profile.kv_bytes_per_token == 2 * 32 * 8 * 128 * bits // 8
        assert ("--kv-cache-dtype" in profile.build_command) == (len(flags) > 2)
        assert argv[0] == "steps" or f"The KV cache is taken to be {bits} bit." in profile.how_measured


def test_a_context_that_does_not_fit_becomes_the_default_that_does(tmp_path):
    """As vLLM would ask for: Qwen3-32B on one GPU has no room for the 40,960 tokens that it allows."""
    rows = [(0, b, b * 500, 20.0 + b / 8) for b in (1, 8)] + [(tokens, 0, 0, tokens / 10) for tokens in (400, 4000)]
    source = write_steps(tmp_path / "steps.csv", rows)
    profile = import_step_rows(
        source, tmp_path, system="h100_sxm", model="qwen3-32b", tp=1, dtype="bf16", engine="vllm"
    )
    assert profile.max_model_len == 36_864
    assert 0 <= profile.total_kv_blocks() * profile.block_size - profile.max_model_len < 1024
