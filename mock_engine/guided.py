"""
What Dynamo's `guided_decoding` demands of an answer, written.

    guided = Guided(writer, structural_tag)
    guided.write({"json": schema}, seed, max_tokens) -> Written, or None where any words do

Dynamo's frontend makes the options of `response_format`, `guided_json`, `guided_regex`,
`guided_choice`, `guided_grammar`, and of tools with `tool_choice`; at most one is set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mock_engine.errors import RequestError
from mock_engine.grammar_writer import GrammarWriter, Written, json_grammar, regex_grammar, text_grammar
from mock_engine.structural_tag import Page, StructuralTag

_KINDS = ("json", "regex", "choice", "grammar", "structural_tag")


def demanded(sampling_options: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The constraint in `sampling_options`, as `{kind: value, ...}`; None if there is none. Raises `RequestError`."""
    options = sampling_options.get("guided_decoding")
    if options is None:
        return None
    if not isinstance(options, Mapping):
        raise RequestError(f"guided_decoding must be an object, not {options!r:.80}")
    kinds = [kind for kind in _KINDS if options.get(kind) is not None]
    if len(kinds) > 1:
        raise RequestError(f"guided_decoding has {' and '.join(kinds)}; one constraint at a time is allowed")
    return options if kinds else None


@dataclass(frozen=True, slots=True)
class Guided:
    """Writes what is demanded, the same for the same seed."""

    writer: GrammarWriter
    structural_tag: StructuralTag

    def write(self, options: Mapping[str, Any], seed: int, max_tokens: int) -> Written | None:
        """Tokens without the one that ends the answer. Raises `RequestError` for what cannot be used."""
        draw = np.random.default_rng(seed)
        page = Page(self.writer, max_tokens)
        if options.get("json") is not None:
            page.add_grammar(json_grammar(options["json"], options.get("whitespace_pattern")), seed)
        elif options.get("regex") is not None:
            page.add_grammar(regex_grammar(_text(options, "regex")), seed)
        elif options.get("grammar") is not None:
            page.add_grammar(text_grammar(_text(options, "grammar")), seed)
        elif options.get("choice") is not None:
            choices = options["choice"]
            if not isinstance(choices, list | tuple) or not choices:
                raise RequestError(f"choice is {choices!r:.80}; it must be a list of texts, and not empty")
            page.add_text(str(choices[int(draw.random() * len(choices))]))
        elif not self.structural_tag.write(options["structural_tag"], page, draw):
            return None
        token_ids = page.token_ids()
        return Written(token_ids[:max_tokens], page.is_whole and len(token_ids) <= max_tokens)


def _text(options: Mapping[str, Any], kind: str) -> str:
    value = options[kind]
    if not isinstance(value, str):
        raise RequestError(f"{kind} is {value!r:.80}; it must be a text")
    return value
