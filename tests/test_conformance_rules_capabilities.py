"""
The rules on what an engine offers beyond answers: kv, metrics, health, logp, ctl, disagg, encode.

Each broken engine is noticed by the rule that names it, the correct ones by none.
"""

from __future__ import annotations

import math
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

import pytest

from conformance import release
from conformance.catalogue import load_catalogue, select
from conformance.facts import find_facts
from conformance.recording import KvEvent, RecordingKvPublisher, RecordingMetrics, Snapshot, Tree
from conformance.rules.ctl import dispatch_of, sets_of
from conformance.rules.disagg import decode_requires_of, handoff_of, prefill_one_of, prefill_params_of
from conformance.rules.encode import require_of, terminal_of
from conformance.rules.health import payload_of, probe_answer_of, probe_request
from conformance.rules.kv import (
    balance_of,
    block_shape_of,
    parent_of,
    sources_shape_of,
    sources_stable_of,
    tokens_true_of,
)
from conformance.rules.logp import aligned_of, bad_option_of, prompt_of, top_of
from conformance.rules.metrics import range_problems, ranks_of, type_problems
from conformance.selftest.kill import verdict_on, verdicts_of
from conformance.selftest.mutants import Mutant, mutants
from conformance.selftest.toy import Blocks, ToyEngine
from conformance.settings import Role, SuiteSettings
from conformance.streams import DriverName
from conformance.transcript import Event, Transcript, Violation
from conformance.verdict import Outcome
from conformance.wire import wire_request

AREAS = ("kv", "metrics", "health", "logp", "ctl", "disagg", "encode")
RULES = select(load_catalogue(), [f"{area}.*" for area in AREAS])
MUTANTS = [
    mutant
    for mutant in mutants()
    if mutant.rule_id.partition(".")[0] in AREAS
    and load_catalogue()[mutant.rule_id].is_in_release(release.dynamo_version())
]
TOY = "conformance.selftest.toy:ToyEngine"
ALL_FLAGS = "--kv-events --metrics --logprobs --controls --logits"
since_1_3 = pytest.mark.skipif(not release.is_at_least("1.3"), reason="from 1.3")


pytestmark = pytest.mark.usefixtures("quiet")

# Broken engines.


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.rule_id}-{mutant.name}-{mutant.role}")
def test_each_broken_engine_is_noticed_by_the_rule_that_names_it(mutant: Mutant) -> None:
    verdict = verdict_on(mutant, seed=1, shrinks=False)
    assert verdict.outcome is Outcome.FAILED, verdict.reason
    assert verdict.finding is not None
    assert verdict.finding.script.count("\n") <= 25


def test_every_rule_of_these_areas_has_a_broken_engine() -> None:
    installed = {rule.id for rule in RULES if rule.is_in_release(release.dynamo_version())}
    assert installed <= {mutant.rule_id for mutant in MUTANTS}


# One of each kind of script: about a publisher, a hook, a pair of engines, a conversation.
SHOWN = (
    "PublishesCountingTokens",
    "CallbackKeepsMetrics",
    "WakesUpOnce",
    "HandoffWithAnotherKey",
    "PrefillKeepsMinTokens",
    "PromptLogProbsLost",
)


@pytest.mark.parametrize(
    "mutant", [mutant for mutant in MUTANTS if mutant.name in SHOWN], ids=lambda mutant: f"{mutant.name}-{mutant.role}"
)
def test_the_reproducing_script_fails_on_the_broken_engine_only(mutant: Mutant) -> None:
    finding = verdict_on(mutant, seed=1, shrinks=False).finding
    assert finding is not None
    module, _, name = mutant.engine.partition(":")
    correct = (
        finding.script.replace(f"from {module} import {name}", "from conformance.selftest.toy import ToyEngine")
        .replace(f"= {name},", "= ToyEngine,")
        .replace(f"await {name}.from_args", "await ToyEngine.from_args")
    )
    assert correct != finding.script
    scripts = [_start(finding.script), _start(correct)]
    output, status = zip(*[(script.communicate(timeout=60)[0], script.returncode) for script in scripts], strict=True)
    assert status == (1, 0), output


def _start(script: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(["", *sys.path])},
    )


