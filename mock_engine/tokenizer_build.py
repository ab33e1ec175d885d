"""
Builds the tokenizer folder we ship.

    python -m mock_engine.tokenizer_build [FOLDER]      default: mock_engine/tokenizer

A client that cuts prompts out of a tokenized text (AIPerf) decodes its slice,
sends the text, and the server tokenizes it again. With most tokenizers the
count then differs by a few. Here it does not, by construction:

- one regular expression that never looks back cuts the text into pieces: a word
  with the space before it, up to three digits, a punctuation mark, a run of
  spaces, one character outside ASCII;
- a piece is cut greedily, longest entry first (WordPiece without a prefix for
  continuations), down to single bytes, so every text can be encoded.

What is chosen at a position depends only on the text after it, and the rest of
a piece is a piece. So any slice of an encoding, decoded and encoded again, is
that slice, and so are slices joined by a special token, as AIPerf joins the
blocks of a trace by bos. Slices joined by nothing are exact where the right one
begins with a space and a letter, or with a capital and a small letter;
elsewhere a seam may cost a token. Two more exceptions: runs of over 64 letters,
and a cut between the bytes of one character.

The vocabulary is made here: words any English text needs, their regular
inflections, and all short combinations of letters. The most common words have
the lowest ids.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from string import ascii_letters, ascii_lowercase, ascii_uppercase, digits, punctuation
from typing import Any

from mock_engine.output_tokens import WORDS_FILE, words_json
from mock_engine.tokenizer_words import COMMON_WORDS, WORDS

BOS, EOS, SYSTEM, USER, ASSISTANT, TOOL, UNKNOWN = SPECIAL_TOKENS = (
    "<|bos|>",
    "<|eos|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|tool|>",
    "<|unknown|>",
)
# Marks of reasoning and of tool calls: one token each, as with Qwen, and shown as text. Dynamo (1.4.2) reads a mark of
# reasoning only where it comes in one piece.
THINK, END_THINK, TOOL_CALL, END_TOOL_CALL = MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
MAX_PIECE_LETTERS = 64
MAX_MODEL_LEN = 1_048_576  # the engine registers the real one; this only must not be in the way

# Order matters: the first alternative that matches wins. The one look ahead (capitals end before the one that
# starts a word) does no harm: every capital with a small letter after it is an entry, so no slice ends between them.
PIECES = "|".join(
    (
        rf" ?[A-Z]{{1,{MAX_PIECE_LETTERS}}}(?![a-z])",
        rf" ?[A-Z]?[a-z]{{1,{MAX_PIECE_LETTERS}}}",
        r"[0-9]{1,3}",
        r" ?[!-/:-@\[-`{-~]",
        r" {8}",
        r" {4}",
        r"\n\n",
        r"[\s\S]",
    )
)

# A first user message costs one token, the generation prompt. AIPerf compares its own count, without a
# template, with `usage.prompt_tokens` and warns above 10 %: one token keeps it silent from ISL 10. Parts of a
# message are joined with a line break, as Dynamo does before the template sees them. Tools come first, one a line.
CHAT_TEMPLATE = (
    "{%- if tools -%}{{- '<|system|>' -}}"
    "{%- for tool in tools -%}{{- tool | tojson -}}{{- '\\n' -}}{%- endfor -%}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' or message['role'] == 'developer' -%}{{- '<|system|>' -}}"
    "{%- elif message['role'] == 'assistant' -%}{{- '<|assistant|>' -}}"
    "{%- elif message['role'] == 'tool' -%}{{- '<|tool|>' -}}"
    "{%- elif tools or not loop.first -%}{{- '<|user|>' -}}"
    "{%- endif -%}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- elif message['content'] -%}"
    "{%- for part in message['content'] -%}"
    "{%- if not loop.first -%}{{- '\\n' -}}{%- endif -%}"
    "{%- if part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{%- for call in message['tool_calls'] or [] -%}"
    "{%- set arguments = call['function']['arguments'] -%}"
    "{{- '<tool_call>\\n{\"name\": ' -}}{{- call['function']['name'] | tojson -}}{{- ', \"arguments\": ' -}}"
    "{{- arguments if arguments is string else arguments | tojson -}}{{- '}\\n</tool_call>' -}}"
    "{%- endfor -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def build_files() -> dict[str, str]:
    """The content of every file of the folder, by name."""
    vocabulary = build_vocabulary()
    num_words = len(vocabulary)
    added_ids = {token: num_words + i for i, token in enumerate((*SPECIAL_TOKENS, *MARKS))}
    bos_id, eos_id = added_ids[BOS], added_ids[EOS]
    tokenizer_json = _tokenizer_json(vocabulary, added_ids)
    return {
        "tokenizer.json": tokenizer_json,
        WORDS_FILE: words_json(tokenizer_json),
        "tokenizer_config.json": _json(_tokenizer_config(added_ids)),
        "config.json": _json(_model_config(num_words + len(added_ids), bos_id, eos_id)),
        "generation_config.json": _json({"bos_token_id": bos_id, "eos_token_id": eos_id}),
    }


def write_folder(folder: Path) -> None:
    """Writes `build_files()` to `folder`, which is made if it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in build_files().items():
        (folder / name).write_text(content, encoding="utf-8")


