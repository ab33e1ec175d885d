"""
What the engine says: seeded token ids that survive detokenize -> tokenize.

    output = OutputTokens.from_model_path(model_path)
    output.take(seed, osl_tokens)       the whole answer at once
    output.stream(seed)                 the same ids, one by one, without end

The client counts the answer by tokenizing its text. So only ids are used that
decode to a space and a lowercase word, and of which any sequence was seen to
come back as the same ids; `from_model_path` finds them in any tokenizer.json. That takes 0.15 s of processor
time, so the folder that we ship has them in a file beside it, which counts as long as the tokenizer is that one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from mock_engine.errors import ConfigError

MIN_WORDS = 16
WORDS_FILE = "usable_words.json"
_MAX_CANDIDATES = 2048  # the lowest ids first: in a trained vocabulary these are the common words
_MAX_WORDS = 256
_MAX_ROUNDS = 8
_TABLE_SIZE = 1 << 16
_MASK_64 = (1 << 64) - 1

# How a vocabulary writes a space before a word: byte-level, SentencePiece, and WordPiece, which leaves it out.
_WORD_ENTRIES = tuple(re.compile(f"{space}[a-z]{{2,16}}") for space in ("Ġ", "▁", ""))
_WORDS_TEXT = re.compile(r" ?[a-z]+(?: [a-z]+)*")


class OutputTokens:
    """Seeded source of output token ids that survive detokenize -> tokenize with the same count."""

    def __init__(self, word_ids: Sequence[int], eos_token_ids: Sequence[int]) -> None:
        self.eos_token_ids = tuple(eos_token_ids)
        self.word_ids = tuple(id_ for id_ in word_ids if id_ not in self.eos_token_ids)
        if not self.word_ids:
            raise ConfigError("no output token ids were given; at least one that is not an eos id is needed")
        shuffled = np.random.default_rng(0).integers(0, len(self.word_ids), _TABLE_SIZE)
        self._table = np.asarray(self.word_ids, dtype=np.int64)[shuffled]

    @classmethod
    def from_model_path(cls, model_path: str | Path) -> OutputTokens:
        """The usable ids of the tokenizer in a local model folder. Raises `ConfigError` if there are too few."""
        folder = Path(model_path)
        path = find_tokenizer(folder)
        tokenizer = load_tokenizer(path)
        eos_token_ids = _find_eos_token_ids(folder, tokenizer)
        found = _known_words(folder, path.read_bytes()) or find_words(tokenizer, eos_token_ids)
        if len(found) >= MIN_WORDS:
            return cls(found, eos_token_ids)
        raise ConfigError(
            f"{folder / 'tokenizer.json'} has {len(found)} word tokens that survive detokenize -> tokenize, and at "
            f"least {MIN_WORDS} are needed. Choose another --model-path, or leave it out to use the tokenizer we ship."
        )

    def take(self, seed: int, num_tokens: int) -> list[int]:
        """The first `num_tokens` ids of `stream(seed)`; the caller owns the list. About 20 ns a token."""
        return self._ids(seed, 0, num_tokens)

    def stream(self, seed: int) -> Iterator[int]:
        """Ids without end, the same for the same seed."""
        start, num_tokens = 0, 64
        while True:
            yield from self._ids(seed, start, num_tokens)
            start += num_tokens
            num_tokens = min(2 * num_tokens, 4096)

    def _ids(self, seed: int, start: int, num_tokens: int) -> list[int]:
        """A walk through the table; the seed sets where it begins and its odd, so never repeating, stride."""
        mixed = _mix(seed)
        offset, stride = mixed % _TABLE_SIZE, (mixed >> 32) % _TABLE_SIZE | 1
        steps = np.arange(start, start + num_tokens, dtype=np.int64)
        ids: list[int] = self._table[(offset + stride * steps) % _TABLE_SIZE].tolist()
        return ids


def _mix(seed: int) -> int:
    """64 well-mixed bits of any integer (splitmix64), so that seeds 1 and 2 have nothing in common."""
    mixed = (seed + 0x9E3779B97F4A7C15) & _MASK_64
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return mixed ^ (mixed >> 31)


def words_json(tokenizer_json: str) -> str:
    """The content of `WORDS_FILE` for a tokenizer.json."""
    found = find_words(Tokenizer.from_str(tokenizer_json), eos_token_ids=())
    return json.dumps({"tokenizer_sha256": _sha256(tokenizer_json.encode()), "word_ids": found}) + "\n"


def _known_words(folder: Path, tokenizer_json: bytes) -> list[int]:
    """What `WORDS_FILE` says, if it is there and was made for this tokenizer; else nothing."""
    known = _read_json(folder / WORDS_FILE)
    if known.get("tokenizer_sha256") != _sha256(tokenizer_json):
        return []
    word_ids: list[int] = known["word_ids"]
    return word_ids


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def find_words(tokenizer: Tokenizer, eos_token_ids: Sequence[int]) -> list[int]:
    """The ids that `OutputTokens` may use; if there are not `MIN_WORDS`, the most that could be found."""
    found: list[int] = []
    for entry in _WORD_ENTRIES:
        stable = _keep_stable(tokenizer, _find_candidates(tokenizer, entry, eos_token_ids))
        found = max(found, stable, key=len)
        if len(found) >= MIN_WORDS:
            break
    return found


def find_tokenizer(model_path: Path) -> Path:
    """The tokenizer.json of a local model folder. Raises `ConfigError` if there is none."""
    path = model_path / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(
            f"{path} does not exist. --model-path must be a local model folder with config.json, tokenizer.json and "
            f"tokenizer_config.json; leave it out to use the one we ship."
        )
    return path


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a tokenizer.json. Raises `ConfigError` if the library cannot load it."""
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ConfigError(f"{path} is no tokenizer the tokenizers library can load: {error}") from error


