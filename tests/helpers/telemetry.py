"""Prometheus, promtool and an OpenTelemetry collector, as real processes or as little of them as a test needs."""

from __future__ import annotations

import gzip
import json
import math
import subprocess
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from mock_engine.processes import free_ports
from tests.helpers.processes import wait_for

# What promtool's linter says of names that are not ours to choose.
NOT_OURS = (
    "metric names should not contain ':'",  # vllm:, sglang:
    'vllm:iteration_tokens_total non-counter metrics should not have "_total" suffix',
    "label names should be written in 'snake_case' not 'camelCase'",  # modelName, of dcgm-exporter
    "DCGM_FI_DEV_PCIE_REPLAY_COUNTER metric name should not include type 'counter'",
)


def read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as response:
        return response.read().decode()


def lint(exposition: str) -> list[str]:
    """What promtool says of it. Fails if that cannot be read at all."""
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=exposition, capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 3), done.stderr  # 3: read, and the linter has something to say
    return done.stderr.splitlines()


class Prometheus:
    """A running one, on 127.0.0.1."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def query(self, promql: str) -> list[dict[str, Any]]:
        answer = json.loads(read(f"{self.url}/api/v1/query?{urllib.parse.urlencode({'query': promql})}"))
        assert answer["status"] == "success"
        result: list[dict[str, Any]] = answer["data"]["result"]
        return result

    def value(self, promql: str) -> float:
        """Of a query that gives one number; NaN where it gives none."""
        samples = self.query(promql)
        assert len(samples) <= 1, samples
        return float(samples[0]["value"][1]) if samples else math.nan


@contextmanager
def prometheus(folder: Path, targets: dict[str, list[str]]) -> Iterator[Prometheus]:
    """One that scrapes these URLs, by the name of their job, twice a second; returns when it has scraped all."""
    jobs = [
        {"job_name": job, "static_configs": [{"targets": [urllib.parse.urlsplit(url).netloc for url in urls]}]}
        for job, urls in targets.items()
    ]
    config = folder / "prometheus.yml"  # JSON is YAML
    config.write_text(json.dumps({"global": {"scrape_interval": "500ms"}, "scrape_configs": jobs}), encoding="utf-8")
    (port,) = free_ports(1)
    flags = (
        f"--config.file={config}",
        f"--storage.tsdb.path={folder / 'tsdb'}",
        f"--web.listen-address=127.0.0.1:{port}",
    )
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(["prometheus", *flags], stdout=log, stderr=log)
    try:
        server = Prometheus(port)
        num_targets = sum(map(len, targets.values()))

        def has_scraped_all() -> bool:
            assert process.poll() is None, (folder / "prometheus.log").read_text(encoding="utf-8")
            try:
                return server.value("sum(up)") == num_targets
            except OSError:
                return False

        wait_for(has_scraped_all, "Prometheus has scraped all")
        yield server
    finally:
        process.terminate()
        process.wait(30)


class Collector:
    """An OTLP collector that keeps what is sent to it (traces, http/protobuf)."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        bodies = self.bodies

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.path.endswith("/traces"):
                    bodies.append(gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body)
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.environment = {
            "DYN_LOGGING_JSONL": "1",
            "OTEL_EXPORT_ENABLED": "1",
            "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"{url}/v1/traces",
            "OTEL_EXPORTER_OTLP_LOGS_ENDPOINT": f"{url}/v1/logs",
            "OTEL_BSP_SCHEDULE_DELAY": "200",
            "DYN_LOG": "info",  # spans are of that level
        }

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
