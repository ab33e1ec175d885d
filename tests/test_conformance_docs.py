"""The walk-through of docs/conformance.md, done as it stands there: the commands, and what they are said to print."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from conformance.catalogue import LEVELS
from conformance.plugin import OPTIONS

PAGE = (Path(__file__).parents[1] / "docs" / "conformance.md").read_text(encoding="utf-8")
FIRST, SECOND = (code for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "class EchoEngine" in code)


def section_between(begin: str, end: str) -> str:
    return PAGE[PAGE.index(begin) : PAGE.index(end)]


def promised(text: str) -> list[str]:
    """The lines that are shown as output: indented, outside of code blocks; far to the right a line goes on."""
    outside = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    outside = re.sub(r"\n {20,}", " ", outside)
    return [line.strip() for line in outside.splitlines() if line.startswith("    ")]


def run(folder: Path, *words: str) -> tuple[int, str]:
    """The exit status, and all that was printed with each run of white space as one blank."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "80", "PYTHONWARNINGS": "ignore"}
    environment.pop("PYTEST_ADDOPTS", None)
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    return done.returncode, " ".join((done.stdout + done.stderr).split())


def missing(lines: list[str], printed: str) -> list[str]:
    return [line for line in lines if " ".join(line.split()) not in printed]


def test_a_new_user_finds_what_the_walk_through_promises(tmp_path):
    pytest_words = ("-m", "pytest", "-p", "no:dash", "-p", "no:cacheprovider", "--hypothesis-seed=1")
    script = "report/reproduce/gen.max_tokens.py"

    assert len(FIRST.splitlines()) <= 22
    (tmp_path / "echo_engine.py").write_text(FIRST)
    status, printed = run(tmp_path, *pytest_words, "--engine=echo_engine:EchoEngine", "--engine-report=report")
    assert status == 1
    assert not missing(promised(section_between("It ends with", "The prompt was two tokens")), printed)

    status, printed = run(tmp_path, script)
    assert status == 1
    assert not missing(promised(section_between("The prompt was two tokens", "So the engine has to look")), printed)

    (tmp_path / "echo_engine.py").write_text(SECOND)
    status, printed = run(tmp_path, script)
    assert status == 0
    assert printed.startswith("r1 {")

    status, printed = run(tmp_path, *pytest_words, "--engine=echo_engine:EchoEngine")
    assert status == 0
    assert not missing(promised(section_between("The script is silent", "Three SHOULD rules")), printed)


def test_the_page_names_every_option_and_no_other():
    listed = set(re.findall(r"^\| `(--[a-z-]+)", PAGE, re.MULTILINE))
    assert listed == OPTIONS.keys()


def test_every_pytest_command_on_the_page_uses_options_that_there_are():
    own = {"--hypothesis-seed", "-k", "-m", "-n", "-x"}
    for block in re.findall(r"```(?:bash|yaml)\n(.*?)```", PAGE, re.DOTALL):
        for line in block.splitlines():
            _, found, command = line.partition("pytest ")
            if found:
                words = shlex.split(command, comments=True)
                flags = {word.partition("=")[0] for word in words if word[0] == "-" and " " not in word}
                assert flags <= {*OPTIONS, *own}, line


def test_the_page_explains_every_level_that_a_verdict_may_name():
    (explained,) = re.findall(r"^MUST: .*?Rules that do not apply", PAGE, re.MULTILINE | re.DOTALL)
    assert all(level in explained for level in LEVELS)
