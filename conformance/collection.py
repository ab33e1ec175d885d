"""
The rules as pytest items: collected, judged, reported; across processes with pytest-xdist too.

A verdict travels in its report's `user_properties`, so what is printed and
written at the end is the same whether the rules were judged in this process or not.
"""

from __future__ import annotations

import dataclasses
import io
import json
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from conformance.bench import Bench
from conformance.catalogue import LEVELS, Rule, load_catalogue, select
from conformance.deviations import Deviation, judge, parse_example, read_deviations, why_unreadable
from conformance.facts import Facts, find_facts
from conformance.release import dynamo_version
from conformance.reproducer import runs_through
from conformance.rules import AREAS
from conformance.runner import judge_rule
from conformance.settings import SuiteError, SuiteSettings
from conformance.suite_report import run_from_json, run_to_json, write_report
from conformance.terminal_summary import format_finding, print_capabilities, print_summary
from conformance.verdict import Outcome, Subject, SuiteRun, Verdict
from conformance.verdict_text import CHECKED

CATALOGUE = Path(__file__).with_name("catalogue.csv")
MARKERS = ("conformance", *(level.lower() for level in LEVELS), *AREAS)
_PROPERTY = "conformance_verdict"
_FIRST_SUITE = "0.1"
_QUICK_START_S = 5.0  # seconds; scripts are not tried on an engine that takes longer to start
_SCRIPT_WITHIN_S = 20.0


def suite_version() -> str:
    """The release of the package that the suite is part of."""
    try:
        return version("mock-engine")
    except PackageNotFoundError:
        return "unknown"


