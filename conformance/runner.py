"""
One rule, held against one engine: draws examples, shrinks what fails, says a verdict.

    bench = Bench(settings, find_facts(settings))
    verdict = judge_rule(bench, load_catalogue()["cancel.mid"])
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, Verbosity
from hypothesis import strategies as st
from hypothesis.errors import (
    DidNotReproduce,
    FailedHealthCheck,
    Flaky,
    HypothesisException,
    InvalidArgument,
    Unsatisfiable,
    UnsatisfiedAssumption,
)
from hypothesis.internal.conjecture import engine as conjecture
from hypothesis.stateful import run_state_machine_as_test

from conformance.bench import Bench
from conformance.catalogue import Rule
from conformance.deviations import why_unreadable
from conformance.release import dynamo_version
from conformance.reproducer import reproducing_script
from conformance.rules import UNCHECKABLE, Check, checks
from conformance.runner_errors import NotHere
from conformance.settings import ROLES, SuiteError
from conformance.transcript import Violation
from conformance.verdict import Finding, Outcome, Verdict

MOST_EXAMPLES = 30  # a rule
FEWEST_EXAMPLES = 8
_REAL_S = 1.5  # in real time, about so long for the examples of a rule
_SHRINKING_S = 20  # real seconds; Hypothesis itself would take up to 300
_BLOB = re.compile(r"@reproduce_failure\('([^']+)', b'([^']*)'\)")
_BEFORE_REQUESTS = frozenset({"args", "sig", "start"})  # areas that say something of an engine that does not start
_APPLIES_TO_ROLES = frozenset(ROLES)


@dataclass
class _Tries:
    """What happened in all examples of one rule."""

    num: int = 0
    failure: BaseException | None = None
    transcripts: list[Any] = field(default_factory=list)


def judge_rule(bench: Bench, rule: Rule, *, example: tuple[str, str] | None = None, shrinks: bool = True) -> Verdict:
    """
    The verdict of one rule: passed, failed, skipped or unchecked.

    `example`: Hypothesis' release and blob of an example that failed before; only this one is tried.
    `shrinks`: make what fails as small as can be, which takes longer than to find it.
    Raises SuiteError if it was made by another release of Hypothesis.
    """
    began_s = time.perf_counter()
    check = checks().get(rule.id)
    if check is None:
        return Verdict(rule, Outcome.UNCHECKED, UNCHECKABLE.get(rule.id, "no check is written for it yet"))
    reason = why_not(bench, rule, check)
    if reason:
        return Verdict(rule, Outcome.SKIPPED, reason)
    tries = _Tries()
    try:
        _try_examples(bench, rule, check, tries, example, shrinks)
    except NotHere as error:
        return Verdict(rule, Outcome.SKIPPED, str(error), seconds=time.perf_counter() - began_s)
    except (HypothesisException, BaseExceptionGroup, Exception, SystemExit) as error:
        if isinstance(error, HypothesisException) and tries.failure is None:
            return _without_failure(rule, tries, error, example)
        finding = _finding(bench, rule, tries, error)
        return Verdict(
            rule,
            Outcome.FAILED,
            finding=finding,
            num_examples=tries.num,
            seconds=time.perf_counter() - began_s,
        )
    return Verdict(rule, Outcome.PASSED, num_examples=tries.num, seconds=time.perf_counter() - began_s)


def _without_failure(rule: Rule, tries: _Tries, error: HypothesisException, example: tuple[str, str] | None) -> Verdict:
    """Hypothesis gave up, and not because of the engine."""
    if example is not None and isinstance(error, DidNotReproduce):
        return Verdict(rule, Outcome.PASSED, num_examples=tries.num)
    if example is not None and isinstance(error, InvalidArgument):
        if why_unreadable(example):
            raise SuiteError(
                f"{rule.id}: the example {example[1]!r} cannot be read; copy it whole, as it was printed"
            ) from None
        raise SuiteError(
            f"{rule.id}: the pinned example was made by Hypothesis {example[0]}, and this is "
            f"{hypothesis.__version__}, or the check has changed since; run without it and pin the new one."
        ) from None
    if isinstance(error, Unsatisfiable | FailedHealthCheck):
        reason = f"none of {tries.num} examples came to what the rule is about"
        return Verdict(rule, Outcome.SKIPPED, reason, num_examples=tries.num)
    if isinstance(error, Flaky):
        reason = f"what could be tried depended on the engine's timing, and differed when it was tried again: {error}"
        return Verdict(rule, Outcome.SKIPPED, reason, num_examples=tries.num)
    raise error


def why_not(bench: Bench, rule: Rule, check: Check) -> str:
    """Why the rule cannot be looked at with this engine, driver and release; "" if it can."""
    facts, settings = bench.facts, bench.settings
    if not rule.is_in_release(dynamo_version()):
        span = f"from {rule.since}" if rule.since else ""
        span += f" up to {rule.until}" if rule.until else ""
        return f"holds {span.strip()}; ai-dynamo {dynamo_version()} is installed"
    roles = rule.applies & _APPLIES_TO_ROLES
    if roles and facts.role not in roles:
        return f"is for {', '.join(sorted(roles))} workers; this one is {facts.role}"
    for capability in (*sorted(rule.applies - _APPLIES_TO_ROLES - {"any"}), *check.needs):
        if not facts.has(capability):
            return facts.capabilities.get(capability, f"no: {facts.problem or 'nothing is known of it'}")
    if settings.driver == "worker" and check.in_process:
        return "looks at the engine object, which the worker driver has in another process; --engine-driver bridge does"
    if not facts.starts and rule.area not in _BEFORE_REQUESTS:
        return f"the engine does not start: {facts.problem}"
    if facts.problem and check.needs_engine:
        return f"the dry run failed: {facts.problem}"
    return ""


def _try_examples(
    bench: Bench, rule: Rule, check: Check, tries: _Tries, example: tuple[str, str] | None, shrinks: bool
) -> None:
    number = bench.settings.max_examples or default_examples(bench)
    if check.max_examples is not None:
        number = min(number, check.max_examples)
    settings = hypothesis.settings(
        max_examples=number,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
        report_multiple_bugs=False,
        verbosity=Verbosity.normal,
        stateful_step_count=20,
        # After each broken example there is another worker, which takes too long to shrink.
        phases=[Phase.explicit, Phase.reuse, Phase.generate] + [Phase.shrink] * (shrinks and not bench.is_in_worker),
        database=hypothesis.settings().database if bench.settings.seed is None else None,
    )
    with _shrinking_ends():
        if check.is_machine:
            machine = check.function(bench)
            machine.tries = tries
            if bench.settings.seed is not None:
                machine = hypothesis.seed(bench.settings.seed)(machine)
            run_state_machine_as_test(machine, settings=settings)
            return

        def one(data: Any) -> None:
            tries.num += 1
            try:
                bench.run_example(check.function, data.draw, needs_engine=check.needs_engine)
            except UnsatisfiedAssumption:
                raise
            except NotHere:
                raise
            except (Exception, SystemExit) as error:
                tries.failure = error
                tries.transcripts = list(bench.transcripts)
                raise

        test: Callable[[], None] = settings(hypothesis.given(data=st.data())(one))
        key = f"{bench.settings.engine} {bench.settings.driver} {bench.facts.role} {rule.id}"
        test.hypothesis.inner_test._hypothesis_internal_add_digest = key.encode()  # type: ignore[attr-defined]
        if bench.settings.seed is not None:
            test = hypothesis.seed(bench.settings.seed)(test)
        if example is not None:
            test = hypothesis.reproduce_failure(example[0], example[1].encode())(test)
        test()


def default_examples(bench: Bench) -> int:
    """Fewer where each takes real time."""
    answer_s = bench.facts.first_chunk_s + 6 * bench.facts.gap_s
    if bench.is_virtual or answer_s <= 0:
        return MOST_EXAMPLES
    return max(FEWEST_EXAMPLES, min(MOST_EXAMPLES, int(_REAL_S / answer_s)))


@contextmanager
def _shrinking_ends() -> Any:
    """Hypothesis has no setting for how long it may shrink."""
    usual = getattr(conjecture, "MAX_SHRINKING_SECONDS", None)
    if usual is None:
        yield
        return
    conjecture.MAX_SHRINKING_SECONDS = _SHRINKING_S
    try:
        yield
    finally:
        conjecture.MAX_SHRINKING_SECONDS = usual


def _finding(bench: Bench, rule: Rule, tries: _Tries, error: BaseException) -> Finding:
    failure = tries.failure or error
    if isinstance(failure, Violation):
        message, transcripts = str(failure), failure.transcripts or tries.transcripts
    else:
        message, transcripts = f"{type(failure).__name__}: {failure}{_where(failure)}", tries.transcripts
    if isinstance(error, Flaky):
        message += (
            " (not every time: the same example passed when it was tried again on a new engine, so the outcome "
            "depends on earlier requests or on timing)"
        )
    example = _BLOB.search("\n".join(getattr(error, "__notes__", [])))
    return Finding(
        message=message,
        sent=tuple(transcript.request_json() for transcript in transcripts),
        transcript=tuple(
            line for transcript in transcripts for line in (f"{transcript.request_id}:", *transcript.lines())
        ),
        script=reproducing_script(bench.settings, bench.facts, rule, message, transcripts, failure),
        example=f"{example.group(1)}:{example.group(2)}" if example else "",
        is_should=getattr(failure, "is_should", False),
    )


def _where(error: BaseException) -> str:
    """The last frame outside the suite, where an engine's own exception came from."""
    trace = error.__traceback__
    place = ""
    while trace is not None:
        code = trace.tb_frame.f_code
        if "/conformance/" not in code.co_filename and "/asyncio/" not in code.co_filename:
            place = f" ({code.co_filename.rsplit('/', 1)[-1]}, line {trace.tb_lineno}, in {code.co_name})"
        trace = trace.tb_next
    return place
