"""
What is known without measuring: model shapes, engine defaults; data sheets are in `gpu_datasheets`.

Model shapes are those of the models' config.json.
"""

from __future__ import annotations

from typing import NamedTuple

from mock_engine.errors import ProfileError
from mock_engine.gpu_datasheets import DATASHEETS
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
