"""Dynamo's frontend with Nagle's algorithm off: what a listening socket hands down."""

from __future__ import annotations

import socket
import sys

import pytest

from mock_engine.frontend import set_nodelay

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def has_nodelay(connection):
    return connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0


@pytest.mark.parametrize("is_set", [False, True])
def test_connections_inherit_it_from_the_socket_that_listens(is_set):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        if is_set:
            assert set_nodelay(port)
        with socket.create_connection(("127.0.0.1", port)), server.accept()[0] as accepted:
            assert has_nodelay(accepted) == is_set


def test_a_socket_that_only_uses_the_port_is_not_meant():
    """The client's end, or one that is bound and does not listen yet."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        assert not set_nodelay(bound.getsockname()[1])
        assert not has_nodelay(bound)
        bound.listen()
        assert set_nodelay(bound.getsockname()[1])
