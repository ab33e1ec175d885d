"""
One engine, several drivers, one verdict: the emulation of Dynamo's bridge is held against the real worker.

What the drivers cannot agree on is in `HIDDEN`, each with its reason.
"""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from conformance.bench import Bench
from conformance.catalogue import load_catalogue
from conformance.facts import Facts
from conformance.rules import checks
from conformance.runner_errors import NotHere
from conformance.selftest.kill import verdicts_of
from conformance.selftest.mutants import Mutant, mutants
from conformance.selftest.toy import ToyEngine
from conformance.settings import SuiteSettings
from conformance.streams import DriverName
from conformance.transcript import Transcript
from conformance.verdict import Outcome
from conformance.wire import wire_request
from conformance.worker_driver import WorkerDriver

TOY = "conformance.selftest.toy:ToyEngine"
SAMPLE = "dynamo.common.backend.sample_engine:SampleLLMEngine"
LIMIT_S = 20.0

# Broken engines that the real worker's driver does not notice, and why it cannot.
HIDDEN = {
    "StopConditionsWanted": "Dynamo completes every request before the engine sees it",
    "OutputOptionsWanted": "Dynamo completes every request before the engine sees it",
    "UnknownKeysRefused": "Dynamo throws unknown keys away before the engine sees them",
    "TakesAnyEncoderResult": "Dynamo does not take a request whose encoder_result is no object",
    "FailedKeepsPlace": "the engine fails where its probe says, and the probe is in another process",
    "RefusalMarks": "in real time other requests may change an answer, so that it is not compared (bridge: likewise)",
}

# One or two of each kind of damage; each takes about 2 s.
NOTICED = (
    "FinishesTwice",
    "NothingForOneToken",
    "ChunksAreDataclasses",
    "TokenIdsAreGenerator",
    "BytesInEngineData",
    "CumulativeTokens",
    "ChoicesNotImplemented",
    "CancelledCountsAll",
    "NegativeSeedRefused",
    "AbortsAll",
    "LongPromptEndsEngine",
    "DecodeStartsOver",
    "PrefillParamsBytes",
)


def conversation_mutants() -> dict[str, Mutant]:
    """Those that a rule names which every driver can look at."""
    return {mutant.name: mutant for mutant in mutants() if not checks()[mutant.rule_id].in_process}


def outcomes(
    engine: str, driver: DriverName, rule_ids: list[str], max_examples: int | None = None, **others: Any
) -> dict[str, Outcome]:
    settings = SuiteSettings(engine, driver=driver, seed=1, max_examples=max_examples, **others)
    rules = [load_catalogue()[rule_id] for rule_id in rule_ids]
    return {verdict.rule.id: verdict.outcome for verdict in verdicts_of(settings, rules, shrinks=False)}


def outcome_on(mutant: Mutant, driver: DriverName, clock: Any = "auto") -> Outcome:
    role: Any = mutant.role if mutant.role != "agg" else None
    others = {"engine_args": mutant.engine_args, "role": role, "clock": clock}
    return outcomes(mutant.engine, driver, [mutant.rule_id], **others)[mutant.rule_id]


def conversation_rules() -> list[str]:
    """Those that every driver can look at, and what takes seconds apart."""
    slow = {"gen.stop_tokens", "gen.default_budget", "gen.isolation"}
    return [rule_id for rule_id, check in checks().items() if not check.in_process and rule_id not in slow]


@pytest.mark.e2e
@pytest.mark.parametrize("name", NOTICED)
def test_what_the_emulation_notices_the_real_worker_shows_too(name: str) -> None:
    mutant = conversation_mutants()[name]
    assert outcome_on(mutant, "bridge") is outcome_on(mutant, "worker") is Outcome.FAILED


@pytest.mark.e2e
@pytest.mark.parametrize("name", ["UnknownKeysRefused", "FailedKeepsPlace"])
def test_what_dynamo_itself_hides_is_noticed_by_the_emulation_only(name: str) -> None:
    mutant = conversation_mutants()[name]
    assert name in HIDDEN
    assert outcome_on(mutant, "bridge") is Outcome.FAILED
    assert outcome_on(mutant, "worker") in (Outcome.PASSED, Outcome.SKIPPED)


def test_what_is_hidden_exists_and_in_real_time_the_emulation_does_not_see_it_either() -> None:
    assert HIDDEN.keys() <= conversation_mutants().keys()
    assert outcome_on(conversation_mutants()["RefusalMarks"], "bridge", "real") is Outcome.PASSED


@pytest.mark.e2e
@pytest.mark.parametrize(("engine", "args"), [(TOY, ""), (SAMPLE, "--delay 0.002")], ids=["toy", "sample"])
def test_all_drivers_say_the_same_of_a_whole_engine(engine: str, args: str) -> None:
    rules = conversation_rules()
    drivers: list[DriverName] = ["bridge", "worker"]
    emulated, real = (outcomes(engine, driver, rules, max_examples=4, engine_args=args) for driver in drivers)
    differing = {rule_id for rule_id in rules if emulated[rule_id] is not real[rule_id]}
    assert differing <= {"gen.sparse_request", "gen.packed_ids"}, "what no Dynamo client can send"
    assert all(real[rule_id] is Outcome.SKIPPED for rule_id in differing)


