"""
The pytest plugin: a mock engine for the tests of whatever talks to an LLM.

    def test_my_router(mock_engine_server):
        client = openai.OpenAI(base_url=mock_engine_server.base_url, api_key=mock_engine_server.api_key)

    mock_engine_server                        one for the session; started by the first test that asks for it
    mock_engine_server_factory(workers=2)     others, each kept for the session; the same settings, the same one

Settings of all come from `mock_engine_args` in the ini file, then `--mock-engine-args`, then the factory's keywords:
the flags of `mock-engine serve`, the later one counts. A test that fails shows what the server logged meanwhile.

Under pytest-xdist each of its processes has servers of its own, so that no test finds the KV cache, the queue or a
dead worker of a test beside it. pytest loads this module in every run, so it imports the rest when a test asks.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from itertools import zip_longest
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from mock_engine.testing import MockEngineServer

ARGS = "mock_engine_args"
FLAG = "--mock-engine-args"
_MAX_LOG_LINES = 40
_SERVERS = pytest.StashKey[list["MockEngineServer"]]()  # those that run
_LOGGED_BEFORE = pytest.StashKey[list[dict[str, int]]]()  # for each of them, how long each log was


def pytest_addoption(parser: pytest.Parser) -> None:
    """One option and one ini value."""
    text = "flags of 'mock-engine serve' for the fixture mock_engine_server, one shell-quoted text"
    parser.getgroup("mock-engine").addoption(FLAG, dest=ARGS, metavar="ARGS", default="", help=text)
    parser.addini(ARGS, text, type="args", default=[])


@pytest.fixture(scope="session")
def mock_engine_server_factory(pytestconfig: pytest.Config) -> Iterator[Callable[..., MockEngineServer]]:
    """`mock_engine_server_factory(max_num_seqs=4)`: a running mock engine with these settings, kept for the session."""
    from mock_engine.errors import MockEngineError
    from mock_engine.testing import MockEngineServer

    servers = pytestconfig.stash[_SERVERS] = []
    with ExitStack() as stack:

        def server_with(**settings: object) -> MockEngineServer:
            try:
                server = MockEngineServer(_given_args(pytestconfig), **settings)
                for other in servers:
                    if other.settings == server.settings:
                        return other
                servers.append(stack.enter_context(server))
            except MockEngineError as error:
                raise _failure(str(error)) from None
            return server

        yield server_with
    servers.clear()


@pytest.fixture(scope="session")
def mock_engine_server(mock_engine_server_factory: Callable[..., MockEngineServer]) -> MockEngineServer:
    """A running mock engine: `base_url`, `model`, `api_key`, `env()`, `status()`, `wait_until(...)`, `logs()`."""
    return mock_engine_server_factory()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add to the report of a test that failed what the servers are doing, and what they logged since it began."""
    report = yield
    if "mock_engine_server_factory" not in getattr(item, "fixturenames", ()):
        return report
    servers = item.config.stash.get(_SERVERS, [])
    if report.when == "setup":
        item.stash[_LOGGED_BEFORE] = [_log_sizes(server) for server in servers]
    if report.when != "teardown" and report.failed:
        before = item.stash.get(_LOGGED_BEFORE, [])
        for server, sizes in zip_longest(servers, before):
            report.sections.append((f"mock engine at {server.url}", _story_of(server, sizes or {})))
    return report


def _given_args(config: pytest.Config) -> list[str]:
    text = config.getoption(ARGS)
    try:
        return [*config.getini(ARGS), *shlex.split(text)]
    except ValueError as error:
        raise _failure(f"{FLAG} is {text!r}, which no shell can split: {error}") from None


def _failure(message: str) -> BaseException:
    """What fails a test with this message and no traceback."""
    return pytest.fail.Exception(f"mock-engine: {message}", pytrace=False)


def _log_sizes(server: MockEngineServer) -> dict[str, int]:
    return {name: len(text) for name, text in server.logs().items()}


def _story_of(server: MockEngineServer, sizes: dict[str, int]) -> str:
    from mock_engine.errors import ProcessError

    try:
        lines = [f"state: {server.status()}"]
    except ProcessError as error:
        lines = [str(error)]
    for name, text in server.logs().items():
        new = text[sizes.get(name, 0) :].splitlines()
        cut = [f"({len(new) - _MAX_LOG_LINES} lines before these)"] if len(new) > _MAX_LOG_LINES else []
        lines += [f"{name}: {line}" for line in [*cut, *new[-_MAX_LOG_LINES:]]]
    return "\n".join(lines)
