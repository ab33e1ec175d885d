"""
AIPerf as a child process, stopped whatever happens.

    status = run_aiperf(command, environment, check)
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from mock_engine.errors import ConfigError

_POLL_S = 0.2
_STOP_S = 10.0


def require_aiperf(command: str, *others: tuple[str, str]) -> None:
    """Raise `ConfigError` if AIPerf, or one of the `others` (module, name), is not installed."""
    for module, needed in (("aiperf", "AIPerf"), *others):
        if importlib.util.find_spec(module) is None:
            raise ConfigError(
                f"{command} needs {needed}, which is not installed. Run: pip install 'mock-engine[bench]'"
            )


def run_aiperf(
    command: list[str],
    environment: Mapping[str, str],
    check: Callable[[], None] = lambda: None,
    log_path: Path | None = None,
) -> int:
    """
    AIPerf's exit status. What it prints goes to `log_path`, or where our own output goes.

    `check` is called again and again while it runs; if it raises, or we are interrupted, AIPerf is stopped first.
    """
    with contextlib.ExitStack() as files:
        output = files.enter_context(log_path.open("wb")) if log_path else None
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if output else None,
            start_new_session=True,
        )
        try:
            while process.poll() is None:
                check()
                time.sleep(_POLL_S)
            check()
        finally:
            stop_aiperf(process)
        return process.returncode


def stop_aiperf(process: subprocess.Popen[bytes]) -> None:
    """AIPerf is a dozen processes in a session of their own: ask the first to end, then see to it that none is left."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
