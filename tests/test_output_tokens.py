"""What the engine says comes back token by token, with our tokenizer and with any other kind."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

import mock_engine
from mock_engine import output_tokens
from mock_engine.errors import ConfigError
from mock_engine.output_tokens import MIN_WORDS, WORDS_FILE, OutputTokens
from mock_engine.tokenizer_words import COMMON_WORDS, WORDS

SHIPPED = Path(mock_engine.__file__).parent / "tokenizer"
OUTPUT = OutputTokens.from_model_path(SHIPPED)
TOKENIZER = Tokenizer.from_file(str(SHIPPED / "tokenizer.json"))
TEXT = [" ".join((*COMMON_WORDS, *WORDS[start::7], *COMMON_WORDS[::-1])) + "." for start in range(7)]
EOS = "</s>"


def train_byte_level() -> Tokenizer:
    """As Llama 3 and Qwen: byte-level BPE, with a bos added to every prompt."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1500, special_tokens=["<s>", EOS], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def train_sentencepiece_bpe() -> Tokenizer:
    """As Llama 2: BPE over the whole text, spaces written as ▁ by the normalizer, the first one stripped again."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(vocab_size=1500, special_tokens=["<unk>", EOS])
    tokenizer.train_from_iterator([word for text in TEXT for word in text.split()], trainer)
    return tokenizer


def train_unigram() -> Tokenizer:
    """As T5 and Gemma: Unigram with Metaspace."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=900, special_tokens=["<unk>", EOS], unk_token="<unk>")
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def train_word_piece() -> Tokenizer:
    """As BERT: the space is in no token, the decoder puts it there."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=1200, special_tokens=["[UNK]", EOS])
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def write_model(folder: Path, tokenizer: Tokenizer, **configs: dict[str, Any]) -> Path:
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, config in configs.items():
        (folder / f"{name}.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@given(seed=st.integers(), num_tokens=st.integers(1, 600), data=st.data())
@settings(max_examples=300)
def test_any_slice_of_any_answer_comes_back_as_the_same_ids(seed: int, num_tokens: int, data: st.DataObject) -> None:
    ids = OUTPUT.take(seed, num_tokens)
    start = data.draw(st.integers(0, num_tokens - 1))
    joined = ids[start:] + OUTPUT.take(seed + 1, 5) + ids[: start + 1]
    for sequence in (ids, ids[start:], joined):
        assert TOKENIZER.encode(TOKENIZER.decode(sequence), add_special_tokens=False).ids == sequence


@given(ids=st.lists(st.sampled_from(OUTPUT.word_ids), min_size=1, max_size=100))
@settings(max_examples=300)
def test_text_already_sent_stays_what_it_is(ids: list[int]) -> None:
    """Dynamo detokenizes while it streams; the pieces must join to the text of the whole."""
    assert "".join(TOKENIZER.decode([id_]) for id_ in ids) == TOKENIZER.decode(ids)


@given(seed=st.integers(), num_tokens=st.integers(0, 10_000))
@settings(max_examples=100)
def test_take_is_the_beginning_of_stream(seed: int, num_tokens: int) -> None:
    assert OUTPUT.take(seed, num_tokens) == list(islice(OUTPUT.stream(seed), num_tokens))


def test_the_same_seed_says_the_same() -> None:
    again = OutputTokens.from_model_path(SHIPPED)
    assert [OUTPUT.take(seed, 32) for seed in range(100)] == [again.take(seed, 32) for seed in range(100)]


def test_seeds_next_to_each_other_have_nothing_in_common() -> None:
    """Eight tokens in a row are said once, wherever in whichever answer; else one answer is another, shifted."""
    answers = [OUTPUT.take(seed, 32) for seed in range(1000)]
    runs = {tuple(answer[start : start + 8]) for answer in answers for start in range(25)}
    assert len(runs) == 25 * len(answers)


@pytest.mark.parametrize("seed", range(20))
def test_a_long_answer_does_not_go_in_circles(seed: int) -> None:
    ids = OUTPUT.take(seed, 1 << 16)
    assert len({tuple(ids[start : start + 8]) for start in range(0, len(ids), 8)}) == len(ids) // 8


def test_one_answer_uses_many_words() -> None:
    assert len(set(OUTPUT.take(7, 1000))) > 200


def test_the_eos_id_is_never_said() -> None:
    output = OutputTokens(word_ids=[5, 6, 7], eos_token_ids=[6])
    assert output.eos_token_ids == (6,)
    assert set(output.take(0, 1000)) == {5, 7}
    with pytest.raises(ConfigError, match="at least one"):
        OutputTokens(word_ids=[6], eos_token_ids=[6])


@pytest.mark.parametrize(
    "train",
    [
        pytest.param(train_byte_level, id="byte-level BPE"),
        pytest.param(train_sentencepiece_bpe, id="SentencePiece BPE"),
        pytest.param(train_unigram, id="Unigram"),
        pytest.param(train_word_piece, id="WordPiece"),
    ],
)
def test_answers_survive_the_users_own_tokenizer(train: Callable[[], Tokenizer], tmp_path: Path) -> None:
    tokenizer = train()
    output = OutputTokens.from_model_path(write_model(tmp_path, tokenizer, config={"eos_token_id": 1}))
    assert output.eos_token_ids == (1,)
    assert len(output.word_ids) > 100
    for seed in range(300):
        ids = output.take(seed, 64)
        text = tokenizer.decode(ids, skip_special_tokens=False)
        assert tokenizer.encode(text, add_special_tokens=False).ids == ids
        assert len(text.split()) == 64


def test_words_that_melt_into_their_neighbours_are_dropped(tmp_path: Path) -> None:
    """A BPE that merges across spaces: " of" after " out" is one token, so one of the two cannot be used."""
    tokenizer = train_sentencepiece_bpe()
    content = json.loads(tokenizer.to_str())
    content["model"]["vocab"]["▁out▁of"] = len(content["model"]["vocab"])
    content["model"]["merges"].append(["▁out", "▁of"])
    assert "▁of" in content["model"]["vocab"]
    assert "▁out" in content["model"]["vocab"]
    melting = Tokenizer.from_str(json.dumps(content))
    output = OutputTokens.from_model_path(write_model(tmp_path, melting))
    assert not {melting.token_to_id("▁out"), melting.token_to_id("▁of")} <= set(output.word_ids)
    assert len(output.word_ids) > 100


def test_words_that_melt_three_at_a_time_are_dropped(tmp_path: Path) -> None:
    """Every pair is sound; only a mixture shows it."""
    words = [f"▁{word}" for word in COMMON_WORDS[:20]]
    entries = ["<unk>", *words, "".join(words[:3])]
    model = models.WordPiece(
        {entry: id_ for id_, entry in enumerate(entries)},
        unk_token="<unk>",
        continuing_subword_prefix="",
        max_input_chars_per_word=1_000_000,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    output = OutputTokens.from_model_path(write_model(tmp_path, tokenizer))
    assert not {1, 2, 3} <= set(output.word_ids)


def test_added_tokens_are_never_said(tmp_path: Path) -> None:
    tokenizer = train_word_piece()
    tokenizer.add_tokens([AddedToken("the", normalized=False)])
    output = OutputTokens.from_model_path(write_model(tmp_path, tokenizer))
    assert tokenizer.token_to_id("the") not in output.word_ids


@pytest.mark.parametrize(
    ("configs", "expected"),
    [
        pytest.param({}, (), id="nowhere"),
        pytest.param({"config": {"eos_token_id": 7}}, (7,), id="config"),
        pytest.param({"config": {"text_config": {"eos_token_id": [7, 8]}}}, (7, 8), id="nested, several"),
        pytest.param(
            {"generation_config": {"eos_token_id": [9, 7]}, "config": {"eos_token_id": 7}}, (9, 7), id="both, no repeat"
        ),
        pytest.param({"tokenizer_config": {"eos_token": EOS}}, (1,), id="by its text"),
        pytest.param({"tokenizer_config": {"eos_token": {"content": EOS}}}, (1,), id="by an added token"),
        pytest.param({"config": {"eos_token_id": None}, "tokenizer_config": {"eos_token": None}}, (), id="null"),
    ],
)
def test_eos_ids_come_from_the_models_files(
    configs: dict[str, dict[str, Any]], expected: tuple[int, ...], tmp_path: Path
) -> None:
    output = OutputTokens.from_model_path(write_model(tmp_path, train_word_piece(), **configs))
    assert output.eos_token_ids == expected


def test_too_few_words_is_one_clear_line(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(["ab"], trainers.BpeTrainer(vocab_size=10))
    with pytest.raises(ConfigError, match=rf"0 word tokens.*at least {MIN_WORDS}.*--model-path") as error:
        OutputTokens.from_model_path(write_model(tmp_path, tokenizer))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("files", "match"),
    [
        pytest.param({}, "does not exist.*--model-path", id="no tokenizer"),
        pytest.param({"tokenizer.json": "{"}, "no tokenizer", id="broken tokenizer"),
        pytest.param({"tokenizer.json": None, "config.json": "{"}, "config.json is not JSON", id="broken config"),
        pytest.param({"tokenizer.json": None, "config.json": "[]"}, "config.json holds a list", id="config is a list"),
    ],
)
def test_a_broken_folder_is_one_clear_line(files: dict[str, str | None], match: str, tmp_path: Path) -> None:
    shipped = (SHIPPED / "tokenizer.json").read_text(encoding="utf-8")
    for name, content in files.items():
        (tmp_path / name).write_text(shipped if content is None else content, encoding="utf-8")
    with pytest.raises(ConfigError, match=match) as error:
        OutputTokens.from_model_path(tmp_path)
    assert "\n" not in str(error.value)


def test_the_words_of_the_shipped_tokenizer_are_known_and_need_not_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_tokens, "find_words", lambda *_: pytest.fail("looked for words"))
    assert OutputTokens.from_model_path(SHIPPED).word_ids == OUTPUT.word_ids


def test_words_that_are_known_of_another_tokenizer_are_not_used(tmp_path: Path) -> None:
    """A folder of ours whose tokenizer was replaced."""
    for path in SHIPPED.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    known = json.loads((SHIPPED / WORDS_FILE).read_text(encoding="utf-8"))
    (tmp_path / WORDS_FILE).write_text(json.dumps({**known, "word_ids": list(range(100, 200))}), encoding="utf-8")
    assert OutputTokens.from_model_path(tmp_path).word_ids == tuple(range(100, 200))
    TOKENIZER.save(str(tmp_path / "tokenizer.json"), pretty=True)
    assert OutputTokens.from_model_path(tmp_path).word_ids == OUTPUT.word_ids
