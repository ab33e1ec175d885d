"""
The rules on what `generate` yields and on errors: each broken engine is noticed, no correct one is blamed.

Pure checks are shown planted violations; some of the scripts that findings come with are run.
"""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conformance import release
from conformance.catalogue import load_catalogue, select
from conformance.rules import checks, err, gen
from conformance.selftest.kill import verdict_on, verdicts_of
from conformance.selftest.mutants import Mutant, mutants
from conformance.settings import Role, SuiteSettings
from conformance.transcript import Event, Transcript, Violation
from conformance.verdict import Outcome
from conformance.wire import wire_request
from tests.helpers.broken_engines import name_of, run_script, verdict_of_its_rule

AREAS = ["gen.*", "err.*"]
RULES = select(load_catalogue(), AREAS)
OURS = [mutant for mutant in mutants() if mutant.rule_id.partition(".")[0] in ("gen", "err")]
TOY = "conformance.selftest.toy:ToyEngine"
EVERYTHING = "--kv-events --metrics --logprobs --controls --logits"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # they are broken, after all
@pytest.mark.parametrize("mutant", OURS, ids=name_of)
def test_a_broken_engine_is_noticed_by_the_rule_that_names_it(mutant: Mutant):
    verdict = verdict_of_its_rule(mutant)
    assert verdict.outcome is Outcome.FAILED, verdict.reason


def test_every_rule_that_is_checked_has_a_broken_engine():
    checked = {rule_id for rule_id in checks() if rule_id.partition(".")[0] in ("gen", "err")}
    assert checked == {mutant.rule_id for mutant in OURS}


@pytest.mark.parametrize(
    ("engine", "arguments", "role"),
    [
        (TOY, EVERYTHING, None),
        (TOY, "", "prefill"),
        (TOY, "", "decode"),
        (TOY, "", "encode"),
        ("conformance.selftest.toy:ToyWithoutProbe", "--max-num-seqs 1", None),
        ("conformance.selftest.toy:ToyWithChoices", "--logprobs", None),
    ],
)
def test_a_correct_engine_is_not_blamed(engine: str, arguments: str, role: Role | None):
    settings = SuiteSettings(engine, arguments, "bridge", role, seed=2, max_examples=6)
    found = {verdict.rule.id: verdict.finding.message for verdict in verdicts_of(settings, RULES) if verdict.finding}
    assert not found


def test_a_plain_async_for_is_not_blamed_either():
    settings = SuiteSettings(TOY, EVERYTHING, "plain", seed=3, max_examples=6)
    assert not [verdict.rule.id for verdict in verdicts_of(settings, RULES) if verdict.finding]


# Planted violations.


def transcript(*chunks: Any, error: BaseException | None = None, stopped: bool = False, budget: int = 4) -> Transcript:
    events = [Event(0.0, "stop")] if stopped else []
    events += [Event(0.1, "chunk", chunk) for chunk in chunks]
    events.append(Event(0.2, "end") if error is None else Event(0.2, "error", error))
    return Transcript("r1", wire_request([1, 2], max_tokens=budget), events)


PLAIN = {"token_ids": [7], "index": 0}
USAGE = {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4}
LAST = {**PLAIN, "finish_reason": "length", "completion_usage": USAGE}

Pure = Callable[[Transcript], None]


@pytest.mark.parametrize(
    ("check", "broken"),
    [
        pytest.param(gen.terminal_once_of, transcript(PLAIN, PLAIN), id="never finished"),
        pytest.param(gen.terminal_once_of, transcript(LAST, PLAIN), id="kept talking after the end"),
        pytest.param(gen.terminal_once_of, transcript(LAST, LAST), id="finished twice"),
        pytest.param(gen.terminal_once_of, transcript(LAST, error=RuntimeError()), id="raised after the end"),
        pytest.param(gen.nonempty_of, transcript(), id="no chunk at all"),
        pytest.param(gen.finish_reason_of, transcript({**LAST, "finish_reason": "canceled"}), id="canceled"),
        pytest.param(gen.finish_reason_of, transcript({**PLAIN, "finish_reason": ""}), id="empty reason"),
        pytest.param(gen.chunk_mapping_of, transcript([7]), id="a list"),
        pytest.param(gen.chunk_mapping_of, transcript({"index": 0}), id="no token_ids"),
        pytest.param(gen.token_ids_of, transcript({**PLAIN, "token_ids": "12"}), id="text"),
        pytest.param(gen.token_ids_of, transcript({**PLAIN, "token_ids": {1: 2}.keys()}), id="keys of a dict"),
        pytest.param(gen.token_ids_of, transcript({**PLAIN, "token_ids": [2**32]}), id="beyond 32 bits"),
        pytest.param(gen.index_of, transcript({"token_ids": []}), id="no index"),
        pytest.param(gen.index_of, transcript({**PLAIN, "index": True}), id="a bool as index"),
        pytest.param(gen.known_keys_of, transcript({**PLAIN, "logprobs": [0.0]}), id="unknown key"),
        pytest.param(gen.json_safe_of, transcript({**PLAIN, "engine_data": {"a": [b""]}}), id="bytes"),
        pytest.param(gen.json_safe_of, transcript({**PLAIN, "extra_args": {1: 2}}), id="int key"),
        pytest.param(gen.usage_arith_of, transcript(LAST), id="usage counts another token"),
        pytest.param(
            gen.usage_single_of,
            transcript({**PLAIN, "completion_usage": {**USAGE, "completion_tokens": 1}}, PLAIN, PLAIN),
            id="usage of one choice",
        ),
        pytest.param(err.no_evict_of, transcript(error=GeneratorExit()), id="GeneratorExit"),
        pytest.param(err.no_bare_error_chunk_of, transcript({**PLAIN, "finish_reason": "error"}), id="error"),
        pytest.param(err.no_bare_error_chunk_of, transcript({**PLAIN, "finish_reason": "abort"}), id="nobody stopped"),
        pytest.param(err.typed_for_client_of, transcript(error=KeyError("n")), id="KeyError for the client"),
        pytest.param(err.typed_for_engine_of, transcript(error=TypeError("bug")), id="TypeError for a bug"),
    ],
)
def test_a_planted_violation_is_seen(check: Any, broken: Transcript):
    words = ("a request",) if check.__module__.endswith("err") else ()
    with pytest.raises(Violation):
        check(broken, *words)


