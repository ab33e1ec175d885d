"""What the pages say is true: commands parse, the two of the README are what CI runs, links lead somewhere."""

from __future__ import annotations

import re
import shlex
from itertools import takewhile
from pathlib import Path

import pytest

from mock_engine.cli import parse
from mock_engine.flags import OneLineParser, add_dynamo_flags, add_engine_flags, add_worker_flags
from mock_engine.profile import list_profiles, load_profile
from mock_engine.profiles_command import summarize

ROOT = Path(__file__).parents[1]
PAGES = sorted(path for folder in (".", "docs", "profiles", "reports") for path in (ROOT / folder).glob("*.md"))


def shell_lines(page):
    """Lines of the bash blocks, continued ones joined, without comments."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def mock_engine_commands():
    commands = []
    for page in PAGES:
        for line in shell_lines(page):
            for command in line.split("&&"):
                words = list(takewhile(lambda word: word[0] not in "<>&|", shlex.split(command, comments=True)))
                if words[:1] == ["mock-engine"]:
                    commands.append(pytest.param(words[1:], id=f"{page.name}: {' '.join(words[1:4])}"))
    return commands


@pytest.mark.parametrize("argv", mock_engine_commands())
def test_every_command_on_the_pages_is_one_that_we_have(argv):
    if argv[0] == "worker":
        parser = OneLineParser()
        for add_flags in (add_engine_flags, add_worker_flags, add_dynamo_flags):
            add_flags(parser)
        flags = parser.parse_args(argv[1:])
    else:
        flags = parse(argv)
    assert getattr(flags, "profile", None) in (None, *list_profiles())


def test_ci_runs_the_two_commands_of_the_readme_as_they_stand_there():
    readme = [line for line in shell_lines(ROOT / "README.md") if line.startswith("pip install")]
    assert len(readme) == 2
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert [line.removesuffix(" || exit 1") for line in ci if line.startswith("pip install")] == readme


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_that_are_there(page):
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def profile_rows():
    """Rows of the README's table of profiles."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace(" (default)", "")
    return re.findall(r"^\| `([a-z0-9.-]+/\S+)` \| (.*) \|$", text, re.MULTILINE)


@pytest.mark.parametrize(("name", "figures"), profile_rows())
def test_the_readme_s_table_has_the_figures_of_the_profiles(name, figures):
    summary = summarize(load_profile(name))
    decode_ms = summary["decode_ms"]["batch_size 32, context_tokens 1024"]
    prefill_ms = summary["prefill_ms"]["new_tokens 2048"]
    assert figures == f"{summary['kv_tokens']:,} | {decode_ms:.1f} | {prefill_ms:.1f}"


def test_the_readme_s_table_shows_each_model_that_ships():
    shown = [name for name, _ in profile_rows()]
    assert {name.split("/")[1] for name in list_profiles()} == {name.split("/")[1] for name in shown}
    assert f"{len(list_profiles())} profiles" in (ROOT / "README.md").read_text(encoding="utf-8")