# Correct engines, of kinds that the toy engine is not.


class CachingBlocks(Blocks):
    """Keeps what nobody uses any more for as long as there is room, as a prefix cache does."""

    room = 40

    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks)
        self.cached: dict[int, None] = {}  # in the order of storing, so that no parent comes after its child

    def take(self, token_ids: Any) -> list[int]:
        hashes = self.hashes_of(token_ids)
        self.users.update(hashes)
        self.make_room(sum(one not in self.cached for one in hashes))
        first = next((i for i, one in enumerate(hashes) if one not in self.cached), None)
        if first is not None:
            self.cached |= dict.fromkeys(hashes[first:])
            self.publish_stored(token_ids, hashes, first)
        return hashes

    def make_room(self, num_needed: int) -> None:
        gone = [one for one in reversed(self.cached) if not self.users[one]]
        gone = gone[: max(0, len(self.cached) + num_needed - self.room)]
        for one in gone:
            del self.cached[one]
        if gone:
            self.publish_removed(gone)

    def give_back(self, hashes: Any) -> None:
        self.users.subtract(hashes)
        self.users += type(self.users)()  # drops what is 0


class CachingToy(ToyEngine):
    """An engine with a prefix cache, and a name for each control in a tuple."""

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.blocks = CachingBlocks(self.blocks.num_blocks)

    def supported_controls(self) -> Any:
        return tuple(sorted(super().supported_controls()))

    async def engine_update(self, update: str, body: dict[str, Any]) -> dict[str, Any]:
        if update in self.supported_updates() and body and not isinstance(body.get("value"), int):
            raise ValueError("value must be an integer")
        return await super().engine_update(update, body)


class ThreadedToy(ToyEngine):
    """Publishes from a thread of its own, in batches where the release has them; the thread ends in cleanup."""

    thread: threading.Thread | None = None

    def on_kv_ready(self, publisher: Any) -> None:
        self.events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self.publish_all, args=(publisher,), name="toy-publisher")
        self.thread.start()
        self.blocks.publisher = self

    def publish_stored(self, **event: Any) -> None:
        self.events.put({"type": "stored", **event})

    def publish_removed(self, **event: Any) -> None:
        self.events.put({"type": "removed", **event})

    def publish_all(self, publisher: Any) -> None:
        while (event := self.events.get()) is not None:
            if hasattr(publisher, "publish_batch"):
                publisher.publish_batch([event])
            else:
                getattr(publisher, f"publish_{event.pop('type')}")(**event)
            super().publish_snapshot()

    def publish_snapshot(self) -> None:
        if self.thread is None:
            super().publish_snapshot()

    async def cleanup(self) -> None:
        await super().cleanup()
        if self.thread is not None:
            self.events.put(None)
            self.thread.join()


class PairsToy(ToyEngine):
    """Sends two tokens in a chunk; a prefill worker of its kind sends its address ahead, and no probe sees that."""

    async def generate(self, request: Mapping[str, Any], context: Any) -> AsyncGenerator[dict[str, Any], None]:
        if self.role == "prefill" and request.get("_HEALTH_CHECK") is not True:
            yield {"token_ids": [], "index": 0, "disaggregated_params": {"bootstrap_room": 7}}
        held: dict[str, Any] | None = None
        stream = super().generate(request, context)
        try:
            async for chunk in stream:
                chunk.pop("disaggregated_params", None)
                if held is None:
                    held = chunk
                else:
                    chunk["token_ids"] = held["token_ids"] + chunk["token_ids"]
                    for key in ("log_probs", "top_logprobs"):
                        if key in held and key in chunk:
                            chunk[key] = held[key] + chunk[key]
                        elif key in held:
                            chunk.pop(key, None)
                    held = None
                    yield chunk
                if held is not None and "finish_reason" in held:
                    yield held
        finally:
            del stream  # dropped where this one is

    def chunk(self, work: Any, token: int) -> dict[str, Any]:
        chunk = super().chunk(work, token)
        if "top_logprobs" in chunk and len(work.output) == 1:
            chunk["top_logprobs"] = [[]]  # as SGLang has it for a token without candidates
        return chunk


