"""The limits of a scheduler, whatever its policy."""

from __future__ import annotations

from dataclasses import dataclass

from mock_engine.errors import ConfigError
from mock_engine.speculation import Speculation
from mock_engine.waiting_queue import SCHEDULING_POLICIES


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits of the engine, spelled as vLLM spells them. Raises `ConfigError` when they do not go together."""

    max_num_seqs: int  # sequences running at once
    max_num_batched_tokens: int  # tokens computed in one step
    max_model_len: int  # prompt plus output tokens of one sequence
    enable_chunked_prefill: bool = True
    speculation: Speculation | None = None
    scheduling_policy: str = "fcfs"  # one of `SCHEDULING_POLICIES`

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
        if self.scheduling_policy not in SCHEDULING_POLICIES:
            allowed = ", ".join(SCHEDULING_POLICIES)
            raise ConfigError(f"--scheduling-policy is {self.scheduling_policy!r}; allowed is {allowed}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"--max-num-batched-tokens is {self.max_num_batched_tokens}, less than --max-num-seqs "
                f"{self.max_num_seqs}: every running sequence needs one token a step. "
                f"Raise the first or lower the second."
            )
        if self.speculation is not None:
            tokens_per_sequence = 1 + self.speculation.num_tokens
            if self.max_num_batched_tokens < self.max_num_seqs * tokens_per_sequence:
                raise ConfigError(
                    f"--max-num-batched-tokens is {self.max_num_batched_tokens}, and with --num-speculative-tokens "
                    f"{self.speculation.num_tokens} each of --max-num-seqs {self.max_num_seqs} sequences needs "
                    f"{tokens_per_sequence} a step. Use --max-num-seqs "
                    f"{self.max_num_batched_tokens // tokens_per_sequence} or less, or fewer draft tokens."
                )
        if not self.enable_chunked_prefill and self.max_num_batched_tokens < self.max_model_len:
            raise ConfigError(
                f"without chunked prefill --max-num-batched-tokens ({self.max_num_batched_tokens}) must be at least "
                f"--max-model-len ({self.max_model_len}). Raise the first, lower the second, or enable chunked prefill."
            )
