"""`pytest --engine`, as its users run it: in a folder of their own, in a process of its own."""

from __future__ import annotations

import json
import shlex
import sys
import textwrap
import tomllib
from xml.etree import ElementTree

import hypothesis
import pytest

from conformance.verdict_text import one_line

pytest_plugins = ["pytester"]

TOY = "conformance.selftest.toy:ToyEngine"
CUT = f"{hypothesis.__version__}:AAFBAQ"  # not all of a blob
MUTANTS = "conformance.selftest.mutants"

# One engine with two faults: it ignores max_tokens, and its terminal chunk has no usage.
TALKATIVE = """
from conformance.selftest.toy import ToyEngine

class Talkative(ToyEngine):
    def max_tokens(self, prompt, asked):
        return 20

    def usage(self, work):
        return None
"""


@pytest.fixture
def run(pytester, monkeypatch):
    """Run pytest in a child process, in an empty folder."""
    for name in ("PYTEST_ADDOPTS", "CONFORMANCE_ENGINE"):
        monkeypatch.delenv(name, raising=False)

    def run_pytest(*args):
        return pytester.runpytest_subprocess("-p", "no:dash", "-p", "no:cacheprovider", *map(str, args))

    return run_pytest


@pytest.fixture
def talkative(pytester):
    pytester.makepyfile(talkative=TALKATIVE)
    return "--engine=talkative:Talkative"


def said(result):
    return result.stdout.str()


# Without --engine.


def test_nothing_changes_for_a_run_without_engine(pytester, run):
    """Somebody else's `--engine`, and names that are ours otherwise, keep their meaning."""
    pytester.makeconftest(
        """
        def pytest_addoption(parser):
            parser.addoption("--rule", default="theirs")
            parser.addoption("--deviations", action="store_true")
        """
    )
    pytester.makepyfile("def test_theirs(request): assert request.config.getoption('--rule') == 'mine'")
    result = run("--rule=mine", "--deviations", "-v")
    result.assert_outcomes(passed=1)
    assert "onformance" not in said(result).replace("conformance-", "")


def test_a_run_without_engine_does_not_import_the_suite(pytester, run):
    pytester.makepyfile(
        """
        import sys
        def test_light():
            ours = {name for name in sys.modules if name.split(".")[0] == "conformance"}
            assert ours == {"conformance", "conformance.plugin"}
        """
    )
    run().assert_outcomes(passed=1)


def test_help_lists_the_options_with_their_variables(run):
    result = run("--help")
    for flag in ("--engine", "--engine-args", "--engine-driver", "--engine-role", "--rule", "--explain", "--fail-on"):
        assert f"{flag}" in said(result)
    assert "CONFORMANCE_ENGINE_ARGS" in said(result)


# Explaining.


def test_explain_prints_the_rule_and_its_source_and_needs_no_engine(run):
    result = run("--explain=cancel.mid")
    assert result.ret == 0
    assert "cancel.mid" in said(result)
    assert "MUST" in said(result)
    assert "Source" in said(result) or "source" in said(result)


def test_explain_of_an_unknown_rule_says_what_is_near(run):
    result = run("--explain=cancel.midd")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*cancel.midd*cancel.mid*"])


# Running.


def test_a_correct_engine_passes_and_only_the_suite_is_run(pytester, run):
    pytester.makepyfile("def test_mine(): raise AssertionError('not asked for')")
    result = run(f"--engine={TOY}", "--rule=gen.max_tokens", "--rule=gen.index,gen.n", "--max-examples=5")
    result.assert_outcomes(passed=3)
    assert "conforms: " in said(result)
    assert "has " in said(result)  # the capabilities


def test_named_tests_run_beside_the_suite(pytester, run):
    path = pytester.makepyfile("def test_mine(): pass")
    result = run(f"--engine={TOY}", "--rule=gen.index", "--max-examples=3", path.name)
    result.assert_outcomes(passed=2)


def test_a_broken_engine_fails_with_all_that_a_stranger_needs(run, talkative):
    result = run(talkative, "--rule=gen.max_tokens,gen.usage_present,gen.index", "--max-examples=5")
    result.assert_outcomes(passed=1, failed=1, xfailed=1)
    text = said(result)
    assert "gen.max_tokens" in text
    assert "MUST" in text
    assert "tokens for max_tokens=" in text  # what was found
    assert '"token_ids"' in text  # what was sent
    assert "chunk" in text  # the transcript
    assert "async def main()" in text  # the script
    assert "does not conform: 1 MUST rule broken (gen.max_tokens)" in text
    assert "gen.usage_present" in text  # the warning


