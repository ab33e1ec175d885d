"""The file of known deviations: what is written is read back, and what is wrong is said in one line."""

from __future__ import annotations

import itertools
import tomllib

import hypothesis
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conformance.deviations import (
    DRIVERS,
    ROLES,
    Deviation,
    format_deviation,
    judge,
    parse_example,
    read_deviations,
)

QUICK = settings(max_examples=100)
IDS = frozenset({"gen.empty_prompt", "gen.usage_arith", "cancel.mid", "start.model"})
EXAMPLES = st.none() | st.tuples(
    st.from_regex(r"\A[0-9]{1,3}\.[0-9]{1,3}\.[0-9]{1,3}\Z"), st.from_regex(r"\A[A-Za-z0-9+/]{1,40}={0,2}\Z")
)
REASONS = st.text().filter(str.strip)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("deviations") / "deviations.toml"


@given(entries=st.dictionaries(st.sampled_from(sorted(IDS)), st.tuples(REASONS, EXAMPLES)))
@QUICK
def test_what_is_written_is_read_back_in_order(entries, path):
    text = "\n".join(format_deviation(rule_id, *entry) for rule_id, entry in entries.items())
    path.write_text(text, encoding="utf-8")
    expected = {rule_id: Deviation(rule_id, *entry) for rule_id, entry in entries.items()}
    assert list(read_deviations(path, IDS).items()) == list(expected.items())


@given(rule_id=st.text(min_size=1), reason=REASONS, example=EXAMPLES)
@QUICK
def test_any_id_and_reason_are_toml_of_one_line_a_key(rule_id, reason, example):
    text = format_deviation(rule_id, reason, example)
    assert list(tomllib.loads(text)) == [rule_id]
    assert len(text.splitlines()) == 2 + (example is not None)


def test_half_a_surrogate_pair_does_not_keep_the_file_from_being_written(path):
    path.write_text(format_deviation("cancel.mid", "bad byte \udc80 in the name"), encoding="utf-8")
    assert read_deviations(path, IDS)["cancel.mid"].reason == "bad byte ? in the name"


@given(
    restrictions=st.fixed_dictionaries(
        {}, optional={"role": st.sampled_from(ROLES), "driver": st.sampled_from(DRIVERS)}
    )
)
@QUICK
def test_a_restricted_entry_speaks_of_exactly_the_runs_it_names(restrictions, path):
    lines = "".join(f'{key} = "{value}"\n' for key, value in restrictions.items())
    path.write_text(format_deviation("cancel.mid", "known") + lines, encoding="utf-8")
    deviation = read_deviations(path, IDS)["cancel.mid"]
    for driver, role in itertools.product(DRIVERS, ROLES):
        run = {"driver": driver, "role": role}
        assert deviation.is_for(driver, role) == all(run[key] == value for key, value in restrictions.items())


@pytest.mark.parametrize(
    ("was_run", "is_broken", "complaint"),
    [
        pytest.param(True, True, None, id="broken, as the entry says"),
        pytest.param(True, False, "holds, but the deviations file says it is broken", id="no longer broken"),
        pytest.param(False, False, "matches nothing", id="not checked"),
    ],
)
def test_an_entry_that_excuses_nothing_is_wrong(was_run, is_broken, complaint):
    deviation = Deviation("cancel.mid", "known")
    said = judge(deviation, is_broken=is_broken, was_run=was_run)
    if complaint is None:
        assert said == ""
    else:
        assert "cancel.mid" in said
        assert complaint in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param(
            f'["cancel.mid"]\nreason = "x"\nexample = "{hypothesis.__version__}:AAFBAQ"', "cannot read", id="cut blob"
        ),
        pytest.param('["gen.empty_promt"]\nreason = "x"', "Did you mean gen.empty_prompt?", id="misspelt id"),
        pytest.param('["zzz"]\nreason = "x"', '["zzz"] is no rule of this suite', id="unknown id"),
        pytest.param('["a\\nb"]\nreason = "x"', '["a\\nb"] is no rule', id="id with a line break"),
        pytest.param('[gen.empty_prompt]\nreason = "x"', 'quotes: ["gen.empty_prompt"]', id="id without quotes"),
        pytest.param('reason = "x"', '["reason"] is no rule', id="no table at all"),
        pytest.param('"cancel.mid" = "x"', '["cancel.mid"] is a text, not a table', id="text for a table"),
        pytest.param('[["cancel.mid"]]\nreason = "x"', '["cancel.mid"] is an array, not a table', id="array of tables"),
        pytest.param('["cancel.mid"]', '["cancel.mid"] has no reason', id="no reason"),
        pytest.param('["cancel.mid"]\nreason = " \\n"', "has a blank reason", id="blank reason"),
        pytest.param('["cancel.mid"]\nreasons = "x"', "Did you mean reason? Allowed are reason,", id="unknown key"),
        pytest.param('["cancel.mid"]\nreason = true', "reason is a boolean, not a text", id="reason is a boolean"),
        pytest.param('["cancel.mid"]\nreason = "x"\nexample = 6.1', "example is a float", id="example is a float"),
        pytest.param('["cancel.mid"]\nreason = 1979-05-27', "reason is a date or time", id="reason is a date"),
        pytest.param('["cancel.mid"]\nreason = "x"\nexample = "AXic"', "release and a blob", id="blob alone"),
        pytest.param('["cancel.mid"]\nreason = "x"\nrole = "all"', "Allowed are agg, prefill,", id="unknown role"),
        pytest.param('["cancel.mid"]\nreason = "x"\ndriver = "c"', "Allowed are plain, bridge,", id="unknown driver"),
        pytest.param('["cancel.mid"]\nreason: "x"', "(at line 2, column 7)", id="not TOML"),
        pytest.param('["cancel.mid"]\nreason="x"\n["cancel.mid"]\nreason="y"', "(at line 3", id="the same rule twice"),
    ],
)
def test_a_wrong_file_is_named_in_one_line(path, text, said):
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        read_deviations(path, IDS)
    message = str(caught.value)
    assert str(path) in message
    assert said in message
    assert len(message.splitlines()) == 1


def test_a_file_that_cannot_be_read_is_named_in_one_line(tmp_path):
    (tmp_path / "latin").write_bytes(b'["cancel.mid"]\nreason = "caf\xe9"')
    for name, said in {"absent": "No such file", ".": "Is a directory", "latin": "is not UTF-8 (byte 28)"}.items():
        with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as caught:
            read_deviations(tmp_path / name, IDS)
        assert said in str(caught.value)


@pytest.mark.parametrize("text", ["", "6.100.0", "6.100.0:", ":AX", "6:AX", "6.100.0:A X", "6.100.0:AX\n", "６.1.0:AX"])
def test_what_is_not_an_example_is_none(text):
    assert parse_example(text) is None