@pytest.mark.parametrize(
    "check",
    [
        gen.terminal_once_of,
        gen.nonempty_of,
        gen.finish_reason_of,
        gen.chunk_mapping_of,
        gen.token_ids_of,
        gen.index_of,
        gen.known_keys_of,
        gen.json_safe_of,
        gen.usage_arith_of,
        gen.usage_single_of,
    ],
)
@given(shape=st.sampled_from([list, tuple, set, frozenset, bytes]), tokens=st.sets(st.integers(0, 255), max_size=5))
def test_a_good_conversation_is_not_blamed_however_its_tokens_are_held(check: Pure, shape: Any, tokens: set[int]):
    usage = {"prompt_tokens": 2, "completion_tokens": len(tokens) + 1, "total_tokens": len(tokens) + 3}
    last = {**PLAIN, "finish_reason": "stop", "completion_usage": usage, "engine_data": {"a": [1, 0.5, None]}}
    check(transcript({"token_ids": shape(tokens), "index": 0}, last))


@given(parts=st.lists(st.integers(1, 4), min_size=1, max_size=6))
def test_one_token_over_and_over_is_not_taken_for_cumulative(parts: list[int]):
    chunks = [{"token_ids": [7] * part, "index": 0} for part in parts]
    gen.delta_not_cumulative_of(transcript(*chunks), sum(parts))


@given(tokens=st.lists(st.integers(0, 9), min_size=3, max_size=9))
def test_cumulative_tokens_are_seen_whatever_they_are(tokens: list[int]):
    chunks = [{"token_ids": tokens[: i + 1], "index": 0} for i in range(len(tokens))]
    with pytest.raises(Violation):
        gen.delta_not_cumulative_of(transcript(*chunks), len(tokens))


@pytest.mark.parametrize("reason", ["cancelled", "abort"])
def test_a_request_that_was_stopped_may_end_as_cancelled(reason: str):
    err.no_bare_error_chunk_of(transcript({**PLAIN, "finish_reason": reason}, stopped=True), "a request")


@pytest.mark.parametrize(
    "error", [ValueError("n"), TypeError("n"), *(kind("n") for kind in release.exceptions("Unknown"))]
)
def test_errors_are_sorted_by_whom_they_blame(error: Exception):
    blames_client = isinstance(error, ValueError | TypeError)
    for check, is_right in ((err.typed_for_client_of, blames_client), (err.typed_for_engine_of, not blames_client)):
        if is_right:
            check(transcript(error=error), "a request")
        else:
            with pytest.raises(Violation):
                check(transcript(error=error), "a request")


# The scripts.


@pytest.mark.parametrize(
    "name",
    [
        "NoFinishReason",
        "OneTokenTooMany",
        "OutputIsAppended",
        "KeyErrorForLongPrompt",
        "AllIsInvalid",
        "FailedKeepsPlace",
        "LongPromptEndsEngine",
    ],
)
def test_the_script_of_a_finding_fails_for_the_broken_engine_and_for_no_other(name: str):
    mutant = next(mutant for mutant in OURS if mutant.name == name)
    finding = verdict_on(mutant, seed=1).finding
    assert finding is not None
    script = finding.script
    assert len(script.splitlines()) <= 25
    broken = run_script(script)
    assert broken.returncode != 0, broken.stdout
    module = mutant.engine.partition(":")[0]
    correct = script.replace(module, "conformance.selftest.toy").replace(name, "ToyEngine")
    done = run_script(correct)
    assert done.returncode == 0, done.stderr
