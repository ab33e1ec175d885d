"""
What is known without measuring: model shapes, data sheets, engine defaults.

Model shapes are those of the models' config.json. GPU figures are NVIDIA's data
sheets, dense (no sparsity); memory is what CUDA reports, less than the 80 GB on
the box: 79.10 GiB (H100 SXM) and 79.15 GiB (A100 SXM).
"""

from __future__ import annotations

from typing import NamedTuple

from mock_engine.errors import ProfileError
from mock_engine.roofline import GpuDatasheet, ModelShape


class Model(NamedTuple):
    """A model as importers need it."""

    shape: ModelShape
    intermediate_size: int
    max_model_len: int
    hub_name: str  # its name on the model hub, by which sources know it


class EngineDefaults(NamedTuple):
    """What an engine does when no flag is given."""

    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int


MODELS = {
    "llama-3.1-8b": Model(
        ModelShape(8_030_261_248, 32, 4096, 32, 8, 128, 128_256), 14_336, 131_072, "meta-llama/Meta-Llama-3.1-8B"
    ),
    "llama-3.1-70b": Model(
        ModelShape(70_553_706_496, 80, 8192, 64, 8, 128, 128_256), 28_672, 131_072, "meta-llama/Meta-Llama-3.1-70B"
    ),
    "llama-3.3-70b": Model(
        ModelShape(70_553_706_496, 80, 8192, 64, 8, 128, 128_256), 28_672, 131_072, "nvidia/Llama-3.3-70B-Instruct-FP8"
    ),
    "llama-2-70b": Model(
        ModelShape(68_976_648_192, 80, 8192, 64, 8, 128, 32_000), 28_672, 4_096, "meta-llama/Llama-2-70b"
    ),
    "codellama-34b": Model(
        ModelShape(33_743_970_304, 48, 8192, 64, 8, 128, 32_000), 22_016, 16_384, "codellama/CodeLlama-34b"
    ),
}

_H100 = GpuDatasheet(989e12, 3.35e12, 84.93e9, 450e9)
_A100 = GpuDatasheet(312e12, 2.039e12, 84.99e9, 300e9)

DATASHEETS = {
    ("h100-sxm", "bf16"): _H100,
    ("h100-sxm", "fp8"): GpuDatasheet(1979e12, _H100.memory_bytes_per_s, _H100.memory_bytes, _H100.nvlink_bytes_per_s),
    ("a100-sxm", "bf16"): _A100,
    ("a100-sxm", "fp16"): _A100,
}

# vLLM 0.24, EngineArgs.get_batch_defaults, API server: cards of 70 GiB or more, but not the A100, get larger batches.
VLLM_DEFAULTS = {"h100-sxm": EngineDefaults(16, 1024, 8192), "a100-sxm": EngineDefaults(16, 256, 2048)}


def find_model(name: str) -> Model:
    """The model of that name. Raises `ProfileError`."""
    if name not in MODELS:
        raise ProfileError(f"no model {name!r} is known to the importer; known are {', '.join(MODELS)}")
    return MODELS[name]


def find_datasheet(gpu: str, dtype: str) -> GpuDatasheet:
    """The GPU's figures for arithmetic in that dtype. Raises `ProfileError`."""
    if (gpu, dtype) not in DATASHEETS:
        known = ", ".join(f"{gpu} {dtype}" for gpu, dtype in DATASHEETS)
        raise ProfileError(f"no data sheet for {gpu} in {dtype}; known are {known}")
    return DATASHEETS[gpu, dtype]
