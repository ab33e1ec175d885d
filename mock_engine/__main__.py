"""`python -m mock_engine` is `mock-engine`."""

from mock_engine.cli import run

if __name__ == "__main__":
    run()
