"""
Rules on KV events: what `kv_event_sources` gives, and what is published through a PushSource.

Each check makes an engine of its own and gives it recording publishers in the worker's order
(`conformance.recording`). The checks named `*_of` are pure: they take events and raise.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from conformance.bench import Bench, Draw
from conformance.recording import KvEvent, RecordingKvPublisher, Served, Tree, hand_over, serve
from conformance.reproducer import as_code
from conformance.rules import check
from conformance.runner_errors import NotHere
from conformance.streams import Stream
from conformance.transcript import Transcript, expect
from conformance.wire import wire_request

MAX_U32 = 2**32 - 1
SOURCES = ("ZmqSource", "PushSource")


# The sources.


@check("kv.sources_shape", needs_engine=False, max_examples=3)
async def sources_shape(bench: Bench, draw: Draw) -> None:
    engine = await bench.make()
    await engine.start(draw(st.integers(0, 2**64 - 1)))
    sources = await engine.kv_event_sources()
    sources_shape_of(sources)
    for source in sources:
        problem = await hand_over(source, RecordingKvPublisher()) if hasattr(source, "on_ready") else ""
        expect(
            not problem,
            f"{problem}; it is called once with the publisher, on a thread without an event loop, and what it raises "
            "ends start-up",
            code=_sources_script(_ON_READY),
        )


def sources_shape_of(sources: Any) -> None:
    code = _sources_script(
        f"""\
assert type(sources) is list, sources
assert all(type(source).__name__ in {SOURCES} for source in sources), sources
assert all(0 <= source.dp_rank.__index__() < 2**32 for source in sources), sources
assert all(callable(getattr(source, "on_ready", print)) for source in sources), sources
assert all(getattr(source, "endpoint", "x").strip() for source in sources), sources"""
    )
    expect(
        isinstance(sources, list),
        f"kv_event_sources gave {type(sources).__name__}; the bridge takes a list only; anything else ends start-up",
        code=code,
    )
    for source in sources:
        name = type(source).__name__
        expect(
            name in SOURCES,
            f"kv_event_sources gave a {name}; the bridge goes by the exact name of the class, {' or '.join(SOURCES)}, "
            "and takes no subclass",
            code=code,
        )
        rank = source.dp_rank
        expect(
            hasattr(rank, "__index__") and 0 <= int(rank) <= MAX_U32,
            f"a {name} has dp_rank {rank!r}; it is an int from 0 to 2^32 - 1",
            code=code,
        )
        if name == "PushSource":
            expect(
                callable(source.on_ready),
                f"a PushSource has on_ready {source.on_ready!r}; it is called with the publisher",
                code=code,
            )
        else:
            expect(
                isinstance(source.endpoint, str) and source.endpoint.strip(),
                f'a ZmqSource has endpoint {source.endpoint!r}; it is a str such as "tcp://127.0.0.1:5557"',
                code=code,
            )


_ON_READY = """\
publisher = type("Publisher", (), dict.fromkeys(["publish_stored", "publish_removed"], lambda *_, **__: None))()
ready = [source.on_ready for source in again if hasattr(source, "on_ready")]
[await asyncio.get_running_loop().run_in_executor(None, one, publisher) for one in ready]"""


def _sources_script(test: str) -> str:
    return f"""\
engine, _ = await Engine.from_args(ARGV)
await engine.start(1)
sources = await engine.kv_event_sources()
again = await engine.kv_event_sources()
{test}
await engine.cleanup()"""


@check("kv.sources_stable", needs_engine=False, max_examples=5)
async def sources_stable(bench: Bench, draw: Draw) -> None:
    engine = await bench.make_started()
    ranks = []
    for _ in range(draw(st.integers(2, 4))):
        ranks.append([getattr(source, "dp_rank", None) for source in await engine.kv_event_sources() or ()])
        if draw(st.booleans()):
            await bench.talk(wire_request([1, 2, 3], max_tokens=2), engine=engine)
    sources_stable_of(ranks)


def sources_stable_of(calls: Sequence[Sequence[Any]]) -> None:
    """`calls`: the ranks that each call gave."""
    code = _sources_script(
        """\