class ZmqToy(ToyEngine):
    """Publishes over ZMQ, which is not looked at."""

    async def kv_event_sources(self) -> Any:
        module: Any = release.submodule("publisher")
        return [module.ZmqSource(endpoint="tcp://127.0.0.1:5557", dp_rank=rank) for rank in (0, 1)]


def _own(name: str) -> str:
    return f"tests.test_conformance_rules_capabilities:{name}"


CORRECT = [
    pytest.param(TOY, ALL_FLAGS, None, "bridge", id="agg"),
    pytest.param(TOY, ALL_FLAGS, None, "plain", id="agg, plain driver"),
    pytest.param(TOY, "", None, "bridge", id="agg, no flags"),
    pytest.param(TOY, ALL_FLAGS, "prefill", "bridge", id="prefill"),
    pytest.param(TOY, ALL_FLAGS, "decode", "bridge", id="decode"),
    pytest.param(TOY, ALL_FLAGS, "encode", "bridge", id="encode", marks=since_1_3),
    pytest.param(TOY, f"{ALL_FLAGS} --data-parallel-size 3", None, "bridge", id="three ranks", marks=since_1_3),
    pytest.param(TOY, "--route-to-encoder", None, "bridge", id="behind an encoder", marks=since_1_3),
    pytest.param(TOY, "--route-to-encoder", "prefill", "plain", id="prefill behind an encoder", marks=since_1_3),
    pytest.param("conformance.selftest.toy:ToyWithoutProbe", ALL_FLAGS, None, "bridge", id="no probe"),
    pytest.param(_own("CachingToy"), ALL_FLAGS, None, "bridge", id="prefix cache"),
    pytest.param(_own("ThreadedToy"), ALL_FLAGS, None, "bridge", id="own thread"),
    pytest.param(_own("PairsToy"), ALL_FLAGS, None, "bridge", id="two tokens a chunk"),
    pytest.param(_own("PairsToy"), ALL_FLAGS, "prefill", "bridge", id="address ahead"),
    pytest.param(_own("ZmqToy"), ALL_FLAGS, None, "bridge", id="ZMQ", marks=since_1_3),
]


@pytest.mark.parametrize(("engine", "engine_args", "role", "driver"), CORRECT)
def test_a_correct_engine_breaks_none_of_these_rules(
    engine: str, engine_args: str, role: Role | None, driver: DriverName
) -> None:
    settings = SuiteSettings(engine, engine_args, driver, role, seed=1, max_examples=5)
    broken = {
        verdict.rule.id: verdict.finding.message
        for verdict in verdicts_of(settings, RULES)
        if verdict.finding is not None
    }
    assert broken == {}


@since_1_3
def test_the_same_in_real_time() -> None:
    rules = select(load_catalogue(), ["kv.*", "metrics.*", "ctl.*"])
    settings = SuiteSettings(_own("ThreadedToy"), ALL_FLAGS, clock="real", max_examples=2, seed=1)
    verdicts = list(verdicts_of(settings, rules))
    assert [(verdict.rule.id, verdict.outcome) for verdict in verdicts] == [(rule.id, Outcome.PASSED) for rule in rules]


@since_1_3
@pytest.mark.parametrize(("name", "skipped"), [("ZmqToy", 4), ("ThreadedToy", 0), ("CachingToy", 0)])
def test_a_rule_that_has_nothing_to_look_at_says_so(name: str, skipped: int) -> None:
    settings = SuiteSettings(_own(name), ALL_FLAGS, seed=2, max_examples=3)
    verdicts = list(verdicts_of(settings, select(load_catalogue(), ["kv.*"])))
    assert sum(verdict.outcome is Outcome.SKIPPED for verdict in verdicts) == skipped, verdicts


@since_1_3
def test_a_dry_run_with_an_engine_that_changes_its_requests_leaves_the_next_as_it_was() -> None:
    """NVIDIA's enforce_prefill_max_tokens works in place."""
    sample = "dynamo.common.backend.sample_engine:SampleLLMEngine"
    find_facts(SuiteSettings(sample, "--disaggregation-mode prefill", clock="virtual"))
    assert len(find_facts(SuiteSettings(sample, clock="virtual")).output) == 6