@pytest.mark.parametrize("name", [*NOTICED, None])
def test_a_plain_loop_and_the_emulation_agree_where_only_what_is_said_counts(name: str | None) -> None:
    if name is None:
        rules = conversation_rules()
        assert outcomes(TOY, "plain", rules, max_examples=8) == outcomes(TOY, "bridge", rules, max_examples=8)
    else:
        mutant = conversation_mutants()[name]
        assert outcome_on(mutant, "plain") is outcome_on(mutant, "bridge") is Outcome.FAILED


# What a conversation through the real worker looks like.


class Odd(ToyEngine):
    """What it does depends on the first token."""

    async def generate(self, request: Any, context: Any) -> AsyncGenerator[Any, None]:
        match request["token_ids"][0]:
            case 1:  # does as it should
                async for chunk in super().generate(request, context):
                    yield chunk
            case 2:  # never looks at the context
                for token in range(200):
                    await asyncio.sleep(0.01)
                    yield {"token_ids": [token], "index": 0}
                yield {"token_ids": [], "index": 0, "finish_reason": "stop"}
            case 3:  # a chunk that the bridge refuses
                yield {"token_ids": [7], "index": 0}
                yield {"token_ids": "seven", "index": 0}
            case 4:
                await asyncio.Event().wait()
            case 5:

                class Own(KeyError):
                    pass

                raise Own("cannot be pickled")
            case 6:
                import os

                os._exit(3)


ODD = f"{__name__}:Odd"


@pytest.fixture(scope="module")
def bench() -> Any:
    made = Bench(SuiteSettings(ODD, driver="worker"), Facts())
    yield made
    made.close()


def converse(bench: Bench, first_token: int, within_s: float = LIMIT_S, **places: Any) -> Transcript:
    async def one() -> Transcript:
        await bench.ensure_engine()
        request = wire_request([first_token, 2], max_tokens=5, stop={"ignore_eos": True})
        stream = await bench.open(request, **places)
        return await stream.finish(within_s)

    transcript = bench.run(one())
    times = [event.time_s for event in transcript.events]
    assert times == sorted(times)
    return transcript


def kinds(transcript: Transcript) -> list[str]:
    return [event.kind for event in transcript.events]


@pytest.mark.e2e
class TestAConversationWithTheRealWorker:
    def test_a_whole_answer_looks_as_with_the_emulation(self, bench: Bench) -> None:
        transcript = converse(bench, 1)
        assert kinds(transcript) == ["chunk"] * 5 + ["end"]
        assert transcript.finish_reason == "length"

    @pytest.mark.parametrize("place", [0, 2])
    def test_what_the_engine_says_to_a_stop_is_there_though_no_client_sees_it(self, bench: Bench, place: int) -> None:
        transcript = converse(bench, 1, stop_after=place)
        assert transcript.is_cancelled
        assert kinds(transcript)[-2:] == ["chunk", "end"]
        assert len(transcript.chunks_after("stop")) <= 2
        assert not transcript.was_let_go

    def test_the_bridge_lets_go_of_an_engine_that_does_not_hear_of_the_stop(self, bench: Bench) -> None:
        transcript = converse(bench, 2, stop_after=2)
        assert transcript.was_let_go
        assert kinds(transcript)[-1] == "gone"
        assert 2 <= len(transcript.chunks_after("stop")) <= 3
        assert transcript.error is None

    def test_a_stream_that_the_client_leaves_ends_when_the_engine_has_ended_it(self, bench: Bench) -> None:
        transcript = converse(bench, 1, drop_after=1)
        assert "drop" in kinds(transcript)
        assert transcript.is_cancelled

    def test_a_chunk_that_the_bridge_refuses_is_there_with_what_the_client_got(self, bench: Bench) -> None:
        transcript = converse(bench, 3)
        assert transcript.chunks[1]["token_ids"] == "seven"
        assert transcript.error is None
        assert "invalid chunk shape" in str(transcript.refusal)

    def test_an_error_keeps_its_type(self, bench: Bench) -> None:
        error = converse(bench, 5).error
        assert isinstance(error, KeyError)
        assert type(error).__name__ == "Own"

    def test_what_never_ends_hangs(self, bench: Bench) -> None:
        transcript = converse(bench, 4, within_s=0.3)
        assert transcript.is_hung
        bench.close()

    def test_a_dead_worker_is_an_error_that_says_so_and_the_next_one_is_another(self, bench: Bench) -> None:
        transcript = converse(bench, 6)
        assert "exit code is 3" in str(transcript.error)
        assert kinds(converse(bench, 1))[-1] == "end"

    @pytest.mark.parametrize(
        "changes",
        [
            pytest.param({"sampling_options": {"n": -1}}, id="it does not parse"),
            pytest.param({"token_ids": b"\1\0\0\0"}, id="it is no JSON"),
        ],
    )
    def test_what_dynamo_does_not_take_is_not_judged(self, bench: Bench, changes: dict[str, Any]) -> None:
        async def one() -> None:
            await bench.ensure_engine()
            stream = await bench.open({**wire_request([1], max_tokens=1), **changes})
            await stream.finish(LIMIT_S)

        with pytest.raises(NotHere, match="engine-driver bridge"):
            bench.run(one())


@pytest.mark.e2e
def test_a_worker_is_kept_between_rules_and_ends_with_the_bench() -> None:
    bench = Bench(SuiteSettings(ODD, driver="worker"), Facts(start_s=0.01))
    try:
        converse(bench, 1)
        worker = bench._worker
        bench.renew()
        converse(bench, 1)
        assert isinstance(worker, WorkerDriver)
        assert bench._worker is worker
    finally:
        bench.close()
    assert worker.pids == []
    assert worker.exit_code == 0