ranks = [source.dp_rank for source in sources]
assert len(ranks) == len(set(ranks)), ranks
assert set(ranks) == {source.dp_rank for source in again}, (ranks, again)"""
    )
    for ranks in calls:
        twice = sorted({rank for rank in ranks if list(ranks).count(rank) > 1}, key=str)
        expect(
            not twice,
            f"kv_event_sources has rank {twice} more than once in {list(ranks)}; one source a rank",
            code=code,
        )
        expect(
            set(ranks) == set(calls[0]),
            f"kv_event_sources gave the ranks {list(calls[0])} first and {list(ranks)} later; they stay as they are",
            code=code,
        )


# The events.


@dataclass(frozen=True, slots=True)
class Move:
    """One request, and how it ends: after so many chunks, or so many seconds."""

    request: dict[str, Any]
    stop_after: int | None = None
    drop_after: int | None = None
    stop_after_s: float | None = None
    aborts: bool = False
    is_alone: bool = True  # it is over before the next begins


@check("kv.block_shape", needs_engine=False, max_examples=12)
async def block_shape(bench: Bench, draw: Draw) -> None:
    served = await _serve_kv(bench)
    await _make(served, _moves(draw, served))
    block_size = served.numbers["kv_cache_block_size"]
    for publisher in served.kv:
        block_shape_of(publisher.events, block_size, bench.transcripts)


def block_shape_of(events: Sequence[KvEvent], block_size: int, transcripts: Sequence[Transcript] = ()) -> None:
    code = _script(
        transcripts,
        f"""\
for kind, hashes, tokens, sizes, parent in events:
    assert set(sizes) <= {{{block_size}}} and all(-2**63 <= h < 2**63 for h in hashes), (sizes, hashes)
    assert kind == "removed" or len(sizes) == len(hashes) and sum(sizes) <= len(tokens), (sizes, hashes, tokens)""",
    )
    for event in events:
        hashes = [*event.block_hashes, *([] if event.parent_hash is None else [event.parent_hash])]
        for one in hashes:
            expect(
                hasattr(one, "__index__") and -(2**63) <= int(one) < 2**63,
                f"a block hash is {one!r}; hashes are signed 64-bit ints, and the publisher raises for others",
                *transcripts,
                code=code,
            )
        if event.kind != "stored":
            continue
        num_blocks, num_sizes = len(event.block_hashes), len(event.num_block_tokens)
        expect(
            num_blocks == num_sizes,
            f"a stored event has {num_blocks} block_hashes and {num_sizes} num_block_tokens; one of each for a block",
            *transcripts,
            code=code,
        )
        wrong = [size for size in event.num_block_tokens if size != block_size]
        expect(
            not wrong,
            f"a stored event has a block of {wrong[:1]} tokens, and kv_cache_block_size is {block_size}; the router "
            "drops such an event. Publish whole blocks only",
            *transcripts,
            code=code,
        )
        num_tokens, num_named = len(event.token_ids), sum(event.num_block_tokens)
        expect(
            num_named <= num_tokens,
            f"a stored event has {num_named} tokens in its blocks and {num_tokens} token_ids; the router drops it",
            *transcripts,
            code=code,
        )


@check("kv.parent", needs_engine=False, max_examples=12)
async def parent(bench: Bench, draw: Draw) -> None:
    served = await _serve_kv(bench)
    await _make(served, _moves(draw, served))
    for publisher in served.kv:
        parent_of(publisher.events, bench.transcripts)


def parent_of(events: Sequence[KvEvent], transcripts: Sequence[Transcript] = ()) -> None:
    for orphan in Tree.of(events).orphans:
        expect(
            False,
            f"a stored event has the parent_hash {orphan.parent_hash!r}, and no such block is stored at that time; "
            "the router drops it. None is the parent of a prompt's first block",
            *transcripts,
            code=_script(transcripts, _REPLAY),
        )


@check("kv.balance", needs_engine=False, max_examples=12)
async def balance(bench: Bench, draw: Draw) -> None:
    served = await _serve_kv(bench)
    total = served.numbers["total_kv_blocks"]
    await _make(served, [Move(wire_request(_text(9, _num_tokens(served, 2)), max_tokens=2))])
    keeps_blocks = any(tree.live for tree in served.trees())  # a prefix cache, for as long as there is room
    load = [Move(request, is_alone=False) for request in served.too_much()] if draw(st.booleans()) else []
    halfway_s = 0.3 * bench.facts.first_chunk_s
    halfway = Move(wire_request(_text(8, _num_tokens(served, 2)), max_tokens=4), stop_after_s=halfway_s)
    await _make(served, load or [halfway, *_moves(draw, served)])
    for publisher in served.kv:
        balance_of(publisher.events, total, bench.transcripts)
    if keeps_blocks:
        return

    def is_empty() -> bool:
        return not any(tree.live for tree in served.trees())

    expect(
        await served.eventually(is_empty),
        f"all requests are over, and {_num_live(served)} blocks are still stored for the router; when a request ended "
        "by itself its blocks were removed, so a stopped or dropped one should give them back as well",
        *bench.transcripts,
        code=_script(bench.transcripts, f"{_REPLAY}\nassert not live, live"),
        is_should=True,
    )
    # Removals that wait to be published when `cleanup` begins.
    last = [Move(wire_request(_text(20 + i, _num_tokens(served, 1)), max_tokens=1), is_alone=False) for i in range(4)]
    await _make(served, last, settles=False)
    if served.has_threads:  # a thread that publishes at once needs its turn, and may not publish in cleanup
        await bench.let_threads_run(lambda: False, 0.05)
    await served.engine.cleanup()
    await served.settle()
    expect(
        await served.eventually(is_empty, 0.3),
        f"after cleanup {_num_live(served)} blocks are stored for the router whose requests were over before it began; "
        "their removal was never published, and should be, before cleanup or in it",
        *bench.transcripts,
        code=_script(bench.transcripts[-4:], f"{_REPLAY}\nassert not live, live", sees_cleanup=True),
        is_should=True,
    )
    for publisher in served.kv:
        balance_of(publisher.events, total, bench.transcripts)


def balance_of(events: Sequence[KvEvent], total_blocks: Any, transcripts: Sequence[Transcript] = ()) -> None:
    tree = Tree.of(events)
    expect(
        not tree.strangers,
        f"the block {tree.strangers[:1]} was removed and was not stored then; each block is removed once, by what "
        "stored it",
        *transcripts,
        code=_script(transcripts, _REPLAY),
    )
    if isinstance(total_blocks, int):
        expect(
            tree.most_live <= total_blocks,
            f"{tree.most_live} blocks were stored at one time, and total_kv_blocks is {total_blocks}",
            *transcripts,
            code=_script(
                transcripts, f"{_REPLAY}\n    assert len(live) <= config.llm.total_kv_blocks, len(live)", at_once=True
            ),
        )


@check("kv.tokens_true", needs_engine=False, max_examples=12)
async def tokens_true(bench: Bench, draw: Draw) -> None:
    served = await _serve_kv(bench)
    await _make(served, _moves(draw, served))
    for publisher in served.kv:
        tokens_true_of(publisher.events, bench.transcripts)


def tokens_true_of(events: Sequence[KvEvent], transcripts: Sequence[Transcript]) -> None:
    if any(event.is_eagle for event in events):
        return  # its blocks overlap
    said = [[*transcript.request["token_ids"], *transcript.token_ids] for transcript in transcripts]
    for tokens in Tree.of(events).stored:
        # What the engine computed and nobody read any more is not in the transcript, so both ends are open.
        expect(
            any(tokens[: len(known)] == known[: len(tokens)] for known in said),
            f"a stored block ends the tokens {_short(tokens)}, with which no prompt and answer begins; "
            "the router finds a cached prompt by its tokens",
            *transcripts,
            code=_script(
                transcripts,
                """\
