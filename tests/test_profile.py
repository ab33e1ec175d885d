"""Profiles on disk: what ships is complete, capacity is what vLLM reports, and what is corrupt is said in one line."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from mock_engine.errors import ProfileError
from mock_engine.profile import PROFILES_DIR, check_profile, list_profiles, load_profile
from mock_engine.profiles_command import summarize
from mock_engine.roofline import ModelShape

H100_8B = "h100-sxm/llama-3.1-8b/vllm-tp1-bf16"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of a shipped profile to spoil."""
    return Path(shutil.copytree(PROFILES_DIR / H100_8B, tmp_path / "spoilt"))


def test_the_shipped_profiles_are_all_there_and_fine():
    names = list_profiles()
    assert names == sorted(names)
    assert {
        "a100-sxm/llama-2-70b/splitwise-tp8-fp16",
        "a100-sxm/llama-3.1-70b/vllm-tp4-bf16",
        "a100-sxm/llama-3.1-8b/vllm-tp1-bf16",
        "h100-sxm/llama-3.1-70b/vllm-tp4-bf16",
        H100_8B,
        "h100-sxm/llama-3.3-70b/vllm-tp4-fp8",
    } <= set(names)
    for name in names:
        assert check_profile(name) == []
        profile = load_profile(name)
        assert profile.name == name
        assert profile.total_kv_blocks() * profile.block_size >= profile.max_model_len
        assert profile.expected_error
        assert max(profile.expected_error.values()) <= 0.1


def test_the_catalogue_covers_what_it_promises():
    """H100 and A100, three engines, dense models, experts and fp8."""
    names = set(list_profiles())
    for gpu in ("h100-sxm", "a100-sxm"):
        for engine in ("vllm", "trtllm", "sglang"):
            for model, tps in {
                "llama-3.1-8b": (1, 2),
                "llama-3.1-70b": (4, 8),
                "llama-2-70b": (4, 8),
                "qwen3-14b": (1,),
                "qwen3-32b": (1, 2, 4),
                "codellama-34b": (2,),
                "mixtral-8x7b": (2,),
            }.items():
                assert {f"{gpu}/{model}/{engine}-tp{tp}-bf16" for tp in tps} <= names
    assert {f"h100-sxm/llama-3.3-70b/{engine}-tp{tp}-fp8" for engine in ("vllm", "trtllm") for tp in (2, 4, 8)} <= names


def test_a_shipped_profile_is_small():
    """So that the package stays small, and a person can read a table."""
    for name in list_profiles():
        assert sum(path.stat().st_size for path in (PROFILES_DIR / name).iterdir()) < 60_000


@pytest.mark.parametrize(
    ("name", "num_blocks"),
    [
        ("h100-sxm/llama-3.1-70b/vllm-tp4-bf16", 30_251),
        ("h100-sxm/llama-2-70b/vllm-tp4-bf16", 31_356),
        ("h100-sxm/codellama-34b/vllm-tp2-bf16", 26_602),
    ],
)
def test_where_an_engine_reported_its_kv_blocks_that_number_counts(name, num_blocks):
    profile = load_profile(name)
    assert profile.total_kv_blocks(0.9) == num_blocks
    assert summarize(profile)["kv_capacity"] == "reported by the engine at a utilization of 0.9"
    assert "computed" in summarize(load_profile(H100_8B))["kv_capacity"]


def test_each_gpu_holds_one_kv_head_at_least():
    """Four KV heads on eight GPUs: each head is there twice, and the capacity no larger than on four."""
    shape = replace(load_profile(H100_8B).shape, num_kv_heads=4)
    on_each = [shape.kv_bytes_per_token_on_each(tp, "bf16") for tp in (4, 8)]
    assert on_each == [shape.kv_bytes_per_token("bf16") / 4] * 2


def with_kv_cache(folder: Path, kv_cache_dtype: str) -> Path:
    """The same profile, and of its KV cache it says this."""
    spoil_toml("^tp = 1$", f'tp = 1\nkv_cache_dtype = "{kv_cache_dtype}"')(folder)
    return folder


