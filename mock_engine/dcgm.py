"""
The GPUs that an engine pretends to have, as NVIDIA's dcgm-exporter shows them.

    collector = DcgmCollector(engine, ranks, drives, node="worker-1f")
    server = DcgmServer(collector, "127.0.0.1", 9400)        GET /metrics
    server.stop()

A worker is a node of its own, with TP times data-parallel ranks GPUs, and has an endpoint of its own. What comes from
the model, and what is a guess:

    FB_TOTAL, FB_USED, FB_FREE     data sheet; weights, all KV blocks and what vLLM takes besides
    GPU_UTIL, SM_ACTIVE            share of the time in steps
    PIPE_TENSOR_ACTIVE             arithmetic of the steps / data sheet
    DRAM_ACTIVE, MEM_COPY_UTIL     bytes read by the steps / data sheet
    NVLINK_BANDWIDTH_TOTAL         bytes of the all-reduces
    POWER_USAGE, ENERGY            estimate, see `gpu_power`; of a GPU that is not in its table there is none
    GPU_TEMP                       guess from the power
    SM_CLOCK, MEM_CLOCK            the highest
    ENC_UTIL, DEC_UTIL, XID_ERRORS, POWER_VIOLATION, PCIE_REPLAY_COUNTER      0

Shares are means over the last second. Power and energy are those of the modelled GPU: with a speed-up, energy grows
that much faster than power times real time.

Names and labels are those of dcgm-exporter 4 (etc/default-counters.csv), and all that AIPerf 0.13 reads are there. Its
counters have no `_total`, which prometheus_client would add: they are written as gauges.
"""

from __future__ import annotations

import socket
import uuid
from collections.abc import Iterable, Iterator, Sequence
from socketserver import ThreadingMixIn
from threading import Thread
from typing import TYPE_CHECKING
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from mock_engine.drive_realtime import RealTimeDrive
from mock_engine.engine_settings import Engine
from mock_engine.errors import ConfigError
from mock_engine.gpu_datasheets import NAMES_IN_CUDA
from mock_engine.gpu_power import GPU_POWER
from mock_engine.step_stats import StepStats

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

_MIB = 1 << 20

FIELDS = {
    "DCGM_FI_DEV_SM_CLOCK": "SM clock frequency (in MHz).",
    "DCGM_FI_DEV_MEM_CLOCK": "Memory clock frequency (in MHz).",
    "DCGM_FI_DEV_GPU_TEMP": "GPU temperature (in C).",
    "DCGM_FI_DEV_POWER_USAGE": "Power draw (in W).",
    "DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION": "Total energy consumption since boot (in mJ).",
    "DCGM_FI_DEV_PCIE_REPLAY_COUNTER": "Total number of PCIe retries.",
    "DCGM_FI_DEV_GPU_UTIL": "GPU utilization (in %).",
    "DCGM_FI_DEV_MEM_COPY_UTIL": "Memory utilization (in %).",
    "DCGM_FI_DEV_ENC_UTIL": "Encoder utilization (in %).",
    "DCGM_FI_DEV_DEC_UTIL": "Decoder utilization (in %).",
    "DCGM_FI_DEV_XID_ERRORS": "Value of the last XID error encountered.",
    "DCGM_FI_DEV_POWER_VIOLATION": "Throttling duration due to power constraints (in ns).",
    "DCGM_FI_DEV_FB_TOTAL": "Total framebuffer memory (in MiB).",
    "DCGM_FI_DEV_FB_FREE": "Framebuffer memory free (in MiB).",
    "DCGM_FI_DEV_FB_USED": "Framebuffer memory used (in MiB).",
    "DCGM_FI_DEV_NVLINK_BANDWIDTH_TOTAL": "Total number of NVLink bandwidth counters for all lanes.",
    "DCGM_FI_PROF_GR_ENGINE_ACTIVE": "Ratio of time the graphics engine is active.",
    "DCGM_FI_PROF_SM_ACTIVE": "The ratio of cycles an SM has at least 1 warp assigned.",
    "DCGM_FI_PROF_PIPE_TENSOR_ACTIVE": "Ratio of cycles the tensor (HMMA) pipe is active.",
    "DCGM_FI_PROF_DRAM_ACTIVE": "Ratio of cycles the device memory interface is active sending or receiving data.",
}


