"""Faults as they are written down, and when they are there. No clock, no engine."""

from __future__ import annotations

from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mock_engine.errors import ConfigError
from mock_engine.fault_injector import FaultInjector
from mock_engine.faults import ERROR_TYPES, KINDS, KV_EVENTS, Fault, make_fault, of_worker, parse_fault, read_faults

_VALUES: dict[str, st.SearchStrategy[object]] = {
    "at": st.floats(0, 1e6),
    "for": st.floats(0.001, 100),
    "every": st.floats(100, 1000),
    "rate": st.floats(0.001, 1),
    "times": st.integers(1, 9),
    "after_requests": st.integers(0, 99),
    "after_tokens": st.integers(0, 99),
    "rank": st.integers(0, 3),
    "worker": st.integers(0, 3),
    "share": st.floats(0.001, 1),
    "blocks": st.integers(1, 99),
    "seconds": st.floats(0.001, 1000),
    "factor": st.floats(0.001, 1000),
    "message": st.text("abc d:=", min_size=1).map(str.strip).filter(bool),
    "type": st.sampled_from(ERROR_TYPES),
    "tokens": st.integers(0, 99),
    "event": st.sampled_from(KV_EVENTS),
}
_NEEDED = {"kv": {"share": 0.5}, "die": {"at": 1.0}}


@st.composite
def faults(draw: st.DrawFn, kinds: tuple[str, ...] = tuple(KINDS)) -> Fault:
    kind = draw(st.sampled_from(kinds))
    names = draw(st.sets(st.sampled_from(KINDS[kind].keys)))
    given_ = {"kind": kind, **_NEEDED.get(kind, {}), **{name: draw(_VALUES[name]) for name in sorted(names)}}
    if "blocks" in names:
        given_.pop("share", None)
    if kind == "die" and not given_["at"]:
        given_["rate"] = 0.5
    return make_fault(given_)


@given(faults())
def test_a_fault_is_the_same_after_it_was_written_as_a_flag_as_json_or_as_toml(tmp_path_factory, fault):
    assert parse_fault(fault.to_text()) == fault
    assert make_fault(fault.to_mapping()) == fault
    path = tmp_path_factory.mktemp("faults") / "faults.toml"
    rows = (f"{name} = {value!r}" for name, value in fault.to_mapping().items())
    path.write_text("\n".join(["[[fault]]", *rows]), encoding="utf-8")
    assert read_faults(path) == [fault]


