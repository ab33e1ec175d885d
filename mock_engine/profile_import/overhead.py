"""
What an engine adds to its kernels: seconds a layer and a sequence, and jitter.

    timing = H100_VLLM.timing(num_layers)       the section of profile.toml

Kernel tables know nothing of scheduling, sampling and launching. `fit_overhead`
fits the figures here on real runs; change them only with what it prints.
"""

from __future__ import annotations

from typing import NamedTuple


class EngineOverhead(NamedTuple):
    """Seconds that a pass takes beyond its kernels, and how much one and the same pass varies."""

    per_layer_s: float
    per_seq_s: float
    overhead_source: str
    jitter_cv: float
    jitter_source: str

    def timing(self, num_layers: int, assumed: str = "") -> dict[str, float | str]:
        """The [timing] section of a model with so many layers; `assumed` is added to the source."""
        return {
            "overhead_step_s": round(self.per_layer_s * num_layers, 8),
            "overhead_per_seq_s": self.per_seq_s,
            "overhead_source": self.overhead_source + assumed,
            "jitter_cv": self.jitter_cv,
            "jitter_source": self.jitter_source,
        }


_RUNS = (
    "real vLLM on H100 (inference-sim/inference-sim, branch stepml-experiments 9293b222, Apache-2.0): 1,967 steps of "
    "Llama-2-70B tp4 general, Llama-2-70B tp4 codegen and CodeLlama-34B tp2 general"
)
H100_VLLM = EngineOverhead(
    per_layer_s=10.75e-6,
    per_seq_s=0.0,
    overhead_source=(
        f"10.75 us a layer, fitted by profile_import.fit_overhead on {_RUNS}; mean error 5.1 % without it, 3.4 % with. "
        "Each run predicted with the overhead of the others: median error 2.6 %."
    ),
    jitter_cv=0.029,
    jitter_source=f"Decode steps at the same batch size, mean coefficient of variation, {_RUNS}.",
)