@pytest.mark.parametrize("is_in_ci", [False, True])
def test_a_finding_is_printed_once_in_ci_too(run, talkative, monkeypatch, is_in_ci):
    """pytest does not cut the lines of its closing list where the variable CI is set."""
    monkeypatch.setenv("CI", "true") if is_in_ci else monkeypatch.delenv("CI", raising=False)
    result = run(talkative, "--rule=gen.max_tokens", "--max-examples=3")
    assert said(result).count("asyncio.run(main())") == 1


def test_should_rules_fail_the_run_only_if_asked(run, talkative):
    run(talkative, "--rule=gen.usage_present", "--max-examples=3").assert_outcomes(xfailed=1)
    run(talkative, "--rule=gen.usage_present", "--max-examples=3", "--fail-on=should").assert_outcomes(failed=1)


def test_the_printed_script_shows_the_fault_and_is_silent_when_it_is_mended(pytester, run, talkative):
    run(talkative, "--rule=gen.max_tokens", "--max-examples=5", "--engine-report=out")
    script = (pytester.path / "out/reproduce/gen.max_tokens.py").read_text()
    assert len(script.splitlines()) <= 25
    path = pytester.makepyfile(reproducer=script)
    assert pytester.runpython(path).ret == 1
    pytester.makepyfile(talkative=TALKATIVE.replace("return 20", "return min(asked or 20, 20)"))
    assert pytester.runpython(path).ret == 0
    run(talkative, "--rule=gen.max_tokens", "--max-examples=5", "--engine-report=out")
    assert not list((pytester.path / "out").rglob("*.py"))


def test_a_printed_example_can_be_tried_again(pytester, run, talkative):
    run(talkative, "--rule=gen.max_tokens", "--max-examples=5", "--engine-report=out")
    (verdict,) = json.loads((pytester.path / "out/conformance.json").read_text())["verdicts"]
    example = verdict["finding"]["example"]
    again = run(talkative, "--rule=gen.max_tokens", f"--example={example}", "--engine-report=again")
    again.assert_outcomes(failed=1)
    (second,) = json.loads((pytester.path / "again/conformance.json").read_text())["verdicts"]
    assert second["num_examples"] <= 2
    assert second["finding"]["message"] == verdict["finding"]["message"]


def test_the_printed_command_has_every_option_that_the_run_was_given(pytester, run, monkeypatch):
    source = (
        TALKATIVE
        + """
    @classmethod
    async def from_args(cls, argv=None):
        assert argv == ["--name", "a b"]
        return await super().from_args([])
"""
    )
    pytester.makepyfile(talkative=source)
    monkeypatch.setenv("CONFORMANCE_ENGINE_CLOCK", "virtual")
    given = ["--engine=talkative:Talkative", "--engine-args=--name 'a b'", "--engine-driver=plain"]
    result = run(*given, "--engine-role=agg", "--rule=gen.max_tokens", "--max-examples=5")
    (command,) = (line for line in said(result).splitlines() if line.strip().startswith("pytest --engine"))
    words = shlex.split(command)
    assert words[1:-1] == [*given, "--engine-role=agg", "--engine-clock=virtual", "--rule=gen.max_tokens"]
    monkeypatch.delenv("CONFORMANCE_ENGINE_CLOCK")
    run(*words[1:]).assert_outcomes(failed=1)


def test_the_report_has_every_form(pytester, run, talkative):
    run(talkative, "--rule=gen.max_tokens,gen.index", "--max-examples=3", "--engine-report=out")
    names = {path.name for path in (pytester.path / "out").iterdir()}
    assert names == {"conformance.json", "junit.xml", "conformance.md", "conformance.html", "badge.svg", "reproduce"}
    suite = ElementTree.parse(pytester.path / "out/junit.xml").getroot()
    assert {case.get("name") for case in suite.iter("testcase")} == {"gen.max_tokens", "gen.index"}


def test_environment_variables_stand_for_the_flags(run, monkeypatch):
    monkeypatch.setenv("CONFORMANCE_ENGINE", TOY)
    monkeypatch.setenv("CONFORMANCE_RULE", "gen.index,gen.n")
    monkeypatch.setenv("CONFORMANCE_MAX_EXAMPLES", "3")
    run().assert_outcomes(passed=2)