for kind, hashes, tokens, sizes, parent in events:
    prompts = [request["token_ids"] for request, *_ in TALKS]
    assert parent is not None or not tokens or any(p[:len(tokens)] == tokens[:len(p)] for p in prompts), tokens""",
            ),
        )


def _short(tokens: Sequence[int]) -> str:
    return str(list(tokens)) if len(tokens) <= 24 else f"{str(list(tokens[:24]))[:-1]}, ... {len(tokens)} in all]"


# Requests that make KV events.


async def _serve_kv(bench: Bench) -> Served:
    served = await serve(bench)
    if not isinstance(served.numbers["kv_cache_block_size"], int):
        raise NotHere("kv_cache_block_size is not set, and without it a worker starts no KV publisher")
    if served.kv_problem:
        raise NotHere(f"{served.kv_problem}; see kv.sources_shape")
    if not served.kv:
        raise NotHere("no PushSource: what is published over ZMQ is not seen here")
    return served


def _text(seed: int, length: int) -> list[int]:
    """Tokens that only the seed decides: of one seed, a shorter text is the beginning of a longer one."""
    return [(seed * 37 + i * 11 + i // 7) % 199 + 1 for i in range(length)]


def _num_tokens(served: Served, num_blocks: int) -> int:
    """Of a prompt with that many whole blocks, as far as the context goes."""
    return _within(served, num_blocks * served.numbers["kv_cache_block_size"] + 1)


def _within(served: Served, length: int) -> int:
    context = served.numbers["context_length"]
    return max(1, min(length, context - 8)) if isinstance(context, int) else length


def _moves(draw: Draw, served: Served) -> list[Move]:
    """A few requests, some with a common beginning, one with at least two whole blocks."""
    block_size = served.numbers["kv_cache_block_size"]
    moves = []
    for i in range(draw(st.integers(1, 4))):
        num_blocks = draw(st.integers(0 if i else 2, 4))
        length = _within(served, max(1, num_blocks * block_size + draw(st.integers(0, block_size - 1))))
        request = wire_request(
            _text(draw(st.integers(0, 2)), length), max_tokens=draw(st.integers(1, min(2 * block_size, 16)))
        )
        context = served.numbers["context_length"]
        if isinstance(context, int):
            room = max(1, context - length)
            request["stop_conditions"]["max_tokens"] = min(request["stop_conditions"]["max_tokens"], room)
        end = draw(st.sampled_from(["whole", "stop", "drop", "stop in time"]))
        fraction = draw(st.sampled_from([0.3, 0.6])) if end == "stop in time" else 0.0
        moves.append(
            Move(
                request,
                stop_after=draw(st.integers(0, 3)) if end == "stop" else None,
                drop_after=draw(st.integers(0, 3)) if end == "drop" else None,
                stop_after_s=fraction * served.bench.facts.first_chunk_s if fraction else None,
                aborts=end.startswith("stop") and draw(st.booleans()),
                is_alone=draw(st.booleans()),
            )
        )
    return moves


async def _make(served: Served, moves: Sequence[Move], *, settles: bool = True) -> None:
    bench = served.bench
    streams: list[Stream] = []
    for move in moves:
        stream = await bench.open(
            move.request,
            engine=served.engine,
            stop_after=move.stop_after,
            drop_after=move.drop_after,
            aborts=move.aborts,
        )
        streams.append(stream)
        if move.stop_after_s is not None:
            await bench.let_pass(move.stop_after_s)
            if move.aborts:
                await stream.abort()
            else:
                stream.stop()
        if move.is_alone:
            await stream.finish(bench.answer_within_s())
        else:
            await asyncio.sleep(0)
    for stream in streams:
        if not stream.is_over:
            await stream.finish(bench.answer_within_s())
    if not settles:
        return
    await served.settle()
    block_size = served.numbers["kv_cache_block_size"]
    done = [one.transcript for one in streams if one.transcript.terminals and not one.transcript.is_cancelled]
    lengths = [len(transcript.request["token_ids"]) for transcript in done]
    if not served.num_events and max(lengths, default=0) >= 2 * block_size:
        raise NotHere(f"no KV event was published for a prompt of {max(lengths)} tokens, in blocks of {block_size}")


def _num_live(served: Served) -> int:
    return sum(len(tree.live) for tree in served.trees())


# The reproducing script.


_REPLAY = """\
for kind, hashes, tokens, sizes, parent in events:
    assert parent in live | {None} if kind == "stored" else live >= set(hashes), (kind, parent, hashes)
    live = live | set(hashes) if kind == "stored" else live - set(hashes)"""


def _script(transcripts: Sequence[Transcript], test: str, *, at_once: bool = False, sees_cleanup: bool = False) -> str:
    """
    The requests again, in a row or at once, and `test` on `events`: all that was published before cleanup (or in it).

    `test` has at most 4 lines.
    """
    talks = ", ".join(_talk(transcript) for transcript in transcripts)
    return f"""\
