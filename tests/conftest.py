"""What holds for every test."""

from collections.abc import Iterator

import pytest

from tests.helpers.processes import Command


@pytest.fixture
def quiet(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """What broken engines print is nobody's business."""
    yield
    capfd.readouterr()


@pytest.fixture(autouse=True)
def _no_process_outlives_its_test() -> Iterator[None]:
    yield
    Command.stop_all()
