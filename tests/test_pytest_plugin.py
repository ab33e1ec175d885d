"""The fixtures, as the tests of another project use them: in a folder of their own, in a process of its own."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from mock_engine.pytest_plugin import _given_args

pytest_plugins = ["pytester"]

PLUGIN = "mock_engine.pytest_plugin"


@pytest.fixture
def run(pytester, monkeypatch):
    """Run pytest in a child process, in an empty folder."""
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)

    def run_pytest(*args):
        return pytester.runpytest_subprocess("-p", "no:dash", "-p", "no:cacheprovider", "-p", PLUGIN, *args)

    return run_pytest


def test_the_plugin_is_found_by_its_entry_point():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    entry = importlib.metadata.EntryPoint(PLUGIN, project["project"]["entry-points"]["pytest11"][PLUGIN], "pytest11")
    assert entry.load().mock_engine_server


def test_a_run_that_asks_for_no_server_imports_next_to_nothing(pytester, run):
    """pytest starts as fast as without us."""
    pytester.makepyfile(
        """
        import sys
        def test_light():
            ours = {name for name in sys.modules if name.split(".")[0] == "mock_engine"}
            assert ours == {"mock_engine", "mock_engine.pytest_plugin"}
            assert not {"numpy", "tokenizers"} & sys.modules.keys()
        """
    )
    run().assert_outcomes(passed=1)


def test_help_and_the_list_of_fixtures_say_what_there_is(run):
    assert "mock-engine-args=ARGS" in run("--help").stdout.str()
    text = run("--fixtures").stdout.str()
    assert "mock_engine_server_factory [session scope]" in text
    assert "mock_engine_server [session scope]" in text


def test_wrong_settings_are_one_line_and_fail_the_tests_that_asked(pytester, run):
    pytester.makepyfile(
        """
        def test_flag(mock_engine_server): pass
        def test_keyword(mock_engine_server_factory): mock_engine_server_factory(jitter=0, max_num_seqs=0)
        def test_profile(mock_engine_server_factory): mock_engine_server_factory(jitter=0, profile="nope")
        def test_other(): pass
        """
    )
    result = run("--mock-engine-args=--jitter 2")
    result.assert_outcomes(errors=1, failed=2, passed=1)
    text = result.stdout.str()
    for message in (
        "--jitter is 2; it is a coefficient of variation from 0 (none) to 1",
        "--max-num-seqs is 0; it must be at least 1",
        "no profile 'nope', neither shipped nor a folder",
    ):
        assert f"\nmock-engine: {message}" in text
    assert "pytest_plugin.py" not in text  # no traceback


def test_settings_that_no_shell_can_split_are_one_line():
    config = SimpleNamespace(getoption=lambda _: "--frob 'x", getini=lambda _: [])
    with pytest.raises(pytest.fail.Exception, match=r"^mock-engine: --mock-engine-args is .* no shell can split"):
        _given_args(config)


@pytest.mark.e2e
def test_servers_are_shared_set_by_file_flags_and_keywords_and_a_failure_shows_what_they_logged(pytester, run):
    """Two processes of pytest-xdist, each with a server of its own."""
    pytester.makeini("[pytest]\nmock_engine_args = --seed 5 --max-num-seqs 6 --max-model-len 64\n")
    pytester.makeconftest(
        """
        import openai, pytest

        @pytest.fixture
        def router(mock_engine_server):
            return mock_engine_server

        @pytest.fixture
        def ask():
            def ask(server, content="hello"):
                client = openai.OpenAI(base_url=server.base_url, api_key=server.api_key)
                messages = [{"role": "user", "content": content}]
                answer = client.chat.completions.create(model=server.model, messages=messages, max_tokens=6)
                return answer.choices[0].message.content

            return ask
        """
    )
    pytester.makepyfile(
        test_one="""
        import openai, pytest

        def test_settings(router, mock_engine_server_factory, ask):
            engine = router.settings.worker.engine
            assert (engine.seed, engine.max_num_seqs, engine.speedup_ratio) == (5, 7, 0)
            assert mock_engine_server_factory(seed=5) is router
            print("url:", router.url, "said:", ask(router))

        def test_that_fails(router, ask):
            with pytest.raises(openai.BadRequestError):
                ask(router, "hello " * 100)
            assert router.url == "something else"
        """,
        test_two="""
        def test_keywords(mock_engine_server_factory, ask):
            server = mock_engine_server_factory(seed=6)
            assert (server.settings.worker.engine.seed, server.settings.worker.engine.max_num_seqs) == (6, 7)
            assert mock_engine_server_factory(seed=6, max_num_seqs=7) is server
            print("url:", server.url, "said:", ask(server))
        """,
    )
    result = run("--mock-engine-args=--max-num-seqs 7 --speedup-ratio 0", "-n2", "--dist=loadfile", "-rP")
    result.assert_outcomes(passed=2, failed=1)
    text = result.stdout.str()
    urls = re.findall("^url: (.*) said", text, re.MULTILINE)
    assert len(set(urls)) == 2
    assert len(set(re.findall("said: (.*)", text))) == 2  # another seed, other words
    (failed,) = re.findall("-- mock engine at (.*) --", text)
    assert failed in urls  # shared with the test before
    assert "state: 0 running, 0 waiting, 0 of 28198 KV blocks used" in text
    assert re.search("^frontend: .* status=400 ", text, re.MULTILINE)