def test_every_kind_says_which_keys_it_has_and_has_all_of_them():
    for kind, fault_type in KINDS.items():
        assert fault_type.kind == kind
        own = {field.name for field in fields(fault_type)} - {field.name for field in fields(Fault)}
        assert own <= set(fault_type.keys), kind
        assert fault_type.__doc__, kind


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there is no fault ''; there are kv, stall"),
        ("flood", "there is no fault 'flood'; there are kv, stall"),
        ("stall:secs=1", "fault 'stall' has no 'secs'; it has seconds"),
        ("stall:1", "'1' is no key=value"),
        ("stall:at=1,at=2", "says 'at' twice"),
        ("stall:seconds=soon", "fault 'stall': seconds is 'soon'; it must be a number, above 0"),
        ("stall:seconds=nan", "seconds is 'nan'"),
        ("stall:at=-1", "at is '-1'; it must be a number, at least 0"),
        ("error:times=1.5", "times is '1.5'; it must be a whole number, at least 1"),
        ("error:rate=2", "rate is '2'; it must be a number, above 0 and at most 1"),
        ("error:type=OSError", "type is 'OSError'; allowed is one of Unknown, InvalidArgument"),
        ("kv", "needs one of share=SHARE and blocks=NUMBER"),
        ("kv:share=0.5,blocks=3", "needs one of"),
        ("die", "when is it to happen?"),
        ("kv:share=1,for=3,every=2", "for=3 is longer than every=2"),
        ("slow-start:at=3", "fault 'slow-start' has no 'at'"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_is_allowed(text, message):
    with pytest.raises(ConfigError) as error:
        parse_fault(text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [True, None, [1], {}])
def test_json_of_another_type_is_a_mistake(value):
    with pytest.raises(ConfigError, match="seconds is"):
        make_fault({"kind": "stall", "seconds": value})
    with pytest.raises(ConfigError, match="there is no fault"):
        make_fault({"kind": value})


@pytest.mark.parametrize(
    "text", ["fault = 3", "[fault]\nkind='kv'", "[[faults]]\nkind='kv'", "", "[[fault]]\nkind='x'", "?"]
)
def test_a_file_that_is_not_one_of_faults_is_named(tmp_path, text):
    path = tmp_path / "mine.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"mine\.toml"):
        read_faults(path)
    with pytest.raises(ConfigError, match=r"none\.toml"):
        read_faults(tmp_path / "none.toml")


def test_each_worker_of_several_gets_its_own_faults_and_those_of_all():
    all_of_them = [parse_fault(text) for text in ("slow", "stall:worker=1", "slow:factor=3,worker=0")]
    assert [fault.to_text() for fault in of_worker(all_of_them, 0)] == ["slow", "slow:factor=3.0"]
    assert [fault.to_text() for fault in of_worker(all_of_them, 1)] == ["slow", "stall"]


@given(at_s=st.integers(0, 50), for_s=st.integers(1, 20) | st.none(), every_s=st.integers(20, 40) | st.none())
def test_a_window_is_there_from_at_for_so_long_and_again_every(at_s, for_s, every_s):
    given_ = {"at": at_s, "for": for_s, "every": every_s}
    fault = make_fault({"kind": "slow", **{name: value for name, value in given_.items() if value is not None}})
    for quarter in range(4 * 200):
        now_s = quarter / 4
        starts = [at_s] if every_s is None else list(range(at_s, 200, every_s))
        expected = [
            number for number, start in enumerate(starts) if start <= now_s and (for_s is None or now_s < start + for_s)
        ]
        assert fault.window(now_s) == (expected[-1] if expected else None)


def injector(*texts: str, seed: int = 0, die=lambda _: None) -> FaultInjector:
    return FaultInjector([parse_fault(text) for text in texts], seed, die)


def test_a_stall_hits_the_first_step_of_each_window_and_no_other():
    faults = injector("stall:seconds=3,at=1,every=10")
    hit = [now_s for now_s in range(40) if faults.step_s(0.5, now_s) == 3.5]
    assert hit == [1, 11, 21, 31]


def test_a_stall_with_a_length_hits_every_step_in_it_and_with_a_rate_a_share_of_them():
    faults = injector("stall:seconds=3,at=2,for=3")
    assert [faults.step_s(0.5, now_s) for now_s in range(7)] == [0.5, 0.5, 3.5, 3.5, 3.5, 0.5, 0.5]
    faults = injector("stall:seconds=3,rate=0.25")
    num_hit = sum(faults.step_s(0.5, 0.0) > 1 for _ in range(4000))
    assert 900 < num_hit < 1100


def test_slowness_is_a_factor_and_of_one_rank_only_where_it_says_so():
    faults = injector("slow:factor=4,rank=1", "slow:factor=2,for=10")
    assert [faults.step_s(0.5, 0.0, rank) for rank in (0, 1)] == [1.0, 4.0]
    assert [faults.step_s(0.5, 10.0, rank) for rank in (0, 1)] == [0.5, 2.0]


@given(seed=st.integers(0, 2**31), rate=st.floats(0.05, 0.95))
def test_who_is_hit_depends_on_the_seed_and_the_count_and_not_on_the_time(seed, rate):
    def hits(step_s: float, seed: int) -> list[bool]:
        faults = injector(f"error:rate={rate}", seed=seed)
        return [faults.admit(step_s * number) is not None for number in range(200)]

    assert hits(0.0, seed) == hits(7.3, seed)
    assert hits(0.0, seed) != hits(0.0, seed + 1)


def test_a_rate_is_a_share_of_the_requests():
    faults = injector("error:rate=0.02", "hang:rate=0.1")
    given_ = [faults.admit(0.0) for _ in range(10_000)]
    assert sum(each is not None and each.error is not None for each in given_) == pytest.approx(200, abs=45)
    assert sum(each is not None and each.hang is not None for each in given_) == pytest.approx(1000, abs=100)


def test_times_limits_the_hits_and_after_requests_begins_late():
    faults = injector("error:times=2,after_requests=3")
    assert [faults.admit(0.0) is not None for _ in range(8)] == [False, False, False, True, True, False, False, False]


def test_seconds_count_from_when_so_many_tokens_have_come_out():
    faults = injector("slow:after_tokens=10,at=5,for=1")
    faults.count_tokens(9, 100.0)
    assert faults.step_s(1.0, 106.0) == 1.0
    faults.count_tokens(1, 107.0)
    assert [faults.step_s(1.0, now_s) for now_s in (107.0, 111.9, 112.0, 112.9, 113.0)] == [1, 1, 2, 2, 1]


def test_a_delay_an_error_and_a_hang_can_meet_in_one_request():
    faults = injector("slow-ttft:seconds=2", "slow-ttft:seconds=3", "error:tokens=7", "hang:tokens=4")
    fault = faults.admit(0.0)
    assert fault.delay_s == 5
    assert fault.breaks
    assert fault.num_whole_tokens == 4


@pytest.mark.parametrize(
    ("text", "act"),
    [
        ("die:at=5", lambda faults: faults.tick(5.0)),
        ("die:after_tokens=20", lambda faults: faults.count_tokens(20, 1.0)),
        ("die:after_requests=1", lambda faults: (faults.admit(1.0), faults.tick(1.0))),
        ("die:rate=1", lambda faults: faults.admit(0.0)),
    ],
)
def test_death_comes_when_it_was_asked_for_and_once(text, act):
    deaths = []
    faults = injector(text, die=deaths.append)
    faults.tick(4.0)
    faults.count_tokens(19, 4.0)
    assert not deaths
    act(faults)
    act(faults)
    assert deaths == [parse_fault(text).to_text()]


def test_a_share_of_kv_events_is_lost_of_the_kind_that_is_named():
    faults = injector("kv-events:event=removed,rate=0.5")
    kept = {event: sum(faults.keeps_kv_event(event, 0.0) for _ in range(2000)) for event in ("stored", "removed")}
    assert kept["stored"] == 2000
    assert 900 < kept["removed"] < 1100


def test_kv_blocks_of_several_faults_add_up_to_all_there_are():
    faults = injector("kv:share=0.5", "kv:blocks=30,at=1", "kv:share=0.4,at=2")
    assert [faults.num_held_blocks(100, now_s) for now_s in (0.0, 1.0, 2.0)] == [50, 80, 100]


def test_what_is_set_while_an_engine_runs_begins_then():
    faults = injector("slow:factor=3")
    faults.set([parse_fault("slow:at=1"), parse_fault("error:after_requests=1")], now_s=100.0)
    assert [faults.step_s(1.0, now_s) for now_s in (100.0, 101.0)] == [1.0, 2.0]
    assert [faults.admit(101.0) is not None for _ in range(2)] == [False, True]
    described = faults.describe(101.0)
    assert [(each["kind"], each["is_on"], each["num_hits"]) for each in described] == [
        ("slow", True, 0),
        ("error", True, 1),
    ]
    faults.clear("slow")
    assert [fault.kind for fault in faults.faults] == ["error"]
    faults.set([], 102.0)
    assert faults.is_empty
    assert faults.admit(103.0) is None


def test_starting_and_cleaning_up_have_delays_that_add_up_and_a_failure_has_a_message():
    faults = injector(
        "slow-start:seconds=3", "slow-start:seconds=4", "slow-cleanup:seconds=2", "failed-start:message=no luck"
    )
    assert (faults.start_delay_s, faults.cleanup_delay_s, faults.start_failure) == (7, 2, "no luck")
    assert injector().start_failure is None
