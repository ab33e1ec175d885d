"""What holds for every test."""

from collections.abc import Iterator
from functools import cache

import pytest
from hypothesis import HealthCheck, settings

from mock_engine.engine_settings import load_profile
from mock_engine.output_tokens import OutputTokens
from tests.helpers.jumping_loop import LoopClock
from tests.helpers.processes import Command

# No test fails because a busy machine stalled in it, or because it was the first to import something that takes long.
settings.register_profile("no clock", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("no clock")


@pytest.fixture
def quiet(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """What broken engines print is nobody's business."""
    yield
    capfd.readouterr()


@pytest.fixture(scope="module")
def no_wall_clock() -> Iterator[pytest.MonkeyPatch]:
    """A live engine's time is its loop's, which jumps; files that never change are read once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mock_engine.llm_engine.RealTimeClock", LoopClock)
        patch.setattr("mock_engine.worker_roles.RealTimeClock", LoopClock)
        patch.setattr("mock_engine.engine_settings.load_profile", cache(load_profile))
        patch.setattr(OutputTokens, "from_model_path", cache(OutputTokens.from_model_path))
        yield patch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whoever asks for a mock engine starts processes, the examples of docs/ too, which know nothing of our marks."""
    for item in items:
        if "mock_engine_server_factory" in getattr(item, "fixturenames", ()):
            item.add_marker("e2e")


@pytest.fixture(autouse=True)
def _no_process_outlives_its_test() -> Iterator[None]:
    yield
    Command.stop_all()