class StallingToy(ToyEngine):
    """Its host stalls in its first answer."""

    has_stalled = False

    async def generate(self, request: Any, context: Any) -> AsyncGenerator[Any, None]:
        async for chunk in super().generate(request, context):
            if not StallingToy.has_stalled:
                StallingToy.has_stalled = True
                time.sleep(0.2)  # noqa: ASYNC251
            yield chunk


@pytest.mark.parametrize("clock", ["auto", "virtual"])
def test_a_step_in_virtual_time_does_not_last_longer_because_the_host_has_stalled(clock: str) -> None:
    StallingToy.has_stalled = False
    facts = find_facts(SuiteSettings(_own("StallingToy"), clock=clock))
    calm = find_facts(SuiteSettings(_own("StallingToy"), clock=clock))
    assert (facts.clock, facts.first_chunk_s, facts.gap_s) == ("virtual", calm.first_chunk_s, calm.gap_s)
    assert facts.gap_s < 0.1


# Planted violations: what was recorded, without an engine.


def said(*chunks: Any, error: Exception | None = None, **request: Any) -> Transcript:
    events = [Event(0.0, "chunk", {"index": 0, **chunk}) for chunk in chunks]
    if error is not None:
        events.append(Event(0.0, "error", error))
    full = wire_request([1, 2, 3], max_tokens=4)
    full["output_options"] = {**full["output_options"], **request.pop("output", {})}
    return Transcript("r1", {**full, **request}, events)


def stored(hashes: Any, tokens: Any, parent: Any = None, size: int = 2) -> KvEvent:
    return KvEvent("stored", hashes, tokens, [size] * len(hashes), parent)


def removed(*hashes: int) -> KvEvent:
    return KvEvent("removed", list(hashes))


def snapshot(rank: Any = 0, **fields: Any) -> list[str]:
    usual = {
        "kv_used_blocks": 1,
        "kv_total_blocks": 4,
        "gpu_cache_usage": 0.25,
        "dp_rank": 0,
        "kv_cache_hit_rate": None,
    }
    one = Snapshot(rank, usual | fields)
    return type_problems(one, [0]) or range_problems(one)


PLAIN = {"token_ids": [5]}
END = {"token_ids": [6], "finish_reason": "length"}
TOP = {"rank": 1, "token_id": 5, "token": None, "logprob": -0.5}


class ZmqSource:
    def __init__(self, endpoint: Any, dp_rank: Any = 0) -> None:
        self.endpoint, self.topic, self.dp_rank = endpoint, "", dp_rank


