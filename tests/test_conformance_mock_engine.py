"""MockLLMEngine is held against the rules itself, MUST and SHOULD, as its users hold theirs."""

from __future__ import annotations

import pytest

from conformance.catalogue import load_catalogue
from conformance.selftest.kill import verdicts_of
from conformance.settings import SuiteSettings
from conformance.verdict import Outcome

ENGINE = "mock_engine:MockLLMEngine"


@pytest.mark.parametrize(
    ("driver", "engine_args"),
    [
        ("plain", "--speedup-ratio 100"),
        ("bridge", "--speedup-ratio 100"),
        pytest.param(
            "bridge",
            "--speedup-ratio 0 --num-gpu-blocks-override 40 --max-model-len 512 --data-parallel-size 2",
            id="bridge-tight",
        ),
        pytest.param("worker", "--speedup-ratio 100", marks=pytest.mark.e2e),
    ],
)
def test_the_mock_engine_keeps_every_rule(driver, engine_args):
    settings = SuiteSettings(ENGINE, engine_args, driver, max_examples=8, seed=1)
    verdicts = list(verdicts_of(settings, load_catalogue().values()))
    broken = {verdict.rule.id: verdict.finding.message for verdict in verdicts if verdict.outcome is Outcome.FAILED}
    assert not broken
    num_passed = sum(verdict.outcome is Outcome.PASSED for verdict in verdicts)
    assert num_passed >= (20 if driver == "worker" else 60)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_prefill_and_a_decode_worker_keep_the_rules_that_roles_touch(role):
    """Hand-over, draining, and what is left of requests that end in whatever way."""
    areas = ("abort.", "cancel.", "disagg.", "drain.", "drop.", "err.", "life.")
    settings = SuiteSettings(ENGINE, f"--disaggregation-mode {role} --speedup-ratio 100", max_examples=4, seed=1)
    rules = [rule for rule in load_catalogue().values() if rule.id.startswith(areas)]
    verdicts = list(verdicts_of(settings, rules))
    assert not {verdict.rule.id: verdict.finding.message for verdict in verdicts if verdict.outcome is Outcome.FAILED}
    passed = {verdict.rule.id for verdict in verdicts if verdict.outcome is Outcome.PASSED}
    wanted = ("prefill_one", "prefill_params") if role == "prefill" else ("decode_requires",)
    assert {"disagg.handoff", *(f"disagg.{name}" for name in wanted)} <= passed
