"""
A profile: one model on one GPU type under one engine, as measured.

    load_profile("h100-sxm/llama-3.1-8b/vllm-tp1-bf16")   one of `list_profiles()`
    load_profile("my/folder")                             a folder that holds profile.toml
    check_profile("my/folder")                            all that is wrong with it

A profile is a folder: `profile.toml` says what was measured, how and by whom;
CSV tables hold the measured points. There are two kinds, by what was measured:

    tables = "kernels"   parts of a pass; the engine's own time is added from `overhead_*`
    tables = "steps"     whole passes of a running engine; the overhead is in them

How a time comes out of the tables: `timing`. How the shipped ones were made: profiles/README.md.
"""

from __future__ import annotations

import difflib
import math
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mock_engine.engine_defaults import default_kv_cache_dtype
from mock_engine.errors import ProfileError
from mock_engine.latency_table import LatencyTable, read_table
from mock_engine.roofline import KV_CACHE_BYTES, GpuDatasheet, ModelShape, Roofline

# Of one weight. "fp8" has one scale for each matrix, "fp8_block" one for each block of 128 x 128, as Qwen3's FP8
# checkpoints do; scales add nothing to speak of.
WEIGHT_BYTES = {"bf16": 2, "fp16": 2, "fp8": 1, "fp8_block": 1}

TABLE_COLUMNS: dict[str, dict[str, tuple[str, ...]]] = {
    "kernels": {
        "linear": ("tokens",),
        "head": ("sequences",),
        "prefill_attention": ("new_tokens", "past_tokens"),
        "decode_attention": ("batch_size", "context_tokens_per_sequence"),
        "communication": ("tokens",),  # only where tp > 1
    },
    "steps": {
        "prefill": ("new_tokens",),
        "decode": ("batch_size", "context_tokens_per_sequence"),
    },
}

# What vLLM takes besides weights and KV blocks: activations, CUDA graphs, NCCL. This one number brings the
# blocks that ten runs of vLLM on H100 reported within 1.5 % (tests/test_profile.py has the figures).
RESERVED_BYTES = 1.24e9


def _find_profiles_dir() -> Path:
    package = Path(__file__).resolve().parent
    installed = package / "profiles"
    return installed if installed.is_dir() else package.parent / "profiles"


PROFILES_DIR = _find_profiles_dir()


