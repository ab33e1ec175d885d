"""GPU metrics: what a pass does on a GPU, what that draws, and an endpoint that reads like dcgm-exporter's."""

from __future__ import annotations

import csv
import http.client
import math
import statistics
import uuid
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest

from mock_engine.core import Step
from mock_engine.dcgm import DcgmCollector, DcgmServer
from mock_engine.engine_settings import EngineSettings, build_engine
from mock_engine.errors import ConfigError
from mock_engine.gpu_power import GPU_POWER
from mock_engine.gpu_work import GpuWork
from mock_engine.profile import list_profiles, load_profile
from mock_engine.roofline import GpuDatasheet
from mock_engine.scheduler import Schedule
from mock_engine.step import PrefillChunk, StepLoad
from mock_engine.step_stats import StepStats

POWER = Path(__file__).parent / "reference" / "power_a100.csv"
MEASURED = "a100-sxm/llama-2-70b/splitwise-tp8-fp16"
DEFAULT = "h100-sxm/llama-3.1-8b/vllm-tp1-bf16"

profiles = st.sampled_from(list_profiles()).map(cache(load_profile))
counts = st.integers(1, 4096)


def decode_load(batch_size, context_tokens):
    return StepLoad((), batch_size, batch_size * context_tokens)


@given(profile=profiles, new_tokens=counts, batch_size=st.integers(1, 512), context_tokens=counts)
def test_work_is_what_the_roofline_makes_times_of(profile, new_tokens, batch_size, context_tokens):
    """On a GPU that does one operation a second, and moves bytes for nothing, a pass takes its arithmetic."""
    work = GpuWork(profile.roofline)
    one, new = np.ones(1), np.asarray([float(new_tokens)])
    batch, context = np.asarray([float(batch_size)]), np.asarray([float(context_tokens)])
    computing = replace(profile.roofline, gpu=GpuDatasheet(1.0, math.inf, 1.0, math.inf))
    moving = replace(profile.roofline, gpu=GpuDatasheet(math.inf, 1.0, 1.0, math.inf))
    sending = replace(profile.roofline, gpu=GpuDatasheet(1.0, 1.0, 1.0, 1.0))

    prompt = work.of(StepLoad((PrefillChunk(new_tokens, 0),), 0, 0))
    assert prompt.flops == pytest.approx(computing.prefill_s(new)[0])
    assert prompt.dram_bytes == pytest.approx(moving.prefill_s(new)[0])
    assert prompt.nvlink_bytes == pytest.approx(sending.communication_s(new)[0])

    decode = work.of(decode_load(batch_size, context_tokens))
    assert decode.dram_bytes == pytest.approx(moving.decode_s(batch, context)[0])
    matrices = computing.linear_s(batch)[0] + computing.head_s(batch)[0]
    attention = batch_size * computing.prefill_attention_s(one, context - 1)[0]  # a token over a past of that length
    assert decode.flops == pytest.approx(matrices + attention)


def test_the_estimated_power_is_near_what_was_measured():
    profile = load_profile(MEASURED)
    power = GPU_POWER["a100-sxm"]
    errors: dict[str, list[float]] = {"prefill": [], "decode": []}
    with POWER.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(line for line in file if not line.startswith("#")):
            work = GpuWork(replace(profile.roofline, tp=int(row["tp"])))
            batch_size, isl_tokens, seconds = int(row["batch_size"]), int(row["isl_tokens"]), float(row["seconds"])
            if row["phase"] == "prefill":
                load = StepLoad(tuple(PrefillChunk(isl_tokens, 0) for _ in range(batch_size)), 0, 0)
            else:
                load = decode_load(batch_size, isl_tokens + 64)
            flops, dram_bytes, _ = work.of(load)
            datasheet = profile.datasheet
            watts = power.watts(
                flops / seconds / datasheet.flops_per_s, dram_bytes / seconds / datasheet.memory_bytes_per_s
            )
            errors[row["phase"]].append(abs(watts / power.limit_w - float(row["power_share"])))
    assert len(errors["prefill"]) + len(errors["decode"]) == 60
    assert statistics.median(errors["prefill"]) < 0.025
    assert statistics.median(errors["decode"]) < 0.025
    assert max(errors["decode"]) < 0.14
    assert max(errors["prefill"]) < 0.43