BROKEN: list[Any] = [
    pytest.param(lambda: sources_shape_of(None), id="sources are None"),
    pytest.param(lambda: sources_shape_of([object()]), id="source of no kind"),
    pytest.param(lambda: sources_shape_of([ZmqSource("")]), id="no endpoint"),
    pytest.param(lambda: sources_shape_of([ZmqSource("tcp://h:1", 2**32)]), id="rank of 33 bits"),
    pytest.param(lambda: sources_stable_of([[0, 1], [0]]), id="a rank goes away"),
    pytest.param(lambda: sources_stable_of([[0, 0]]), id="a rank twice"),
    pytest.param(lambda: block_shape_of([stored([7], [1, 2, 3], size=3)], 2), id="block too large"),
    pytest.param(lambda: block_shape_of([stored([7, 8], [1, 2, 3])], 2), id="too few tokens"),
    pytest.param(lambda: block_shape_of([stored([2**63], [1, 2])], 2), id="unsigned hash"),
    pytest.param(lambda: block_shape_of([stored(["7"], [1, 2])], 2), id="hash is text"),
    pytest.param(lambda: block_shape_of([removed(-(2**63) - 1)], 2), id="unsigned hash removed"),
    pytest.param(lambda: block_shape_of([stored([7], [1, 2], parent=2**64)], 2), id="unsigned parent"),
    pytest.param(lambda: block_shape_of([KvEvent("stored", [7, 8], [1, 2], [2])], 2), id="lists of unequal length"),
    pytest.param(lambda: parent_of([stored([8], [3, 4], parent=7)]), id="parent never stored"),
    pytest.param(lambda: parent_of([stored([7], [1, 2]), removed(7), stored([8], [3, 4], 7)]), id="parent removed"),
    pytest.param(lambda: balance_of([removed(7)], 9), id="removed before stored"),
    pytest.param(lambda: balance_of([stored([7], [1, 2]), removed(7), removed(7)], 9), id="removed twice"),
    pytest.param(lambda: balance_of([stored([7, 8], [1, 2, 3, 4])], 1), id="more than there are"),
    pytest.param(lambda: tokens_true_of([stored([7], [1, 3])], [said(PLAIN, END)]), id="other tokens"),
    pytest.param(
        lambda: tokens_true_of([stored([7], [1, 2]), stored([8], [3, 6], 7)], [said(PLAIN, END)]), id="other answer"
    ),
    pytest.param(lambda: ranks_of([(0,)]), id="ranks are a tuple"),
    pytest.param(lambda: ranks_of([[0], [1]]), id="ranks change"),
    pytest.param(lambda: ranks_of([["0"]]), id="rank is text"),
    pytest.param(lambda: payload_of([1]), id="payload is a list"),
    pytest.param(lambda: payload_of({"token_ids": [1], "sampling_options": [1]}), id="options are a list"),
    pytest.param(lambda: payload_of({"token_ids": [-1]}), id="token -1"),
    pytest.param(lambda: probe_answer_of(said(END | {"finish_reason": "error"})), id="probe ends with error"),
    pytest.param(lambda: probe_answer_of(said({"token_ids": []}, END)), id="first chunk says nothing"),
    pytest.param(lambda: probe_answer_of(said(error=ValueError("no"))), id="probe raises"),
    pytest.param(lambda: probe_answer_of(said(PLAIN)), id="probe never ends"),
    pytest.param(lambda: aligned_of(said(PLAIN | {"log_probs": []})), id="no log_probs for a token"),
    pytest.param(lambda: aligned_of(said(PLAIN | {"log_probs": [None]})), id="log_probs None"),
    pytest.param(lambda: aligned_of(said(PLAIN | {"log_probs": [-math.inf]})), id="log_probs -inf"),
    pytest.param(lambda: aligned_of(said(PLAIN | {"log_probs": [0.3]})), id="log_probs positive"),
    pytest.param(lambda: aligned_of(said(PLAIN | {"log_probs": -0.3})), id="log_probs no list"),
    pytest.param(lambda: top_of(said(PLAIN | {"top_logprobs": []})), id="no list for a token"),
    pytest.param(lambda: top_of(said(PLAIN | {"top_logprobs": [None]})), id="None for a token"),
    pytest.param(lambda: top_of(said(PLAIN | {"top_logprobs": [[TOP | {"rank": None}]]})), id="rank None"),
    pytest.param(lambda: top_of(said(PLAIN | {"top_logprobs": [[TOP | {"token_id": 9}]]})), id="another token"),
    pytest.param(
        lambda: top_of(said(PLAIN | {"top_logprobs": [[TOP, TOP, TOP]]}, output={"logprobs": 1})), id="too many"
    ),
    pytest.param(
        lambda: bad_option_of(said(PLAIN | {"log_probs": [-1.0]}, END, output={"logprobs": -1}), said(END), "logprobs"),
        id="-1 is taken for a number",
    ),
    pytest.param(lambda: prompt_of(said(END)), id="no prompt_logprobs"),
    pytest.param(lambda: prompt_of(said(END | {"engine_data": {"prompt_logprobs": [None, {}]}})), id="too short"),
    pytest.param(
        lambda: prompt_of(said(END | {"engine_data": {"prompt_logprobs": [None, {2: {"logprob": -1.0}}, {}]}})),
        id="int keys",
    ),
    pytest.param(lambda: sets_of("control", [None]), id="controls are None"),
    pytest.param(lambda: sets_of("control", ["sleep"]), id="controls are a str"),
    pytest.param(lambda: sets_of("update", [{""}]), id="empty name"),
    pytest.param(lambda: sets_of("update", [{"a"}, {"b"}]), id="names change"),
    pytest.param(lambda: dispatch_of("control", "x", "ok", is_known=True), id="answer is text"),
    pytest.param(lambda: dispatch_of("control", "x", {}, is_known=False), id="unknown without status"),
    pytest.param(lambda: prefill_one_of(said(PLAIN, END)), id="prefill gives two"),
    pytest.param(lambda: prefill_params_of(said(END)), id="prefill without params"),
    pytest.param(lambda: prefill_params_of(said(END | {"disaggregated_params": "x"})), id="params are text"),
    pytest.param(lambda: handoff_of(said(error=KeyError("handle"))), id="decode raises"),
    pytest.param(lambda: handoff_of(said({"token_ids": [], "finish_reason": "length"})), id="decode gives nothing"),
    pytest.param(lambda: decode_requires_of(said(END, prefill_result=None)), id="decode serves without prefill"),
    pytest.param(lambda: terminal_of(said({"token_ids": [], "finish_reason": "stop"})), id="no encoder_result"),
    pytest.param(lambda: require_of(said(END, encoder_result=[1])), id="a list as encoder_result"),
]