def test_processes_of_xdist_give_one_summary(run, talkative):
    result = run(talkative, "--rule=gen.max_tokens,gen.index,gen.n,gen.usage_present", "--max-examples=3", "-n2")
    result.assert_outcomes(passed=2, failed=1, xfailed=1)
    assert "does not conform: 1 MUST rule broken (gen.max_tokens)" in said(result)


def test_a_conftest_and_an_asyncio_plugin_of_the_user_are_in_nobodys_way(pytester, run):
    pytester.makeini("[pytest]\nfilterwarnings = error\naddopts = --strict-markers\n")
    pytester.makeconftest(
        """
        import asyncio, pytest

        @pytest.fixture(autouse=True, scope="session")
        def policy():
            asyncio.set_event_loop_policy(asyncio.DefaultEventLoopPolicy())

        def pytest_collection_modifyitems(items):
            items.reverse()
        """
    )
    run(f"--engine={TOY}", "--rule=gen.index,gen.max_tokens", "--max-examples=3").assert_outcomes(passed=2)


def test_rules_can_be_chosen_by_marker_and_by_name_too(run):
    result = run(f"--engine={TOY}", "--max-examples=2", "-m", "gen and must", "-k", "max_tokens or index")
    result.assert_outcomes(passed=2, deselected=108)


# Deviations.


def deviations(pytester, text):
    path = pytester.path / "deviations.toml"
    path.write_text(textwrap.dedent(text))
    return f"--deviations={path}"


def test_a_known_deviation_does_not_fail_the_run(pytester, run, talkative):
    known = deviations(pytester, '["gen.max_tokens"]\nreason = "our clients do not mind"')
    result = run(talkative, "--rule=gen.max_tokens", "--max-examples=5", known, "-rx")
    result.assert_outcomes(xfailed=1)
    assert "our clients do not mind" in said(result)


def test_the_lines_that_a_failure_prints_are_a_deviations_file_that_is_pinned(pytester, run, talkative):
    text = said(run(talkative, "--rule=gen.max_tokens", "--max-examples=5"))
    begin = text.index('["gen.max_tokens"]')
    lines = [line.strip() for line in text[begin:].splitlines()[:3]]
    (table,) = tomllib.loads("\n".join(lines)).values()
    assert table["example"]
    known = deviations(pytester, "\n".join(lines))
    run(talkative, "--rule=gen.max_tokens", known).assert_outcomes(xfailed=1)


def test_an_entry_that_no_longer_fails_is_an_error(pytester, run):
    known = deviations(pytester, '["gen.max_tokens"]\nreason = "old"')
    result = run(f"--engine={TOY}", "--rule=gen.max_tokens", "--max-examples=3", known)
    result.assert_outcomes(failed=1)
    assert "gen.max_tokens holds" in said(result)
    assert "does not conform: 1 entry of the deviations file is out of date (gen.max_tokens)" in one_line(said(result))
    assert one_line(said(result)).count("all - 1 - - - -") == 1


def test_an_entry_for_a_rule_that_is_not_checked_here_is_an_error(pytester, run):
    known = deviations(pytester, '["encode.terminal"]\nreason = "we do not encode"')
    result = run(f"--engine={TOY}", "--max-examples=2", "-k", "encode.terminal", known)
    result.assert_outcomes(failed=1, deselected=109)
    assert "matches nothing" in said(result)
    assert "1 entry of the deviations file is out of date (encode.terminal)" in one_line(said(result))


def test_a_selected_rule_that_is_skipped_makes_its_entry_out_of_date_and_one_that_is_not_selected_does_not(
    pytester, run
):
    known = deviations(pytester, '["encode.terminal"]\nreason = "we do not encode"')
    run(f"--engine={TOY}", "--rule=gen.index", "--max-examples=3", known).assert_outcomes(passed=1)
    run(f"--engine={TOY}", "--rule=encode.*", known).assert_outcomes(failed=1, skipped=1)
    other = deviations(pytester, '["encode.terminal"]\nreason = "we do not encode"\nrole = "encode"')
    run(f"--engine={TOY}", "--rule=encode.*", other).assert_outcomes(skipped=2)


def test_an_entry_pinned_under_another_hypothesis_is_out_of_date(pytester, run, talkative):
    known = deviations(pytester, '["gen.max_tokens"]\nreason = "x"\nexample = "6.1.0:AAFBAQAAAA=="')
    result = run(talkative, "--rule=gen.max_tokens", known)
    result.assert_outcomes(failed=1)
    assert "made by Hypothesis 6.1.0" in said(result)
    assert "1 entry of the deviations file is out of date (gen.max_tokens)" in one_line(said(result))


