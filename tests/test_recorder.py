"""What a worker writes down can be read back, also while it is being written."""

from __future__ import annotations

import pytest

from mock_engine.errors import ConfigError
from mock_engine.recorder import (
    REQUESTS_FILE,
    TIMELINE_FILE,
    Recorder,
    read_requests,
    read_status,
    read_timeline,
)
from tests.test_bench_results import make_row, make_timeline


def test_rows_come_back_as_they_were(tmp_path):
    recorder = Recorder(tmp_path / "new" / "folder", tmp_path / "status.json")
    requests, timeline = [make_row(number) for number in range(3)], make_timeline(3)
    for request, state in zip(requests, timeline, strict=True):
        recorder.add_request(request)
        recorder.add_state(state)
        assert read_status(tmp_path / "status.json") == state
    assert read_requests(tmp_path / "new" / "folder") == requests  # before it is closed, too
    recorder.close()
    recorder.close()
    assert read_timeline(tmp_path / "new" / "folder") == timeline


def test_half_a_line_is_not_a_row_yet(tmp_path):
    recorder = Recorder(tmp_path, None)
    recorder.add_state(make_timeline()[0])
    recorder.close()
    with (tmp_path / TIMELINE_FILE).open("a", encoding="utf-8") as file:
        file.write('{"unix_s": 1.0, "ti')
    assert len(read_timeline(tmp_path)) == 1


def test_without_a_folder_only_the_status_is_kept(tmp_path):
    recorder = Recorder(None, tmp_path / "status.json")
    assert not recorder.keeps_requests
    recorder.add_request(make_row())
    recorder.add_state(make_timeline()[0])
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_nothing_recorded_is_nothing_read(tmp_path):
    assert read_timeline(tmp_path) == []
    assert read_requests(tmp_path) == []
    assert read_status(tmp_path / "status.json") is None


def test_a_folder_that_cannot_be_written_is_said_at_once(tmp_path):
    (tmp_path / REQUESTS_FILE).mkdir()
    with pytest.raises(ConfigError, match=r"cannot record to .*Name another folder"):
        Recorder(tmp_path, None)