def test_a_kv_cache_is_16_bit_where_the_profile_does_not_say(folder):
    silent = load_profile(folder)
    assert silent.kv_cache_dtype == "bf16"
    said = load_profile(with_kv_cache(folder, "bf16"))
    assert (said.name, said.kv_bytes_per_token, said.total_kv_blocks(0.7)) == (
        silent.name,
        silent.kv_bytes_per_token,
        silent.total_kv_blocks(0.7),
    )


def test_of_the_shipped_profiles_those_of_fp8_under_tensorrt_llm_have_an_fp8_kv_cache_and_no_others():
    """So NVIDIA's FP8 checkpoints say, and TensorRT-LLM heeds it. What was 16 bit says nothing new in its file."""
    for name in list_profiles():
        is_fp8 = name.endswith("-fp8") and "/trtllm-" in name
        assert load_profile(name).kv_cache_dtype == ("fp8" if is_fp8 else "bf16")
        text = (PROFILES_DIR / name / "profile.toml").read_text(encoding="utf-8")
        assert ("kv_cache_dtype" in text) == is_fp8


@pytest.mark.parametrize("utilization", [0.5, 0.9, 1.0])
def test_what_is_left_of_the_memory_holds_twice_as_many_tokens_in_fp8(folder, utilization):
    """utilization * memory - weights - 1.24 GB, in blocks of 16 tokens: 32 layers, 8 KV heads of 128, K and V."""
    profile = load_profile(with_kv_cache(folder, "fp8"))
    left_bytes = utilization * profile.datasheet.memory_bytes - 2 * profile.shape.num_params - 1.24e9
    assert profile.kv_bytes_per_token == 2 * 32 * 8 * 128
    assert profile.total_kv_blocks(utilization) == int(left_bytes / (16 * 65_536))
    assert profile.total_kv_blocks(utilization) // 2 == load_profile(H100_8B).total_kv_blocks(utilization)
    assert summarize(profile)["kv_cache_dtype"] == "fp8"


def test_a_profile_says_in_its_name_if_its_kv_cache_is_not_the_usual_one(folder):
    """So that both can lie side by side."""
    assert load_profile(with_kv_cache(folder, "fp8")).name == f"{H100_8B}-kv-fp8"
    usual = load_profile("h100-sxm/llama-3.3-70b/trtllm-tp4-fp8")
    assert replace(usual, kv_cache_dtype="bf16").name == f"{usual.name}-kv-bf16"
    assert replace(usual, kv_cache_dtype="bf16", engine="vllm").name == "h100-sxm/llama-3.3-70b/vllm-tp4-fp8"


@pytest.mark.parametrize("path", sorted(path for path in PROFILES_DIR.rglob("*") if path.is_file()))
def test_no_file_names_a_machine_or_a_registry(path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"/work|/tmp|/home|https?://(?!github\.com)", text)


# KV blocks of 16 tokens that vLLM reported on H100-80GB at gpu_memory_utilization 0.9: read off published runs
# (inference-sim/inference-sim, branch stepml-experiments 9293b222, and inference-sim/training ed5c1d26).
REPORTED_BLOCKS = [
    ("Llama-2-7B", 6_738_000_000, 32, 32, 1, 7_463),
    ("Qwen2.5-7B", 7_616_000_000, 28, 4, 1, 65_352),
    ("Qwen2.5-7B, 1,024 batched tokens", 7_616_000_000, 28, 4, 1, 65_368),
    ("Mistral-Nemo-12B", 12_248_000_000, 40, 8, 1, 19_251),
    ("Mistral-Nemo-12B", 12_248_000_000, 40, 8, 2, 48_009),
    ("Llama-3.1-70B, 8,192 batched tokens", 70_554_000_000, 80, 8, 4, 30_251),
    ("Llama-3.1-70B", 70_554_000_000, 80, 8, 4, 30_425),
    ("Llama-2-70B", 68_977_000_000, 80, 8, 4, 31_356),
    ("CodeLlama-34B", 33_744_000_000, 48, 8, 2, 26_602),
    ("Yi-34B", 34_389_000_000, 60, 8, 2, 20_793),
]


