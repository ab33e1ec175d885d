"""
What an answer says beyond words: thoughts, tool calls, what a constraint demands, and where a stop string ends it.

    content = Content.from_model_path(model_path, ContentSettings())
    content.demanded(guided_decoding, seed, max_tokens)     None where any words do
    content.thoughts(seed, max_tokens)

Made for one tokenizer. Everything is the same for the same seed.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mock_engine.errors import ConfigError
from mock_engine.grammar_writer import GrammarWriter, Written
from mock_engine.guided import Guided
from mock_engine.logprobs import Alternatives
from mock_engine.output_tokens import OutputTokens, find_tokenizer, load_tokenizer
from mock_engine.structural_tag import StructuralTag

THINK, END_THINK = "<think>", "</think>"
_THOUGHTS_CV = 0.5
_THOUGHTS = 3  # makes a seed of its own


@dataclass(frozen=True, slots=True)
class ContentSettings:
    """Shares of answers, and how long thoughts are. Raises `ConfigError` for a value out of range."""

    tool_call_ratio: float = 0.5  # of the answers that may call a tool and need not
    reasoning_ratio: float = 0.0
    reasoning_osl: int = 128  # mean tokens of thoughts

    def __post_init__(self) -> None:
        for name in ("tool_call_ratio", "reasoning_ratio"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {value:g}; it is a share of answers, from 0 to 1")
        if self.reasoning_osl < 1:
            raise ConfigError(f"--reasoning-osl is {self.reasoning_osl}; it must be at least 1")


class Content:
    """See the module."""

    def __init__(self, writer: GrammarWriter, words: OutputTokens, settings: ContentSettings | None = None) -> None:
        self._writer = writer
        self._words = words
        self._settings = settings or ContentSettings()
        self._guided = Guided(writer, StructuralTag(self._write_words, self._settings.tool_call_ratio))
        self.alternatives = Alternatives(words.word_ids, writer.decode)

    @classmethod
    def from_model_path(cls, model_path: Path, words: OutputTokens, settings: ContentSettings) -> Content:
        """For the tokenizer in a model folder. Raises `ConfigError` if it has no marks for the thoughts asked for."""
        tokenizer = load_tokenizer(find_tokenizer(model_path))
        content = cls(GrammarWriter(tokenizer, words.word_ids, words.eos_token_ids), words, settings)
        if settings.reasoning_ratio and any(len(mark) != 1 for mark in content._marks):
            raise ConfigError(
                f"--reasoning-ratio is {settings.reasoning_ratio:g}, but {model_path / 'tokenizer.json'} has no single "
                f"token for {THINK} and {END_THINK}, and Dynamo does not find them in pieces. Choose another "
                f"--model-path, or leave --reasoning-ratio out."
            )
        return content

    def demanded(self, guided_decoding: Mapping[str, Any] | None, seed: int, max_tokens: int) -> Written | None:
        """What a constraint demands, without the token that ends it; None for any words. Raises `RequestError`."""
        if guided_decoding is None:
            return None
        return self._guided.write(guided_decoding, seed, max_tokens)

    def thoughts(self, seed: int, max_thinking_tokens: int | None) -> list[int]:
        """Tokens from one mark to the other, both included; none for an answer without thoughts."""
        settings = self._settings
        if not settings.reasoning_ratio:
            return []
        draw = np.random.default_rng((seed, _THOUGHTS))
        if draw.random() >= settings.reasoning_ratio:
            return []
        variance = np.log(1 + _THOUGHTS_CV**2)
        drawn = np.exp(np.sqrt(variance) * draw.standard_normal() - variance / 2)
        num_words = max(1, round(settings.reasoning_osl * float(drawn)))
        if max_thinking_tokens is not None:
            num_words = min(num_words, max_thinking_tokens)
        begin, end = self._marks
        return [*begin, *self._words.take(int(draw.integers(1 << 63)), num_words), *end]

    def first_stop(self, token_ids: Sequence[int], stops: Sequence[str], min_tokens: int) -> int | None:
        """Tokens up to the first stop string that ends at `min_tokens` or later, with it; None if there is none."""
        stops = [stop for stop in stops if stop]
        if not stops:
            return None
        num_skipped = len(self._writer.decode(token_ids[: max(min_tokens - 1, 0)]))

        def has_stop(num_tokens: int) -> bool:
            text = self._writer.decode(token_ids[:num_tokens])
            return any(text.find(stop, max(0, num_skipped - len(stop) + 1)) >= 0 for stop in stops)

        if not has_stop(len(token_ids)):
            return None
        return bisect.bisect_left(range(1, len(token_ids) + 1), True, key=has_stop) + 1

    @cached_property
    def _marks(self) -> tuple[list[int], list[int]]:
        return self._writer.encode(THINK), self._writer.encode(END_THINK)

    def _write_words(self, seed: int, num_words: int) -> str:
        return self._writer.decode(self._words.take(seed, num_words))
