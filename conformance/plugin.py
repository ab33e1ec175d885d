"""
The pytest plugin. Without `--engine` (or `--explain`) it does nothing at all, and has no options.

    pytest --engine=my_pkg:Engine
    pytest --explain cancel.mid

pytest loads this module in every run, so it imports the suite only when it is asked for.
"""

from __future__ import annotations

import os
import shlex
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from conformance.settings import SuiteSettings

PREFIX = "CONFORMANCE_"  # of the environment variables: --engine-args is CONFORMANCE_ENGINE_ARGS

OPTIONS: dict[str, dict[str, Any]] = {
    "--engine": {"metavar": "MODULE:CLASS", "help": "hold this Dynamo LLMEngine against the contract"},
    "--engine-args": {"metavar": "ARGS", "default": "", "help": "arguments for its from_args, one shell-quoted text"},
    "--engine-driver": {
        "choices": ("plain", "bridge", "worker"),
        "default": "bridge",
        "help": "who reads its streams: a plain `async for`, an emulation of Dynamo's Rust bridge (default), "
        "or a real Dynamo worker in a process of its own",
    },
    "--engine-role": {
        "choices": ("agg", "prefill", "decode", "encode"),
        "help": "its role; default: what its WorkerConfig says. Another one is asked for with --disaggregation-mode",
    },
    "--engine-clock": {
        "choices": ("auto", "virtual", "real"),
        "default": "auto",
        "help": "whether the event loop's time jumps to the next timer; auto (default) finds out if it may",
    },
    "--engine-report": {"metavar": "DIR", "help": "write JSON, JUnit XML, Markdown, an HTML matrix and a badge there"},
    "--rule": {
        "action": "append",
        "metavar": "PATTERN",
        "help": 'only these rules, such as "cancel.*"; may be repeated',
    },
    "--explain": {"metavar": "RULE", "help": "print what a rule wants, why, and how it is checked; and stop"},
    "--fail-on": {
        "choices": ("must", "should"),
        "default": "must",
        "help": "which broken rules fail the run; those below are warnings (default: must)",
    },
    "--deviations": {"metavar": "FILE", "help": "TOML file of rules that are known to be broken, with reasons"},
    "--max-examples": {
        "metavar": "N",
        "type": int,
        "help": "Hypothesis examples a rule (default: 30; down to 8 for a slow engine)",
    },
    "--example": {
        "metavar": "RELEASE:BLOB",
        "help": "try one example again, as a finding printed it; needs one --rule",
    },
}


def variable_of(flag: str) -> str:
    """The environment variable that stands for a flag."""
    return PREFIX + flag.removeprefix("--").replace("-", "_").upper()


def _dest(flag: str) -> str:
    return variable_of(flag).lower()


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Only where they are meant: a conftest of somebody else may have an `--engine` of its own."""
    if not _is_wanted(pluginmanager.get_plugin("pytestconfig")):
        return
    group = parser.getgroup("conformance", "conformance of Dynamo engines")
    for flag, settings in OPTIONS.items():
        variable = variable_of(flag)
        given = os.environ.get(variable)
        kept = {**settings, "help": f"{settings['help']} [{variable}]"}
        if given:
            kept["default"] = _from_environment(flag, settings, given)
        group.addoption(flag, dest=_dest(flag), **kept)


def _from_environment(flag: str, settings: dict[str, Any], given: str) -> Any:
    if settings.get("action") == "append":
        return given.split(",")
    if settings.get("type") is int:
        if not given.isdecimal():
            raise pytest.UsageError(f"{variable_of(flag)} is {given!r}; it must be a whole number")
        return int(given)
    choices = settings.get("choices")
    if choices and given not in choices:
        raise pytest.UsageError(f"{variable_of(flag)} is {given!r}; it must be one of {', '.join(choices)}")
    return given


def _is_wanted(config: Any) -> bool:
    words = list(config.invocation_params.args) if config is not None else []
    words += shlex.split(os.environ.get("PYTEST_ADDOPTS", ""))
    words += _addopts(config)
    flags = {str(word).partition("=")[0] for word in words}
    asked = {"--engine", "--explain", "-h", "--help"}
    return bool(flags & asked) or any(os.environ.get(variable_of(flag)) for flag in ("--engine", "--explain"))


def _addopts(config: Any) -> list[str]:
    """Those of the ini file. `getini` would remember what it finds, and it may be too early for that."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pytest 9 prefers getini
        found = (getattr(config, "inicfg", None) or {}).get("addopts", "")
    found = getattr(found, "value", found)
    return [str(word) for word in found] if isinstance(found, list) else shlex.split(str(found))


def _given(config: pytest.Config, flag: str) -> Any:
    return getattr(config.option, _dest(flag), OPTIONS[flag].get("default"))


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> int | None:
    """`--explain` needs no engine and no tests."""
    wanted = _given(config, "--explain")
    if not wanted:
        return None
    from conformance.catalogue import explain, load_catalogue, select

    try:
        rules = select(load_catalogue(), [wanted])
    except ValueError as error:
        raise pytest.UsageError(f"--explain: {error}") from None
    print("\n\n".join(explain(rule) for rule in rules))
    return 0


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """With `--engine`, the suite is what is collected: alone, or beside the paths that were named."""
    if not _given(config, "--engine"):
        return
    from conformance.collection import CATALOGUE, MARKERS, Suite

    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # the script `pytest`, unlike `python -m pytest`, leaves it out
    if "pytest_conformance" not in (name for name, _ in config.pluginmanager.list_name_plugin()):
        suite = Suite(config, _settings(config), _given, _telling_flags(config))
        config.pluginmanager.register(suite, "pytest_conformance")
    for marker in MARKERS:
        config.addinivalue_line("markers", f"{marker}: of the conformance suite")
    args_are_given = config.args_source is pytest.Config.ArgsSource.ARGS
    others = [arg for arg in config.args if arg != str(CATALOGUE)] if args_are_given else []
    config.args = [*others, str(CATALOGUE)]


def _telling_flags(config: pytest.Config) -> list[str]:
    """What another run needs to show the same finding, where it is not the default."""
    flags = ("--engine-args", "--engine-driver", "--engine-role", "--engine-clock", "--fail-on")
    values = {flag: _given(config, flag) for flag in flags}
    return [f"{flag}={value}" for flag, value in values.items() if value != OPTIONS[flag].get("default")]


def _settings(config: pytest.Config) -> SuiteSettings:
    from conformance.settings import SuiteSettings

    number = _given(config, "--max-examples")
    if number is not None and number < 1:
        raise pytest.UsageError(f"--max-examples is {number}; it must be at least 1")
    args = _given(config, "--engine-args")
    try:
        shlex.split(args)
    except ValueError as error:
        raise pytest.UsageError(f"--engine-args is {args!r}, which no shell can split: {error}") from None
    return SuiteSettings(
        engine=_given(config, "--engine"),
        engine_args=args,
        driver=_given(config, "--engine-driver"),
        role=_given(config, "--engine-role"),
        clock=_given(config, "--engine-clock"),
        max_examples=number,
    )