def _find_candidates(tokenizer: Tokenizer, entry: re.Pattern[str], eos_token_ids: Sequence[int]) -> list[int]:
    taken = {*tokenizer.get_added_tokens_decoder(), *eos_token_ids}
    vocabulary: Mapping[str, int] = tokenizer.get_vocab(with_added_tokens=False)
    ids = sorted(id_ for token, id_ in vocabulary.items() if entry.fullmatch(token) and id_ not in taken)
    return ids[:_MAX_CANDIDATES]


def _keep_stable(tokenizer: Tokenizer, candidates: Sequence[int]) -> list[int]:
    """
    Those of `candidates` of which every sequence tried comes back as it was.

    First each next to itself, then every one after every other and random
    mixtures; the id where a sequence first differs goes, until none differs.
    """
    repeats = [[id_] * 3 for id_ in candidates]
    unstable = {ids[0] for ids, again in zip(repeats, _round_trips(tokenizer, repeats), strict=True) if ids != again}
    kept = [id_ for id_ in candidates if id_ not in unstable][:_MAX_WORDS]
    draw = np.random.default_rng(0)
    for _ in range(_MAX_ROUNDS):
        if len(kept) < MIN_WORDS:
            return kept
        neighbours = [[id_ for other in kept[i:] for id_ in (first, other)] for i, first in enumerate(kept)]
        mixtures: list[list[int]] = draw.choice(kept, (256, 256)).tolist()
        sequences = neighbours + mixtures
        again = _round_trips(tokenizer, sequences)
        unstable = {_first_lost(*pair) for pair in zip(sequences, again, strict=True) if pair[0] != pair[1]}
        if not unstable:
            return kept
        kept = [id_ for id_ in kept if id_ not in unstable]
    return []


def _first_lost(ids: list[int], again: list[int]) -> int:
    """The first of `ids` that did not come back; the last one if more came back than went out."""
    return next((id_ for id_, found in zip_longest(ids, again[: len(ids)]) if id_ != found), ids[-1])


def _round_trips(tokenizer: Tokenizer, sequences: Sequence[list[int]]) -> list[list[int]]:
    """What each sequence is after detokenize -> tokenize; empty where its text is not one plain word a token."""
    texts: list[str] = tokenizer.decode_batch(sequences, skip_special_tokens=False)
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [
        encoding.ids if _WORDS_TEXT.fullmatch(text) and len(text.split()) == len(sequence) else []
        for sequence, text, encoding in zip(sequences, texts, encodings, strict=True)
    ]


def _find_eos_token_ids(folder: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Every id that ends an answer, as the model's own files say, without repeats."""
    model_config = _read_json(folder / "config.json")
    found: list[Any] = []
    for config in (_read_json(folder / "generation_config.json"), model_config, model_config.get("text_config")):
        value = config.get("eos_token_id") if isinstance(config, dict) else None
        found += value if isinstance(value, list) else [value]
    token = _read_json(folder / "tokenizer_config.json").get("eos_token")
    content = token.get("content") if isinstance(token, dict) else token
    found.append(tokenizer.token_to_id(content) if isinstance(content, str) else None)
    return tuple(dict.fromkeys(id_ for id_ in found if isinstance(id_, int)))


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a {type(content).__name__}, not an object")
    return content
