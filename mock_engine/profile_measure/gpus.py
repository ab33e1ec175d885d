"""
The device: what it is called, what its data sheet says, what is free on it.

    device = find_device(settings)
    device.datasheet, device.free_bytes, device.limits(config, settings)
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import time
from dataclasses import dataclass, replace

from mock_engine.engine_defaults import engine_defaults
from mock_engine.errors import ConfigError
from mock_engine.gpu_datasheets import DATASHEETS, NAMES_IN_CUDA
from mock_engine.model_config import ModelConfig
from mock_engine.profile import as_name
from mock_engine.profile_measure.memory import Limits
from mock_engine.profile_measure.settings import MeasureSettings
from mock_engine.roofline import GpuDatasheet

_PCIE_BYTES_PER_S = 32e9  # generation 4, 16 lanes: one GPU sends nothing to another, but a data sheet has a figure
_CPU_MEMORY_SHARE = 0.25  # of what is free: other programs live there


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU, or the CPU in its place."""

    kind: str  # "cuda" or "cpu"
    gpu: str  # its name in the profile
    product: str  # its name as the driver gives it
    datasheet: GpuDatasheet
    free_bytes: int
    l2_cache_bytes: int
    software: str  # versions: torch, CUDA, driver
    clock: str  # as far as it can be read

    @property
    def memory_kind(self) -> str:
        return "GPU memory" if self.kind == "cuda" else "memory"

    def limits(self, config: ModelConfig, settings: MeasureSettings) -> Limits:
        """How far to measure: what was asked for, else the model's context and vLLM's defaults for such a GPU."""
        defaults = engine_defaults("vllm", "", self.gpu, self.datasheet.memory_bytes if self.kind == "cuda" else 0)
        max_model_len = settings.max_model_len or config.max_model_len
        if max_model_len > config.max_model_len:
            raise ConfigError(
                f"--max-model-len is {max_model_len}, but {config.name} has positions for "
                f"{config.max_model_len}. Use --max-model-len {config.max_model_len} or less."
            )
        max_num_seqs = settings.max_num_seqs or defaults.max_num_seqs
        max_num_batched_tokens = settings.max_num_batched_tokens or max(defaults.max_num_batched_tokens, max_num_seqs)
        if max_num_batched_tokens < max_num_seqs:
            raise ConfigError(
                f"--max-num-batched-tokens {max_num_batched_tokens} is less than --max-num-seqs {max_num_seqs}; a step "
                "has a token of each sequence. Raise the first or lower the second."
            )
        return Limits(max_model_len, max_num_seqs, max_num_batched_tokens)


def check_torch(device: str) -> None:
    """Raises `ConfigError` if there is no torch, or not what `device` needs of it."""
    if importlib.util.find_spec("torch") is None:
        raise ConfigError("measuring needs torch, which is not installed. Run: pip install 'mock-engine[torch]'")
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "no GPU was found (torch.cuda.is_available() is False), and without one there is nothing to measure. "
            "Use a shipped profile ('mock-engine profiles list'), or --device cpu to try the way through: "
            "its times say nothing of a GPU."
        )


def find_device(settings: MeasureSettings) -> Device:
    """The device that the settings name; `check_torch` has passed. Raises `ConfigError` for an unknown GPU."""
    device = _cuda_device(settings) if settings.device == "cuda" else _cpu_device(settings)
    return replace(device, datasheet=_overridden(device.datasheet, settings))


def _cuda_device(settings: MeasureSettings) -> Device:
    import torch

    properties = torch.cuda.get_device_properties(0)
    product = torch.cuda.get_device_name(0)
    free_bytes, total_bytes = torch.cuda.mem_get_info(0)
    driver, clock = _ask_driver()
    known = NAMES_IN_CUDA.get(product)
    return Device(
        kind="cuda",
        gpu=as_name(settings.gpu or known or product),
        product=product,
        datasheet=replace(known_datasheet(product, settings), memory_bytes=float(total_bytes)),
        free_bytes=free_bytes,
        l2_cache_bytes=int(getattr(properties, "L2_cache_size", 0)) or 64 * 2**20,
        software=f"torch {torch.__version__}, CUDA {torch.version.cuda}, driver {driver}",
        clock=clock,
    )


