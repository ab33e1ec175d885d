"""A planner and what it needs, on the tokenizer that we ship."""

from __future__ import annotations

from mock_engine.content import Content, ContentSettings
from mock_engine.engine_settings import DEFAULT_TOKENIZER
from mock_engine.grammar_writer import GrammarWriter
from mock_engine.output_tokens import OutputTokens, load_tokenizer
from mock_engine.prompt import Planner

TOKENIZER = load_tokenizer(DEFAULT_TOKENIZER / "tokenizer.json")
WORDS = OutputTokens.from_model_path(DEFAULT_TOKENIZER)
WRITER = GrammarWriter(TOKENIZER, WORDS.word_ids, WORDS.eos_token_ids)
(EOS,) = WORDS.eos_token_ids


def make_planner(max_model_len=10_000, default_osl=20, **settings):
    """A planner of whole answers; `settings` are those of `ContentSettings`."""
    content = Content(WRITER, WORDS, ContentSettings(**settings))
    return Planner(WORDS, max_model_len, 16, default_osl, 0, list, content)


def plan(planner, prompt=(5, 6, 7), sampling=None, output=None, **stop):
    wire = {
        "token_ids": list(prompt),
        "stop_conditions": stop,
        "sampling_options": sampling or {},
        "output_options": output or {},
        "eos_token_ids": [EOS],
    }
    return planner.plan("r", wire)


def text_of(answer):
    """What a client is shown."""
    return WRITER.decode([id_ for id_ in answer.token_ids if id_ != EOS])
