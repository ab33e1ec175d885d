"""Traces: what is in the file comes out, a bit at a time; what is wrong with it is said with the line."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from datetime import UTC, datetime, timedelta
from itertools import groupby, islice, pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mock_engine.errors import ConfigError
from mock_engine.request import Request
from mock_engine.session import Session, Turn
from mock_engine.trace_files import DATASET_TYPES, read_trace

BLOCK_SIZE = 64
MOONCAKE = Path(__file__).parents[2] / "shared" / "data" / "mooncake_conversation_trace.jsonl.gz"
AZURE_HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"
CSV_HEADER = "arrival_s,isl_tokens,osl_tokens"

quick = settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])


def write(folder: Path, lines: list[str], name: str = "trace") -> Path:
    path = folder / name
    data = "".join(f"{line}\n" for line in lines).encode()
    path.write_bytes(gzip.compress(data, 1) if name.endswith(".gz") else data)
    return path


def read(path: Path, dataset_type: str, block_size: int = BLOCK_SIZE, **limits: int) -> list[Session]:
    return list(read_trace(path, dataset_type, block_size, **limits))


def complain(path: Path, dataset_type: str, block_size: int = BLOCK_SIZE) -> str:
    with pytest.raises(ConfigError) as raised:
        read(path, dataset_type, block_size)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def mooncake_line(time_ms: float, isl: int, osl: int, **more: object) -> str:
    hash_ids = list(range(-(-isl // 512)))
    return json.dumps({"timestamp": time_ms, "input_length": isl, "output_length": osl, "hash_ids": hash_ids, **more})


def export_line(time_ms: float, isl: int, osl: int, **more: object) -> str:
    """A line of AIPerf 0.13.0's profile_export.jsonl, with a few of its many fields."""
    return json.dumps(
        {
            "metadata": {"session_num": 0, "request_start_ns": 1_795_559_072_000_000_000 + round(time_ms * 1e6)},
            "metrics": {
                "time_to_first_token": {"value": 44.2, "unit": "ms"},
                "input_sequence_length": {"value": isl, "unit": "tokens"},
                "output_sequence_length": {"value": osl, "unit": "tokens"},
            },
            **more,
        }
    )


def azure_line(time_ms: float, isl: int, osl: int) -> str:
    time = datetime(2023, 11, 16, 18, 17, 3, tzinfo=UTC) + timedelta(milliseconds=time_ms)
    return f"{time:%Y-%m-%d %H:%M:%S.%f}0,{isl},{osl}"


def csv_line(time_ms: float, isl: int, osl: int) -> str:
    return f"{time_ms / 1000},{isl},{osl}"


LINE_OF = {
    "mooncake_trace": mooncake_line,
    "profile_export": export_line,
    "azure_trace": azure_line,
    "csv": csv_line,
}
HEADER_OF = {"azure_trace": [AZURE_HEADER], "csv": [CSV_HEADER]}

types = st.sampled_from(sorted(LINE_OF))
requests = st.lists(st.tuples(st.integers(0, 10**7), st.integers(1, 5000), st.integers(1, 3000)), min_size=1)


