"""Dynamo's three flags: what may be asked for, and that what is not there is said before anything starts."""

from __future__ import annotations

import importlib
import itertools
import os
import socket
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from mock_engine.cli import parse
from mock_engine.errors import ConfigError
from mock_engine.planes import CHOICES, Planes


@contextmanager
def listening():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def closed_port():
    """A port that is ours, and takes no connections."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@pytest.mark.parametrize("values", list(itertools.product(*CHOICES.values())))
def test_flags_give_the_same_planes_again(values):
    planes = Planes(*values)
    assert Planes.from_flags(parse(["serve", *planes.to_argv()])) == planes


@pytest.mark.parametrize("name", CHOICES)
def test_what_dynamo_does_not_have_is_one_line_that_says_what_there_is(name):
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} is carrier-pigeon; it must be "):
        Planes(**{name: "carrier-pigeon"})


def test_without_etcd_and_nats_nothing_has_to_be_there():
    Planes().check({"ETCD_ENDPOINTS": "http://127.0.0.1:1", "NATS_SERVER": "nats://127.0.0.1:1"})


@pytest.mark.skipif(sys.platform != "linux", reason="files are watched in another way")
def test_with_too_little_to_watch_files_with_nothing_starts():
    """It is the same error whether the user's inotify instances are used up or, as here, the process's files."""
    resource = importlib.import_module("resource")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    next_file = _next_file()
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (next_file + 4, limits[1]))
        with pytest.raises(ConfigError, match=r"^only \d inotify instances are left .*\(Too many open files\)"):
            Planes().check({})
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert _next_file() == next_file  # it has closed them


def _next_file():
    """The number of the next file that is opened."""
    with Path(os.devnull).open() as file:
        return file.fileno()


@pytest.mark.parametrize("url", ["http://127.0.0.1:{}", "127.0.0.1:{}", "http://127.0.0.1:1, http://127.0.0.1:{}/"])
def test_one_etcd_that_takes_connections_is_enough(url):
    with listening() as port:
        Planes("etcd").check({"ETCD_ENDPOINTS": url.format(port)})


@pytest.mark.parametrize(
    ("planes", "variable", "name"),
    [
        (Planes("etcd"), "ETCD_ENDPOINTS", "etcd"),
        (Planes(request_plane="nats"), "NATS_SERVER", "NATS"),
        (Planes(event_plane="nats"), "NATS_SERVER", "NATS"),
    ],
)
def test_what_is_not_there_is_one_line_that_says_where_it_was_looked_for(planes, variable, name, closed_port):
    url = f"http://127.0.0.1:{closed_port}"
    with pytest.raises(ConfigError, match=f"^{name} does not answer at {url}: Connection refused.*with {variable}.$"):
        planes.check({variable: url})
    with pytest.raises(ConfigError, match="could not be cast to integer"):
        planes.check({variable: "http://127.0.0.1:port"})
