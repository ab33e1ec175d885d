"""`python -m mock_engine` is `mock-engine`."""

import sys

from mock_engine.cli import main

if __name__ == "__main__":
    sys.exit(main())