@pytest.mark.parametrize("check", BROKEN)
def test_a_planted_violation_is_found(check: Callable[[], None]) -> None:
    with pytest.raises(Violation) as found:
        check()
    assert len(str(found.value)) > 30


RIGHT: list[Any] = [
    pytest.param(lambda: sources_shape_of([ZmqSource("tcp://h:1"), ZmqSource("tcp://h:2", 1)]), id="sources"),
    pytest.param(lambda: sources_stable_of([[0, 1], [1, 0]]), id="ranks in another order"),
    pytest.param(lambda: block_shape_of([stored([-(2**63), 8], [1, 2, 3, 4, 5]), removed(8)], 2), id="blocks"),
    pytest.param(lambda: parent_of([stored([7], [1, 2]), stored([8], [3, 4], 7), removed(8, 7)]), id="parents"),
    pytest.param(lambda: balance_of([stored([7], [1, 2]), stored([7], [1, 2]), removed(7)], 1), id="stored again"),
    pytest.param(lambda: balance_of([stored([7], [1, 2])], None), id="no total"),
    pytest.param(
        lambda: tokens_true_of([stored([7, 8, 9], [1, 2, 3, 5, 6, 70])], [said(PLAIN, END)]), id="beyond what was read"
    ),
    pytest.param(
        lambda: tokens_true_of([KvEvent("stored", [7], [9, 9, 9], [2], None, True)], [said(END)]), id="Eagle windows"
    ),
    pytest.param(lambda: ranks_of([[0, 1], [0, 1]]), id="ranks"),
    pytest.param(lambda: payload_of({"token_ids": [1], "_HEALTH_CHECK": True}), id="a short payload"),
    pytest.param(lambda: probe_answer_of(said({"token_ids": [], "finish_reason": "stop"})), id="an encoder's probe"),
    pytest.param(lambda: aligned_of(said({"token_ids": [5, 6], "log_probs": [-1.0, 0]}, END)), id="log_probs"),
    pytest.param(lambda: top_of(said(PLAIN | {"top_logprobs": [[TOP, TOP | {"token_id": 1, "rank": 9}]]})), id="top"),
    pytest.param(lambda: prompt_of(said({"token_ids": [], "finish_reason": "cancelled"})), id="cancelled"),
    pytest.param(lambda: sets_of("control", [["b", "a"], {"a", "b"}]), id="names"),
    pytest.param(lambda: prefill_params_of(said({"disaggregated_params": {"room": 1}}, END)), id="params ahead"),
    pytest.param(lambda: decode_requires_of(said(error=ValueError("no prefill_result"))), id="refused"),
    pytest.param(lambda: decode_requires_of(said(END | {"finish_reason": {"error": "no"}})), id="refused in a chunk"),
    pytest.param(lambda: decode_requires_of(said(END, prefill_result={})), id="empty, and good enough"),
]


