"""What holds for every test."""

from collections.abc import Iterator

import pytest

from tests.helpers.processes import Command


@pytest.fixture
def quiet(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """What broken engines print is nobody's business."""
    yield
    capfd.readouterr()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whoever asks for a mock engine starts processes, the examples of docs/ too, which know nothing of our marks."""
    for item in items:
        if "mock_engine_server_factory" in getattr(item, "fixturenames", ()):
            item.add_marker("e2e")


@pytest.fixture(autouse=True)
def _no_process_outlives_its_test() -> Iterator[None]:
    yield
    Command.stop_all()
