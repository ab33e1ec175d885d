"""docs/ci.md and docs/examples: what they say is done as it stands there."""

from __future__ import annotations

import configparser
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from mock_engine.cli import parse
from mock_engine.pytest_plugin import ARGS
from mock_engine.serve import describe
from mock_engine.testing import read_settings

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "docs" / "examples"
PAGE = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")
WORKFLOW = yaml.safe_load((EXAMPLES / "github-workflow.yml").read_text(encoding="utf-8"))
COMPOSE = yaml.safe_load((EXAMPLES / "compose.yml").read_text(encoding="utf-8"))
FIRST, FLAGS, START, ASK, STOP = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
FIXTURE, FACTORY, SCRIPT = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
(INI,) = re.findall(r"```ini\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """This process's, with a `mock-engine` and a `pytest` that run what is tested here."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, words in (
        ("mock-engine", "-m mock_engine"),
        ("pytest", "-m pytest -p mock_engine.pytest_plugin -p no:dash"),
    ):
        (folder / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n', encoding="utf-8")
        (folder / name).chmod(0o755)
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}


def bash(script, folder, environment):
    """What a script printed, which has to succeed; `bash -e` is what GitHub runs steps with."""
    done = subprocess.run(
        ["bash", "-e", "-c", script], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.e2e
def test_the_tests_on_the_page_pass_with_the_settings_on_the_page(tmp_path, environment):
    (tmp_path / "test_page.py").write_text(f"{FIXTURE}\n\n{FACTORY}", encoding="utf-8")
    (tmp_path / "pytest.ini").write_text(INI, encoding="utf-8")
    install, *write, run = FIRST.splitlines(keepends=True)
    assert install.startswith("pip install -c constraints.txt .")
    assert run == "pytest test_it.py\n"
    assert "3 passed" in bash("".join([*write, FLAGS]), tmp_path, environment)
    printed = bash(f"exec {sys.executable} - <<'END'\n{SCRIPT}END", tmp_path, environment)
    assert re.fullmatch(r"http://127.0.0.1:\d+/v1\n", printed)


@pytest.mark.e2e
def test_the_commands_for_other_languages_start_ask_and_stop_a_server(tmp_path, environment):
    printed = bash(f"{START}{ASK}{STOP}wait $!\necho ended with $?", tmp_path, environment)
    assert '"finish_reason"' in printed
    assert printed.endswith("ended with 0\n")
    assert not (tmp_path / "ready.json").exists()


@pytest.mark.e2e
def test_the_workflow_s_steps_start_ask_and_stop_a_server(tmp_path, environment):
    steps = {step["name"]: step for step in WORKFLOW["jobs"]["any-language"]["steps"] if "name" in step}
    assert list(steps) == ["Install", "Start", "Test", "Stop"]
    assert steps["Stop"]["if"] == "always()"
    variables = tmp_path / "github_env"
    bash(steps["Start"]["run"], tmp_path, {**environment, "GITHUB_ENV": str(variables)})
    given = dict(line.split("=", 1) for line in variables.read_text(encoding="utf-8").splitlines())
    try:
        answer = bash(steps["Test"]["run"], tmp_path, {**environment, **given})
    finally:
        log = bash(steps["Stop"]["run"], tmp_path, environment)
    assert '"completion_tokens":5' in answer
    assert given["OPENAI_BASE_URL"] in log


def run_steps():
    return [step["run"] for job in WORKFLOW["jobs"].values() for step in job["steps"] if "run" in step]


def test_the_workflow_has_what_github_asks_of_one():
    assert WORKFLOW.keys() == {"name", True, "jobs"}  # YAML takes `on` for a yes
    for job in WORKFLOW["jobs"].values():
        assert job.keys() == {"runs-on", "timeout-minutes", "steps"}
        for step in job["steps"]:
            assert step.keys() <= {"name", "uses", "with", "run", "if", "env"}
            assert ("uses" in step) != ("run" in step)
        checkout = next(step["with"] for step in job["steps"] if "path" in step.get("with", {}))
        assert checkout == {"repository": "OWNER/mock-engine", "path": "mock-engine"}
    for script in run_steps():
        subprocess.run(["bash", "-n", "-c", script], check=True)


def test_files_that_the_workflow_and_the_service_name_are_there():
    named = re.findall(r"(?<!OWNER/)mock-engine/(\S+)", "\n".join(run_steps()))
    assert {"constraints.txt", "docs/examples/test_my_router.py"} <= {*named}
    for path in named:
        assert (ROOT / path).exists(), path
    requirements = next(words for script in run_steps() for words in script.split("./mock-engine", 1)[1:]).split()
    assert [Requirement(word).name for word in requirements] == ["pytest", "openai"]


def test_the_service_s_health_is_the_file_that_serve_writes():
    service, tests = COMPOSE["services"]["mock-engine"], COMPOSE["services"]["tests"]
    program, *argv = service["command"].split()
    flags = parse(argv)
    assert program == "mock-engine"
    assert service["healthcheck"]["test"] == ["CMD", "test", "-e", str(flags.json)]
    assert tests["depends_on"]["mock-engine"] == {"condition": "service_healthy"}
    assert tests["environment"]["OPENAI_BASE_URL"] == f"http://mock-engine:{flags.port}/v1"
    assert flags.host == "0.0.0.0"


def test_the_page_s_settings_are_ones_that_we_have():
    ini = configparser.ConfigParser()
    ini.read_string(INI)
    (flags,) = re.findall('--mock-engine-args "(.*)"', FLAGS)
    settings = read_settings(f"{ini['pytest'][ARGS]} {flags}")
    assert settings.worker.engine.profile == "h100-sxm/llama-3.1-70b/vllm-tp4-bf16"
    assert settings.worker.engine.speedup_ratio == 1


@pytest.mark.e2e
def test_the_page_names_every_field_of_the_file(mock_engine_server):
    (table,) = re.findall(r"\| in the file \| \|\n(.*?)\n\n", PAGE, re.DOTALL)
    named = {name for row in table.splitlines() for name in re.findall("`(.*?)`", row.split("|")[1])}
    assert named == {*describe(mock_engine_server.fleet)}
