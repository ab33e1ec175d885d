"""
Requests that were recorded, read from a file one at a time.

    for session in read_trace(path, "mooncake_trace", block_size):
        ...

    mooncake_trace    AIPerf's JSON lines: timestamp (ms), input_length, output_length, hash_ids of 512-token blocks
    inputs_json       AIPerf's inputs.json: whole payloads, counted with our tokenizer
    profile_export    AIPerf's profile_export.jsonl: what a run sent, sorted by when it was sent
    azure_trace       CSV of Azure's LLM inference traces: TIMESTAMP,ContextTokens,GeneratedTokens
    csv               CSV: arrival_s,isl_tokens,osl_tokens

A name that ends in .gz is unpacked on the way. Only `profile_export` is read to its end before the
first request comes out, as its rows are in the order in which requests ended.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import reprlib
import zlib
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import numpy as np
from tokenizers import Tokenizer

from mock_engine.engine_settings import DEFAULT_TOKENIZER
from mock_engine.errors import ConfigError
from mock_engine.request import hash_blocks
from mock_engine.session import Session, Turn, chain_turns, num_full_blocks

MOONCAKE_BLOCK_TOKENS = 512  # of one hash id
_MAX_TOKENS = 2**31 - 1  # of one request
_MAX_TIME = 2.0**53  # in a trace's own unit
_FIRST_OWN_ID = -(2**63)  # block hashes of conversations; the hash ids of traces are not negative
_CHUNK = 1 << 16
_ROWS_AT_ONCE = 4096
_ARRAY_BEGINS = re.compile(r'\s*\{\s*"data"\s*:\s*\[\s*\]?')
_ARRAY_GOES_ON = re.compile(r"\s*(?:,\s*|\])")


class _Row(NamedTuple):
    """One request as it lies in the file."""

    line: int
    arrival_s: float | None
    isl_tokens: int
    osl_tokens: int
    time_text: object = None  # the arrival as the file has it
    block_hashes: Sequence[int] = ()
    session_id: str | None = None
    think_s: float = 0.0
    is_whole_prompt: bool = False  # rather than what a turn adds to the turns before


def read_trace(
    path: Path, dataset_type: str, block_size: int, *, max_isl: int | None = None, max_osl: int | None = None
) -> Iterator[Session]:
    """
    The requests of the file, in the order of their arrival times where it has such; read as they are asked for.

    As in AIPerf, rows with a longer input than `max_isl` are left out, and outputs are cut to `max_osl`.
    Raises `ConfigError` for what is wrong, with the line; most of it only when that line is reached.
    """
    check_dataset_type(dataset_type)
    rows = _READERS[_canonical(dataset_type)](path, block_size)
    return _sessions(path, rows, block_size, max_isl or _MAX_TOKENS, max_osl or _MAX_TOKENS)


def check_dataset_type(dataset_type: str) -> None:
    """Raise `ConfigError` if we cannot read such a file."""
    if _canonical(dataset_type) not in _READERS:
        raise ConfigError(f"--custom-dataset-type is {dataset_type}; it must be one of {', '.join(_READERS)}")


def _canonical(dataset_type: str) -> str:
    return dataset_type.replace("-", "_")


def _sessions(path: Path, rows: Iterator[_Row], block_size: int, max_isl: int, max_osl: int) -> Iterator[Session]:
    """Rows of one session, which follow one another, become turns; all others are sessions of one turn."""
    row: _Row | None = None
    latest: _Row | None = None  # the last row that had a time
    latest_s = 0.0
    held: list[_Row] = []  # the rows so far of the session that is being read
    seen: set[str] = set()
    first_own_id = _FIRST_OWN_ID
    for row in rows:
        is_next_turn = bool(held) and row.session_id == held[0].session_id
        if row.arrival_s is not None and not is_next_turn:
            if latest is not None and row.arrival_s < latest_s:
                found = f"the time {row.time_text} is before {latest.time_text} of line {latest.line}"
                raise _error(path, row.line, f"{found}; sort the file by time")
            latest, latest_s = row, row.arrival_s
        if row.isl_tokens > max_isl:
            continue
        if row.osl_tokens > max_osl:
            row = row._replace(osl_tokens=max_osl)
        if held and not is_next_turn:
            session = _session(held, block_size, first_own_id)
            yield session
            first_own_id += num_full_blocks(session.turns, block_size)
            held = []
        if row.session_id is None:
            yield Session(row.arrival_s, (Turn(row.isl_tokens, row.osl_tokens, row.block_hashes),))
            continue
        if row.session_id in seen and not is_next_turn:
            found = f"session {row.session_id!r} was there before, with others in between"
            raise _error(path, row.line, f"{found}; keep the rows of a session together")
        seen.add(row.session_id)
        held.append(row)
    if held:
        yield _session(held, block_size, first_own_id)
    if row is None:
        raise ConfigError(f"{path} has no requests; name another trace")


def _session(rows: Sequence[_Row], block_size: int, first_own_id: int) -> Session:
    first = rows[0]
    if first.is_whole_prompt or len(rows) == 1:
        return Session(first.arrival_s, tuple(Turn(row.isl_tokens, row.osl_tokens, row.block_hashes) for row in rows))
    lengths = ((row.isl_tokens, row.osl_tokens, row.think_s) for row in rows)
    return Session(first.arrival_s, chain_turns(lengths, block_size, first_own_id, first.block_hashes))


def _read_mooncake(path: Path, block_size: int) -> Iterator[_Row]:
    """
    AIPerf's form (0.13.0, `MooncakeTrace`) with lengths; prompts as text are refused.

    A session's rows say what each turn adds to the conversation. Its first prompt keeps its hash ids; what comes
    after lies elsewhere among the blocks than in the file and follows answers of its own, so it is shared with nobody.
    """
    last_session = None
    for line, row in read_objects(path):
        for name in ("text_input", "messages", "payload"):
            if row.get(name) is not None:
                raise _error(path, line, f"{name} is a prompt in words; of this type only input_length is read")
        isl_tokens = token_count(path, line, "input_length", row.get("input_length"))
        osl_tokens = token_count(path, line, "output_length", row.get("output_length"))
        session_id = row.get("session_id")
        if session_id is not None and not isinstance(session_id, str):
            raise _error(path, line, f"session_id is {reprlib.repr(session_id)}; it must be a string")
        timestamp, delay = row.get("timestamp"), row.get("delay")
        if timestamp is not None:
            timestamp = _time(path, line, "timestamp", timestamp)
            if session_id is not None and session_id == last_session and delay is None:
                raise _error(path, line, "a later turn of a session has a timestamp; give it a delay instead, in ms")
        yield _Row(
            line,
            None if timestamp is None else timestamp / 1000,
            isl_tokens,
            osl_tokens,
            timestamp,
            _expand(path, line, row.get("hash_ids"), isl_tokens, block_size),
            session_id,
            0.0 if delay is None else _time(path, line, "delay", delay) / 1000,
        )
        last_session = session_id


def _expand(path: Path, line: int, hash_ids: object, isl_tokens: int, block_size: int) -> Sequence[int]:
    """Hashes of the full blocks of `block_size` in the prompt, from those of 512 tokens; the last may be partial."""
    if hash_ids is None:
        return ()
    blocks_per_id, rest = divmod(MOONCAKE_BLOCK_TOKENS, block_size)
    if rest:
        raise ConfigError(
            f"--block-size is {block_size}; for a trace with hash_ids it must divide {MOONCAKE_BLOCK_TOKENS}, "
            f"the tokens that one of them stands for"
        )
    num_ids = -(-isl_tokens // MOONCAKE_BLOCK_TOKENS)
    if not isinstance(hash_ids, list) or len(hash_ids) != num_ids:
        found = f"{len(hash_ids)} entries" if isinstance(hash_ids, list) else reprlib.repr(hash_ids)
        needed = f"input_length {isl_tokens} needs a list of {num_ids}, one for each {MOONCAKE_BLOCK_TOKENS} tokens"
        raise _error(path, line, f"hash_ids is {found}; {needed}")
    too_large = 2**63 // blocks_per_id
    for hash_id in hash_ids:
        if type(hash_id) is not int or not 0 <= hash_id < too_large:
            raise _error(path, line, f"hash_ids holds {reprlib.repr(hash_id)}; ids are whole numbers from 0 up")
    if len(set(hash_ids)) < num_ids:
        raise _error(path, line, "hash_ids holds one twice; an id stands for a block and all that is before it")
    ids = np.array(hash_ids, np.int64)[:, np.newaxis] * blocks_per_id + np.arange(blocks_per_id)
    return cast(list[int], ids.ravel()[: isl_tokens // block_size].tolist())


def _read_profile_export(path: Path, _block_size: int) -> Iterator[_Row]:
    """Requests that failed have no lengths, and are left out."""
    lines, starts_ns, isls, osls = array("q"), array("q"), array("i"), array("i")
    for line, record in read_objects(path):
        if record.get("error") is not None:
            continue
        metadata = json_object(path, line, "metadata", record.get("metadata"))
        metrics = json_object(path, line, "metrics", record.get("metrics"))
        start_ns = metadata.get("request_start_ns")
        if type(start_ns) is not int or not 0 <= start_ns < 2**63:
            raise wrong_value(path, line, "metadata.request_start_ns", start_ns, "a whole number of nanoseconds")
        for column, name in ((isls, "input_sequence_length"), (osls, "output_sequence_length")):
            metric = json_object(path, line, f"metrics.{name}", metrics.get(name))
            column.append(token_count(path, line, f"metrics.{name}.value", metric.get("value")))
        lines.append(line)
        starts_ns.append(start_ns)
    if not lines:
        return
    starts = np.frombuffer(starts_ns, np.int64)
    order = np.argsort(starts, kind="stable")
    arrivals_s = (starts - starts[order[0]]) / 1e9
    columns = (np.frombuffer(lines, np.int64), arrivals_s, np.frombuffer(isls, np.intc), np.frombuffer(osls, np.intc))
    for start in range(0, len(order), _ROWS_AT_ONCE):
        rows = order[start : start + _ROWS_AT_ONCE]
        yield from map(_Row, *(column[rows].tolist() for column in columns))


def _read_inputs_json(path: Path, block_size: int) -> Iterator[_Row]:
    """Each payload is a whole prompt, whatever was said before included, as AIPerf sends it."""
    tokenizer = Tokenizer.from_file(str(DEFAULT_TOKENIZER / "tokenizer.json"))
    last_session = None
    for line, entry in _read_array(path):
        session = json_object(path, line, "this entry of data", entry)
        session_id, payloads = session.get("session_id"), session.get("payloads")
        if not isinstance(session_id, str):
            raise wrong_value(path, line, "session_id", session_id, "a string")
        if session_id == last_session:
            raise _error(path, line, f"session {session_id!r} is there twice; give each a session_id of its own")
        last_session = session_id
        if not isinstance(payloads, list) or not payloads:
            raise wrong_value(path, line, "payloads", payloads, "a list of at least one payload")
        for number, payload in enumerate(payloads):
            where = f"payloads[{number}] of session {session_id!r}"
            payload = json_object(path, line, where, payload)
            token_ids: list[int] = []
            for text in _prompt_texts(path, line, where, payload):
                token_ids += tokenizer.encode(text, add_special_tokens=False).ids
            name = "max_tokens" if payload.get("max_completion_tokens") is None else "max_completion_tokens"
            yield _Row(
                line,
                None,
                token_count(path, line, f"the prompt's length in {where}", len(token_ids)),
                token_count(path, line, f"{name} in {where}", payload.get(name)),
                block_hashes=hash_blocks(token_ids, block_size),
                session_id=session_id,
                is_whole_prompt=True,
            )


def _prompt_texts(path: Path, line: int, where: str, payload: Mapping[str, Any]) -> Iterator[str]:
    """The texts of a chat payload's messages, or of a completion's prompt."""
    messages = payload.get("messages")
    if messages is None:
        contents = [("prompt", payload.get("prompt"))]
    elif isinstance(messages, list):
        contents = [
            (f"messages[{i}].content", json_object(path, line, f"messages[{i}] in {where}", message).get("content"))
            for i, message in enumerate(messages)
        ]
    else:
        raise wrong_value(path, line, f"messages in {where}", messages, "a list")
    for name, content in contents:
        if isinstance(content, str):
            yield content
        elif isinstance(content, list):
            for part in content:
                text = part.get("text") if isinstance(part, dict) else part
                if not isinstance(text, str):
                    raise wrong_value(path, line, f"a part of {name} in {where}", part, "text")
                yield text
        else:
            raise wrong_value(path, line, f"{name} in {where}", content, "text")


def _read_azure(path: Path, _block_size: int) -> Iterator[_Row]:
    """Times are UTC where they do not say, and become seconds from the first (to a microsecond)."""
    first: datetime | None = None
    for line, (time_text, isl_text, osl_text) in _read_columns(path, _AZURE_COLUMNS):
        try:
            time = datetime.fromisoformat(time_text)
        except ValueError as error:
            raise wrong_value(
                path, line, _AZURE_COLUMNS[0], time_text, "such as 2023-11-16 18:17:03.9799600"
            ) from error
        time = time if time.tzinfo else time.replace(tzinfo=UTC)
        first = first or time
        isl_tokens = token_count(path, line, _AZURE_COLUMNS[1], _digits(isl_text))
        osl_tokens = token_count(path, line, _AZURE_COLUMNS[2], _digits(osl_text))
        yield _Row(line, (time - first).total_seconds(), isl_tokens, osl_tokens, time_text)


def _read_csv(path: Path, _block_size: int) -> Iterator[_Row]:
    for line, (time_text, isl_text, osl_text) in _read_columns(path, _CSV_COLUMNS):
        try:
            arrival_s = _time(path, line, _CSV_COLUMNS[0], float(time_text))
        except ValueError as error:
            raise wrong_value(path, line, _CSV_COLUMNS[0], time_text, "a number of seconds") from error
        isl_tokens = token_count(path, line, _CSV_COLUMNS[1], _digits(isl_text))
        osl_tokens = token_count(path, line, _CSV_COLUMNS[2], _digits(osl_text))
        yield _Row(line, arrival_s, isl_tokens, osl_tokens, time_text)


_AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_CSV_COLUMNS = ("arrival_s", "isl_tokens", "osl_tokens")
_READERS: dict[str, Callable[[Path, int], Iterator[_Row]]] = {
    "mooncake_trace": _read_mooncake,
    "inputs_json": _read_inputs_json,
    "profile_export": _read_profile_export,
    "azure_trace": _read_azure,
    "csv": _read_csv,
}
DATASET_TYPES = tuple(_READERS)


def _read_columns(path: Path, names: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """The named columns of a CSV file of plain numbers (nothing is quoted), row by row."""
    lines = _read_lines(path)
    line, text = next(lines, (1, ""))
    header = [name.strip() for name in text.split(",")]
    if not text or not set(names) <= set(header):
        raise _error(path, line, f"found the header {reprlib.repr(text)}; the columns must be {','.join(names)}")
    places = [header.index(name) for name in names]
    for line, text in lines:
        values = text.split(",")
        if len(values) != len(header):
            raise _error(path, line, f"{len(values)} values under {len(header)} columns: {reprlib.repr(text)}")
        yield line, [values[place].strip() for place in places]


def read_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The JSON objects of a file with one on each line."""
    for line, text in _read_lines(path):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _error(path, line, f"{_explain(error)}; each line must be one JSON object") from error
        yield line, json_object(path, line, "this line", value)


