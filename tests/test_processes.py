"""Child processes: an interrupt at a bad moment. (That they come up and go down together: test_serve_e2e.)"""

from __future__ import annotations

import os
import signal
import sys

import pytest

from mock_engine.processes import Parts

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere parts start without a fork of Python's own")

SLEEPS = ["-c", "import time; time.sleep(1000)"]

_after_fork = []
os.register_at_fork(after_in_parent=lambda: [call() for call in _after_fork])  # there is no way to take it back


@pytest.fixture
def interrupted_as_it_forks(request):
    """The given signal comes, and is to raise KeyboardInterrupt, where Python drops what is raised."""
    handler = signal.signal(request.param, signal.default_int_handler)
    _after_fork.append(lambda: signal.raise_signal(request.param))
    yield request.param
    _after_fork.clear()
    signal.signal(request.param, handler)


@pytest.mark.parametrize("interrupted_as_it_forks", [signal.SIGINT, signal.SIGTERM], indirect=True)
def test_an_interrupt_while_a_part_starts_comes_once_it_can_be_stopped(tmp_path, interrupted_as_it_forks):
    parts = Parts(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        parts.spawn("sleeper", SLEEPS, {})
    assert [part.name for part in parts.all] == ["sleeper"]
    assert signal.getsignal(interrupted_as_it_forks) is signal.default_int_handler
    parts.stop()
    assert parts.all[0].process.returncode == -signal.SIGTERM
