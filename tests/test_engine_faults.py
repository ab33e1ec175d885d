"""Faults of the engine as clients and Dynamo see them, on a loop whose time jumps."""

from __future__ import annotations

import asyncio

import pytest

from conformance.context import RequestContext
from mock_engine.cli import main as command
from mock_engine.dynamo_release import ERROR_TYPES, EngineShutdown
from mock_engine.faults import DEATH_STATUS
from mock_engine.llm_engine import MockLLMEngine
from tests.helpers.jumping_loop import now_s, run
from tests.helpers.live_engine import NUM_BLOCKS, SMALL, answer_of, serving

pytestmark = pytest.mark.usefixtures("no_wall_clock")


def answers_with(*faults: str, num_requests: int, seed: int = 0, max_tokens: int = 5):
    flags = [word for fault in faults for word in ("--fault", fault)]

    async def main():
        async with serving(*flags, "--seed", str(seed)) as engine:
            return [await answer_of(engine, max_tokens, request_id=f"r{number}") for number in range(num_requests)]

    return run(main())


@pytest.mark.parametrize("name", ERROR_TYPES)
@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_a_request_ends_in_the_exception_that_was_asked_for_after_that_many_tokens(name, tokens):
    first, second = answers_with(f"error:type={name},tokens={tokens},times=1,message=bad luck", num_requests=2)
    assert type(first.error) is ERROR_TYPES[name]
    assert "bad luck" in str(first.error)
    assert len(first.tokens) == tokens
    assert first.finish_reason is None
    assert second.error is None
    assert len(second.tokens) == 5


def test_an_answer_that_is_shorter_than_the_fault_is_whole():
    (answer,) = answers_with("error:tokens=5", num_requests=1)
    assert answer.error is None
    assert answer.finish_reason == "length"


def test_which_requests_fail_is_the_same_with_the_same_seed_and_another_with_another():
    def failed(seed: int) -> list[int]:
        answers = answers_with("error:rate=0.3", num_requests=40, seed=seed, max_tokens=1)
        return [number for number, answer in enumerate(answers) if answer.error is not None]

    assert failed(1) == failed(1)
    assert failed(1) != failed(2)
    assert 4 <= len(failed(1)) <= 20


@pytest.mark.parametrize("tokens", [0, 2])
@pytest.mark.parametrize("way", ["stopped", "aborted"])
def test_a_request_that_hangs_gives_so_many_tokens_and_nothing_more_until_it_is_cancelled(tokens, way):
    async def main():
        async with serving("--fault", f"hang:tokens={tokens},times=1") as engine:
            context = RequestContext("hanging")
            hanging = asyncio.create_task(answer_of(engine, context=context))
            await asyncio.sleep(50)
            assert not hanging.done()
            assert (await answer_of(engine)).finish_reason == "length"
            if way == "stopped":
                context.stop_generating()
            else:
                await engine.abort(context.fresh())
            answer = await hanging
            assert answer.finish_reason == "cancelled"
            assert len(answer.tokens) == tokens
            assert now_s() < 51

    run(main())


def test_cleanup_ends_a_request_that_hangs():
    async def main():
        async with serving("--fault", "hang") as engine:
            hanging = asyncio.create_task(answer_of(engine))
            await asyncio.sleep(5)
            await engine.cleanup()
            assert isinstance((await hanging).error, EngineShutdown)  # so that Dynamo moves it to another worker

    run(main())


def test_a_slow_first_token_is_slow_by_that_much_and_the_others_come_as_ever():
    async def main():
        async with serving("--fault", "slow-ttft:seconds=3,times=1", "--no-enable-prefix-caching") as engine:
            slow = await answer_of(engine)
            before_s = now_s()
            normal = await answer_of(engine)
            assert slow.times_s == pytest.approx([3 - before_s + time_s for time_s in normal.times_s])

    run(main())


def test_starting_takes_that_much_longer_in_model_seconds():
    async def main():
        async with serving("--fault", "slow-start:seconds=90", "--speedup-ratio", "3"):
            assert now_s() == pytest.approx(30)

    run(main())