@given(tensor=st.floats(0, 1.5), dram=st.floats(0, 1.5), gpu=st.sampled_from(sorted(GPU_POWER)))
def test_power_stays_between_idle_and_the_limit_and_never_falls_with_more_work(tensor, dram, gpu):
    power = GPU_POWER[gpu]
    watts = power.watts(tensor, dram)
    assert power.idle_w < watts <= power.limit_w
    assert power.watts(tensor + 0.1, dram) >= watts
    assert power.watts(tensor, dram + 0.1) >= watts
    assert power.celsius(power.idle_w) < power.celsius(watts) <= power.celsius(power.limit_w)


steps = st.lists(
    st.tuples(
        st.floats(0.002, 1.5),  # seconds of it
        st.floats(0, 1.5) | st.just(0.0),  # idle before it
        st.integers(0, 2000),  # prompt tokens
        st.integers(0, 200),  # decoding
    ).filter(lambda step: step[2] + step[3] > 0),
    min_size=1,
    max_size=40,
)


@given(steps=steps, speedup_ratio=st.sampled_from([0.0, 1.0, 4.0]), later_s=st.floats(0, 3))
def test_shares_are_of_what_lies_in_the_last_second_and_the_totals_of_all(steps, speedup_ratio, later_s):
    profile = load_profile(DEFAULT)
    power = GPU_POWER["h100-sxm"]
    stats = StepStats(profile, speedup_ratio, {})
    window_s = speedup_ratio or 1.0
    now_s = joules = 0.0
    spans = []  # begin, end, joules above idle
    for seconds, idle_s, prompt_tokens, batch_size in steps:
        load = StepLoad((PrefillChunk(prompt_tokens, 0),) if prompt_tokens else (), batch_size, batch_size * 500)
        begin_s, now_s = now_s + idle_s, now_s + idle_s + seconds
        stats.add(
            Step(
                seconds,
                Schedule([], bool(batch_size), load),
            ),
            now_s,
        )
        flops, dram_bytes, _ = GpuWork(profile.roofline).of(load)
        tensor = flops / seconds / profile.datasheet.flops_per_s
        dram = dram_bytes / seconds / profile.datasheet.memory_bytes_per_s
        extra_j = (power.watts(tensor, dram) - power.idle_w) * seconds
        joules += extra_j
        spans.append((begin_s, now_s, extra_j))
        for asked_s in (now_s, now_s + later_s):
            inside = [max(0.0, min(end, asked_s) - max(begin, asked_s - window_s)) for begin, end, _ in spans]
            watts = sum(part / (end - begin) * extra for part, (begin, end, extra) in zip(inside, spans, strict=True))
            shares = stats.shares(asked_s)
            assert shares.busy == pytest.approx(sum(inside) / window_s, abs=1e-9)
            assert shares.watts == pytest.approx(power.idle_w + watts / window_s)
    assert stats.num_steps == len(steps)
    assert stats.busy_s == pytest.approx(sum(step[0] for step in steps))
    assert stats.joules(now_s) == pytest.approx(power.idle_w * now_s + joules)