def _read_array(path: Path) -> Iterator[tuple[int, Any]]:
    """The entries of the array in '{"data": [...]}', and the lines on which they begin; one in memory at a time."""
    decode = json.JSONDecoder().raw_decode
    line, num_chars = 1, _CHUNK
    begins = _ARRAY_BEGINS
    with _open(path) as file, io.TextIOWrapper(file, "utf-8-sig") as text:
        rest = ""
        while True:
            found = begins.match(rest)
            if found and found.group().endswith("]"):
                return
            problem: Exception | None = None
            at = found.end() if found else 0
            if found:
                try:
                    entry, end = decode(rest, at)
                except (ValueError, RecursionError) as error:
                    problem = error
                    at = error.pos if isinstance(error, json.JSONDecodeError) else at
                else:
                    line += rest.count("\n", 0, at)
                    yield line, entry
                    line += rest.count("\n", at, end)
                    rest, begins, num_chars = rest[end:], _ARRAY_GOES_ON, _CHUNK
                    continue
            more = "" if found is None and len(rest) > _CHUNK else text.read(num_chars)
            if not more:
                line += rest.count("\n", 0, at)
                raise _error(path, line, f'{_explain(problem)}; the file must be {{"data": [...]}}') from problem
            rest += more
            num_chars *= 2  # an entry is decoded again whenever more of it is there


