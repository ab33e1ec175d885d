"""LoRA adapters: who pays for loading, who makes room, and what requests may name."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mock_engine.errors import ConfigError, RequestError
from mock_engine.lora import DEFAULT_LOAD_S, Adapters, parse_lora_modules
from mock_engine.request import hash_blocks
from tests.helpers.content import make_planner


def test_the_first_request_pays_and_those_after_it_do_not():
    adapters = Adapters({"a": 2.0}, max_loras=1)
    assert adapters.wait_s("a", 10.0, []) == 2.0
    assert adapters.wait_s("a", 11.5, []) == 0.5  # comes while it is loaded
    assert adapters.wait_s("a", 12.0, []) == 0.0
    assert adapters.wait_s("a", 100.0, []) == 0.0


def test_the_one_used_least_recently_makes_room():
    adapters = Adapters(dict.fromkeys("abc", 1.0), max_loras=2)
    for now_s, name in enumerate("abab"):
        adapters.wait_s(name, 10.0 * now_s, [])
    adapters.wait_s("a", 50.0, [])
    assert adapters.wait_s("c", 60.0, []) == 1.0  # in place of b
    assert adapters.wait_s("a", 70.0, []) == 0.0
    assert adapters.wait_s("b", 80.0, []) == 1.0  # in place of c


def test_one_that_is_in_use_or_being_loaded_makes_no_room():
    adapters = Adapters({"a": 1.0, "b": 1.0}, max_loras=1)
    adapters.wait_s("a", 0.0, [])
    assert adapters.wait_s("b", 0.5, []) is None
    assert adapters.wait_s("b", 5.0, ["a"]) is None
    assert adapters.wait_s("b", 5.0, []) == 1.0


@given(
    names=st.lists(st.sampled_from("abcd"), max_size=40),
    gaps=st.lists(st.floats(0, 3), min_size=40, max_size=40),
    max_loras=st.integers(1, 4),
)
@settings(max_examples=100)
def test_no_more_than_max_loras_are_ever_loaded(names, gaps, max_loras):
    adapters = Adapters(dict.fromkeys("abcd", 1.0), max_loras)
    now_s = 0.0
    for name, gap_s in zip(names, gaps, strict=False):
        now_s += gap_s
        wait_s = adapters.wait_s(name, now_s, [])
        assert wait_s is None or 0 <= wait_s <= 1 + 1e-9
        assert len(adapters._ready_s) <= max_loras
        assert (name in adapters._ready_s) == (wait_s is not None)


def test_a_request_names_its_adapter_in_two_ways():
    adapters = Adapters({"ada": 1.0}, 1)
    assert adapters.name_in({"model": "ada", "routing": {"lora_name": "ada"}}) == "ada"
    assert adapters.name_in({"model": "ada"}) == "ada"
    assert adapters.name_in({"model": "", "routing": None}) is None
    assert adapters.name_in({}) is None
    with pytest.raises(RequestError, match="there is no adapter 'bob'; those of this engine are: ada"):
        adapters.name_in({"routing": {"lora_name": "bob"}})


def test_modules_are_names_with_or_without_seconds():
    assert parse_lora_modules(["ada", "bob=2.5", "c=0"]) == {"ada": DEFAULT_LOAD_S, "bob": 2.5, "c": 0.0}


@pytest.mark.parametrize("modules", [["=1"], ["a=x"], ["a=-1"], ["a=inf"], ["a", "a=2"], [""]])
def test_wrong_modules_are_said_in_one_line(modules):
    with pytest.raises(ConfigError, match="--lora-modules has"):
        parse_lora_modules(modules)


def test_kv_blocks_are_shared_by_one_adapter_and_one_salt_only():
    planner = make_planner()

    def hashes(**routing):
        return planner.plan(
            "r", {"token_ids": list(range(64)), "stop_conditions": {"max_tokens": 1}, "routing": routing}
        )[0].request.block_hashes

    plain, ada, salted = hashes(), hashes(lora_name="ada"), hashes(cache_salt="x")
    assert plain == hash_blocks(range(64), 16)
    assert ada == hashes(lora_name="ada")
    assert len({*plain, *ada, *salted, *hashes(lora_name="x")}) == 16