@pytest.mark.parametrize("check", RIGHT)
def test_what_is_right_is_let_through(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize(
    ("problems", "words"),
    [
        pytest.param(snapshot(kv_used_blocks=5), "5 of 4", id="more than there are"),
        pytest.param(snapshot(kv_used_blocks=1.0), "kv_used_blocks is 1.0", id="float"),
        pytest.param(snapshot(kv_total_blocks=True), "kv_total_blocks is True", id="bool"),
        pytest.param(snapshot(gpu_cache_usage=25.0), "not a percentage", id="per cent"),
        pytest.param(snapshot(gpu_cache_usage=math.nan), "nan", id="NaN"),
        pytest.param(snapshot(gpu_cache_usage="0.2"), "it is a number", id="text"),
        pytest.param(snapshot(kv_cache_hit_rate=-0.1), "kv_cache_hit_rate is -0.1", id="negative"),
        pytest.param(snapshot(rank=1), "rank 1", id="published for another rank"),
        pytest.param(snapshot(dp_rank=2), "rank 2", id="says another rank"),
    ],
)
def test_a_snapshot_that_makes_no_sense_is_named(problems: list[str], words: str) -> None:
    assert len(problems) == 1
    assert words in problems[0]


def test_a_snapshot_of_an_engine_without_a_prefix_cache_and_one_with_a_full_cache_are_right() -> None:
    assert (
        snapshot(kv_cache_hit_rate=None) == snapshot(kv_used_blocks=4, gpu_cache_usage=1, kv_cache_hit_rate=0.0) == []
    )


# The recording publishers.


@since_1_3
def test_the_recording_publisher_takes_what_the_installed_release_takes() -> None:
    publisher = RecordingKvPublisher(3)
    tokens = [1, 2]
    publisher.publish_stored(tokens, [2], [7], 6, lora_name="x")
    tokens.clear()
    publisher.publish_removed(block_hashes=[7])
    with pytest.raises(TypeError):
        publisher.publish_stored(tokens, [2], [7], colour="red")
    assert publisher.events == [stored([7], [1, 2], 6), removed(7)]
    real = release.core("KvEventPublisher")
    for name in ("publish_stored", "publish_removed", "publish_batch", "shutdown"):
        assert hasattr(publisher, name) == hasattr(real, name)
    if hasattr(publisher, "publish_batch"):
        publisher.publish_batch([{"type": "removed", "block_hashes": [8]}])
        assert publisher.events[-1] == removed(8)


@since_1_3
def test_the_metrics_stand_in_has_what_the_installed_release_has() -> None:
    real = release.core("backend").EngineMetrics
    callbacks: list[Any] = []
    metrics = RecordingMetrics({"model": "m"}, callbacks)
    names = [name for name in dir(real) if not name.startswith("_")]
    assert all(hasattr(metrics, name) for name in names)
    assert hasattr(metrics, "register_prometheus_typed_callback") == hasattr(real, "register_prometheus_typed_callback")
    metrics.register_prometheus_expfmt_callback(str)
    assert callbacks == [str]


def test_events_from_many_threads_are_all_kept() -> None:
    if not release.is_at_least("1.3"):
        pytest.skip("from 1.3")
    publisher = RecordingKvPublisher()

    def publish() -> None:
        for _ in range(500):
            publisher.publish_removed([1])

    threads = [threading.Thread(target=publish) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(publisher.events) == 2000


def test_the_tree_knows_the_tokens_under_each_block_and_how_many_there_were_at_most() -> None:
    tree = Tree.of(
        [
            stored([7, 8], [1, 2, 3, 4]),
            stored([9], [5, 6], 7),
            removed(8),
            KvEvent("stored", None),
            stored([4], [9, 9], 3),
        ]
    )
    assert tree.live == {7: [1, 2], 9: [1, 2, 5, 6]}
    assert (tree.most_live, tree.strangers, [event.block_hashes for event in tree.orphans]) == (3, [], [[4]])


def test_a_probe_comes_back_as_a_request_without_what_no_request_has() -> None:
    probe = probe_request({"token_ids": [1], "stop_conditions": {"max_tokens": 1, "colour": "red"}, "mine": 1})
    assert probe["_HEALTH_CHECK"] is True
    assert probe["stop_conditions"]["max_tokens"] == 1
    assert "colour" not in probe["stop_conditions"]
    assert "mine" not in probe
    assert probe["output_options"]["logprobs"] is None
