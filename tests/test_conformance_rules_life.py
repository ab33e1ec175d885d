"""
The rules on leaving a request and ending an engine: cancel, abort, drop, life, drain.

Each broken engine is noticed by the rule that names it, the correct ones by none; pure checks are shown planted
violations; the scripts that findings come with fail for the broken engine and for no other.
"""

from __future__ import annotations

import asyncio
import importlib
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conformance import release
from conformance.catalogue import load_catalogue, select
from conformance.rules import abort, cancel, checks, drop, life
from conformance.selftest.kill import verdict_on, verdicts_of
from conformance.selftest.mutants import Mutant, mutants
from conformance.selftest.toy import ToyEngine, Work
from conformance.settings import Role, SuiteSettings
from conformance.streams import DriverName
from conformance.transcript import Event, Transcript, Violation
from conformance.verdict import Outcome
from conformance.wire import wire_request
from tests.helpers.broken_engines import is_installed, name_of, run_script, verdict_of_its_rule

AREAS = ("cancel", "abort", "drop", "life", "drain")
RULES = select(load_catalogue(), [f"{area}.*" for area in AREAS])
OURS = [mutant for mutant in mutants() if mutant.rule_id.partition(".")[0] in AREAS]
TOY = "conformance.selftest.toy:ToyEngine"
EVERYTHING = "--kv-events --metrics --logprobs --controls --logits"

