"""
What docs/kubernetes has: manifests for Dynamo's operator, and the image they run. Checked without a cluster.

Fields are those of the operator's CRD, nvidia.com/v1beta1, compared by hand (docs/kubernetes.md says with what).
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from dynamo.frontend.frontend_args import FrontendArgGroup

from mock_engine.cli import parse
from mock_engine.errors import ConfigError
from mock_engine.flags import OneLineParser, add_dynamo_flags, add_engine_flags, add_worker_flags
from mock_engine.processes import free_port, http_json
from mock_engine.profile import load_profile
from mock_engine.worker_settings import WorkerSettings
from tests.helpers.processes import wait_for

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "kubernetes"
CONTAINERFILE = (FOLDER / "Containerfile").read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
PAGE = (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8")

COMPONENT_FIELDS = {"name", "type", "replicas", "podTemplate"}
POD_FIELDS = {"containers", "terminationGracePeriodSeconds"}
CONTAINER_FIELDS = {"name", "image", "command", "args", "env", "livenessProbe", "readinessProbe", "resources"}
PROBE_FIELDS = {"httpGet", "periodSeconds", "timeoutSeconds", "failureThreshold"}
TYPES = {"frontend", "worker", "prefill", "decode"}
PORTS = {"frontend": 8000, "worker": 9090, "prefill": 9090, "decode": 9090}


def components():
    found = []
    for path in sorted(FOLDER.glob("*.yaml")):
        for component in yaml.safe_load(path.read_text(encoding="utf-8"))["spec"]["components"]:
            found.append(pytest.param(component, id=f"{path.name} {component['name']}"))
    return found


def main_container(component):
    (container,) = component["podTemplate"]["spec"]["containers"]
    return container


def environment_of(container):
    return {
        entry["name"]: entry.get("value", "10.0.0.1") for entry in container.get("env", [])
    }  # else the pod's address


def worker_flags(container):
    """Its flags as the worker parses them, with Kubernetes' $(NAME) put in."""
    environment = environment_of(container)
    argv = [re.sub(r"\$\((\w+)\)", lambda match: environment[match[1]], word) for word in container["args"]]
    parser = OneLineParser()
    for add_flags in (add_engine_flags, add_worker_flags, add_dynamo_flags):
        add_flags(parser)
    return parser.parse_args(argv)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.name)
def test_a_manifest_is_a_graph_of_one_frontend_and_workers(path):
    (document,) = yaml.safe_load_all(path.read_text(encoding="utf-8"))
    assert document.keys() == {"apiVersion", "kind", "metadata", "spec"}
    assert (document["apiVersion"], document["kind"]) == ("nvidia.com/v1beta1", "DynamoGraphDeployment")
    assert document["spec"].keys() == {"components"}
    names = [component["name"].lower() for component in document["spec"]["components"]]
    assert len(set(names)) == len(names)
    assert [component["type"] for component in document["spec"]["components"]].count("frontend") == 1
    assert path.name in PAGE


@pytest.mark.parametrize("component", components())
def test_a_component_has_only_fields_that_the_operator_knows(component):
    container = main_container(component)
    assert component.keys() == COMPONENT_FIELDS
    assert re.fullmatch("[A-Za-z0-9]([-A-Za-z0-9]*[A-Za-z0-9])?", component["name"])
    assert component["type"] in TYPES
    assert component["replicas"] >= 1
    assert component["podTemplate"]["spec"].keys() <= POD_FIELDS
    assert container.keys() <= CONTAINER_FIELDS
    assert container["name"] == "main"
    assert container["image"] == f"mock-engine:{version('mock-engine')}"
    assert all(container[probe].keys() == PROBE_FIELDS for probe in container if probe.endswith("Probe"))
    assert all(isinstance(value, str) for value in environment_of(container).values())
    amounts = container["resources"]["requests"] | container["resources"]["limits"]
    assert amounts.keys() == {"cpu", "memory"}, "no GPU"


@pytest.mark.parametrize("component", components())
def test_a_component_s_command_is_one_that_it_understands(component):
    container = main_container(component)
    if component["type"] == "frontend":
        assert container["command"] == ["python", "-m", "mock_engine.frontend"]
        parser = OneLineParser()
        FrontendArgGroup().add_arguments(parser)
        assert parser.parse_args(container["args"]).http_port == PORTS["frontend"]
    else:
        assert container["command"] == ["mock-engine", "worker"]
        flags = worker_flags(container)
        WorkerSettings.from_flags(flags)
        load_profile(flags.profile)
        assert flags.disaggregation_mode == {"worker": "agg"}.get(component["type"], component["type"])