@pytest.mark.parametrize(("model", "num_params", "num_layers", "num_kv_heads", "tp", "reported"), REPORTED_BLOCKS)
def test_kv_capacity_is_what_vllm_reported(model, num_params, num_layers, num_kv_heads, tp, reported):
    shape = ModelShape(num_params, num_layers, 4096, 32, num_kv_heads, 128, 32_000)
    profile = replace(load_profile(H100_8B), model=model, shape=shape, tp=tp)
    assert profile.total_kv_blocks(0.9) == pytest.approx(reported, rel=0.015)


def test_a_reported_block_count_holds_at_its_own_utilization_only():
    profile = replace(load_profile(H100_8B), measured_kv_blocks=12_345, measured_gpu_memory_utilization=0.9)
    assert profile.total_kv_blocks(0.9) == 12_345
    assert profile.total_kv_blocks(0.8) == load_profile(H100_8B).total_kv_blocks(0.8)


def test_kv_capacity_grows_with_utilization():
    blocks = [load_profile(H100_8B).total_kv_blocks(percent / 100) for percent in range(30, 101)]
    assert blocks == sorted(set(blocks))


@pytest.mark.parametrize(("utilization", "advice"), [(0.1, "--gpu-memory-utilization 0.21"), (0.2, "0.21")])
def test_a_model_that_does_not_fit_says_what_would(utilization, advice):
    profile = load_profile(H100_8B)
    with pytest.raises(ProfileError, match=re.escape(advice)):
        profile.total_kv_blocks(utilization)
    assert profile.total_kv_blocks(0.21) >= 1


def test_a_model_too_large_for_the_gpu_asks_for_more_of_them():
    profile = replace(load_profile("h100-sxm/llama-3.1-70b/vllm-tp4-bf16"), tp=1)
    with pytest.raises(ProfileError, match="more GPUs"):
        profile.total_kv_blocks(1.0)


def test_an_unknown_name_gets_suggestions(tmp_path):
    with pytest.raises(ProfileError, match=f"Did you mean .*{H100_8B}"):
        load_profile("h100-sxm/llama-3.1-8b/vllm-tp1")
    with pytest.raises(ProfileError, match=f"There are: .*{H100_8B}"):
        load_profile("?")
    with pytest.raises(ProfileError, match=r"without profile\.toml"):
        load_profile(tmp_path)
    assert len(check_profile("?")) == 1


def test_a_folder_is_as_good_as_a_name(folder):
    assert load_profile(folder).name == load_profile(str(folder)).name == H100_8B