# These engines leave tasks, coroutines and generators behind; that is what they are for.
pytestmark = [
    pytest.mark.usefixtures("quiet"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
    pytest.mark.filterwarnings("ignore:coroutine '.*' was never awaited:RuntimeWarning"),
]


@pytest.mark.parametrize("mutant", OURS, ids=name_of)
def test_a_broken_engine_is_noticed_by_the_rule_that_names_it(mutant: Mutant):
    verdict = verdict_of_its_rule(mutant)
    assert verdict.outcome is Outcome.FAILED, verdict.reason
    assert verdict.finding is not None
    assert len(verdict.finding.script.splitlines()) <= 25


def test_every_rule_that_is_checked_has_a_broken_engine():
    installed = {rule.id for rule in RULES if rule.is_in_release(release.dynamo_version())}
    assert checks().keys() & installed <= {mutant.rule_id for mutant in OURS}


class HastyToy(ToyEngine):
    """Whenever a second abort comes, the whole answer is on its way already: what is left of it, as one chunk."""

    num_aborts = 0

    def abort_work(self, work: Work) -> None:
        self.num_aborts += 1
        if self.num_aborts % 2:
            super().abort_work(work)
        elif not work.is_aborted:
            vars(work)["is_made"] = True

    def is_cancelled(self, work: Work, context: Any) -> bool:
        return "is_made" not in vars(work) and super().is_cancelled(work, context)

    def chunk(self, work: Work, token: int) -> dict[str, Any]:
        chunk = super().chunk(work, token)
        while "is_made" in vars(work) and len(work.output) < self.budget(work):
            work.output.append(self.next_token(work))
            chunk["token_ids"].append(work.output[-1])
        return chunk


@pytest.mark.parametrize(
    ("engine", "arguments", "role", "driver"),
    [
        (TOY, EVERYTHING, None, "bridge"),
        (TOY, EVERYTHING, None, "plain"),
        (TOY, "", "prefill", "bridge"),
        (TOY, "", "decode", "bridge"),
        (TOY, "", "encode", "bridge"),
        ("conformance.selftest.toy:ToyWithoutProbe", "--max-num-seqs 1", None, "bridge"),
        ("conformance.selftest.toy:ToyWithChoices", "--logprobs", None, "bridge"),
        ("tests.test_conformance_rules_life:HastyToy", "", None, "bridge"),
    ],
)
def test_a_correct_engine_is_not_blamed(engine: str, arguments: str, role: Role | None, driver: DriverName):
    settings = SuiteSettings(engine, arguments, driver, role, seed=2, max_examples=6)
    found = {verdict.rule.id: verdict.finding.message for verdict in verdicts_of(settings, RULES) if verdict.finding}
    assert not found


# Planted violations.


TOKEN = {"token_ids": [7], "index": 0}
CANCELLED = {"token_ids": [], "index": 0, "finish_reason": "cancelled"}
LENGTH = {**TOKEN, "finish_reason": "length"}
WITHIN_S = 1.0


def transcript(*what: Any, step_s: float = 0.1) -> Transcript:
    """Texts are events without a value, exceptions errors, and dictionaries chunks; one every `step_s`."""
    events = []
    for i, one in enumerate(what):
        is_chunk, is_error = isinstance(one, dict), isinstance(one, BaseException)
        kind = "chunk" if is_chunk else "error" if is_error else one
        events.append(Event(i * step_s, kind, one if is_chunk or is_error else None))
    return Transcript("r1", wire_request([1, 2], max_tokens=50), events)


STOPPED = transcript(TOKEN, "stop", TOKEN, CANCELLED, "end")
WHOLE = transcript(TOKEN, TOKEN, LENGTH, "end")


def cancelled_of(broken: Transcript) -> None:
    cancel.cancelled_of(broken, WITHIN_S)


def race_last_of(broken: Transcript) -> None:
    cancel.race_last_of(broken, WITHIN_S)


def blocked_of(broken: Transcript) -> None:
    cancel.blocked_of(broken, WITHIN_S, 0)


def abort_path_of(broken: Transcript) -> None:
    cancel.abort_path_of(STOPPED, broken, WITHIN_S)


def killed_of(broken: Transcript) -> None:
    cancel.killed_of(broken, WITHIN_S)


def after_terminal_of(broken: Transcript) -> None:
    cancel.after_terminal_of(broken, "at once", [])


def by_id_of(broken: Transcript) -> None:
    abort.by_id_of(STOPPED, broken, WITHIN_S)


def unharmed_of(broken: Transcript) -> None:
    abort.unharmed_of(broken, WHOLE, ["r2"])


def twice_of(broken: Transcript) -> None:
    abort.twice_of(broken, WITHIN_S, 2, at_once=True)


def task_cancel_of(broken: Transcript) -> None:
    drop.task_cancel_of(broken, 1)


def inflight_of(broken: Transcript) -> None:
    life.inflight_of(broken, WITHIN_S)


def generate_after_of(broken: Transcript) -> None:
    life.generate_after_of(broken, "after cleanup")


@pytest.mark.parametrize(
    ("check", "broken"),
    [
        pytest.param(cancelled_of, transcript(TOKEN, "stop", TOKEN, TOKEN, CANCELLED, "end"), id="two more chunks"),
        pytest.param(cancelled_of, transcript(TOKEN, "stop", LENGTH, "end"), id="ends as if it were whole"),
        pytest.param(cancelled_of, transcript(TOKEN, "stop", "end"), id="ends without a word"),
        pytest.param(cancelled_of, transcript(TOKEN, "stop", "hang"), id="never ends"),
        pytest.param(cancelled_of, transcript(TOKEN, "stop", RuntimeError("stopped")), id="raises"),
        pytest.param(cancelled_of, transcript(TOKEN, "stop", CANCELLED, "end", step_s=2.0), id="late"),
        pytest.param(race_last_of, transcript(TOKEN, "stop", LENGTH, CANCELLED, "end"), id="ends twice"),
        pytest.param(race_last_of, transcript(TOKEN, "stop", TOKEN, "end"), id="ends without a terminal"),
        pytest.param(race_last_of, transcript("stop", {**TOKEN, "finish_reason": "error"}, "end"), id="ends as error"),
        pytest.param(race_last_of, transcript("stop", KeyError("r1")), id="raises in the race"),
        pytest.param(blocked_of, transcript("abort", CANCELLED, "end", step_s=2.0), id="late in a step"),
        pytest.param(blocked_of, transcript("abort", {**CANCELLED, "finish_reason": "stop"}, "end"), id="as stop"),
        pytest.param(blocked_of, transcript("stop", OSError("gone")), id="raises in a step"),
        pytest.param(abort_path_of, transcript(TOKEN, "stop", "abort", LENGTH, "end"), id="abort makes it whole"),
        pytest.param(abort_path_of, transcript(TOKEN, "stop", "abort", "end"), id="abort eats the terminal"),
        pytest.param(abort_path_of, transcript(TOKEN, "stop", "abort", KeyError("r1")), id="abort makes it raise"),
        pytest.param(abort_path_of, transcript(TOKEN, "stop", "abort", "hang"), id="abort makes it hang"),
        pytest.param(cancel.usage_of, transcript(TOKEN, "stop", CANCELLED, "end"), id="usage missing"),
        pytest.param(
            cancel.usage_of,
            transcript(TOKEN, "stop", {**CANCELLED, "completion_usage": {"completion_tokens": 2}}, "end"),
            id="usage counts what was not sent",
        ),
        pytest.param(killed_of, transcript("kill", LENGTH, "end"), id="killed, and whole"),
        pytest.param(killed_of, transcript("kill", CANCELLED, "end", step_s=2.0), id="killed, and late"),
        pytest.param(killed_of, transcript("kill", "end"), id="killed, and silent"),
        pytest.param(after_terminal_of, transcript(LENGTH, "stop", CANCELLED, "end"), id="speaks after the end"),
        pytest.param(after_terminal_of, transcript(LENGTH, "abort", KeyError("r1")), id="raises after the end"),
        pytest.param(by_id_of, transcript(TOKEN, "abort", LENGTH, "end"), id="abort by object"),
        pytest.param(by_id_of, transcript(TOKEN, "abort", CANCELLED, "end", step_s=2.0), id="abort takes long"),
        pytest.param(unharmed_of, transcript(TOKEN, CANCELLED, "end"), id="another's abort cancels"),
        pytest.param(unharmed_of, transcript(TOKEN, LENGTH, "end"), id="another's abort shortens"),
        pytest.param(unharmed_of, transcript(TOKEN, "hang"), id="another's abort stalls"),
        pytest.param(unharmed_of, transcript(TOKEN, KeyError("r2")), id="another's abort raises"),
        pytest.param(
            twice_of, transcript(TOKEN, "abort", "abort", CANCELLED, KeyError("r1")), id="second abort raises"
        ),
        pytest.param(twice_of, transcript(TOKEN, "abort", "abort", LENGTH, "end"), id="second abort undoes"),
        pytest.param(
            drop.closed_of, transcript(TOKEN, "drop", RuntimeError("ignored GeneratorExit")), id="aclose raises"
        ),
        pytest.param(task_cancel_of, transcript(TOKEN, "cancel", TOKEN, TOKEN, LENGTH, "end"), id="not cancelled"),
        pytest.param(task_cancel_of, transcript(TOKEN, "cancel", RuntimeError("cancelled")), id="another error"),
        pytest.param(task_cancel_of, transcript(TOKEN, "cancel", "hang"), id="swallowed"),
        pytest.param(inflight_of, transcript(TOKEN, "cleanup", "hang"), id="hangs after cleanup"),
        pytest.param(inflight_of, transcript(TOKEN, "cleanup", "end"), id="silent after cleanup"),
        pytest.param(inflight_of, transcript(TOKEN, "cleanup", AttributeError("x")), id="bare error after cleanup"),
        pytest.param(generate_after_of, transcript("hang"), id="generate after cleanup hangs"),
    ],
)
def test_a_planted_violation_is_seen(check: Any, broken: Transcript):
    with pytest.raises(Violation):
        check(broken)


CancelledByEngine = release.exceptions("Cancelled")


@pytest.mark.parametrize(
    ("check", "good"),
    [
        pytest.param(cancelled_of, STOPPED, id="one more chunk, and cancelled"),
        pytest.param(cancelled_of, transcript("stop", {**CANCELLED, "finish_reason": "abort"}, "end"), id="abort"),
        pytest.param(race_last_of, transcript(TOKEN, "stop", LENGTH, "end"), id="whole"),
        pytest.param(race_last_of, transcript(TOKEN, "stop", CANCELLED, "end"), id="cancelled"),
        pytest.param(blocked_of, transcript("abort", CANCELLED, "end"), id="cancelled in a step"),
        pytest.param(abort_path_of, transcript(TOKEN, "stop", "abort", CANCELLED, "end"), id="as stopped alone"),
        pytest.param(
            cancel.usage_of,
            transcript(TOKEN, "stop", {**CANCELLED, "completion_usage": {"completion_tokens": 1}}, "end"),
            id="usage",
        ),
        pytest.param(killed_of, transcript("kill", CANCELLED, "end"), id="killed"),
        pytest.param(after_terminal_of, transcript(LENGTH, "stop", "end"), id="nothing after the end"),
        pytest.param(by_id_of, transcript(TOKEN, "abort", CANCELLED, "end"), id="abort by id"),
        pytest.param(unharmed_of, WHOLE, id="unharmed"),
        pytest.param(twice_of, transcript(TOKEN, "abort", "abort", CANCELLED, "end"), id="aborted twice"),
        pytest.param(drop.closed_of, transcript(TOKEN, "drop", "end"), id="closed"),
        pytest.param(drop.closed_of, transcript(ValueError("long"), "drop"), id="raised before it was closed"),
        pytest.param(task_cancel_of, transcript(TOKEN, "cancel", asyncio.CancelledError()), id="CancelledError"),
        pytest.param(task_cancel_of, transcript(TOKEN, "cancel", LENGTH, "end"), id="its last chunk was made"),
        pytest.param(inflight_of, transcript(TOKEN, "cleanup", CANCELLED, "end"), id="cancelled by cleanup"),
        *(
            pytest.param(check, transcript(TOKEN, event, kind("gone")), id=f"{kind.__name__} after {event}")
            for check, event in ((cancelled_of, "stop"), (killed_of, "kill"))
            for kind in CancelledByEngine
        ),
        *(
            pytest.param(inflight_of, transcript(TOKEN, "cleanup", kind("down")), id=kind.__name__)
            for kind in release.exceptions("EngineShutdown")
        ),
    ],
)
def test_what_keeps_the_rule_is_not_blamed(check: Any, good: Transcript):
    check(good)


@given(before=st.integers(0, 5), after=st.integers(0, 5))
def test_at_most_one_chunk_of_tokens_follows_a_stop(before: int, after: int):
    stopped = transcript(*[TOKEN] * before, "stop", *[TOKEN] * after, CANCELLED, "end", step_s=0.01)
    if after <= 1:
        cancelled_of(stopped)
    else:
        with pytest.raises(Violation, match=f"after the stop {after} more chunks"):
            cancelled_of(stopped)


@given(n=st.integers(1, 4), before=st.integers(0, 12), after=st.integers(1, 12))
def test_an_answer_was_there_before_the_stop_if_what_follows_was_sent_or_ready(n: int, before: int, after: int):
    """Chunks of tokens that were made before are sent one for each choice; a second round is what was ready then."""
    stopped = transcript(*[TOKEN] * before, "stop", *[TOKEN] * (after - 1), LENGTH, "end")
    request = wire_request([1, 2], max_tokens=1, sampling={"n": n})
    whole = Transcript("r1", {**request, "stop_conditions": {"max_tokens": (before + after) // n}}, stopped.events)
    bench: Any = SimpleNamespace(facts=SimpleNamespace(role="agg"))
    assert cancel.is_complete(bench, whole) == (after <= 2 * n)


@pytest.mark.parametrize("level", ["WARNING", "ERROR", "CRITICAL"])
def test_a_late_stop_may_be_logged_but_not_as_an_error(level: str):
    late = transcript(LENGTH, "stop", "end")
    if level == "WARNING":
        cancel.after_terminal_of(late, "later", [f"{level} engine: unknown request"])
    else:
        with pytest.raises(Violation, match="is logged as"):
            cancel.after_terminal_of(late, "later", [f"{level} engine: unknown request"])


def test_what_the_interpreter_says_of_a_dropped_stream_is_a_finding():
    drop.unraisable_of([], WHOLE, 1)
    with pytest.raises(Violation, match="call_soon_threadsafe"):
        drop.unraisable_of(["RuntimeError: Non-thread-safe operation invoked"], WHOLE, 1)


# The scripts.


def one_of_each_rule() -> list[Mutant]:
    """The first mutant of each rule that this release has; not the one whose script waits for half a minute."""
    first: dict[str, Mutant] = {}
    for mutant in OURS:
        if is_installed(mutant) and mutant.name != "CleanupWaitsForRequests":
            first.setdefault(mutant.rule_id, mutant)
    return list(first.values())


def correct_parent(mutant: Mutant) -> str:
    """The engine that it breaks, as module:Class."""
    module, _, name = mutant.engine.partition(":")
    kinds = getattr(importlib.import_module(module), name).__mro__
    broken = {each.engine for each in mutants()}
    return next(each for each in (f"{kind.__module__}:{kind.__name__}" for kind in kinds) if each not in broken)


@pytest.mark.parametrize("mutant", one_of_each_rule(), ids=name_of)
def test_the_script_of_a_finding_fails_for_the_broken_engine_and_for_no_other(mutant: Mutant):
    finding = verdict_on(mutant, seed=1).finding
    assert finding is not None
    broken = run_script(finding.script)
    assert broken.returncode != 0, broken.stdout
    if "engine.events" in finding.script:
        return  # it looks at an attribute that only the broken engine has
    script = finding.script
    for ours, other in zip(mutant.engine.split(":"), correct_parent(mutant).split(":"), strict=True):
        script = script.replace(ours, other)
    done = run_script(script)
    assert done.returncode == 0, f"{done.stderr}\n{script}"
