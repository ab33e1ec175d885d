"""
How the parts of a Dynamo deployment find and reach each other: Dynamo's three flags.

    Planes()                                      files, TCP and ZeroMQ: nothing else has to run
    planes = Planes("etcd", "nats", "nats")       a cluster that is already there
    planes.check(os.environ)                      raises `ConfigError` if what they need is not there
    ["-m", "dynamo.frontend", *planes.to_argv()]

Where etcd and NATS are, Dynamo's own variables say (ETCD_ENDPOINTS, NATS_SERVER).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from urllib.parse import urlsplit

from mock_engine.engine_settings import argv_of, flag_of
from mock_engine.errors import ConfigError

CHOICES = {
    "discovery_backend": ("file", "etcd"),
    "request_plane": ("tcp", "nats"),
    "event_plane": ("zmq", "nats"),
}
_CONNECT_TIMEOUT_S = 3.0
MAX_WATCHES = 16  # inotify instances of one frontend: 5 for --workers N, 13 with roles and the KV router (1.4.2)


@dataclass(frozen=True, slots=True)
class Planes:
    """Field names are the flags' names. Raises `ConfigError` for a value that Dynamo does not have."""

    discovery_backend: str = "file"
    request_plane: str = "tcp"
    event_plane: str = "zmq"

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise ConfigError(f"{flag_of(name)} is {value}; it must be {' or '.join(choices)}")

    @classmethod
    def from_flags(cls, flags: argparse.Namespace) -> Planes:
        """What a parser with `flags.add_plane_flags` has parsed."""
        return cls(**{each.name: getattr(flags, each.name) for each in fields(cls)})

    def to_argv(self) -> list[str]:
        """Flags of Dynamo's frontend, of `mock-engine worker` and of any other Dynamo backend."""
        return argv_of({each.name: getattr(self, each.name) for each in fields(self)})

    @property
    def is_shared(self) -> bool:
        """Whether others may find each other in the same place."""
        return self.discovery_backend == "etcd"

    def check(self, environment: Mapping[str, str]) -> None:
        """
        Raise `ConfigError` unless all that these planes need is there: etcd and NATS, where `environment` says they
        are, or what Linux lends a user to watch files with.
        """
        if self.discovery_backend == "file" and sys.platform == "linux":
            _check_watches()
        if self.discovery_backend == "etcd":
            _check_one("etcd", "ETCD_ENDPOINTS", environment.get("ETCD_ENDPOINTS") or "http://localhost:2379", 2379)
        if "nats" in (self.request_plane, self.event_plane):
            _check_one("NATS", "NATS_SERVER", environment.get("NATS_SERVER") or "nats://localhost:4222", 4222)


def _check_watches() -> None:
    """
    With too few inotify instances Dynamo's frontend starts, reads the files once and logs without end that it watches
    them again (1.4.2): it sends requests to workers that have left, and none to those that come. So look before.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    with contextlib.ExitStack() as held:
        for number in range(MAX_WATCHES):
            if (watch := libc.inotify_init1(os.O_CLOEXEC)) < 0:
                raise ConfigError(
                    f"only {number} inotify instances are left to this user ({os.strerror(ctypes.get_errno())}), and "
                    f"Dynamo's frontend takes up to {MAX_WATCHES} to find its workers. End other programs that watch "
                    f"files (editors, other frontends), raise the limit (sysctl fs.inotify.max_user_instances=1024), "
                    f"or use --discovery-backend etcd."
                )
            held.callback(os.close, watch)


def _check_one(name: str, variable: str, urls: str, default_port: int) -> None:
    """`urls` are separated by commas; one of them that takes connections is enough."""
    reason = "no address"
    for url in urls.split(","):
        parts = urlsplit(url.strip() if "//" in url else f"//{url.strip()}")
        try:
            address = (parts.hostname or "localhost", parts.port or default_port)
            socket.create_connection(address, _CONNECT_TIMEOUT_S).close()
        except (OSError, ValueError) as error:  # ValueError: the port is no number
            reason = getattr(error, "strerror", None) or str(error)
        else:
            return
    raise ConfigError(f"{name} does not answer at {urls}: {reason}. Start it, or say where it is with {variable}.")