def build_vocabulary() -> list[str]:
    """Every entry as plain text or, for the 256 bytes, as its byte-level letter; the index is the id."""
    letters = _byte_letters()
    entries = [_in_byte_letters(text, letters) for text in _texts()]
    entries += letters  # every byte alone, so nothing is unknown
    return list(dict.fromkeys(entries))


def _texts() -> Iterator[str]:
    """Entries in the order of their ids; one may come twice."""
    yield from (f" {word}" for word in COMMON_WORDS)
    yield from (f" {word}" for word in WORDS)
    yield from (f" {word}" for word in _inflections((*COMMON_WORDS, *WORDS)))
    yield from (f" {word.capitalize()}" for word in (*COMMON_WORDS, *WORDS))
    yield from (f" {word.upper()}" for word in (*COMMON_WORDS, *WORDS))
    yield from COMMON_WORDS
    yield from (word.capitalize() for word in COMMON_WORDS)
    yield from _parts_of_words()
    yield from (f"{space}{mark}" for space in ("", " ") for mark in punctuation)
    yield from ("".join(number) for width in (1, 2, 3) for number in product(digits, repeat=width))
    yield from (" " * 8, " " * 4, "\n\n")
    yield from _characters_outside_ascii()


def _parts_of_words() -> Iterator[str]:
    vowels, consonants, single_onsets = "aeiou", "bcdfghjklmnpqrstvwxyz", "bcdfghjklmnprstvw"
    onsets = (*single_onsets, *_DOUBLE_ONSETS.split())
    codas = (*"bcdglmnprstvkf", *_DOUBLE_CODAS.split())
    yield from (f" {letter}" for letter in ascii_lowercase + ascii_uppercase)
    for space in ("", " "):
        for first, second in ((ascii_lowercase, ascii_lowercase), (ascii_uppercase, ascii_letters)):
            yield from (space + "".join(pair) for pair in product(first, second))
        yield from (space + "".join(part) for part in product(onsets, vowels))
        yield from (space + "".join(part) for part in product(single_onsets, vowels, codas))
    yield from ("".join(part) for part in product(vowels, consonants, vowels))
    yield from ("".join(part) for part in product(vowels, codas))
    yield from _ENDINGS.split()


_DOUBLE_ONSETS = "bl br ch cl cr dr fl fr gl gr kn pl pr qu sc sh sl sn sp st sw th tr wh"
_DOUBLE_CODAS = "ck ll ss st nd nt ng rt rd"
_ENDINGS = """
able al ally ance ant ary ate ated ation ed edst ence ent er ers ery es est eth ful fully ible ic ies ing ings ion ions
ious ish ism ist ity ive less ly man men ment ments ness ous self ship sion th tion tions ty ure ward wards wise
"""


def _inflections(words: Iterable[str]) -> Iterator[str]:
    """Regular forms; a few are no words, which costs an entry and nothing else."""
    for word in words:
        if len(word) < 3:
            continue
        if word.endswith("e"):
            yield from (word + "s", word + "d", word[:-1] + "ing")
        elif word.endswith("y") and word[-2] not in "aeiou":
            yield from (word[:-1] + "ies", word[:-1] + "ied", word + "ing")
        elif word.endswith(("s", "x", "ch", "sh")):
            yield from (word + "es", word + "ed", word + "ing")
        else:
            yield from (word + "s", word + "ed", word + "ing")


def _characters_outside_ascii() -> Iterator[str]:
    """European letters, dashes, quotes and the sign for a broken character: one token each."""
    yield from (chr(code) for code in range(0xA0, 0x180))
    yield from (chr(code) for code in range(0x2010, 0x2028))
    yield from "€™←→\ufffd"


def _byte_letters() -> list[str]:
    """The printable letter that stands for each byte in a byte-level tokenizer.json, by byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {byte: chr(byte) for byte in printable}
    rest = [byte for byte in range(256) if byte not in letters]
    letters.update({byte: chr(256 + i) for i, byte in enumerate(rest)})
    return [letters[byte] for byte in range(256)]


def _in_byte_letters(text: str, letters: list[str]) -> str:
    return "".join(letters[byte] for byte in text.encode())


def _tokenizer_json(vocabulary: list[str], added_ids: dict[str, int]) -> str:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": PIECES}, "behavior": "Isolated", "invert": False}
    content: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": id_, **_added_token(token)} for token, id_ in added_ids.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "WordPiece",
            "unk_token": UNKNOWN,
            "continuing_subword_prefix": "",
            "max_input_chars_per_word": 2 * MAX_PIECE_LETTERS + 1,
            "vocab": {entry: i for i, entry in enumerate(vocabulary)},
        },
    }
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n"


def _added_token(token: str) -> dict[str, Any]:
    is_special = token in SPECIAL_TOKENS
    options = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": is_special}
    return {"content": token, **options}


def _tokenizer_config(added_ids: dict[str, int]) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": MAX_MODEL_LEN,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": BOS,
        "eos_token": EOS,
        "added_tokens_decoder": {str(id_): _added_token(token) for token, id_ in added_ids.items()},
        "chat_template": CHAT_TEMPLATE,
    }


def _model_config(vocab_size: int, bos_id: int, eos_id: int) -> dict[str, Any]:
    """A Llama small enough that nobody takes it for a real model; no weights go with it."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "max_position_embeddings": MAX_MODEL_LEN,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-05,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"


if __name__ == "__main__":
    write_folder(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "tokenizer")
