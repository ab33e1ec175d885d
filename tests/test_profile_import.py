"""Importers: what ships is what they build, and a wrong source is said in one line."""

from __future__ import annotations

import csv
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from mock_engine.errors import ProfileError
from mock_engine.profile import PROFILES_DIR
from mock_engine.profile_import import import_dynamo_sweep, import_kernel_tables, import_splitwise
from mock_engine.profile_import.__main__ import KERNEL_PROFILES, main
from mock_engine.profile_import.facts import MODELS
from mock_engine.profile_import.fit_overhead import Experiment, fit, read_experiments
from mock_engine.profile_import.kernel_tables import KernelTables
from mock_engine.profile_import.overhead import H100_VLLM

DATA = Path(__file__).parents[2] / "shared" / "data"

needs_kernel_tables = pytest.mark.skipif(
    importlib.util.find_spec("aiconfigurator_core") is None, reason="needs pip install aiconfigurator-core==0.12.0"
)
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs the published figures (see profiles/README.md)")
# The wheel's own dependencies warn while they are imported.
third_party_warnings = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@needs_kernel_tables
@third_party_warnings
@pytest.mark.parametrize(("system", "model", "tp"), KERNEL_PROFILES)
def test_shipped_kernel_profiles_are_what_the_importer_builds(system, model, tp, tmp_path):
    profile = import_kernel_tables(system, model, tp, "bf16", "vllm", tmp_path)
    assert_same_files(tmp_path / profile.name, PROFILES_DIR / profile.name)


@needs_data
@pytest.mark.parametrize("tp", [2, 4, 8])
def test_shipped_dynamo_profiles_are_what_the_importer_builds(tp, tmp_path):
    profile = import_dynamo_sweep(DATA / "dynamo_preswept_h100.csv", tp, tmp_path)
    assert_same_files(tmp_path / profile.name, PROFILES_DIR / profile.name)


@needs_data
def test_the_shipped_splitwise_profile_is_what_the_importer_builds(tmp_path):
    profile = import_splitwise(DATA / "splitwise_perf_model.csv", tmp_path)
    assert_same_files(tmp_path / profile.name, PROFILES_DIR / profile.name)


def assert_same_files(built: Path, shipped: Path) -> None:
    assert {path.name: path.read_text() for path in built.iterdir()} == {
        path.name: path.read_text() for path in shipped.iterdir()
    }


@needs_kernel_tables
@needs_data
@third_party_warnings
@pytest.mark.parametrize(("system", "model", "tp"), KERNEL_PROFILES)
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
    assert result.step_s == pytest.approx(H100_VLLM.step_s, abs=20e-6)
    assert result.per_seq_s == pytest.approx(H100_VLLM.per_seq_s, abs=1e-6)
    assert result.error_after < 0.037 < result.error_before
    assert result.jitter_cv == pytest.approx(H100_VLLM.jitter_cv, abs=0.001)


def test_the_fit_finds_what_was_put_in():
    rng = np.random.default_rng(3)
    runs = []
    for kernels_s in (8e-3, 15e-3):
        batch_sizes = rng.integers(1, 20, 3000).astype(float)
        clean_s = kernels_s + 400e-6 + 8e-6 * batch_sizes
        measured_s = clean_s * rng.normal(1, 0.02, 3000)
        runs.append(Experiment("run", batch_sizes, measured_s, np.full(3000, kernels_s)))
    result = fit(runs)
    assert result.step_s == pytest.approx(400e-6, abs=60e-6)
    assert result.per_seq_s == pytest.approx(8e-6, abs=4e-6)
    assert result.jitter_cv == pytest.approx(0.02, rel=0.05)


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
        (("h100_sxm", "gpt-5", 1, "bf16", "vllm"), "no model 'gpt-5' is known to the importer; known are llama"),
        (("h100_sxm", "llama-3.1-8b", 1, "int3", "vllm"), "no kernel tables for dtype 'int3'"),
        (("toaster", "llama-3.1-8b", 1, "bf16", "vllm"), "has no tables for toaster"),
    ],
)
def test_kernel_tables_say_what_they_do_not_have(arguments, message, tmp_path):
    with pytest.raises(ProfileError, match=message):
        import_kernel_tables(*arguments, tmp_path)


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
    profile = import_dynamo_sweep(source, 8, tmp_path)
    assert profile.latency["prefill"].points[:, 0].tolist() == [100, 8240]
    assert profile.latency["decode"].points.tolist() == [[1, 350], [256, 350]]
    assert profile.latency["decode"].seconds.tolist() == [0.009, 0.02]


def test_dynamos_own_files_are_read(tmp_path):
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
    profile = import_dynamo_sweep(folder, 4, tmp_path)
    assert profile.latency["prefill"].seconds.tolist() == [0.023, 0.132]
    assert profile.latency["decode"].points.tolist() == [[1, 100], [4, 100]]
    with pytest.raises(ProfileError, match="cannot be read as a Dynamo sweep with tp 3"):
        import_dynamo_sweep(folder, 3, tmp_path)


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


@pytest.mark.parametrize("build", [lambda path, out: import_dynamo_sweep(path, 4, out), import_splitwise])
@pytest.mark.parametrize("text", [None, "a,b\n1,2\n", ""])
def test_a_wrong_source_is_one_clear_line(build, text, tmp_path):
    source = tmp_path / "source.csv"
    if text is not None:
        source.write_text(text)
    with pytest.raises(ProfileError, match=r"source\.csv"):
        build(source, tmp_path)


def test_the_command_reports_what_is_missing_on_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("mock_engine.profile_import.__main__.KERNEL_PROFILES", [])
    assert main(["--all", "--data", str(tmp_path), "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("mock-engine: error: ")
