"""
A standalone script of at most 25 lines that shows a broken rule with plain asyncio.

It imports the engine and Dynamo, nothing of this suite. It is made from what
was recorded: the requests, and at which chunk what was done to them. It has
only the lines that its requests need.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from conformance.catalogue import Rule
from conformance.facts import Facts
from conformance.settings import SuiteSettings
from conformance.transcript import Transcript

MAX_LINES = 25
_MAX_REQUESTS = 6
_MAX_COMMENT = 300

Places = dict[str, int]


def reproducing_script(
    settings: SuiteSettings,
    facts: Facts,
    rule: Rule,
    message: str,
    transcripts: Sequence[Transcript],
    failure: BaseException,
) -> str:
    """The script, or "" where neither a conversation nor code of the check's own can show it."""
    module, _, name = settings.engine.partition(":")
    top = name.split(".")[0]
    head = [
        f"# {rule.id} ({rule.level}): {rule.sentence}"[:_MAX_COMMENT],
        f"# Found: {' '.join(message.split())}"[:_MAX_COMMENT],
        "import asyncio",
    ]
    code = getattr(failure, "code", "")
    if code:
        body = [f"    {line}" for line in code.strip().splitlines()]
        made = [
            f"from {module} import {top}",
            f"Engine, ARGV = {name}, {list(facts.argv)!r}",
            "async def main():",
            *body,
        ]
    elif transcripts:
        made = _conversation(module, name, facts, list(transcripts)[:_MAX_REQUESTS], getattr(failure, "shows", ""))
    else:
        return ""
    return "\n".join([*head, *made, "asyncio.run(main())"]) + "\n"


def runs_through(script: str, within_s: float) -> bool:
    """Whether it ends without an error, in a process of its own that finds the same modules."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", script],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=within_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def _conversation(module: str, name: str, facts: Facts, transcripts: list[Transcript], shows: str) -> list[str]:
    talks = [(f"r{i + 1}", dict(transcript.request), _places(transcript)) for i, transcript in enumerate(transcripts)]
    used = {place for *_, places in talks for place in places}
    calls = [f"talk(engine, {i!r}, {as_code(request)}{_keywords(places)})" for i, request, places in talks]
    if len(calls) == 1:
        asked = [f"    chunks = await {calls[0]}"]
    else:
        asked = [f"    calls = [{', '.join(calls)}]", "    chunks, *others = await asyncio.gather(*calls)"]
    return [
        "from dynamo._core import Context",
        f"from {module} import {name.split('.')[0]}",
        *_talk(used),
        "async def main():",
        f"    engine, _ = await {name}.from_args({list(facts.argv)!r})",
        "    await engine.start(1)",
        *asked,
        "    await engine.cleanup()",
        *([f"    assert {shows}, chunks"] if shows else []),
    ]


def _talk(used: set[str]) -> list[str]:
    """One request, read and dropped as Dynamo's worker does it: `__anext__` and the last reference off the loop."""
    keywords = "".join(f", {place}=None" for place in sorted(used))
    lines = [
        f"async def talk(engine, request_id, request{keywords}):",
        "    context, chunks, held = Context(request_id), [], []",
        "    try:  # called and dropped off the loop, as Dynamo does",
        "        await asyncio.to_thread(lambda: held.append(engine.generate(request, context=context)))",
        "        while not (chunks and chunks[-1].get('finish_reason')):",
    ]
    if "stop" in used or "abort" in used:
        places = ", ".join(sorted(used & {"stop", "abort"}))
        lines.append(f"            if len(chunks) in ({places},): context.stop_generating()")
    if "abort" in used:
        lines.append("            if len(chunks) == abort: await engine.abort(Context(request_id))")
    if "drop" in used:
        lines.append("            if len(chunks) == drop: break")
    return [
        *lines,
        "            step = await asyncio.to_thread(held[0].__anext__)",
        "            chunks.append(await asyncio.wait_for(step, 10)); print(request_id, chunks[-1])",
        "    except (Exception, asyncio.CancelledError) as error:",
        "        print(request_id, repr(error)); chunks.append({'raised': repr(error)})",
        "    await asyncio.to_thread(held.clear)",
        "    return chunks",
    ]


def _places(transcript: Transcript) -> Places:
    """After how many chunks what was done."""
    places: Places = {}
    num_chunks = 0
    for event in transcript.events:
        if event.kind == "chunk":
            num_chunks += 1
        kind = {"kill": "stop", "cancel": "drop"}.get(event.kind, event.kind)
        if kind in ("stop", "abort", "drop"):
            places.setdefault(kind, num_chunks)
    return places


def _keywords(places: Places) -> str:
    return "".join(f", {place}={count}" for place, count in sorted(places.items()))


def as_code(value: Any) -> str:
    """A request as Python text: what is None, or one token over and over, takes little room."""
    if isinstance(value, dict):
        unset = [key for key, item in value.items() if item is None]
        if len(unset) < 3:
            unset = []
        said = ", ".join(f"{key!r}: {as_code(item)}" for key, item in value.items() if key not in unset)
        return f"{{{said}}}" + (f" | dict.fromkeys({' '.join(unset)!r}.split())" if unset else "")
    if isinstance(value, list) and len(value) > 8 and len(set(map(repr, value))) == 1:
        return f"[{value[0]!r}] * {len(value)}"
    return repr(value)
