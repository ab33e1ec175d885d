"""`profiles record` with the real AIPerf against a served mock, and `profiles fit` of what it recorded."""

from __future__ import annotations

import json
import sys

import pytest

from mock_engine.cli import main
from mock_engine.engine_settings import DEFAULT_TOKENIZER
from mock_engine.profile import check_profile
from mock_engine.profile_fit import read_run
from tests.helpers.processes import Command, serving

pytest.importorskip("aiperf", reason="needs the bench extra")

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]

SMALL = ["--concurrency", "1,3", "--request-count", "9", "--isl", "96", "--isl-stddev", "32", "--osl", "8"]


def test_a_server_is_recorded_and_fitted(tmp_path, capsys):
    """Times are the host's as much as the profile's, so nothing is said of them here."""
    client = tmp_path / "client"
    client.mkdir()
    with serving(tmp_path) as (_, facts):
        server = ["--url", facts["url"], "--model", facts["model"], "--tokenizer", str(DEFAULT_TOKENIZER)]
        command = Command(["profiles", "record", *server, "--out", "runs", *SMALL, "--osl-stddev", "2"], client)
        assert command.exit_status() == 0, command.output
    assert "runs/concurrency-3: concurrency 3, 9 requests: TTFT" in command.output
    assert "Now: mock-engine profiles fit runs/* --out my-profile" in command.output
    folders = sorted((client / "runs").iterdir())
    assert [folder.name for folder in folders] == ["concurrency-1", "concurrency-3"]
    for folder, concurrency in zip(folders, (1, 3), strict=True):
        run = read_run(folder)
        assert (len(run.requests), run.num_left_out) == (9, 0)
        assert 1 <= run.concurrency <= concurrency
        assert len({request.isl_tokens for request in run.requests}) > 3
        assert (folder / "aiperf.log").is_file()
    out, json_path = tmp_path / "my-profile", tmp_path / "fit.json"
    assert main(["profiles", "fit", *map(str, folders), "--out", str(out), "--json", str(json_path)]) == 0
    assert not check_profile(out)
    assert "concurrency-1 has 9 requests; 20 and more give firmer figures." in capsys.readouterr().out
    assert len(json.loads(json_path.read_text(encoding="utf-8"))["runs"]) == 2