def test_a_start_that_fails_is_typed_and_can_be_cleaned_up():
    async def main():
        engine, _ = await MockLLMEngine.from_args([*SMALL, "--fault", "failed-start:message=no GPU"])
        with pytest.raises(EngineShutdown, match="no GPU"):
            await engine.start(1)
        await engine.cleanup()
        await engine.cleanup()

    run(main())


def test_cleaning_up_takes_that_much_longer_and_once():
    async def main():
        async with serving("--fault", "slow-cleanup:seconds=7") as engine:
            before_s = now_s()
            await engine.cleanup()
            assert now_s() - before_s == pytest.approx(7)
        assert now_s() - before_s == pytest.approx(7)

    run(main())


def test_death_is_an_exit_that_tells_nobody(monkeypatch):
    statuses = []
    monkeypatch.setattr("mock_engine.llm_engine.os._exit", statuses.append)
    monkeypatch.setattr("mock_engine.llm_engine.logging.shutdown", lambda: None)
    answers = answers_with("die:after_tokens=7", num_requests=1)
    assert not statuses
    assert len(answers[0].tokens) == 5
    answers_with("die:after_tokens=7", num_requests=2)
    assert statuses == [DEATH_STATUS]


def test_a_request_waits_for_blocks_that_are_taken_away():
    (answer,) = answers_with(f"kv:blocks={NUM_BLOCKS},for=4", num_requests=1)
    assert 4 < answer.times_s[0] < 4.1


def test_faults_come_from_flags_and_files_in_their_order(tmp_path):
    path = tmp_path / "faults.toml"
    path.write_text('[[fault]]\nkind = "slow"\nfactor = 3\n[[fault]]\nkind = "hang"\nat = 5', encoding="utf-8")

    async def main():
        flags = ["--fault", "stall:at=1", "--faults", str(path), "--fault", "kv:share=0.5"]
        engine, _ = await MockLLMEngine.from_args([*SMALL, *flags])
        return engine.settings

    settings = run(main())
    expected = ["stall:at=1.0", "slow:factor=3.0", "hang:at=5.0", "kv:share=0.5"]
    assert [fault.to_text() for fault in settings.faults] == expected
    argv = settings.to_argv()
    assert [argv[number + 1] for number, word in enumerate(argv) if word == "--fault"] == expected


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["serve", "--fault", "flood"], "there is no fault 'flood'"),
        (["serve", "--faults", "none.toml"], "cannot read faults from none.toml"),
        (["serve", "--workers", "2", "--fault", "slow:worker=2"], "the workers are 0 to 1"),
        (["simulate", "--fault", "slow"], "--fault"),
    ],
)
def test_a_mistake_in_a_fault_is_one_line_and_status_2(argv, message, capsys):
    try:
        status = command(argv)
    except SystemExit as end:
        status = end.code
    assert status == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_worker_of_its_own_has_no_number(capsys):
    async def main():
        await MockLLMEngine.from_args([*SMALL, "--fault", "slow:worker=0"])

    with pytest.raises(SystemExit):
        run(main())
    assert "only 'mock-engine serve' and 'bench' can do" in capsys.readouterr().err


class Publisher:
    """Where KV events go."""

    def __init__(self):
        self.stored = []
        self.removed = []

    def publish_stored(self, _token_ids, _num_block_tokens, block_hashes, _parent_hash):
        self.stored += block_hashes

    def publish_removed(self, block_hashes):
        self.removed += block_hashes


@pytest.mark.parametrize("lost", ["", "stored", "removed", "all"])
def test_kv_events_that_are_lost_are_not_published_and_the_others_are(lost):
    publisher = Publisher()

    async def main():
        async with serving(*(("--fault", f"kv-events:event={lost}") if lost else ())) as engine:
            engine._kv_feed.attach_kv(0, publisher)
            await answer_of(engine)
            await engine.engine_control("reset_prefix_cache", {})

    run(main())
    assert len(publisher.stored) == (0 if lost in ("stored", "all") else 5)
    assert len(publisher.removed) == (0 if lost in ("removed", "all") else 5)