class DcgmCollector(Collector):
    """What `prometheus_client` asks for. `node` tells GPUs of one engine from those of others."""

    def __init__(self, engine: Engine, ranks: Sequence[StepStats], drives: Sequence[RealTimeDrive], node: str) -> None:
        profile = engine.profile
        self._tp = profile.tp
        self._power = GPU_POWER.get(profile.gpu)
        self._ranks = ranks
        self._drives = drives
        self._total_mib = profile.datasheet.memory_bytes / _MIB
        self._used_mib = min(self._total_mib, profile.used_bytes(engine.num_blocks, engine.block_size) / _MIB)
        model_name = next((name for name, gpu in NAMES_IN_CUDA.items() if gpu == profile.gpu), profile.gpu)
        host = socket.gethostname()
        self._labels = [
            {
                "gpu": str(index),
                "UUID": f"GPU-{uuid.uuid5(uuid.NAMESPACE_OID, f'{node}/{index}')}",
                "pci_bus_id": f"00000000:{0x10 + index:02X}:00.0",
                "device": f"nvidia{index}",
                "modelName": model_name,
                "Hostname": host,
            }
            for index in range(self._tp * len(ranks))
        ]

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """A metric for each of `FIELDS` that is known, with a sample for each GPU."""
        values = [
            self._values(stats, drive) for stats, drive in zip(self._ranks, self._drives, strict=False)
        ]  # before the engine starts there are no drives, and no GPUs to speak of
        for name, text in FIELDS.items():
            family = GaugeMetricFamily(name, text, labels=list(self._labels[0]))
            for index, labels in enumerate(self._labels[: self._tp * len(values)]):
                value = values[index // self._tp].get(name)
                if value is not None:
                    family.add_metric(list(labels.values()), value)
            if family.samples:
                yield family

    def _values(self, stats: StepStats, drive: RealTimeDrive) -> dict[str, float]:
        now_s = drive.now_s()
        stats.set_pace(drive.speedup_ratio)
        shares = stats.shares(now_s)
        known: dict[str, float] = {}
        joules = stats.joules(now_s)
        if self._power is not None and shares.watts is not None and joules is not None:
            known = {
                "DCGM_FI_DEV_SM_CLOCK": self._power.sm_clock_mhz,
                "DCGM_FI_DEV_MEM_CLOCK": self._power.memory_clock_mhz,
                "DCGM_FI_DEV_GPU_TEMP": round(self._power.celsius(shares.watts)),
                "DCGM_FI_DEV_POWER_USAGE": round(shares.watts, 3),
                "DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION": round(joules * 1e3),
            }
        return known | {
            "DCGM_FI_DEV_GPU_UTIL": round(100 * shares.busy),
            "DCGM_FI_DEV_MEM_COPY_UTIL": round(100 * shares.dram),
            "DCGM_FI_DEV_ENC_UTIL": 0,
            "DCGM_FI_DEV_DEC_UTIL": 0,
            "DCGM_FI_DEV_XID_ERRORS": 0,
            "DCGM_FI_DEV_POWER_VIOLATION": 0,
            "DCGM_FI_DEV_PCIE_REPLAY_COUNTER": 0,
            "DCGM_FI_DEV_FB_TOTAL": round(self._total_mib),
            "DCGM_FI_DEV_FB_FREE": round(self._total_mib) - round(self._used_mib),
            "DCGM_FI_DEV_FB_USED": round(self._used_mib),
            "DCGM_FI_DEV_NVLINK_BANDWIDTH_TOTAL": round(stats.nvlink_bytes),
            "DCGM_FI_PROF_GR_ENGINE_ACTIVE": shares.busy,
            "DCGM_FI_PROF_SM_ACTIVE": shares.busy,
            "DCGM_FI_PROF_PIPE_TENSOR_ACTIVE": shares.tensor,
            "DCGM_FI_PROF_DRAM_ACTIVE": shares.dram,
        }


class DcgmServer:
    """The collector on http://<host>:<port>/metrics, served by a thread. Raises `ConfigError` if that is taken."""

    def __init__(self, collector: DcgmCollector, host: str, port: int) -> None:
        registry = CollectorRegistry(auto_describe=False)
        registry.register(collector)
        try:
            self._server = make_server(host, port, _with_head(make_wsgi_app(registry)), _Server, _QuietHandler)
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host}:{port} for GPU metrics: {error.strerror}. Choose another --dcgm-port."
            ) from error
        self.port: int = self._server.server_address[1]
        self._thread = Thread(target=self._server.serve_forever, name="mock-engine-dcgm", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop listening; the thread is gone when this returns."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def _with_head(app: WSGIApplication) -> WSGIApplication:
    """
    `app`, which answers HEAD as it answers GET, without a body.

    prometheus_client answers HEAD with 405 and a body. AIPerf (0.13.0) asks by HEAD first, finds that body in front of
    its next answer, and takes the endpoint to be unreachable.
    """

    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] != "HEAD":
            return app(environ, start_response)
        app({**environ, "REQUEST_METHOD": "GET"}, start_response)
        return []

    return answer
