"""The shipped profiles against what real servers took: accuracy may rise, but not fall unseen."""

from __future__ import annotations

import csv
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from mock_engine.deployment import DeploymentSettings, WorkerGroup
from mock_engine.engine_settings import EngineSettings
from mock_engine.profile import load_profile
from mock_engine.simulation import SimulationSettings, simulate
from mock_engine.step import PrefillChunk, StepLoad
from mock_engine.timing import TimingModel
from mock_engine.workload import Workload

REFERENCE = Path(__file__).parent / "reference"
ROUNDS = 10  # requests, as a multiple of the concurrency


def read(name):
    with (REFERENCE / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def median(errors):
    return float(np.median(np.abs(errors)))


def test_steps_of_a_real_vllm_take_what_the_profiles_say():
    """Without jitter. Errors are of the profile: within a run, steps of one batch size vary by 3 %."""
    errors = {}
    for row in read("vllm_steps.csv"):
        prefills, sequences = int(row["num_prefills"]), int(row["num_seqs"])
        decoding, each = sequences - prefills, int(row["context_tokens_per_sequence"])
        load = StepLoad((PrefillChunk(1, 570),) * prefills, decoding, decoding * each)
        predicted_ms = TimingModel(load_profile(row["profile"])).step_s(load) * 1e3
        errors.setdefault(row["profile"], []).append(predicted_ms / float(row["ms"]) - 1)
    assert {name: len(found) for name, found in errors.items()} == {
        "h100-sxm/llama-2-70b/vllm-tp4-bf16": 24,
        "h100-sxm/codellama-34b/vllm-tp2-bf16": 13,
    }
    assert median(errors["h100-sxm/llama-2-70b/vllm-tp4-bf16"]) < 0.017
    assert median(errors["h100-sxm/codellama-34b/vllm-tp2-bf16"]) < 0.03
    assert median(np.concatenate(list(errors.values()))) < 0.021


# Median |simulated / measured - 1| of TTFT and TPOT, with a margin over what was found. The engines that ran were older
# than those whose kernels the profiles have.
LIMITS = {
    "h100-sxm/qwen3-32b/sglang-tp2-bf16": (0.18, 0.03),
    "h100-sxm/qwen3-32b/sglang-tp4-bf16": (0.11, 0.06),
    "h100-sxm/llama-3.1-8b/trtllm-tp1-bf16": (None, 0.029),
    "h100-sxm/llama-3.1-8b/trtllm-tp2-bf16": (None, 0.025),
}


@pytest.mark.parametrize("profile", LIMITS)
def test_runs_of_real_servers_come_out_as_they_did(profile):
    """A closed loop of equal requests; TensorRT-LLM with the token budget that aiconfigurator writes for it."""
    ttft, tpot = [], []
    for row in read("runs.csv"):
        if row["profile"] != profile:
            continue
        isl, osl, concurrency = (int(row[name]) for name in ("isl", "osl", "concurrency"))
        known = {}
        if "trtllm" in profile:
            known = {"max_num_batched_tokens": isl + concurrency + 1500, "max_num_seqs": concurrency}
            known |= {"enable_chunked_prefill": False, "max_model_len": isl + osl}
        values = {field.name: None for field in fields(Workload)} | {"fixed_schedule": False}
        values |= {"isl": isl, "osl": osl, "concurrency": concurrency, "request_count": ROUNDS * concurrency}
        engine = EngineSettings(profile=profile, jitter=0.0, **known)
        metrics = simulate(SimulationSettings(DeploymentSettings((WorkerGroup(engine),)), Workload(**values))).metrics
        tpot.append(metrics["inter_token_latency"]["avg"] / float(row["tpot_ms"]) - 1)
        if row["ttft_ms"]:
            ttft.append(metrics["time_to_first_token"]["avg"] / float(row["ttft_ms"]) - 1)
    max_ttft, max_tpot = LIMITS[profile]
    assert len(tpot) >= 10
    assert median(tpot) < max_tpot, sorted(tpot)
    if max_ttft is not None:
        assert median(ttft) < max_ttft, sorted(ttft)