@given(dataset_type=types, requests=requests, name=st.sampled_from(["trace", "trace.gz"]))
@quick
def test_what_is_in_the_file_comes_out(tmp_path, dataset_type, requests, name):
    requests.sort(key=lambda request: request[0])
    lines = [*HEADER_OF.get(dataset_type, []), "", *(LINE_OF[dataset_type](*request) for request in requests)]
    sessions = read(write(tmp_path, lines, name), dataset_type)
    first_ms = 0 if dataset_type in ("mooncake_trace", "csv") else requests[0][0]  # the others have absolute times
    assert [session.arrival_s for session in sessions] == pytest.approx([(ms - first_ms) / 1000 for ms, *_ in requests])
    assert [(turn.isl_tokens, turn.osl_tokens) for (turn,) in (s.turns for s in sessions)] == [r[1:] for r in requests]
    for (turn,) in (session.turns for session in sessions):
        Request("r", turn.isl_tokens, turn.osl_tokens, turn.block_hashes)
        assert len(turn.block_hashes) == (turn.isl_tokens // BLOCK_SIZE if dataset_type == "mooncake_trace" else 0)


@given(requests=requests, seed=st.randoms(use_true_random=False))
@quick
def test_a_profile_export_is_sorted_by_when_requests_were_sent(tmp_path, requests, seed):
    seed.shuffle(requests)
    sessions = read(write(tmp_path, [export_line(*request) for request in requests]), "profile_export")
    requests.sort(key=lambda request: request[0])
    assert [session.arrival_s for session in sessions] == sorted(session.arrival_s for session in sessions)
    assert [(turn.isl_tokens, turn.osl_tokens) for (turn,) in (s.turns for s in sessions)] == [r[1:] for r in requests]


def test_requests_sent_at_one_moment_stay_in_the_order_of_the_file(tmp_path):
    lines = [export_line(number * 7 % 5, number + 1, 5) for number in range(5000)]
    for _, at_once in groupby(read(write(tmp_path, lines), "profile_export"), key=lambda session: session.arrival_s):
        isls = [session.turns[0].isl_tokens for session in at_once]
        assert isls == sorted(isls)


SPOILT = {
    "mooncake_trace": [
        '{"timestamp": 1, "input_le',
        "[1, 2]",
        "[" * 100_000,
        "1" * 5000,
        '"\\ud800"',
        '{"timestamp": 1, "input_length": 5}',
        mooncake_line(10**8, 0, 5),
        mooncake_line(10**8, 5, -5),
        mooncake_line(10**8, 2**31, 5, hash_ids=None),
        mooncake_line(10**8, 5, 5, input_length="5"),
        mooncake_line(10**8, 5, 5, input_length=5.0),
        mooncake_line(10**8, 5, 5, output_length=True),
        mooncake_line(-1, 5, 5),
        mooncake_line(float("nan"), 5, 5),
        mooncake_line(float("inf"), 5, 5),
        mooncake_line(10**400, 5, 5),
        mooncake_line(0, 5, 5, timestamp="soon"),
        mooncake_line(10**8, 513, 5, hash_ids=[1]),
        mooncake_line(10**8, 512, 5, hash_ids=[1, 2]),
        mooncake_line(10**8, 5, 5, hash_ids=[]),
        mooncake_line(10**8, 5, 5, hash_ids=7),
        mooncake_line(10**8, 5, 5, hash_ids=[-1]),
        mooncake_line(10**8, 5, 5, hash_ids=["a"]),
        mooncake_line(10**8, 5, 5, hash_ids=[1.0]),
        mooncake_line(10**8, 5, 5, hash_ids=[2**63 // 8]),
        mooncake_line(10**8, 1000, 5, hash_ids=[3, 3]),
        mooncake_line(10**8, 5, 5, session_id=5),
        mooncake_line(10**8, 5, 5, session_id="s", delay=-1),
        mooncake_line(10**8, 5, 5, text_input="To be, or not to be"),
    ],
    "profile_export": [
        "{}",
        '{"metadata": {}, "metrics": {}}',
        '{"metadata": {"request_start_ns": 5}, "metrics": {"input_sequence_length": {"value": 5}}}',
        export_line(0, 0, 5),
        export_line(0, 5, 2**31),
        export_line(0, 5, 5, metrics={"input_sequence_length": 5}),
        export_line(0, 5, 5, metadata={"request_start_ns": 2**63}),
        export_line(0, 5, 5, metadata={"request_start_ns": 1.5}),
    ],
    "azure_trace": [
        "2023-11-16 18:17:03.9799600,5",
        "2023-11-16 18:17:03.9799600,5,5,5",
        "2023-11-16 18:17:03.9799600,,5",
        "2023-11-16 18:17:03.9799600,5,0",
        "2023-11-16 18:17:03.9799600,5.5,5",
        "2023-11-16 18:77:03.9799600,5,5",
        "yesterday,5,5",
        "1999-11-16 18:17:03,5,5",
    ],
    "csv": [
        "-1,5,5",
        "nan,5,5",
        "inf,5,5",
        "1e400,5,5",
        ",5,5",
        "1,5",
        "1,5,-5",
        "1,5,٣",
        "1,5,99999999999",
        f"1,5,{'9' * 5000}",
        '"1",5,5',
    ],
}


@pytest.mark.parametrize(
    ("dataset_type", "spoilt"),
    [(dataset_type, line) for dataset_type, lines in SPOILT.items() for line in lines],
    ids=lambda text: text[:60],
)
def test_a_spoilt_row_is_reported_with_its_line(tmp_path, dataset_type, spoilt):
    good = [LINE_OF[dataset_type](ms, 5, 5) for ms in (0, 10, 20, 10**9)]
    header = HEADER_OF.get(dataset_type, [])
    for at in (1, 3):
        lines = [*header, *good[:at], spoilt, *good[at:]]
        path = write(tmp_path, lines)
        assert complain(path, dataset_type).startswith(f"{path}, line {len(header) + at + 1}: ")


@given(dataset_type=types, at=st.integers(0, 5), cut=st.integers(1, 30))
@quick
def test_a_row_that_is_cut_off_is_reported_with_its_line(tmp_path, dataset_type, at, cut):
    lines = [LINE_OF[dataset_type](100 * number, 5000, 3000) for number in range(6)]
    cut = min(cut, len(lines[at]) - 1)
    if dataset_type in HEADER_OF:
        lines[at] = lines[at].split(",")[0]
    else:
        lines[at] = lines[at][:-cut]
    header = HEADER_OF.get(dataset_type, [])
    assert f", line {len(header) + at + 1}: " in complain(write(tmp_path, [*header, *lines]), dataset_type)


@given(data=st.binary(max_size=200), dataset_type=st.sampled_from(DATASET_TYPES), is_packed=st.booleans())
@quick
def test_whatever_the_file_holds_there_is_at_most_one_error_and_it_names_the_file(
    tmp_path, data, dataset_type, is_packed
):
    path = tmp_path / ("trace.gz" if is_packed else "trace")
    path.write_bytes(data)
    message = str(path)
    try:
        read(path, dataset_type)
    except ConfigError as error:
        message = str(error)
    assert str(path) in message
    assert "\n" not in message


@pytest.mark.parametrize("dataset_type", ["mooncake_trace", "azure_trace", "csv"])
def test_a_time_before_the_one_before_names_both(tmp_path, dataset_type):
    header = HEADER_OF.get(dataset_type, [])
    lines = [LINE_OF[dataset_type](ms, 5, 5) for ms in (0, 2000, 2000, 1000)]
    message = complain(write(tmp_path, [*header, *lines]), dataset_type)
    assert f", line {len(header) + 4}: the time " in message
    assert f" of line {len(header) + 3}; sort the file by time" in message
    shown = {"mooncake_trace": ("1000", "2000"), "azure_trace": ("18:17:04", "18:17:05"), "csv": ("1.0", "2.0")}
    assert all(time in message for time in shown[dataset_type])


@pytest.mark.parametrize("dataset_type", DATASET_TYPES)
def test_a_file_that_is_none_is_one_error(tmp_path, dataset_type):
    assert "No such file or directory. Name a trace file" in complain(tmp_path / "missing", dataset_type)
    assert "Is a directory. Name a trace file" in complain(tmp_path, dataset_type)
    for name, data in (("empty", b""), ("blank", b"\n \n"), ("bytes", b"\xff\xfe"), ("no.gz", b"plain text")):
        (tmp_path / name).write_bytes(data)
        assert str(tmp_path / name) in complain(tmp_path / name, dataset_type)
    packed = gzip.compress(b" " * 10_000)
    for name, data in (
        ("cut.gz", packed[:-12]),
        ("sum.gz", packed[:-8] + bytes(8)),
        ("bits.gz", packed[:10] + b"?" * 9),
    ):
        (tmp_path / name).write_bytes(data)
        assert f"{tmp_path / name} is damaged, or no gzip file" in complain(tmp_path / name, dataset_type)


def test_an_unknown_type_is_refused_before_the_file_is_opened():
    with pytest.raises(ConfigError, match="is moon_trace; it must be one of mooncake_trace, inputs_json"):
        read_trace(Path("missing"), "moon_trace", BLOCK_SIZE)


def test_types_may_have_hyphens_as_in_aiperfs_help(tmp_path):
    path = write(tmp_path, [mooncake_line(0, 5, 5)])
    assert read(path, "mooncake-trace") == read(path, "mooncake_trace")


def test_bytes_that_are_no_text_are_reported_with_their_line(tmp_path):
    path = tmp_path / "trace"
    path.write_bytes(f"{mooncake_line(0, 5, 5)}\n".encode() + b'{"timestamp": 1, "session_id": "\xff"}\n')
    assert complain(path, "mooncake_trace").startswith(f"{path}, line 2: not UTF-8 text")


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(tmp_path):
    path = tmp_path / "trace"
    path.write_bytes(f"\ufeff{CSV_HEADER}\r\n0.5,5,6\r\n".encode())
    assert read(path, "csv") == [Session(0.5, (Turn(5, 6),))]


@pytest.mark.parametrize("dataset_type", ["mooncake_trace", "azure_trace", "csv"])
def test_only_what_is_asked_for_is_read(tmp_path, dataset_type):
    good = [LINE_OF[dataset_type](ms, 5, 5) for ms in range(100)]
    path = write(tmp_path, [*HEADER_OF.get(dataset_type, []), *good, "spoilt"])
    assert len(list(islice(read_trace(path, dataset_type, BLOCK_SIZE), 100))) == 100


@pytest.mark.parametrize(("dataset_type", "bytes_a_row"), [("csv", 0), ("mooncake_trace", 0), ("profile_export", 60)])
def test_a_large_trace_takes_little_memory(tmp_path, dataset_type, bytes_a_row):
    num_rows = 200_000 if dataset_type == "csv" else 10_000
    line_of = LINE_OF[dataset_type]
    path = write(tmp_path, [*HEADER_OF.get(dataset_type, []), *(line_of(ms, 900, 5) for ms in range(num_rows))])
    list(islice(read_trace(path, dataset_type, BLOCK_SIZE), 3))  # what stays for good does not count
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_trace(path, dataset_type, BLOCK_SIZE)) == num_rows
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1_500_000 + bytes_a_row * num_rows


# Mooncake


@given(
    isl=st.integers(1, 3000),
    block_size=st.sampled_from([1, 16, 64, 128, 512]),
    hash_ids=st.lists(st.integers(0, 2**50), min_size=6, max_size=6, unique=True),
)
@quick
def test_hash_ids_become_the_hashes_of_the_full_blocks(tmp_path, isl, block_size, hash_ids):
    path = write(tmp_path, [mooncake_line(0, isl, 5, hash_ids=hash_ids[: -(-isl // 512)])])
    ((turn,),) = (session.turns for session in read(path, "mooncake_trace", block_size))
    per_id = 512 // block_size
    assert turn.block_hashes == [hash_ids[i // per_id] * per_id + i % per_id for i in range(isl // block_size)]


def test_a_block_size_that_does_not_divide_512_is_refused_if_there_are_hash_ids(tmp_path):
    for block_size in (48, 1024):
        message = complain(write(tmp_path, [mooncake_line(0, 600, 5)]), "mooncake_trace", block_size)
        assert message == (
            f"--block-size is {block_size}; for a trace with hash_ids it must divide 512, "
            "the tokens that one of them stands for"
        )
    path = write(tmp_path, [mooncake_line(0, 600, 5, hash_ids=None)])
    assert read(path, "mooncake_trace", 48) == [Session(0.0, (Turn(600, 5),))]


def test_hash_ids_that_do_not_cover_the_prompt_are_refused(tmp_path):
    for hash_ids in ([1], [1, 2, 3], []):
        message = complain(write(tmp_path, [mooncake_line(0, 600, 5, hash_ids=hash_ids)]), "mooncake_trace")
        needed = "input_length 600 needs a list of 2, one for each 512 tokens"
        assert message.endswith(f", line 1: hash_ids is {len(hash_ids)} entries; {needed}")


def test_rows_without_a_time_are_sent_as_soon_as_the_load_allows(tmp_path):
    path = write(tmp_path, ['{"input_length": 300, "output_length": 40}'])
    assert read(path, "mooncake_trace") == [Session(None, (Turn(300, 40),))]


turns_of_a_session = st.lists(
    st.tuples(st.integers(1, 2000), st.integers(1, 500), st.integers(0, 9000)), min_size=1, max_size=5
)


@given(all_turns=st.lists(turns_of_a_session, min_size=1, max_size=4), with_ids=st.booleans())
@quick
def test_rows_of_a_session_add_up_to_a_conversation(tmp_path, all_turns, with_ids):
    """AIPerf's documented form: input_length is what a turn adds; answers and what was said before come on top."""
    lines = []
    for number, turns in enumerate(all_turns):
        for position, (isl, osl, delay) in enumerate(turns):
            when = {"timestamp": 100 * number} if position == 0 else {"timestamp": None, "delay": delay}
            ids = {} if with_ids else {"hash_ids": None}
            lines.append(mooncake_line(0, isl, osl, session_id=f"s{number}", **{**when, **ids}))
    sessions = read(write(tmp_path, lines), "mooncake_trace")
    assert [session.arrival_s for session in sessions] == [number / 10 for number in range(len(all_turns))]
    own: list[int] = []
    for session, turns in zip(sessions, all_turns, strict=True):
        context = 0
        for turn, (isl, osl, delay) in zip(session.turns, turns, strict=True):
            assert turn.isl_tokens == context + isl
            assert turn.osl_tokens == osl
            assert turn.think_s == (delay / 1000 if context else 0.0)
            context = turn.isl_tokens + turn.osl_tokens
            num_hashed = context if len(turns) > 1 else isl * with_ids  # nobody asks for the rest of a single turn
            assert len(turn.block_hashes) == num_hashed // BLOCK_SIZE
        for before, after in pairwise(session.turns):
            assert list(after.block_hashes[: len(before.block_hashes)]) == list(before.block_hashes)
        first_blocks = turns[0][0] // BLOCK_SIZE if with_ids else 0
        assert list(session.turns[0].block_hashes[:first_blocks]) == list(range(first_blocks))
        own += session.turns[-1].block_hashes[first_blocks:]
    assert len(set(own)) == len(own)
    assert all(-(2**63) <= block_hash < 0 for block_hash in own)


def test_a_session_that_comes_back_is_reported_with_its_line(tmp_path):
    lines = [mooncake_line(ms, 5, 5, session_id=name) for ms, name in enumerate(["a", "b", "c", "a"])]
    assert ", line 4: session 'a' was there before" in complain(write(tmp_path, lines), "mooncake_trace")


def test_a_later_turn_at_a_time_of_its_own_is_refused(tmp_path):
    lines = [mooncake_line(ms, 5, 5, session_id="a") for ms in (0, 10)]
    assert ", line 2: a later turn of a session has a timestamp" in complain(write(tmp_path, lines), "mooncake_trace")


def test_long_inputs_are_left_out_and_long_outputs_cut_row_by_row_as_aiperf_does(tmp_path):
    rows = [(0, 100, 50, "a"), (None, 300, 80, "a"), (None, 20, 10, "a"), (5, 301, 5, None), (6, 300, 5, None)]
    lines = [mooncake_line(0, isl, osl, timestamp=ms, session_id=name, delay=0) for ms, isl, osl, name in rows]
    path = write(tmp_path, lines)
    lengths = [
        [(turn.isl_tokens, turn.osl_tokens) for turn in session.turns]
        for session in read(path, "mooncake_trace", max_isl=299, max_osl=40)
    ]
    assert lengths == [[(100, 40), (160, 10)]]
    lengths = [
        [(turn.isl_tokens, turn.osl_tokens) for turn in session.turns]
        for session in read(path, "mooncake_trace", max_isl=300, max_osl=60)
    ]
    assert lengths == [[(100, 50), (450, 60), (530, 10)], [(300, 5)]]


@pytest.mark.skipif(not MOONCAKE.is_file(), reason="needs the published Mooncake trace (see profiles/README.md)")
@pytest.mark.parametrize("block_size", [64, 512])
def test_the_mooncake_conversation_trace_is_read_whole(block_size):
    """As many blocks are repeated as the trace's own ids say."""
    sessions = read(MOONCAKE, "mooncake_trace", block_size)
    assert len(sessions) == 12_031
    assert sessions[0].turns[0].isl_tokens == 6758
    assert sessions[-1].arrival_s == 3536.999
    seen: set[int] = set()
    num_hits = 0
    for (turn,) in (session.turns for session in sessions):
        num_hits += sum(block_hash in seen for block_hash in turn.block_hashes)
        seen.update(turn.block_hashes)
    seen_512: set[int] = set()
    num_hits_512 = 0
    with gzip.open(MOONCAKE, "rt", encoding="utf-8") as file:
        for row in map(json.loads, file):
            ids = row["hash_ids"][: row["input_length"] // 512]
            num_hits_512 += sum(hash_id in seen_512 for hash_id in ids)
            seen_512.update(ids)
    assert num_hits == num_hits_512 if block_size == 512 else num_hits >= 8 * num_hits_512


# AIPerf's own files


def inputs_json(*sessions: tuple[str, list[dict[str, object]]]) -> list[str]:
    """As AIPerf 0.13.0 writes it, line breaks included."""
    data = [{"session_id": session_id, "payloads": payloads} for session_id, payloads in sessions]
    return json.dumps({"data": data}, indent=2).splitlines()


def payload(*texts: object, **more: object) -> dict[str, object]:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"messages": messages, "model": "m", "stream": True, "max_completion_tokens": 7, "ignore_eos": True, **more}


def test_inputs_json_is_counted_with_our_tokenizer(tmp_path):
    said = " affairs fall by thy side No want of conscience hold it that I call"
    lines = inputs_json(
        ("a", [payload(said), payload(said, " Her love", said)]),
        ("b", [payload([{"type": "text", "text": said}], max_completion_tokens=None, max_tokens=3)]),
        ("c", [{"prompt": said, "max_tokens": 5}]),
    )
    first, second, third = read(write(tmp_path, lines), "inputs_json", 4)
    num_tokens = first.turns[0].isl_tokens
    assert num_tokens == 14
    assert [turn.isl_tokens for turn in first.turns] == [14, 30]
    assert [turn.osl_tokens for turn in first.turns] == [7, 7]
    assert first.turns[1].block_hashes[:3] == first.turns[0].block_hashes
    assert len(first.turns[0].block_hashes) == 3
    assert second.turns == (Turn(14, 3, first.turns[0].block_hashes),)
    assert third.turns == (Turn(14, 5, first.turns[0].block_hashes),)
    assert {session.arrival_s for session in (first, second, third)} == {None}


def test_inputs_json_is_read_entry_by_entry(tmp_path):
    """However the file falls into pieces, entries are whole; what is wrong further on is not seen before."""
    long = " love" * 30_000
    lines = inputs_json(*((f"s{number}", [payload(long if number % 7 == 0 else " love")]) for number in range(30)))
    path = write(tmp_path, [*lines[:-2], " spoilt"])
    sessions = read_trace(path, "inputs_json", BLOCK_SIZE)
    lengths = [session.turns[0].isl_tokens for session in islice(sessions, 29)]
    assert lengths == [30_000 if number % 7 == 0 else 1 for number in range(29)]
    with pytest.raises(ConfigError, match="line"):
        list(sessions)


def test_what_is_wrong_in_inputs_json_is_reported_with_the_line_of_its_entry(tmp_path):
    good = ("a", [payload(" love")])
    line_of_second = next(i for i, line in enumerate(inputs_json(good, good), 1) if line == "    },") + 1
    for spoilt, text in [
        (("b", [payload(" love", max_completion_tokens=None)]), "max_tokens in payloads[0] of session 'b' is missing"),
        (("b", [payload("")]), "the prompt's length in payloads[0] of session 'b' is 0"),
        (("b", [payload(5)]), "messages[0].content in payloads[0] of session 'b' is 5; it must be text"),
        (("b", [payload([{"type": "image_url"}])]), "a part of messages[0].content in payloads[0] of session 'b' is"),
        (("b", [{"messages": 5, "max_tokens": 5}]), "messages in payloads[0] of session 'b' is 5; it must be a list"),
        (("b", [{"max_tokens": 5}]), "prompt in payloads[0] of session 'b' is missing; it must be text"),
        (("b", []), "payloads is []; it must be a list of at least one payload"),
        ((5, [payload(" love")]), "session_id is 5; it must be a string"),
        (good, "session 'a' is there twice"),
    ]:
        path = write(tmp_path, inputs_json(good, spoilt))
        assert complain(path, "inputs_json").startswith(f"{path}, line {line_of_second}: {text}")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('{"data": {}}', 1),
        ('{"sessions": []}', 1),
        ('{"data": [\n5\n]}', 2),
        ('{"data": [\n{"session_id": "a",\n "payloads": [}]}', 3),
        ('{"data": [\n{"session_id": "a"', 2),
        ('{"data": [\n' + "[" * 100_000, 2),
        ("x" * 100_000, 1),
    ],
)
def test_a_file_that_is_no_inputs_json_is_reported_with_a_line(tmp_path, text, line):
    path = tmp_path / "inputs.json"
    path.write_text(text, encoding="utf-8")
    assert complain(path, "inputs_json").startswith(f"{path}, line {line}: ")


def test_a_large_file_that_is_no_inputs_json_is_not_read_to_its_end(tmp_path):
    path = write(tmp_path, [export_line(0, 5, 5)] * 20_000)
    tracemalloc.start()
    try:
        complain(path, "inputs_json")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2_000_000 < path.stat().st_size


def test_requests_that_failed_are_left_out_of_a_profile_export(tmp_path):
    lines = [export_line(0, 5, 5, metrics={}, error={"code": 499, "type": "RequestCancellationError"})]
    assert "has no requests" in complain(write(tmp_path, lines), "profile_export")
    assert read(write(tmp_path, [*lines, export_line(7, 5, 6)]), "profile_export") == [Session(0.0, (Turn(5, 6),))]


# CSV


def test_azures_traces_are_read_in_both_forms(tmp_path):
    for first, second in (
        ("2023-11-16 18:17:03.9799600", "2023-11-16 18:17:04.0319590"),
        ("2024-05-10 00:00:00.009930+00:00", "2024-05-10 00:00:00.061929+00:00"),
        ("2024-05-10 00:00:00.948001+00:00", "2024-05-10 00:00:01+00:00"),
    ):
        path = write(tmp_path, [AZURE_HEADER, f"{first},4808,10", f"{second},3180,8"])
        assert read(path, "azure_trace") == [
            Session(0.0, (Turn(4808, 10),)),
            Session(pytest.approx(0.051999, abs=1e-9), (Turn(3180, 8),)),
        ]


def test_times_without_a_zone_are_utc(tmp_path):
    path = write(tmp_path, [AZURE_HEADER, "2024-05-10 00:00:00,5,5", "2024-05-10 02:00:01+02:00,5,5"])
    assert [session.arrival_s for session in read(path, "azure_trace")] == [0.0, 1.0]


def test_columns_may_stand_in_any_order_among_others(tmp_path):
    path = write(tmp_path, ["osl_tokens, model ,arrival_s,isl_tokens", "6,m,0.25,5"])
    assert read(path, "csv") == [Session(0.25, (Turn(5, 6),))]


def test_a_wrong_header_says_what_the_columns_must_be(tmp_path):
    message = complain(write(tmp_path, ["0.5,5,6"]), "csv")
    assert ", line 1: found the header '0.5,5,6'; the columns must be arrival_s,isl_tokens,osl_tokens" in message
