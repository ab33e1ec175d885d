"""
Text that keeps to a grammar: real constrained decoding, with a seeded choice where a model would sample.

    writer = GrammarWriter(tokenizer, word_ids, eos_token_ids)
    writer.write(json_grammar(schema), seed, max_tokens) -> Written(token_ids, is_whole)

The library llguidance, which vLLM and SGLang use as well, says which tokens a grammar
allows next; it reads JSON schemas, regular expressions, Lark and GBNF. Of those tokens
the choice prefers what ends soon: marks that close, two or three words in a string, small
numbers. Optional parts come or stay away by the seed. An answer that has become long only
closes. No choice can see how far the end is, so texts like those of `.*foo` run on for a while
and then try the words in the grammar one by one; if none ends it, `max_tokens` does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from mock_engine.errors import RequestError

if TYPE_CHECKING:  # else when it is first needed, as it takes 0.2 s to load and most workers never need it
    from llguidance import LLMatcher, LLTokenizer

_LONG_TOKENS = 128  # from here on only what ends the answer is chosen, where there is a choice
_LONG_TEXT_WORDS = 4  # words after which a string in a JSON document, or free text, ends
_ENDINGS_EVERY_TOKENS = 64  # how often a long text tries what might end it at once
_NUM_ENDINGS = 64
_MAX_SPARE_TOKENS = 4096  # chosen beyond `max_tokens`, as a text may take fewer tokens than it was chosen of
_NUM_GRAMMARS = 64  # compiled grammars that are kept

# What a token is by its text; the first that fits. Marks that open come before those that close: '[]' opens and closes.
_KINDS = (
    ("open", r"[\[{(<].*"),
    ("close", r"[\]})>].*"),
    ("quote", r"\".*"),
    ("comma", r"[,:].*"),
    ("digit", r"[0-9]+"),
    ("letter", r"[A-Za-z]+"),
    ("word", r" [A-Za-z]+"),
    ("mark", r"[!-~]+"),
    ("space", r"\s+"),
    ("other", r".*"),
)
_PATTERNS = tuple((kind, re.compile(pattern, re.DOTALL)) for kind, pattern in _KINDS)

# How likely each is, where several are allowed. "end" is the token that ends the answer.
_IN_STRUCTURE = {
    "end": 3.0,
    "close": 3.0,
    "quote": 4.0,
    "comma": 2.0,
    "digit": 2.0,
    "letter": 2.0,
    "mark": 1.0,
    "open": 1.0,
    "space": 1e-3,
    "other": 1e-3,
}
_IN_TEXT = {"end": 1.0, "word": 2.0}
_IN_STRING = {"quote": 1.0, "word": 2.0}
_IN_ENDLESS_TEXT = {**_IN_STRUCTURE, "word": 2.0}
# What becomes of that in a long answer: next to what closes, nothing else comes; least of all what opens.
_IN_LONG = {"open": 1e-9, **dict.fromkeys(("comma", "digit", "letter", "word", "space", "other"), 1e-6)}


class Written(NamedTuple):
    """Tokens of an answer; if `is_whole` is false, `max_tokens` has cut it."""

    token_ids: list[int]
    is_whole: bool


def json_grammar(schema: Any, whitespace_pattern: str | None = None) -> str:
    """
    The grammar of JSON documents that are valid for `schema`, as an object or its text. Raises `RequestError`.

    Objects get none but their named properties, as models do it that were not told to keep to them.
    """
    from llguidance import LLMatcher

    options: dict[str, Any] = {"whitespace_flexible": False}
    if whitespace_pattern is not None:
        options = {"whitespace_pattern": whitespace_pattern}
    try:
        parsed = json.loads(schema) if isinstance(schema, str) else schema
        if parsed is True:  # any document; the library takes objects only
            parsed = {}
        closed = json.dumps(parsed if _combines_schemas(parsed) else _closed(parsed))
        return LLMatcher.grammar_from_json_schema(closed, overrides=options)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise RequestError(f"the JSON schema cannot be used: {_one_line(error)}") from error


def regex_grammar(pattern: str) -> str:
    """The grammar of texts that match `pattern` in full. Wrong patterns are found by `GrammarWriter.write`."""
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_regex(pattern)


def text_grammar(text: str) -> str:
    """A grammar written in Lark, or in GBNF as llama.cpp and vLLM have it. Raises `RequestError`."""
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return LLMatcher.grammar_from_lark(any_to_lark(text))
    except Exception as error:  # the converter raises what it likes
        raise RequestError(f"the grammar cannot be used: {_one_line(error)}") from error


class GrammarWriter:
    """Writes with the tokens of one tokenizer. Safe on several threads."""

    def __init__(self, tokenizer: Tokenizer, word_ids: Sequence[int], eos_token_ids: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self._word_ids = word_ids
        self._eos_token_id = eos_token_ids[0] if eos_token_ids else None
        self._matcher = lru_cache(maxsize=_NUM_GRAMMARS)(self._compile)

    def write(self, grammar: str, seed: int, max_tokens: int) -> Written:
        """
        At most `max_tokens` tokens that `grammar` allows, the same for the same seed, without the one that ends it.

        The text is tokenized as the tokenizer does it, which may take fewer tokens than were chosen for it, so more
        are chosen than may come out. Raises `RequestError` for a grammar that the library cannot compile.
        """
        chosen, is_whole = self._choose(grammar, seed, max_tokens + min(3 * max_tokens + 64, _MAX_SPARE_TOKENS))
        token_ids = self.canonical(chosen)
        if not is_whole and len(token_ids) < max_tokens:
            token_ids = chosen
        return Written(token_ids[:max_tokens], is_whole and len(token_ids) <= max_tokens)

    def _choose(self, grammar: str, seed: int, max_tokens: int) -> Written:
        """Tokens one by one, as they are chosen."""
        choice = _Choice(self._kinds, np.random.default_rng(seed))
        matcher = self._matcher(grammar).deep_copy()
        token_ids: list[int] = []
        next_endings_tokens = _LONG_TOKENS
        while len(token_ids) < max_tokens and not matcher.is_stopped():
            if len(token_ids) >= next_endings_tokens:
                next_endings_tokens = len(token_ids) + _ENDINGS_EVERY_TOKENS
                ending = self._ending(grammar, matcher)
                if ending:
                    return Written(token_ids + ending, True)
            tokens = matcher.compute_ff_tokens()
            if tokens:
                choice.note_forced(tokens[-1])
            else:
                allowed = np.frombuffer(matcher.compute_bitmask(), np.uint8)
                tokens = [choice.next_token(allowed, is_long=len(token_ids) >= _LONG_TOKENS)]
                if tokens[0] == self._guide.eos_token:
                    return Written(token_ids, True)
            if not matcher.consume_tokens(tokens):
                raise RequestError(f"the grammar came to a dead end: {_one_line(matcher.get_error())}")
            token_ids += tokens
        return Written(token_ids, matcher.is_accepting())

    def canonical(self, token_ids: list[int]) -> list[int]:
        """The same text in the tokens that the tokenizer makes of it, where that gives the same text again."""
        text = self.decode(token_ids)
        again = self.encode(text)
        return again if self.decode(again) == text else token_ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, special ones included."""
        text: str = self.tokenizer.decode(token_ids, skip_special_tokens=False)
        return text

    def encode(self, text: str) -> list[int]:
        """The tokens of a text that does not begin a prompt."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _ending(self, grammar: str, matcher: LLMatcher) -> list[int]:
        """A word or a mark out of the grammar itself that ends the text at once; empty if there is none."""
        words = dict.fromkeys(re.findall(r"[A-Za-z0-9]+|\S", grammar))
        for word in list(words)[:_NUM_ENDINGS]:
            tokens = self.encode(word)
            copy = matcher.deep_copy()
            if copy.try_consume_tokens(tokens) == len(tokens) and copy.is_accepting():
                return tokens
        return []

    def _compile(self, grammar: str) -> LLMatcher:
        from llguidance import LLMatcher

        matcher = LLMatcher(self._guide, grammar, log_level=0)
        if matcher.is_error():
            raise RequestError(f"the constraint on the answer cannot be used: {_one_line(matcher.get_error())}")
        return matcher

    @cached_property
    def _guide(self) -> LLTokenizer:
        """Takes 50 ms for the tokenizer we ship, and a second for large ones; made when it is first needed."""
        from llguidance import LLTokenizer

        return LLTokenizer(self.tokenizer.to_str(), eos_token=self._eos_token_id)

    @cached_property
    def _kinds(self) -> _Kinds:
        return _Kinds(self._guide, self._word_ids)


class _Kinds:
    """Which tokens are of which kind, as bit masks of the library's layout."""

    def __init__(self, guide: LLTokenizer, word_ids: Iterable[int]) -> None:
        self.num_bits = -(-guide.vocab_size // 32) * 32
        members: dict[str, list[int]] = {kind: [] for kind, _ in _KINDS}
        self.kind_of: dict[int, str] = {}
        for id_ in range(guide.vocab_size):
            text = guide.decode_bytes([id_]).decode("utf-8", "replace")
            kind = next(kind for kind, pattern in _PATTERNS if pattern.fullmatch(text))
            if guide.is_special_token(id_) or "\ufffd" in text:
                kind = "other"
            members[kind].append(id_)
            self.kind_of[id_] = kind
        members["end"] = [guide.eos_token]
        self.masks = {kind: self._mask(ids) for kind, ids in members.items()}
        # Better ones of their kind, where they are allowed: common words, and words that can begin a string.
        words = set(word_ids) & set(members["word"])
        word_texts = {guide.decode_bytes([id_])[1:] for id_ in words}
        letter_texts = {id_: guide.decode_bytes([id_]) for id_ in members["letter"]}
        self.better = {
            "word": self._mask(words),
            "letter": self._mask(id_ for id_, text in letter_texts.items() if text in word_texts),
        }
        self.exponents = self._mask(id_ for id_, text in letter_texts.items() if text in (b"e", b"E"))

    def _mask(self, ids: Iterable[int]) -> NDArray[np.uint8]:
        bits = np.zeros(self.num_bits, np.uint8)
        bits[list(ids)] = 1
        return np.packbits(bits, bitorder="little")


class _Choice:
    """Chooses one allowed token after the other, for one text."""

    def __init__(self, kinds: _Kinds, draw: np.random.Generator) -> None:
        self._kinds = kinds
        self._draw = draw
        self._last = ""
        self._num_words = 0  # in a row

    def note_forced(self, token_id: int) -> None:
        """The grammar has left no choice up to this token."""
        self._note(self._kinds.kind_of[token_id])

    def next_token(self, allowed: NDArray[np.uint8], is_long: bool) -> int:
        """One of the tokens whose bits are set."""
        masks = self._kinds.masks
        if (allowed & masks["digit"]).any():
            allowed = _narrowed(allowed, ~self._kinds.exponents)  # 3e999 is valid, and no number
        present = [kind for kind in masks if (allowed & masks[kind]).any()]
        kind = self._kind(present, is_long)
        candidates = allowed & masks[kind]
        if kind in self._kinds.better and (kind == "word" or "word" in present):
            candidates = _narrowed(candidates, self._kinds.better[kind])
        ids = np.flatnonzero(np.unpackbits(candidates, bitorder="little"))
        self._note(kind)
        return int(ids[int(self._draw.random() * len(ids))])

    def _kind(self, present: Sequence[str], is_long: bool) -> str:
        is_text = "word" in present
        if is_text and self._last == "quote" and "letter" in present and not is_long:
            return "letter"  # the first word of a string
        table: Mapping[str, float] = _IN_STRUCTURE
        if is_text:
            table = _IN_TEXT if "end" in present else _IN_STRING if "quote" in present else _IN_ENDLESS_TEXT
            is_long = is_long or self._num_words >= _LONG_TEXT_WORDS
        weights = {kind: table.get(kind, 0.0) * (_IN_LONG.get(kind, 1.0) if is_long else 1.0) for kind in present}
        if "digit" in present and "letter" in present and not is_text:
            weights["letter"] *= 0.1
        if self._last == "digit" and "digit" in present:
            weights["digit"] *= 0.2  # a token has up to three
        point = self._draw.random() * sum(weights.values())
        for kind, weight in weights.items():
            point -= weight
            if point < 0:
                return kind
        return present[-1]

    def _note(self, kind: str) -> None:
        self._num_words = self._num_words + 1 if kind in ("word", "letter") else 0
        self._last = kind


# With these, several schemas hold for one object, and what one of them does not name another may ask for.
_COMBINING = frozenset({"allOf", "if", "then", "else", "not", "dependentSchemas", "unevaluatedProperties"})


def _combines_schemas(schema: Any) -> bool:
    if isinstance(schema, dict):
        return bool(_COMBINING & schema.keys()) or any(map(_combines_schemas, schema.values()))
    return isinstance(schema, list) and any(map(_combines_schemas, schema))


def _closed(schema: Any) -> Any:
    """The schema, without properties that it does not name; what is valid for it is valid for `schema`."""
    if not isinstance(schema, dict):
        return schema
    closed = dict(schema)
    properties = schema.get("properties")
    for name in ("properties", "$defs", "definitions"):
        if isinstance(schema.get(name), dict):
            closed[name] = {key: _closed(value) for key, value in schema[name].items()}
    for name in ("prefixItems", "anyOf", "oneOf"):
        # Next to named properties, an alternative adds to what holds for the same object.
        if isinstance(schema.get(name), list) and not (name != "prefixItems" and properties):
            closed[name] = [_closed(value) for value in schema[name]]
    if "items" in schema:
        closed["items"] = _closed(schema["items"])
    is_alone = not {"anyOf", "oneOf", "$ref", "patternProperties", "additionalProperties"} & schema.keys()
    if is_alone and isinstance(properties, dict) and set(schema.get("required") or ()) <= properties.keys():
        closed["additionalProperties"] = False
    return closed


def _narrowed(candidates: NDArray[np.uint8], mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
    narrower = candidates & mask
    return narrower if narrower.any() else candidates


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:300]
