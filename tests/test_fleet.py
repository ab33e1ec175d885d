"""When a fleet is ready, by what its frontend answers. (With real processes: test_serve_e2e.)"""

from __future__ import annotations

import io
import urllib.error

import pytest

from mock_engine import fleet
from mock_engine.errors import ProcessError
from mock_engine.faults import parse_fault
from mock_engine.fleet import Fleet, FleetSettings
from mock_engine.worker_settings import WorkerSettings


class Frontend:
    """Dynamo's, as far as a fleet asks it: `answers` to one request after the other are a body or an HTTP status."""

    def __init__(self, answers):
        self.answers = answers
        self.bodies = []

    def __call__(self, url, body=None, _timeout_s=5.0):
        path = url.split("/", 3)[3]
        if path == "health":
            return {"instances": [{"namespace": "dynamo", "endpoint": "generate"}]}
        if path == "v1/models":
            return {"data": [{"id": "llama-3.1-8b"}]}
        self.bodies.append(body)
        answer = self.answers.pop(0)
        if isinstance(answer, int):
            raise urllib.error.HTTPError(url, answer, "as told", {}, io.BytesIO())
        return answer


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Start a fleet without processes in front of a frontend that answers so; the frontend, once it has started."""
    monkeypatch.setattr(fleet.time, "sleep", lambda _: None)
    monkeypatch.setattr(fleet.Parts, "spawn", lambda *_: None)

    def start(*answers, faults=()):
        frontend = Frontend(list(answers))
        monkeypatch.setattr(fleet, "http_json", frontend)
        with Fleet(FleetSettings(WorkerSettings(faults=faults)), tmp_path):
            pass
        return frontend

    return start


FAULTS = (parse_fault("error:rate=1"),)


@pytest.mark.parametrize("status", [404, 503])
def test_a_model_that_is_listed_but_not_served_yet_is_waited_for(start, status):
    assert len(start(status, status, {}).bodies) == 3


@pytest.mark.parametrize("faults", [(), FAULTS])
def test_what_fails_for_another_reason_is_said(start, faults):
    with pytest.raises(ProcessError, match="the model is registered but does not answer: HTTP Error 500: as told"):
        start(404, 500, faults=faults)
    with pytest.raises(ProcessError, match="HTTP Error 401"):
        start(401, faults=faults)


def test_a_refusal_shows_that_workers_with_faults_are_there_and_does_not_touch_them(start):
    frontend = start(404, 400, faults=FAULTS)
    assert [body["nvext"] for body in frontend.bodies] == [{"token_data": []}] * 2
    with pytest.raises(ProcessError, match="HTTP Error 400"):
        start(400)


def test_a_part_that_has_died_is_what_is_said(start, monkeypatch):
    def check(_):
        raise ProcessError("worker-0 was killed")

    monkeypatch.setattr(Fleet, "check", check)
    with pytest.raises(ProcessError, match="worker-0 was killed"):
        start(500)