@dataclass(frozen=True, slots=True)
class Profile:
    """All of a profile folder, checked. `block_size` to `max_num_batched_tokens` are the engine's own defaults."""

    gpu: str
    model: str
    engine: str
    engine_version: str
    tp: int
    dtype: str
    kv_cache_dtype: str  # "bf16" (any 16 bit type) where profile.toml does not say
    tables: str  # "kernels" or "steps"
    is_measured: bool

    how_measured: str
    source: str
    source_version: str
    licence: str
    build_command: str

    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    async_scheduling: bool  # whether who is in a step is decided when the one before it begins

    overhead_step_s: float  # engine time added to each pass; 0 where whole passes were measured
    overhead_per_seq_s: float  # and for each sequence in it
    overhead_request_s: float  # before a request is queued: HTTP, handing over between processes
    overhead_per_prompt_token_s: float  # and for each token of its prompt: tokenization
    overhead_source: str
    jitter_cv: float  # standard deviation / mean of one and the same pass, repeated
    jitter_source: str

    measured_kv_blocks: int | None  # KV blocks the engine itself reported...
    measured_gpu_memory_utilization: float | None  # ...at this setting

    shape: ModelShape
    datasheet: GpuDatasheet
    latency: dict[str, LatencyTable]  # by table name, see TABLE_COLUMNS
    expected_error: dict[str, float]  # by table name: median share of a pass that a point left out is missed by

    @property
    def name(self) -> str:
        """`<gpu>/<model>/<engine>-tp<N>-<dtype>`, and `-kv-<dtype>` if the KV cache is not the engine's usual one."""
        is_usual = self.kv_cache_dtype == default_kv_cache_dtype(self.engine, self.dtype)
        kv_cache = "" if is_usual else f"-kv-{self.kv_cache_dtype}"
        return f"{self.gpu}/{self.model}/{self.engine}-tp{self.tp}-{self.dtype}{kv_cache}"

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token over all layers and all GPUs."""
        return self.shape.kv_bytes_per_token(self.kv_cache_dtype)

    @property
    def weights_bytes(self) -> float:
        """All weights, over all GPUs."""
        return self.shape.num_params * WEIGHT_BYTES[self.dtype]

    def overhead_before_queue_s(self, isl_tokens: int) -> float:
        """From when a client sends a request until the engine's scheduler sees it."""
        return self.overhead_request_s + self.overhead_per_prompt_token_s * isl_tokens

    @property
    def roofline(self) -> Roofline:
        """Data-sheet times for this model on these GPUs."""
        return Roofline(self.shape, self.datasheet, self.tp, WEIGHT_BYTES[self.dtype], self.kv_cache_dtype)

    def used_bytes(self, num_blocks: int, block_size: int) -> float:
        """What an engine with so many KV blocks takes of each GPU's memory: weights, blocks, and 1.24 GB besides."""
        weights_bytes = self.shape.num_params * WEIGHT_BYTES[self.dtype] / self.tp
        kv_bytes = num_blocks * block_size * self.shape.kv_bytes_per_token_on_each(self.tp, self.kv_cache_dtype)
        return weights_bytes + kv_bytes + RESERVED_BYTES

    def total_kv_blocks(self, gpu_memory_utilization: float = 0.9) -> int:
        """
        KV blocks of `block_size` tokens: what the engine reported at this utilization, else
        utilization * memory - weights / TP - 1.24 GB, shared out. Raises `ProfileError` if the model does not fit.
        """
        if self.measured_kv_blocks is not None and gpu_memory_utilization == self.measured_gpu_memory_utilization:
            return self.measured_kv_blocks
        weights_bytes = self.weights_bytes / self.tp
        usable_bytes = gpu_memory_utilization * self.datasheet.memory_bytes
        block_bytes = self.block_size * self.shape.kv_bytes_per_token_on_each(self.tp, self.kv_cache_dtype)
        num_blocks = math.floor((usable_bytes - weights_bytes - RESERVED_BYTES) / block_bytes)
        if num_blocks < 1:
            needed = (weights_bytes + RESERVED_BYTES + block_bytes) / self.datasheet.memory_bytes
            advice = (
                f"Use --gpu-memory-utilization {math.ceil(needed * 100) / 100:.2f} or more."
                if needed <= 1
                else "Use a profile with more GPUs (tp) or a smaller model."
            )
            raise ProfileError(
                f"{self.name} needs {(weights_bytes + RESERVED_BYTES) / 1e9:.1f} GB on each GPU before the first "
                f"KV block, but --gpu-memory-utilization {gpu_memory_utilization} allows {usable_bytes / 1e9:.1f} GB. "
                f"{advice}"
            )
        return num_blocks


