"""
GPUs by the figures in their data sheets.

    find_datasheet("h100-sxm", "bf16")

NVIDIA's data sheets, dense (no sparsity): H100 (SXM5: 989 TFLOPS in bf16, 3.35 TB/s, NVLink 900 GB/s both ways),
H200 (SXM: the same arithmetic, 4.8 TB/s), A100 80GB (SXM4: 312 TFLOPS, 2,039 GB/s, NVLink 600 GB/s).
Memory is what CUDA reports, less than the 80 GB on the box: 79.10 GiB (H100 SXM) and 79.15 GiB (A100 SXM);
for the H200, on which nobody asked it, as large a share of its 141 GiB as of the H100's 80.
"""

from __future__ import annotations

from dataclasses import replace

from mock_engine.errors import ProfileError
from mock_engine.roofline import GpuDatasheet

_H100 = GpuDatasheet(989e12, 3.35e12, 84.93e9, 450e9)
_H200 = GpuDatasheet(989e12, 4.8e12, 149.7e9, 450e9)
_A100 = GpuDatasheet(312e12, 2.039e12, 84.99e9, 300e9)

DATASHEETS = {
    ("h100-sxm", "bf16"): _H100,
    ("h100-sxm", "fp16"): _H100,
    ("h100-sxm", "fp8"): replace(_H100, flops_per_s=1979e12),
    ("h100-sxm", "fp8_block"): replace(_H100, flops_per_s=1979e12),
    ("h200-sxm", "bf16"): _H200,
    ("h200-sxm", "fp16"): _H200,
    ("h200-sxm", "fp8"): replace(_H200, flops_per_s=1979e12),
    ("h200-sxm", "fp8_block"): replace(_H200, flops_per_s=1979e12),
    ("a100-sxm", "bf16"): _A100,
    ("a100-sxm", "fp16"): _A100,
}

# What CUDA calls them, and we.
NAMES_IN_CUDA = {
    "NVIDIA H100 80GB HBM3": "h100-sxm",
    "NVIDIA H200": "h200-sxm",
    "NVIDIA A100-SXM4-80GB": "a100-sxm",
}


def find_datasheet(gpu: str, dtype: str) -> GpuDatasheet:
    """The GPU's figures for arithmetic in that dtype. Raises `ProfileError`."""
    if (gpu, dtype) not in DATASHEETS:
        known = ", ".join(f"{gpu} {dtype}" for gpu, dtype in DATASHEETS)
        raise ProfileError(f"no data sheet for {gpu} in {dtype}; known are {known}. Use one of them.")
    return DATASHEETS[gpu, dtype]
