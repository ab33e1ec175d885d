"""
The process: `python -m mock_engine` is `mock-engine`.

A worker is asked for by the dozen and waited for, so it does not load what the other commands need (0.15 s).
"""

import sys
from typing import NoReturn


def run() -> NoReturn:
    """Run the command in this process's arguments and end with its exit status."""
    if sys.argv[1:2] == ["worker"]:
        from mock_engine.dynamo_release import run_backend
        from mock_engine.llm_engine import MockLLMEngine

        run_backend(MockLLMEngine, sys.argv[2:])
        sys.exit(0)
    from mock_engine.cli import run as run_command

    run_command()


if __name__ == "__main__":
    run()
