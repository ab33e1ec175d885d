"""Objectives have units, and a request is good when AIPerf says so."""

from __future__ import annotations

from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mock_engine.aiperf_schema import REQUEST_METRICS
from mock_engine.errors import ConfigError
from mock_engine.slos import Slo, meets_all, parse_slos, to_aiperf_goodput
from tests.test_aiperf_schema import make_finished


@pytest.mark.parametrize(
    ("text", "slos"),
    [
        ("time_to_first_token:200ms", [Slo("time_to_first_token", 200.0)]),
        ("time_to_first_token:.2s", [Slo("time_to_first_token", 200.0)]),
        (" request_latency:1e3ms\tdecode_duration:2.5ms ", [Slo("request_latency", 1e3), Slo("decode_duration", 2.5)]),
        ("output_token_throughput_per_user:60tokens/sec/user", [Slo("output_token_throughput_per_user", 60.0)]),
        ("output_token_throughput_per_user:60tokens/s", [Slo("output_token_throughput_per_user", 60.0)]),
    ],
)
def test_an_objective_is_a_metric_a_number_and_a_unit(text, slos):
    assert list(parse_slos(text)) == slos


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param("", "is empty", id="nothing"),
        pytest.param(" ", "is empty", id="only a space"),
        pytest.param("time_to_first_token:200", "no unit.*Write time_to_first_token:200ms, if", id="no unit"),
        pytest.param("output_token_throughput_per_user:9", "per_user:9tokens/sec/user, if", id="no unit of a rate"),
        pytest.param("time_to_first_token:2us", "unit 'us'; allowed .*: ms, s", id="another unit"),
        pytest.param("time_to_first_token:2tokens/s", "allowed .*: ms, s", id="the unit of another metric"),
        pytest.param("ttft:200ms", "metric 'ttft'; allowed are time_to_first_token, ", id="unknown metric"),
        pytest.param("request_count:2ms", "metric 'request_count'; allowed", id="a metric of the run"),
        pytest.param("time_to_first_token", "not metric:value", id="no value"),
        pytest.param("time_to_first_token:", "'' is not a number and a unit", id="empty value"),
        pytest.param("time_to_first_token:ms", "'ms' is not a number", id="only a unit"),
        pytest.param("time_to_first_token:nanms", "'nanms' is not a number", id="not a number"),
        pytest.param("time_to_first_token:-1ms", "-1 is out of range.*above 0", id="negative"),
        pytest.param("time_to_first_token:0ms", "0 is out of range", id="zero"),
        pytest.param("time_to_first_token:1e999s", "1e999 is out of range", id="infinite"),
        pytest.param("time_to_first_token:1ms,request_latency:2ms", "unit 'ms,request", id="commas"),
        pytest.param("request_latency:1s request_latency:1ms", "request_latency 2 times", id="twice"),
    ],
)
def test_anything_else_is_refused_with_what_to_write(text, words):
    with pytest.raises(ConfigError, match=f"^--goodput .*{words}") as error:
        parse_slos(text)
    assert "\n" not in str(error.value)


@given(
    bounds=st.dictionaries(
        st.sampled_from(["time_to_first_token", "inter_token_latency", "output_token_throughput_per_user"]),
        st.decimals("0.001", "1e6", places=3),
        min_size=1,
    ),
)
def test_aiperf_reads_the_same_bounds_from_its_own_spelling(bounds):
    text = " ".join(f"{name}:{bound}{'tokens/s' if 'user' in name else 'ms'}" for name, bound in bounds.items())
    slos = parse_slos(text)
    spelled = to_aiperf_goodput(slos)
    assert dict(item.split(":") for item in spelled.split()).keys() == bounds.keys()
    assert {name: Decimal(value) for name, value in (item.split(":") for item in spelled.split())} == bounds
    parsing = pytest.importorskip("aiperf.config.loader.parsing")
    assert parsing.parse_str_as_numeric_dict(spelled) == {slo.metric: slo.value for slo in slos}


def test_a_request_is_good_if_it_meets_all_objectives():
    finished = make_finished([2, 5, 11], ttft_s=0.2, itl_s=0.02)
    assert meets_all((), finished).tolist() == [True, True, True]
    assert meets_all(parse_slos("time_to_first_token:200ms"), finished).all()  # at the bound is within it
    assert not meets_all(parse_slos("time_to_first_token:199.999999ms"), finished).any()
    slos = parse_slos("time_to_first_token:.2s request_latency:.28s")
    assert meets_all(slos, finished).tolist() == [True, True, False]


def test_more_tokens_a_second_are_better():
    finished = make_finished([5], itl_s=0.02)
    assert meets_all(parse_slos("output_token_throughput_per_user:50tokens/s"), finished).all()
    assert not meets_all(parse_slos("output_token_throughput_per_user:50.01tokens/s"), finished).any()


def test_a_request_without_a_value_is_not_good():
    assert meets_all(parse_slos("inter_token_latency:1s"), make_finished([1, 2])).tolist() == [False, True]


SLOS = "time_to_first_token:200ms inter_token_latency:11ms output_token_throughput_per_user:95tokens/s"


def test_aiperf_finds_the_same_requests_good():
    good_class = pytest.importorskip("aiperf.metrics.types.good_request_count_metric").GoodRequestCountMetric
    record_dict = pytest.importorskip("aiperf.metrics.metric_dicts").MetricRecordDict
    slos = parse_slos(SLOS)
    good_class.set_slos({slo.metric: slo.value for slo in slos})
    try:
        found = set()
        for ttft_s in (0.15, 0.2, 0.200001):
            for itl_s in (0.009, 0.0105, 0.0108, 0.011, 0.012):
                for osl in (1, 2, 30):
                    finished = make_finished([osl], ttft_s, itl_s)
                    record = {
                        name: float(values[0]) * (1e6 if metric.unit == "ms" else 1)
                        for name, metric in REQUEST_METRICS.items()
                        if not np.isnan((values := metric.values(finished))[0])
                    }
                    is_good = bool(meets_all(slos, finished)[0])
                    assert good_class()._is_good(record_dict(record)) == is_good, record
                    found.add(is_good)
        assert found == {True, False}
    finally:
        good_class.set_slos(None)