@pytest.mark.parametrize("component", components())
def test_a_worker_has_the_time_to_stop_that_kubernetes_gives_it(component):
    container, pod = main_container(component), component["podTemplate"]["spec"]
    if component["type"] != "frontend":
        grace_s = int(environment_of(container)["DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS"])
        assert grace_s + 30 < pod["terminationGracePeriodSeconds"]  # and then cleanup, for which Dynamo gives 30 s


@pytest.mark.parametrize("component", components())
def test_ports_are_those_of_the_image(component):
    container = main_container(component)
    (exposed,) = [line.split()[1:] for line in CONTAINERFILE if line.startswith("EXPOSE")]
    port = PORTS[component["type"]]
    assert str(port) in exposed
    for probe in (container[name] for name in container if name.endswith("Probe")):
        assert probe["httpGet"]["port"] == port == int(environment_of(container)["DYN_SYSTEM_PORT"])


def test_the_image_copies_what_the_package_is_built_of_and_installs_it_as_the_readme_does():
    copied = [word for line in CONTAINERFILE if line.startswith("COPY") for word in line.split()[1:-1]]
    assert [name for name in copied if not (ROOT / name).exists()] == []
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    needed = re.search(r"^packages = \[(.*)\]", pyproject, re.MULTILINE)[1].replace('"', "").split(", ")
    needed += ["profiles", "README.md", "LICENSE", "pyproject.toml", "constraints.txt"]
    assert set(copied) == set(needed)
    (install,) = [shlex.split(line) for line in CONTAINERFILE if "pip install" in line]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "pip install -c constraints.txt" in readme
    assert install == ["RUN", "pip", "install", "--no-cache-dir", "-c", "constraints.txt", "."]


def test_the_image_runs_as_nobody_in_particular_a_command_that_we_have():
    assert "USER 1000" in CONTAINERFILE[: [line[:3] for line in CONTAINERFILE].index("CMD")]
    (command,) = [line.removeprefix("CMD ") for line in CONTAINERFILE if line.startswith("CMD")]
    program, *argv = yaml.safe_load(command)
    assert program == "mock-engine"
    assert parse(argv).host == "0.0.0.0"
    assert f"-t mock-engine:{version('mock-engine')} ." in CONTAINERFILE[0]


@pytest.mark.e2e
@pytest.mark.skipif(sys.platform != "linux", reason="binds the system port to the loopback only")
def test_the_probes_of_a_worker_answer(tmp_path):
    """Ready is when its endpoint is; the operator says so by DYN_SYSTEM_USE_ENDPOINT_HEALTH_STATUS."""
    container = next(main_container(param.values[0]) for param in components() if param.values[0]["type"] == "worker")
    port = _free_system_port()
    environment = {
        **os.environ,
        **environment_of(container),
        "DYN_SYSTEM_PORT": str(port),
        "DYN_SYSTEM_HOST": "127.0.0.1",
        "DYN_SYSTEM_USE_ENDPOINT_HEALTH_STATUS": '["generate"]',
        "DYN_DISCOVERY_BACKEND": "file",
        "DYN_FILE_KV": str(tmp_path / "discovery"),
        "DYN_TCP_RPC_HOST": "127.0.0.1",
        "DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS": "0",
    }
    argv = [sys.executable, "-m", "mock_engine", "worker", *container["args"], "--no-enable-kv-routing"]
    with (tmp_path / "log").open("wb") as log:
        worker = subprocess.Popen(argv, env=environment, stdout=log, stderr=log)
    try:
        wait_for(lambda: _json_or_none(f"http://127.0.0.1:{port}/live") or worker.poll() is not None, "it listens")
        for probe in ("livenessProbe", "readinessProbe"):
            url = f"http://127.0.0.1:{port}{container[probe]['httpGet']['path']}"
            assert wait_for(lambda url=url: _json_or_none(url), probe)["status"] in ("live", "ready", "healthy")
    finally:
        worker.terminate()
        assert worker.wait(20) == 0


def _free_system_port():
    """Dynamo reads DYN_SYSTEM_PORT as an i16 (1.4.2): ports from 32768 on are none to it."""
    for port in random.sample(range(20_000, 32_768), 100):
        with contextlib.suppress(ConfigError):
            return free_port("127.0.0.1", port)
    raise AssertionError("no free port")


def _json_or_none(url):
    try:
        return http_json(url)
    except (OSError, ValueError):  # HTTPError is an OSError: not ready yet
        return None