# Bad input: one line, before anything runs.


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["--engine=nothing"], "*--engine is 'nothing'; it must be MODULE:CLASS*"),
        (["--engine=no_such_pkg:Engine"], "*cannot import 'no_such_pkg'*"),
        (["--engine=conformance.selftest.toy:Toy"], "*has no 'Toy'*ToyEngine*"),
        (["--engine=conformance.catalogue:Rule"], "*is no LLMEngine: it has no from_args, start, generate, cleanup*"),
        ([f"--engine={TOY}", "--rule=cancle.*"], "*cancle.*cancel*"),
        ([f"--engine={TOY}", "--max-examples=0"], "*--max-examples is 0; it must be at least 1*"),
        ([f"--engine={TOY}", "--engine-args='"], "*--engine-args*"),
        ([f"--engine={TOY}", "--deviations=none.toml"], "*none.toml*"),
        ([f"--engine={TOY}", "--example=x", "--rule=gen.n"], "*--example is 'x'; it must be RELEASE:BLOB*"),
        ([f"--engine={TOY}", f"--example={CUT}", "--rule=gen.n"], f"*--example is '{CUT}'; Hypothesis * cannot read *"),
        ([f"--engine={TOY}", "--engine-role=cook"], "*invalid choice: 'cook'*"),
    ],
)
def test_bad_input_is_one_line(run, args, line):
    result = run(*args)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([line])
    assert "Traceback" not in result.stderr.str() + said(result)


def test_an_engine_that_cannot_play_the_role_is_a_usage_error(pytester, run):
    pytester.makepyfile(
        only_agg="""
        from conformance.selftest.toy import ToyEngine

        class OnlyAgg(ToyEngine):
            @classmethod
            async def from_args(cls, argv=None):
                engine, config = await super().from_args([])
                return engine, config
        """
    )
    result = run("--engine=only_agg:OnlyAgg", "--engine-role=decode")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--engine-role is decode*--engine-args*"])


def test_an_engine_that_does_not_start_is_told_with_its_reason(pytester, run):
    pytester.makepyfile(
        cold="""
        from conformance.selftest.toy import ToyEngine

        class Cold(ToyEngine):
            async def start(self, worker_id):
                raise RuntimeError("no fuel")
        """
    )
    result = run("--engine=cold:Cold", "--rule=gen.index,gen.n")
    result.assert_outcomes(skipped=2)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert "the engine does not start: start: RuntimeError: no fuel" in said(result)


def test_flags_that_the_engine_does_not_know_are_one_finding_and_no_more(run):
    result = run(f"--engine={TOY}", "--engine-args=--step-sx 3")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(failed=1, skipped=109)
    assert "the engine does not start: from_args: SystemExit: 2" in said(result)


def test_a_run_that_looks_at_no_rule_is_no_success(run):
    result = run(f"--engine={TOY}", "--rule=disagg.*")
    assert result.ret == pytest.ExitCode.NO_TESTS_COLLECTED
    assert "nothing was checked" in said(result)


@pytest.mark.parametrize(
    ("source", "line"),
    [("import no_such_lib", "*It is engine_here that imports 'no_such_lib'*"), ("def (", "*SyntaxError*")],
)
def test_a_module_with_a_fault_of_its_own_is_told_so(pytester, run, source, line):
    pytester.makepyfile(engine_here=source)
    result = run("--engine=engine_here:Engine")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([line])


def test_the_script_called_pytest_finds_an_engine_in_the_working_directory(pytester, talkative):
    """Unlike `python -m pytest` it does not put the directory on Python's path."""
    script = "import os, sys; sys.path.remove(os.getcwd()); import pytest; sys.exit(pytest.main())"
    words = [talkative, "--rule=gen.max_tokens", "-p", "no:dash", "-p", "no:cacheprovider"]
    result = pytester.run(sys.executable, "-P", "-c", script, *words)
    result.assert_outcomes(failed=1)


def test_a_script_that_does_not_show_the_fault_says_so(pytester, run):
    """It breaks the rule with the tenth request, and the script makes one."""
    pytester.makepyfile(
        tired="""
        from conformance.selftest.toy import ToyEngine

        class Tired(ToyEngine):
            num_requests = 0

            def max_tokens(self, prompt, asked):
                self.num_requests += 1
                return super().max_tokens(prompt, asked) + (self.num_requests > 10)
        """
    )
    result = run("--engine=tired:Tired", "--rule=gen.max_tokens")
    result.assert_outcomes(failed=1)
    assert "ran through when it was tried" in " ".join(said(result).split())