def as_name(text: str) -> str:
    """`text` as a part of a profile's name: lower case, dashes for what is no letter, digit or dot."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")


def list_profiles() -> list[str]:
    """Names of the profiles that come with the package, sorted."""
    return sorted(path.parent.relative_to(PROFILES_DIR).as_posix() for path in PROFILES_DIR.glob("*/*/*/profile.toml"))


def load_profile(name_or_path: str | Path) -> Profile:
    """The profile of that name, or in that folder. Raises `ProfileError` if there is none or it is corrupt."""
    profile, problems = _read_profile(find_folder(name_or_path))
    if profile is None:
        more = len(problems) - 1
        raise ProfileError(problems[0] + (f" (and {more} more: mock-engine profiles check)" if more else ""))
    return profile


def check_profile(path: str | Path) -> list[str]:
    """All problems of a profile (a name or a folder), one line each; none when it is fine."""
    try:
        folder = find_folder(path)
    except ProfileError as error:
        return [str(error)]
    return _read_profile(folder)[1]


def find_folder(name_or_path: str | Path) -> Path:
    """The folder of the profile of that name, or that folder. Raises `ProfileError` if it holds none."""
    folder = Path(name_or_path)
    shipped = PROFILES_DIR / folder
    if len(folder.parts) == 3 and (shipped / "profile.toml").is_file():
        return shipped
    if (folder / "profile.toml").is_file():
        return folder
    if folder.is_dir():
        raise ProfileError(f"{folder} is a folder without profile.toml. Use a folder that has one, or a shipped name.")
    names = list_profiles()
    close = difflib.get_close_matches(str(name_or_path), names, n=3, cutoff=0.4)
    shown = f"Did you mean {' or '.join(close)}?" if close else f"There are: {', '.join(names) or 'none'}."
    raise ProfileError(f"no profile {str(name_or_path)!r}, neither shipped nor a folder. {shown}")


_Check = tuple[Callable[[Any], bool], str]

_TEXT: _Check = (lambda v: isinstance(v, str) and bool(v.strip()), "a text")
_COUNT: _Check = (lambda v: type(v) is int and v >= 1, "a whole number of at least 1")
_FLAG: _Check = (lambda v: isinstance(v, bool), "true or false")
_POSITIVE: _Check = (lambda v: type(v) in (int, float) and math.isfinite(v) and v > 0, "a number above 0")
_NOT_NEGATIVE: _Check = (lambda v: type(v) in (int, float) and math.isfinite(v) and v >= 0, "a number, 0 or more")
_SHARE: _Check = (lambda v: type(v) in (int, float) and 0 < v <= 1, "a number above 0, at most 1")


def _one_of(values: list[str]) -> _Check:
    return (lambda v: v in values, " or ".join(repr(value) for value in values))


# profile.toml, section by section ("" is the top); a key that ends in "?" may be absent.
_KEYS: dict[str, dict[str, _Check]] = {
    "": {
        **dict.fromkeys(("gpu", "model", "engine", "engine_version"), _TEXT),
        "tp": _COUNT,
        "dtype": _one_of(list(WEIGHT_BYTES)),
        "kv_cache_dtype?": _one_of(list(KV_CACHE_BYTES)),
        "tables": _one_of(list(TABLE_COLUMNS)),
        "is_measured": _FLAG,
    },
    "source": dict.fromkeys(("how_measured", "source", "source_version", "licence", "build_command"), _TEXT),
    "engine_defaults": {
        **dict.fromkeys(("block_size", "max_model_len", "max_num_seqs", "max_num_batched_tokens"), _COUNT),
        "async_scheduling?": _FLAG,
    },
    "timing": {
        **dict.fromkeys(("overhead_step_s", "overhead_per_seq_s", "jitter_cv"), _NOT_NEGATIVE),
        **dict.fromkeys(("overhead_request_s?", "overhead_per_prompt_token_s?"), _NOT_NEGATIVE),
        **dict.fromkeys(("overhead_source", "jitter_source"), _TEXT),
    },
    "kv_cache": {"measured_kv_blocks?": _COUNT, "measured_gpu_memory_utilization?": _SHARE},
    "expected_error": {f"{table}?": _NOT_NEGATIVE for columns in TABLE_COLUMNS.values() for table in columns},
    "model_shape": {
        **dict.fromkeys(("num_params", "num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim"), _COUNT),
        "vocab_size": _COUNT,
        "tie_word_embeddings?": _FLAG,
        **dict.fromkeys(("num_experts?", "num_experts_per_tok?", "num_expert_params?"), _COUNT),
    },
    "gpu_datasheet": dict.fromkeys(GpuDatasheet.__dataclass_fields__, _POSITIVE),
}


def _read_profile(folder: Path) -> tuple[Profile | None, list[str]]:
    """The profile, or None and what is wrong with it."""
    path = folder / "profile.toml"
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        return None, [f"{path}: cannot be read as TOML: {error}"]
    problems = _document_problems(path, document)
    if problems:
        return None, problems
    latency: dict[str, LatencyTable] = {}
    for table, columns in TABLE_COLUMNS[document["tables"]].items():
        if table == "communication" and document["tp"] == 1:
            continue
        try:
            latency[table] = read_table(folder / f"{table}.csv", columns)
        except ProfileError as error:
            problems.append(str(error))
    if problems:
        return None, problems
    document.setdefault("kv_cache_dtype", "bf16")
    top = {key.rstrip("?"): document[key.rstrip("?")] for key in _KEYS[""]}
    kv_cache = {key.rstrip("?"): document["kv_cache"].get(key.rstrip("?")) for key in _KEYS["kv_cache"]}
    return Profile(
        **top,
        **document["source"],
        **{"async_scheduling": False, **document["engine_defaults"]},
        **{"overhead_request_s": 0.0, "overhead_per_prompt_token_s": 0.0, **document["timing"]},
        **kv_cache,
        shape=ModelShape(**document["model_shape"]),
        datasheet=GpuDatasheet(**document["gpu_datasheet"]),
        latency=latency,
        expected_error=document["expected_error"],
    ), []


def to_document(profile: Profile) -> dict[str, Any]:
    """What `profile.toml` of this profile holds, as nested dictionaries; what is absent or as usual is left out."""
    of_section: dict[str, Profile | ModelShape | GpuDatasheet] = {
        "model_shape": profile.shape,
        "gpu_datasheet": profile.datasheet,
    }
    document: dict[str, Any] = {}
    for section, checks in _KEYS.items():
        if section == "expected_error":
            values = dict(profile.expected_error)
        else:
            holder = of_section.get(section, profile)
            fields = holder.__dataclass_fields__
            values = {
                name: getattr(holder, name)
                for name in (key.rstrip("?") for key in checks)
                if f"{name}?" not in checks or getattr(holder, name) not in (None, fields[name].default)
            }
        document |= {section: values} if section else values
    return {key: value for key, value in document.items() if value != {}}


def _document_problems(path: Path, document: dict[str, Any]) -> list[str]:
    problems: list[str] = []
    unknown: list[str] = []
    for section in ("kv_cache", "expected_error"):
        document.setdefault(section, {})
    for section, checks in _KEYS.items():
        where = f"{path}, [{section}]" if section else f"{path}"
        values = document.get(section) if section else {k: v for k, v in document.items() if k not in _KEYS}
        if not isinstance(values, dict):
            problems.append(f"{where}: the section is missing; it needs {', '.join(checks)}")
            continue
        for key, (is_allowed, allowed) in checks.items():
            if key.rstrip("?") not in values:
                if not key.endswith("?"):
                    problems.append(f"{where}: {key} is missing; allowed is {allowed}")
            elif not is_allowed(values[key.rstrip("?")]):
                problems.append(f"{where}: {key.rstrip('?')} = {values[key.rstrip('?')]!r}; allowed is {allowed}")
        known = [key.rstrip("?") for key in checks]
        unknown += [f"{where}: unknown key {key}; known are {', '.join(known)}" for key in values if key not in known]
    problems += unknown
    if not problems and len(document["kv_cache"]) == 1:
        problems.append(
            f"{path}, [kv_cache]: both keys go together, or neither; found {next(iter(document['kv_cache']))}"
        )
    experts = [key for key in document.get("model_shape", {}) if "expert" in key]
    if not problems and experts:
        problems += _expert_problems(f"{path}, [model_shape]", document["model_shape"], experts)
    return problems


def _expert_problems(where: str, shape: dict[str, int], found: list[str]) -> list[str]:
    """What is wrong with a mixture of experts whose numbers are all counts."""
    if len(found) < 3:
        return [
            f"{where}: num_experts, num_experts_per_tok and num_expert_params go together, or none; "
            f"found {', '.join(found)}"
        ]
    if shape["num_experts_per_tok"] > shape["num_experts"]:
        return [
            f"{where}: num_experts_per_tok = {shape['num_experts_per_tok']}; "
            f"allowed is up to num_experts, {shape['num_experts']}"
        ]
    if shape["num_expert_params"] >= shape["num_params"]:
        return [
            f"{where}: num_expert_params = {shape['num_expert_params']}; "
            f"allowed is less than num_params, {shape['num_params']}"
        ]
    return []