def test_a_gpu_that_decodes_all_the_time_is_busy_and_one_that_waits_draws_idle_power():
    profile = load_profile(DEFAULT)
    stats = StepStats(profile, 1.0, {})
    for number in range(1, 201):
        stats.add(Step(0.01, Schedule([], True, decode_load(64, 1000))), number * 0.01)
    shares = stats.shares(2.0)
    assert shares.busy == pytest.approx(1.0)
    bytes_read = GpuWork(profile.roofline).of(decode_load(64, 1000)).dram_bytes
    assert shares.dram == pytest.approx(bytes_read / 0.01 / profile.datasheet.memory_bytes_per_s)
    assert stats.shares(2.5).busy == pytest.approx(0.5)
    idle = stats.shares(3.5)
    assert (idle.busy, idle.watts) == (0.0, GPU_POWER["h100-sxm"].idle_w)
    busy_j = stats.joules(2.0)
    assert busy_j == pytest.approx(2 * shares.watts)
    assert stats.joules(5.0) - busy_j == pytest.approx(3 * GPU_POWER["h100-sxm"].idle_w)


def collector_of(profile_name, num_ranks=1, now_s=2.0):
    engine = build_engine(EngineSettings(profile=profile_name))
    ranks = [StepStats(engine.profile, 1.0, {}) for _ in range(num_ranks)]
    for number, rank in enumerate(ranks):  # busy for 1/2 of the last second, 1/4, 1/8...
        rank.add(Step(0.5 ** (number + 1), Schedule([], True, decode_load(64, 1000))), now_s)
    return DcgmCollector(engine, ranks, [SimpleNamespace(speedup_ratio=1.0, now_s=lambda: now_s)] * num_ranks, "1f")


def text_of(collector):
    registry = CollectorRegistry(auto_describe=False)
    registry.register(collector)
    return generate_latest(registry).decode()


@pytest.mark.parametrize(
    ("profile_name", "num_ranks", "num_gpus"), [(DEFAULT, 1, 1), (DEFAULT, 3, 3), (MEASURED, 2, 16)]
)
def test_aiperf_reads_every_field_it_knows_of_every_gpu(profile_name, num_ranks, num_gpus):
    constants = pytest.importorskip("aiperf.gpu_telemetry.constants")
    from aiperf.gpu_telemetry.dcgm_collector import DCGMTelemetryCollector

    text = text_of(collector_of(profile_name, num_ranks))
    records = DCGMTelemetryCollector("http://127.0.0.1:1/metrics")._parse_metrics_to_records(text)
    assert [record.gpu_index for record in records] == list(range(num_gpus))
    assert len({record.gpu_uuid for record in records}) == num_gpus
    for record in records:
        assert uuid.UUID(record.gpu_uuid.removeprefix("GPU-"))
        assert record.gpu_model_name.startswith("NVIDIA ")
        values = record.telemetry_data.model_dump(exclude_none=True)
        assert values.keys() >= set(constants.DCGM_TO_FIELD_MAPPING.values())
        rank = record.gpu_index // (num_gpus // num_ranks)
        assert values["nvidia_sm_utilization"] == pytest.approx(100 * 0.5 ** (rank + 1))
        assert values["nvidia_gpu_utilization"] == round(100 * 0.5 ** (rank + 1))


@given(profile_name=st.sampled_from(list_profiles()))
@settings(max_examples=20)
def test_memory_adds_up_and_an_engine_takes_about_the_share_it_may(profile_name):
    values = {}
    for family in collector_of(profile_name).collect():
        values[family.name] = family.samples[0].value
    used, free, total = (values[f"DCGM_FI_DEV_FB_{part}"] for part in ("USED", "FREE", "TOTAL"))
    assert used + free == total
    assert 0.5 < used / total < 0.95


def test_the_endpoint_answers_head_and_get_on_one_connection():
    server = DcgmServer(collector_of(DEFAULT), "127.0.0.1", 0)
    try:
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        for method in ("HEAD", "GET"):
            connection.request(method, "/metrics")
            response = connection.getresponse()
            assert response.status == 200
            body = response.read()
            assert (b"DCGM_FI_DEV_GPU_UTIL{" in body) == (method == "GET")
        connection.close()
        with pytest.raises(ConfigError, match="--dcgm-port"):
            DcgmServer(collector_of(DEFAULT), "127.0.0.1", server.port)
    finally:
        server.stop()
