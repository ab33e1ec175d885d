"""The rule on what an engine may do with its context."""

from __future__ import annotations

import sys
import weakref
from typing import Any

from hypothesis import strategies as st

from conformance import release
from conformance.bench import Bench, Draw
from conformance.context import RequestContext
from conformance.reproducer import as_code
from conformance.rules import check
from conformance.streams import Stream
from conformance.transcript import Transcript, expect
from conformance.wire import requests

# Documented in dynamo/_core.pyi, 1.2.1 to 1.6.1 together: an engine for several releases may ask whether one is there.
DOCUMENTED = frozenset(
    {
        "id",
        "is_stopped",
        "is_killed",
        "stop_generating",
        "async_killed_or_stopped",
        "notify_first_token",
        "trace_id",
        "span_id",
        "parent_span_id",
        "metadata",
        "trace_headers",
        "current_span",
        "start_span",
        "detached",
    }
)


@check("ctx.surface", in_process=True, max_examples=12)
async def surface(bench: Bench, draw: Draw) -> None:
    request = dict(await bench.prepared(draw(requests())))
    place = draw(st.integers(0, 3))
    places: dict[str, Any] = draw(
        st.sampled_from([{}, {"stop_after": place}, {"stop_after": place, "aborts": True}, {"drop_after": place}])
    )
    context = StrictContext(bench.next_id())
    stream = Stream(bench.settings.driver, bench.engine, request, context.id(), context=context, **places)
    bench.transcripts.append(stream.transcript)
    await stream.wait_chunks(1, bench.answer_within_s())
    has_weak_reference = weakref.getweakrefcount(context) > 0
    transcript = await stream.finish(bench.answer_within_s())
    surface_of(context, transcript)
    expect(
        not has_weak_reference,
        "the engine makes a weak reference to the context; Dynamo's Context takes none, so that no request is served",
        transcript,
        code=_code(transcript),
    )


class StrictContext(RequestContext):
    """Tells what the engine does from what the suite does, by whose code is running."""

    def __getattribute__(self, name: str) -> Any:
        if name in DOCUMENTED or name.startswith("__") or _is_ours():
            return super().__getattribute__(name)
        self.touched.append(name)
        raise AttributeError(f"Dynamo's Context has no documented attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "metadata" and not _is_ours():
            self.touched.append(f"{name} = ...")
            raise AttributeError(f"Dynamo's Context has no attribute {name!r}, and takes none")
        super().__setattr__(name, value)

    def fresh(self) -> RequestContext:
        other = StrictContext(self._id, self._controller)
        other.touched = self.touched
        return other


def _is_ours() -> bool:
    module = str(sys._getframe(2).f_globals.get("__name__"))
    return module.startswith("conformance.") and not module.startswith("conformance.selftest.")


def surface_of(context: RequestContext, *transcripts: Transcript) -> None:
    names = sorted({name for name in context.touched if name not in DOCUMENTED})
    expect(
        not names,
        f"the engine uses {', '.join(names)} of the context, which is not documented and may be gone in the next "
        f"release; documented are {', '.join(sorted(DOCUMENTED))}",
        *transcripts,
        code=_code(transcripts[0]) if transcripts else "",
    )


def _code(transcript: Transcript) -> str:
    known = sorted(name for name in DOCUMENTED if hasattr(release.core("Context"), name))
    return f"""
from dynamo._core import Context
class Strict:
    __slots__ = ("inner", "names")
    def __init__(self, id): object.__setattr__(self, "inner", Context(id)); object.__setattr__(self, "names", [])
    def __getattribute__(self, name):
        if name not in {known}: object.__getattribute__(self, "names").append(name)
        return getattr(object.__getattribute__(self, "inner"), name)
    def __setattr__(self, name, _): object.__getattribute__(self, "names").append(f"{{name}} = ...")
engine, _ = await Engine.from_args(ARGV)
await engine.start(1)
strict = Strict("r1")
request = {as_code(dict(transcript.request))}
async for _ in engine.generate(request, context=strict): strict.stop_generating()
await engine.abort(strict)
await engine.cleanup()
names = [name for name in object.__getattribute__(strict, "names") if name[:2] != "__"]
assert not names, names
"""