def _explain(error: Exception | None) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"no JSON ({error.msg}, column {error.colno})"
    return "no JSON that can be read" if error is None else f"no JSON that can be read ({error})"


def _read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file that are not blank, numbered from 1."""
    line = 0
    with _open(path) as file:
        for line, data in enumerate(file, 1):
            try:
                text = str(data, "utf-8")
            except UnicodeDecodeError as error:
                raise _error(path, line, _NO_TEXT) from error
            text = text.strip("\ufeff \t\r\n")
            if text:
                yield line, text


_NO_TEXT = "not UTF-8 text; name a text file, or one whose name ends in .gz"


@contextmanager
def _open(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, unpacked if its name ends in .gz. What goes wrong on the way is a `ConfigError`."""
    try:
        with path.open("rb") as raw:
            if path.suffix == ".gz":
                with gzip.open(raw) as unpacked, io.BufferedReader(cast(io.RawIOBase, unpacked)) as file:
                    yield file
            else:
                yield raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ConfigError(f"{path} is damaged, or no gzip file ({error}). Get it again, or name another") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: {_NO_TEXT}") from error
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}. Name a trace file") from error


def _digits(text: str) -> int | str:
    """The number that the text is; whatever is no short row of digits stays text, and is refused as such."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 10 else text


def token_count(path: Path, line: int, name: str, value: object) -> int:
    if type(value) is not int or not 1 <= value <= _MAX_TOKENS:
        raise wrong_value(path, line, name, value, f"a whole number from 1 to {_MAX_TOKENS}")
    return value


def _time(path: Path, line: int, name: str, value: object) -> int | float:
    if type(value) not in (int, float) or not 0 <= cast(float, value) <= _MAX_TIME:
        raise wrong_value(path, line, name, value, "a number from 0 up")
    return cast(float, value)


def json_object(path: Path, line: int, name: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise wrong_value(path, line, name, value, "a JSON object")
    return value


def wrong_value(path: Path, line: int, name: str, value: object, allowed: str) -> ConfigError:
    found = f"{name} is missing" if value is None else f"{name} is {reprlib.repr(value)}"
    return _error(path, line, f"{found}; it must be {allowed}")


def _error(path: Path, line: int, text: str) -> ConfigError:
    return ConfigError(f"{path}, line {line}: {text}")