class Suite:
    """Everything of one run. Registered as a plugin only where `--engine` is given."""

    def __init__(
        self,
        config: pytest.Config,
        settings: SuiteSettings,
        given: Callable[[pytest.Config, str], Any],
        flags: Sequence[str],
    ) -> None:
        self.settings = settings
        self.fail_on: str = given(config, "--fail-on")
        self.flags = flags
        folder = given(config, "--engine-report")
        self.report_folder = Path(folder) if folder else None
        self.catalogue = load_catalogue()
        self.patterns: list[str] = given(config, "--rule") or []
        self.is_worker = hasattr(config, "workerinput")
        self.verdicts: dict[str, Verdict] = {}
        self.began_s = time.perf_counter()
        self._bench: Bench | None = None
        try:
            self.rules = select(self.catalogue, self.patterns) if self.patterns else list(self.catalogue.values())
            path = given(config, "--deviations")
            self.deviations = read_deviations(Path(path), self.catalogue.keys()) if path else {}
            self.example = self._read_example(given(config, "--example"))
            settings.engine_class()
            self.facts = self._find_facts(config)
        except (SuiteError, ValueError) as error:
            raise pytest.UsageError(str(error)) from None

    def _read_example(self, text: str | None) -> tuple[str, str] | None:
        if not text:
            return None
        example = parse_example(text)
        if example is None:
            raise SuiteError(f"--example is {text!r}; it must be RELEASE:BLOB, as a finding prints it")
        if fault := why_unreadable(example):
            raise SuiteError(f"--example is {text!r}; {fault}")
        if len(self.rules) != 1:
            raise SuiteError(f"--example is for one rule, and {len(self.rules)} are selected; name it with --rule")
        return example

    def _find_facts(self, config: pytest.Config) -> Facts:
        """The dry run; with pytest-xdist the controller makes it, for all."""
        sent = getattr(config, "workerinput", {}).get("conformance_facts")
        if sent is None:
            return find_facts(self.settings)
        facts: dict[str, Any] = json.loads(sent)
        for name in ("argv", "prefill_argv", "decode_argv", "output"):
            facts[name] = tuple(facts[name]) if facts[name] is not None else None
        return Facts(**facts)

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Of pytest-xdist: what each worker process is told."""
        node.workerinput["conformance_facts"] = json.dumps(dataclasses.asdict(self.facts), default=dict)

    @property
    def subject(self) -> Subject:
        facts, settings = self.facts, self.settings
        return Subject(
            engine=settings.engine,
            engine_args=settings.engine_args,
            driver=settings.driver,
            role=facts.role,
            clock=facts.clock,
            dynamo_version=dynamo_version(),
            suite_version=suite_version(),
            capabilities=dict(facts.capabilities),
        )

    # Collecting.

    def pytest_collect_file(self, file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
        if file_path != CATALOGUE:
            return None
        collected: RuleFile = RuleFile.from_parent(parent, path=file_path, nodeid="conformance")
        collected.suite = self
        return collected

    # Judging.

    def judge(self, rule: Rule) -> Verdict:
        """The rule's verdict, as the run's options take it."""
        if self._bench is None:
            self._bench = Bench(self.settings, self.facts)
        deviation = self.deviations.get(rule.id)
        if deviation is not None and not deviation.is_for(self.settings.driver, self.facts.role):
            deviation = None
        example = self.example or (deviation.example if deviation is not None else None)
        try:
            verdict = judge_rule(self._bench, rule, example=example)
        except SuiteError as error:
            if self.example is not None or deviation is None or deviation.example is None:
                raise
            return _out_of_date(Verdict(rule, Outcome.FAILED), str(error))
        finally:
            self._bench.renew()
        return self._weighed(self._with_tried_script(verdict), deviation)

    def _with_tried_script(self, verdict: Verdict) -> Verdict:
        """A script that does not show what it is for says so; where the engine starts quickly, that is found out."""
        finding = verdict.finding
        if finding is None or not finding.script or self.facts.start_s > _QUICK_START_S or self.example:
            return verdict
        if not runs_through(finding.script, _SCRIPT_WITHIN_S):
            return verdict
        message = (
            f"{finding.message} (the script below ran through when it was tried: it takes luck, or what went before)"
        )
        return dataclasses.replace(verdict, finding=dataclasses.replace(finding, message=message))

    def _weighed(self, verdict: Verdict, deviation: Deviation | None) -> Verdict:
        is_broken = verdict.outcome is Outcome.FAILED
        if deviation is not None:
            was_run = verdict.outcome in (Outcome.PASSED, Outcome.FAILED)
            fault = judge(deviation, is_broken=is_broken, was_run=was_run)
            if fault:
                return _out_of_date(verdict, fault)
            if is_broken:
                return dataclasses.replace(verdict, outcome=Outcome.DEVIATES, reason=deviation.reason)
            return verdict
        if not is_broken:
            return verdict
        rule = verdict.rule
        if rule.level not in ("MUST", "SHOULD"):
            return dataclasses.replace(verdict, outcome=Outcome.WARNED, reason=f"{rule.level} rules only warn")
        if verdict.is_should and self.fail_on == "must":
            what = "SHOULD rules" if rule.level == "SHOULD" else "this part of the rule is a SHOULD; those"
            return dataclasses.replace(
                verdict, outcome=Outcome.WARNED, reason=f"{what} only warn, unless with --fail-on should"
            )
        if rule.entered != _FIRST_SUITE and suite_version().startswith(f"{rule.entered}."):
            return dataclasses.replace(
                verdict,
                outcome=Outcome.WARNED,
                reason=f"the rule is new in {rule.entered}; it fails runs from the next on",
            )
        return verdict

    # Reporting.

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None and not self.is_worker:
            reporter.write(_rendered(reporter, lambda console: print_capabilities(self.subject, console)))
            if self.facts.problem:
                reporter.write_line(f"dry run: {self.facts.problem}", red=True)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, text in report.user_properties:
            if name == _PROPERTY and isinstance(text, str):
                (verdict,) = run_from_json(json.loads(text)).verdicts
                self.verdicts[verdict.rule.id] = verdict

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if not self.verdicts:
            return
        run = self.run()
        terminalreporter.section(f"conformance of {self.settings.engine}")
        terminalreporter.write(_rendered(terminalreporter, lambda console: print_summary(run, console)))
        if not self.facts.starts:
            terminalreporter.write_line(f"the engine does not start: {self.facts.problem}", red=True)
        if self.report_folder is not None:
            for path in write_report(run, self.report_folder):
                terminalreporter.write_line(f"wrote {path}")

    def run(self) -> SuiteRun:
        """All verdicts so far, in the catalogue's order."""
        kept = tuple(self.verdicts[rule_id] for rule_id in self.catalogue if rule_id in self.verdicts)
        return SuiteRun(self.subject, kept, time.perf_counter() - self.began_s)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """A run that looked at no rule is no success, and neither is one of an engine that does not start."""
        if self._bench is not None:
            self._bench.close()
        if self.is_worker or session.exitstatus != pytest.ExitCode.OK:
            return
        if not self.facts.starts:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        elif not any(each.outcome in CHECKED for each in self.verdicts.values()):
            session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED


def _out_of_date(verdict: Verdict, fault: str) -> Verdict:
    """An entry of the deviations file says what is not so: that fails the run, and is counted."""
    return dataclasses.replace(verdict, outcome=Outcome.FAILED, reason=fault, is_out_of_date=True)


class RuleBroken(Exception):
    """How pytest hears of a failed rule."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(verdict.rule.id)
        self.verdict = verdict


class _Told:
    """A finding as pytest prints it: whole once, and in its closing list, which is not cut in CI, by its first line."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.reprcrash = SimpleNamespace(message=text.partition("\n")[0])

    def __str__(self) -> str:
        return self.text

    def toterminal(self, writer: Any) -> None:
        for line in self.text.splitlines():
            writer.line(line)


class RuleFile(pytest.File):
    """The catalogue, as pytest sees it."""

    suite: Suite

    def collect(self) -> Iterator[RuleItem]:
        for rule in self.suite.rules:
            item: RuleItem = RuleItem.from_parent(self, name=rule.id)
            item.rule = rule
            item.suite = self.suite
            for marker in ("conformance", rule.level.lower(), rule.area):
                item.add_marker(marker)
            yield item


class RuleItem(pytest.Item):
    """One rule."""

    rule: Rule
    suite: Suite

    def runtest(self) -> None:
        verdict = self.suite.judge(self.rule)
        sent = run_to_json(SuiteRun(self.suite.subject, (verdict,), 0.0))
        self.user_properties.append((_PROPERTY, json.dumps(sent)))
        if verdict.outcome is Outcome.FAILED:
            raise RuleBroken(verdict)
        if verdict.outcome in (Outcome.WARNED, Outcome.DEVIATES):
            pytest.xfail(
                f"{verdict.rule.level}: {verdict.finding.message if verdict.finding else ''} ({verdict.reason})"
            )
        if verdict.outcome is Outcome.SKIPPED:
            pytest.skip(verdict.reason)
        if verdict.outcome is Outcome.UNCHECKED:
            pytest.skip(f"cannot be checked: {verdict.reason}")

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        error = excinfo.value
        if isinstance(error, RuleBroken) and error.verdict.is_out_of_date:
            return error.verdict.reason
        if isinstance(error, RuleBroken):
            return _Told(format_finding(error.verdict, self.suite.settings.engine, self.suite.flags))
        if isinstance(error, SuiteError):
            return str(error)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int | None, str]:
        return self.path, None, f"{self.rule.id} ({self.rule.level})"


def _rendered(reporter: Any, show: Callable[[Console], None]) -> str:
    """Rich text for pytest's own terminal writer, which knows the width and whether there are colours."""
    writer = reporter._tw
    buffer = io.StringIO()
    console = Console(
        file=buffer,
        force_terminal=bool(writer.hasmarkup),
        color_system="standard" if writer.hasmarkup else None,
        width=writer.fullwidth,
        legacy_windows=False,
    )
    show(console)
    return buffer.getvalue()
