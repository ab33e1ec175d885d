"""config.json: parameters are counted as published, and what is not a plain transformer is refused in one line."""

from __future__ import annotations

import json

import pytest

from mock_engine.errors import ProfileError
from mock_engine.model_config import hub_config, model_of_config, read_config
from mock_engine.profile_import.known_models import MODELS, find_model

PLAIN = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14_336,
    "vocab_size": 128_256,
    "max_position_embeddings": 131_072,
}
EXPERTS = {"num_local_experts": 8, "num_experts_per_tok": 2}
SMALL_QWEN3 = PLAIN | {
    "model_type": "qwen3",
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "head_dim": 128,
    "intermediate_size": 3072,
    "vocab_size": 151_936,
    "tie_word_embeddings": True,
}
SPARSE_QWEN3 = SMALL_QWEN3 | {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "tie_word_embeddings": False,
}
QWEN2_7B = PLAIN | {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18_944,
    "vocab_size": 152_064,
    "sliding_window": 131_072,
    "use_sliding_window": False,
}


@pytest.mark.parametrize(
    ("config", "num_params"),
    [
        pytest.param(PLAIN, 8_030_261_248, id="Llama-3.1-8B"),
        pytest.param(SMALL_QWEN3, 596_049_920, id="Qwen3-0.6B"),
        pytest.param(SPARSE_QWEN3, 30_532_122_624, id="Qwen3-30B-A3B"),
        pytest.param(QWEN2_7B, 7_615_616_512, id="Qwen2.5-7B"),
    ],
)
def test_parameters_are_as_many_as_the_model_is_published_with(config, num_params):
    assert model_of_config(config, "x", "x").shape.num_params == num_params


@pytest.mark.parametrize(
    ("name", "num_params"),
    [("qwen3-14b", 14_768_307_200), ("qwen3-32b", 32_762_123_264), ("mixtral-8x7b", 46_702_792_704)],
)
def test_known_models_have_their_published_size(name, num_params):
    assert MODELS[name].shape.num_params == num_params


@pytest.mark.parametrize("name", MODELS)
def test_a_known_model_comes_back_from_the_config_that_the_kernel_tables_get(name):
    """But for norms of queries and keys, which are a few thousand parameters."""
    model = MODELS[name]
    again = model_of_config(hub_config(model), model.name, model.hub_name)
    assert again.shape.num_params == pytest.approx(model.shape.num_params, rel=1e-5)
    assert (again.shape.num_experts, again.shape.num_expert_params) == (
        model.shape.num_experts,
        model.shape.num_expert_params,
    )
    assert again.max_model_len == model.max_model_len


def test_a_folder_is_as_good_as_the_file_in_it_and_gives_the_model_its_name(tmp_path):
    folder = tmp_path / "My_Model-8B (v2)"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(PLAIN))
    by_folder, by_file = find_model(str(folder)), find_model(str(folder / "config.json"))
    assert by_folder == by_file
    assert by_folder.name == "my-model-8b-v2"
    (folder / "Other.json").write_text(json.dumps(PLAIN))
    assert read_config(folder / "Other.json").name == "other"


def test_a_file_of_a_download_cache_is_named_by_its_folder_not_by_what_it_links_to(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "8f2d").write_text(json.dumps(PLAIN))
    (tmp_path / "Llama-8B").mkdir()
    (tmp_path / "Llama-8B" / "config.json").symlink_to(tmp_path / "blobs" / "8f2d")
    model = read_config(tmp_path / "Llama-8B")
    assert (model.name, model.hub_name) == ("llama-8b", "Llama-8B")


def test_what_follows_from_the_rest_may_be_absent():
    config = PLAIN | {"num_key_value_heads": None, "_name_or_path": "org/x"}
    model = model_of_config(config, "x", "x")
    assert (model.shape.num_kv_heads, model.shape.head_dim) == (32, 128)
    assert (model.query_size, model.kv_size) == (4096, 4096)


@pytest.mark.parametrize(
    ("config", "bias_and_norms"), [(PLAIN, (False, False)), (QWEN2_7B, (True, False)), (SMALL_QWEN3, (False, True))]
)
def test_biases_and_norms_of_heads_are_those_of_the_kind(config, bias_and_norms):
    model = model_of_config(config, "x", "x")
    assert (model.has_qkv_bias, model.has_head_norms) == bias_and_norms


def test_a_window_that_no_context_exceeds_is_full_attention(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PLAIN | {"sliding_window": 4096}))
    assert read_config(tmp_path, max_model_len=4096).max_model_len == 131_072
    with pytest.raises(ProfileError, match="less than a context of 4097"):
        read_config(tmp_path, max_model_len=4097)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "hidden_size is None; allowed is a whole number"),
        ({"vocab_size": "many"}, "vocab_size is 'many'; allowed is a whole number"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ({"num_key_value_heads": 5}, "num_attention_heads is 32; allowed is a multiple of num_key_value_heads, 5"),
        ({"intermediate_size": None}, "intermediate_size is None"),
        ({"kv_lora_rank": 512}, "latent attention; plain transformers only"),
        ({"text_config": {"hidden_size": 1}}, "a part that is not text"),
        ({"n_shared_experts": 1}, "shared experts; plain transformers only"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layer_types has linear_attention"),
        ({"sliding_window": 4096}, "sliding_window is 4096, less than a context of 131072; full attention only"),
        ({"sliding_window": "wide"}, "sliding_window is 'wide'"),
        ({**EXPERTS, "mlp_only_layers": [0]}, "experts are in some layers only"),
        ({**EXPERTS, "num_experts_per_tok": 9}, "num_experts_per_tok is 9; allowed is up to 8"),
        ({"num_local_experts": 8}, "num_experts_per_tok is None"),
    ],
)
def test_a_config_that_is_not_a_plain_transformer_is_one_clear_line(changes, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PLAIN | changes))
    with pytest.raises(ProfileError, match=message) as caught:
        read_config(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "the file is missing"),
        ("{", "cannot be read as JSON"),
        ("[]", "found list; needed is an object"),
        ("{}", "hidden_size is missing; needed are"),
    ],
)
def test_a_file_that_is_no_config_is_one_clear_line(text, message, tmp_path):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ProfileError, match=message) as caught:
        read_config(tmp_path)
    assert "\n" not in str(caught.value)