from dynamo._core import Context
log, live, TALKS = [], set(), [{talks}]
class Publisher:
    {_PUBLISH_STORED}
    def publish_removed(self, block_hashes): log.append(("removed", block_hashes, [], [], None))
    def publish_batch(self, batch): [getattr(self, "publish_" + event.pop("type"))(**event) for event in batch]
engine = (await Engine.from_args(ARGV))[0]; config = await engine.start(1)
for source in await engine.kv_event_sources(): source.on_ready(Publisher())
async def talk(request, end, stop_s, context):
    if stop_s: asyncio.get_running_loop().call_later(stop_s, context.stop_generating)
    async for chunk in engine.generate(request, context=context):
        if (end := end - 1) == 0: context.stop_generating()
{_TALK_AT_ONCE if at_once else _TALK_IN_A_ROW}
{_AFTER_CLEANUP if sees_cleanup else _BEFORE_CLEANUP}
{test}"""


_PUBLISH_STORED = (
    "def publish_stored(self, token_ids, num_block_tokens, block_hashes, parent_hash=None, *_, **__): "
    'log.append(("stored", block_hashes, token_ids, num_block_tokens, parent_hash))'
)
_TALK_IN_A_ROW = 'for i, one in enumerate(TALKS): await talk(*one, Context(f"r{i}"))'
_TALK_AT_ONCE = 'await asyncio.gather(*(talk(*one, Context(f"r{i}")) for i, one in enumerate(TALKS)))'
_BEFORE_CLEANUP = "await asyncio.sleep(2); events = list(log); await engine.cleanup()"
_AFTER_CLEANUP = "await engine.cleanup(); await asyncio.sleep(1); events = list(log)"


def _talk(transcript: Transcript) -> str:
    """A request, and after how many chunks it is stopped, or after how many seconds (0: never)."""
    num_chunks, num_seconds = 0, 0.0
    for event in transcript.events:
        num_chunks += event.kind == "chunk"
        if event.kind in ("stop", "abort", "drop"):
            if not num_chunks and event.time_s > 0:
                num_seconds = round(event.time_s, 4)
            return f"({as_code(dict(transcript.request))}, {0 if num_seconds else max(1, num_chunks)}, {num_seconds})"
    return f"({as_code(dict(transcript.request))}, 0, 0)"