def known_datasheet(product: str, settings: MeasureSettings) -> GpuDatasheet:
    """Of a GPU that CUDA calls `product`; one that is not known gets its figures from flags, or `ConfigError`."""
    known = NAMES_IN_CUDA.get(product)
    if known is not None:
        return DATASHEETS[known, settings.dtype]
    if settings.gpu_tflops is None or settings.gpu_memory_bandwidth is None:
        raise ConfigError(
            f"no data sheet is known for {product!r}; known are {', '.join(NAMES_IN_CUDA)}. Give its figures: "
            f"--gpu-tflops (dense, in {settings.dtype}) and --gpu-memory-bandwidth (GB/s)."
        )
    return GpuDatasheet(1.0, 1.0, 1.0, _PCIE_BYTES_PER_S)


def _overridden(datasheet: GpuDatasheet, settings: MeasureSettings) -> GpuDatasheet:
    if settings.gpu_tflops is not None:
        datasheet = replace(datasheet, flops_per_s=settings.gpu_tflops * 1e12)
    if settings.gpu_memory_bandwidth is not None:
        datasheet = replace(datasheet, memory_bytes_per_s=settings.gpu_memory_bandwidth * 1e9)
    return datasheet


def _cpu_device(settings: MeasureSettings) -> Device:
    import torch

    page_bytes = os.sysconf("SC_PAGE_SIZE")
    free_bytes = int(os.sysconf("SC_AVPHYS_PAGES") * page_bytes * _CPU_MEMORY_SHARE)
    is_given = settings.gpu_tflops is not None and settings.gpu_memory_bandwidth is not None
    flops_per_s, bytes_per_s = (1.0, 1.0) if is_given else _rough_cpu_speed(settings.dtype)
    return Device(
        kind="cpu",
        gpu=as_name(settings.gpu or "cpu"),
        product=f"CPU, {platform.machine()}, {torch.get_num_threads()} threads",
        datasheet=GpuDatasheet(
            flops_per_s, bytes_per_s, float(os.sysconf("SC_PHYS_PAGES") * page_bytes), _PCIE_BYTES_PER_S
        ),
        free_bytes=free_bytes,
        l2_cache_bytes=32 * 2**20,
        software=f"torch {torch.__version__}",
        clock="not read",
    )


def _rough_cpu_speed(dtype: str) -> tuple[float, float]:
    """A matrix product's operations and a copy's bytes a second, the best of a few: a stand-in for a data sheet."""
    import torch

    numbers = torch.ones(512, 512, dtype=torch.bfloat16 if dtype == "bf16" else torch.float16)
    block = torch.ones(4 * 2**20, dtype=torch.float32)
    product_s, copy_s = [], []
    for _ in range(5):
        start_s = time.perf_counter()
        numbers @ numbers
        middle_s = time.perf_counter()
        block.clone()
        product_s.append(middle_s - start_s)
        copy_s.append(time.perf_counter() - middle_s)
    return 2 * 512**3 / min(product_s), 2 * block.nbytes / min(copy_s)


def with_clock_now(device: Device) -> Device:
    """The device with the clock it has at this moment: asked for right after measuring, while it is still fast."""
    return replace(device, clock=_ask_driver()[1]) if device.kind == "cuda" else device


def _ask_driver() -> tuple[str, str]:
    """The driver's version and the SM clock, from nvidia-smi; "not readable" without it."""
    import torch

    uuid = str(getattr(torch.cuda.get_device_properties(0), "uuid", ""))
    unknown = "not readable"
    command = shutil.which("nvidia-smi")
    if command is None:
        return unknown, unknown
    fields = "driver_version,clocks.sm,clocks.max.sm,power.limit"
    argv = [command, f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(
            [*argv, f"--id=GPU-{uuid.removeprefix('GPU-')}"] if uuid else argv,
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return unknown, unknown
    cells = [cell.strip() for cell in answer.stdout.strip().splitlines()[0].split(",")] if answer.stdout.strip() else []
    if len(cells) != len(fields.split(",")):
        return unknown, unknown
    driver, now, most, power = cells
    return driver, f"SM {now} right after measuring, at most {most}, power limit {power}"