def spoil_toml(pattern: str, replacement: str):
    def spoil(folder: Path) -> None:
        path = folder / "profile.toml"
        text, count = re.subn(pattern, replacement, path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert count == 1
        path.write_text(text, encoding="utf-8")

    return spoil


def spoil_line(file: str, line: int, text: str):
    def spoil(folder: Path) -> None:
        lines = (folder / file).read_text(encoding="utf-8").splitlines()
        lines[line - 1 : line] = [text] if text else []
        (folder / file).write_text("\n".join(lines) + "\n", encoding="utf-8")

    return spoil


CORRUPT = [
    pytest.param(spoil_toml("^tp = 1$", ""), "tp is missing; allowed is a whole number of at least 1", id="no tp"),
    pytest.param(spoil_toml("^tp = 1$", "tp = true"), "tp = True; allowed is a whole number", id="tp is a flag"),
    pytest.param(spoil_toml('^dtype = "bf16"$', 'dtype = "int3"'), "dtype = 'int3'; allowed is 'bf16'", id="dtype"),
    pytest.param(
        spoil_toml("^tp = 1$", 'tp = 1\nkv_cache_dtype = "int4"'),
        "kv_cache_dtype = 'int4'; allowed is 'bf16' or 'fp8'",
        id="KV cache dtype",
    ),
    pytest.param(spoil_toml('^licence = ".*"$', 'licence = " "'), "[source]: licence = ' '; allowed is", id="licence"),
    pytest.param(spoil_toml("^jitter_cv = .*$", "jitter_cv = nan"), "jitter_cv = nan; allowed is", id="jitter nan"),
    pytest.param(spoil_toml("^jitter_cv", "jitter_vc"), "jitter_cv is missing", id="misspelt key, missing"),
    pytest.param(spoil_toml("^num_layers", "layers = 3\nnum_layers"), "unknown key layers", id="unknown key"),
    pytest.param(spoil_toml("^memory_bytes = .*$", "memory_bytes = -1"), "memory_bytes = -1; allowed", id="memory"),
    pytest.param(spoil_toml(r"^\[model_shape\]$", "[shape]"), "[model_shape]: the section is missing", id="section"),
    pytest.param(
        spoil_toml(r"^\[model_shape\]$", "[kv_cache]\nmeasured_kv_blocks = 5\n[model_shape]"),
        "both keys go together",
        id="half of a block count",
    ),
    pytest.param(
        spoil_toml("^vocab_size = .*$", "vocab_size = 128256\nnum_experts = 8"),
        "num_experts, num_experts_per_tok and num_expert_params go together, or none; found num_experts",
        id="half of the experts",
    ),
    pytest.param(
        spoil_toml(
            "^vocab_size = .*$",
            "vocab_size = 128256\nnum_experts = 8\nnum_experts_per_tok = 9\nnum_expert_params = 1000",
        ),
        "num_experts_per_tok = 9; allowed is up to num_experts, 8",
        id="too many experts for a token",
    ),
    pytest.param(
        spoil_toml(
            "^vocab_size = .*$",
            "vocab_size = 128256\nnum_experts = 8\nnum_experts_per_tok = 2\nnum_expert_params = 9000000000",
        ),
        "num_expert_params = 9000000000; allowed is less than num_params",
        id="more in the experts than in the model",
    ),
    pytest.param(
        spoil_toml(r"^\[expected_error\]$", "[expected_error]\nluck = 0.5"), "unknown key luck", id="unknown error"
    ),
    pytest.param(spoil_line("linear.csv", 3, "300000,4"), "allowed is a whole number, 0 to 262,144", id="too far"),
    pytest.param(spoil_toml("^gpu = .*$", "gpu = "), "cannot be read as TOML", id="not TOML"),
    pytest.param(lambda folder: (folder / "head.csv").unlink(), "head.csv: the file is missing", id="no table"),
    pytest.param(
        spoil_line("linear.csv", 1, "tokens,s"),
        "line 1: found the header 'tokens,s'; allowed is 'tokens,ms'",
        id="header",
    ),
    pytest.param(spoil_line("linear.csv", 3, "2,fast"), "line 3, column ms: found 'fast'; allowed", id="not a number"),
    pytest.param(spoil_line("linear.csv", 3, "2,nan"), "line 3, column ms: found 'nan'; allowed", id="nan"),
    pytest.param(spoil_line("linear.csv", 3, "2,-1.5"), "line 3, column ms: found '-1.5'; allowed", id="negative"),
    pytest.param(
        spoil_line("linear.csv", 3, "1.5,4"), "line 3, column tokens: found '1.5'; allowed", id="half a token"
    ),
    pytest.param(spoil_line("linear.csv", 3, "2"), "line 3: found 1 cells; needed are 2", id="short row"),
    pytest.param(spoil_line("linear.csv", 3, "1,4"), "line 3: the same point as line 2", id="twice"),
    pytest.param(
        lambda folder: (folder / "head.csv").write_text("sequences,ms\n1,2\n"),
        "found 1 measured points",
        id="one point",
    ),
    pytest.param(lambda folder: (folder / "head.csv").write_text(""), "line 1: found the header 'nothing'", id="empty"),
]


@pytest.mark.parametrize(("spoil", "message"), CORRUPT)
def test_a_corrupt_profile_is_one_clear_line(folder, spoil, message):
    """The file is named, and what was found and what is allowed."""
    spoil(folder)
    with pytest.raises(ProfileError) as caught:
        load_profile(folder)
    assert message in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert any(message in problem for problem in check_profile(folder))


def test_all_problems_are_listed_at_once(folder):
    spoil_line("linear.csv", 3, "2,nan")(folder)
    spoil_line("head.csv", 3, "2,nan")(folder)
    assert len(check_profile(folder)) == 2
    with pytest.raises(ProfileError, match="and 1 more"):
        load_profile(folder)
