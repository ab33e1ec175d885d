"""
What an engine adds to its kernels: seconds a step and a sequence, and jitter.

Kernel tables know nothing of scheduling, sampling and launching. `fit_overhead`
fits the figures here on real runs; change them only with what it prints.
"""

from __future__ import annotations

from typing import NamedTuple


class EngineOverhead(NamedTuple):
    """Seconds that a pass takes beyond its kernels, and how much one and the same pass varies."""

    step_s: float
    per_seq_s: float
    overhead_source: str
    jitter_cv: float
    jitter_source: str


_RUNS = (
    "real vLLM on H100 (inference-sim/inference-sim, branch stepml-experiments 9293b222, Apache-2.0): 1,358 decode "
    "steps of Llama-2-70B tp4 general, Llama-2-70B tp4 codegen and CodeLlama-34B tp2 general"
)
H100_VLLM = EngineOverhead(
    step_s=720e-6,
    per_seq_s=1e-6,
    overhead_source=f"Fitted by profile_import.fit_overhead on {_RUNS}; mean error 4.7 % without it, 3.6 % with.",
    jitter_cv=0.029,
    jitter_source=f"Decode steps at the same batch size, mean coefficient of variation, {_RUNS}.",
)
