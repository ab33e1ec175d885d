"""The mock engine as a stand-in: settings, the official OpenAI client against it, and processes on any thread."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mock_engine import testing
from mock_engine.engine_settings import DEFAULT_TOKENIZER, EngineSettings
from mock_engine.errors import ConfigError, ProcessError
from mock_engine.fleet import FleetSettings
from mock_engine.testing import SPEEDUP_RATIO, MockEngineServer, read_settings
from mock_engine.worker_settings import WorkerSettings
from tests.helpers.processes import is_alive, wait_for

# Settings.

SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "workers": st.integers(1, 9),
        "seed": st.integers(0, 99),
        "max_num_seqs": st.integers(1, 99),
        "speedup_ratio": st.floats(0, 100),
        "enable_prefix_caching": st.booleans(),
        "async_scheduling": st.none() | st.booleans(),
        "profile": st.just("a100-sxm/llama-3.1-8b/vllm-tp1-bf16"),
        "model_path": st.just(DEFAULT_TOKENIZER),
    },
)


@given(keywords=SETTINGS)
def test_a_keyword_is_the_setting_of_that_name(keywords):
    expected = {"speedup_ratio": SPEEDUP_RATIO, **keywords}
    num_workers = expected.pop("workers", 1)
    model_path = expected.pop("model_path", DEFAULT_TOKENIZER)
    worker = WorkerSettings(EngineSettings(**expected), model_path)
    assert read_settings(**keywords) == FleetSettings(worker, (("agg", num_workers),), port=0)


def test_flags_are_taken_as_a_shell_would_and_keywords_count_more():
    assert read_settings("--seed 3 --model-name 'a b'", seed=4) == read_settings(["--seed=4", "--model-name", "a b"])


@pytest.mark.parametrize(
    ("args", "keywords", "message"),
    [
        ("", {"max_num_seq": 3}, "there is no setting 'max_num_seq'; did you mean max_num_seqs?"),
        ("", {"frobnicate": 3}, "'mock-engine serve --help' has all"),
        ("--frob", {}, "unrecognized arguments: --frob. 'mock-engine serve --help'"),
        ("--seed 'x", {}, "is not a list of flags: No closing quotation"),
        ("", {"workers": 0}, "--workers is 0; it must be at least 1"),
        ("", {"workers": "many"}, "argument --workers: invalid int value: 'many'"),
        ("", {"seed": True}, "argument --seed: invalid int value: 'True'"),
    ],
)
def test_a_wrong_setting_is_an_error_before_anything_starts(args, keywords, message):
    with pytest.raises(ConfigError) as caught:
        MockEngineServer(args, **keywords)
    assert message in str(caught.value)


def test_a_server_that_is_not_running_says_so():
    server = MockEngineServer()
    server.stop()
    with pytest.raises(RuntimeError, match="use it in a 'with' statement"):
        _ = server.base_url
    assert repr(server) == "<MockEngineServer: stopped>"


@pytest.mark.parametrize(("port", "num_lost", "is_up"), [(0, 2, True), (0, 3, False), (18_000, 1, False)])
def test_a_port_that_is_lost_to_another_program_is_tried_anew_unless_it_was_asked_for(
    monkeypatch, port, num_lost, is_up
):
    starts = []

    class Fleet:
        def __init__(self, _settings, folder):
            self.folder = folder

        def __enter__(self):
            starts.append(self.folder)
            if len(starts) <= num_lost:
                raise ProcessError("frontend ended with exit status 1. ... port 18234 already in use.")
            return self

        def stop(self):
            pass

    monkeypatch.setattr(testing, "Fleet", Fleet)
    server = MockEngineServer(port=port)
    if is_up:
        with server:
            assert len(starts) == num_lost + 1
    else:
        with pytest.raises(ProcessError, match="already in use"):
            server.start()
    assert not any(folder.exists() for folder in starts)
    assert not server.is_running


# The official client.

needs_processes = pytest.mark.e2e
HELLO = [{"role": "user", "content": "hello there"}]


def ask(client, server, content="hello there", **options):
    """The text of an answer of eight tokens."""
    messages = [{"role": "user", "content": content}]
    answer = client.chat.completions.create(model=server.model, messages=messages, **{"max_tokens": 8, **options})
    return answer.choices[0].message.content


@pytest.fixture
def client(mock_engine_server):
    with openai.OpenAI(base_url=mock_engine_server.base_url, api_key="any") as client:
        yield client


@needs_processes
def test_openai_s_client_finds_the_model_and_gets_the_same_answer_whole_and_streamed(client, mock_engine_server):
    assert [model.id for model in client.models.list()] == [mock_engine_server.model]
    answer = client.chat.completions.create(model=mock_engine_server.model, messages=HELLO, max_tokens=8)
    (choice,) = answer.choices
    assert choice.finish_reason == "length"
    assert answer.usage.completion_tokens == 8
    assert len(choice.message.content.split()) == 8
    stream = client.chat.completions.create(
        model=mock_engine_server.model,
        messages=HELLO,
        max_tokens=8,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == choice.message.content
    assert sum(map(bool, texts)) > 1  # it came bit by bit
    assert chunks[-1].usage.completion_tokens == 8
    text = client.completions.create(model=mock_engine_server.model, prompt="hello", max_tokens=3).choices[0].text
    assert len(text.split()) == 3


@needs_processes
def test_openai_s_async_client_has_many_requests_under_way(mock_engine_server):
    async def main():
        async with openai.AsyncOpenAI(base_url=mock_engine_server.base_url, api_key="any") as client:

            async def streamed(content):
                stream = await client.chat.completions.create(
                    model=mock_engine_server.model,
                    messages=[{"role": "user", "content": content}],
                    max_tokens=16,
                    stream=True,
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*(streamed(f"question {number % 8}") for number in range(32)))

    texts = asyncio.run(main())
    assert all(len(text.split()) == 16 for text in texts)
    assert texts[:8] * 4 == texts  # a question, an answer
    assert len(set(texts)) == 8


@needs_processes
def test_mistakes_of_the_client_are_openai_s_own_errors_and_are_not_sent_again(mock_engine_server):
    sent = []
    http_client = openai.DefaultHttpxClient(event_hooks={"request": [sent.append]})
    with openai.OpenAI(base_url=mock_engine_server.base_url, api_key="any", http_client=http_client) as client:
        with pytest.raises(openai.BadRequestError, match="context"):
            ask(client, mock_engine_server, "hello " * 140_000)
        with pytest.raises(openai.NotFoundError, match="Model not found"):
            client.chat.completions.create(model="no-such-model", messages=HELLO)
    assert len(sent) == 2


@needs_processes
def test_a_client_that_goes_away_leaves_nothing_behind(client, mock_engine_server):
    model = mock_engine_server.model
    stream = client.chat.completions.create(model=model, messages=HELLO, max_tokens=100_000, stream=True)
    next(iter(stream))
    busy = mock_engine_server.wait_until(lambda status: status.num_running == 1)
    assert busy.kv_used_blocks > 0
    stream.close()
    idle = mock_engine_server.wait_until(lambda status: status.num_running == status.kv_used_blocks == 0)
    assert idle.num_open_requests == 0
    assert "0 running" in str(idle)
    with pytest.raises(TimeoutError, match=r"within 0 s: 0 running, 0 waiting"):
        mock_engine_server.wait_until(lambda status: status.num_running == 7, timeout_s=0)


@needs_processes
def test_a_program_finds_it_in_the_environment(mock_engine_server):
    code = "import openai; print(*[model.id for model in openai.OpenAI().models.list()])"
    environment = {**os.environ, **mock_engine_server.env()}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout == f"{mock_engine_server.model}\n", done.stderr


@needs_processes
def test_answers_depend_on_seed_and_prompt_alone_and_retries_get_over_a_worker_that_died(client, mock_engine_server):
    """Two workers elsewhere, started and stopped on other threads, say what one says here; a dead one delays it."""
    questions = [f"question {number}" for number in range(6)]
    here = [ask(client, mock_engine_server, question) for question in questions]

    async def elsewhere():
        async with MockEngineServer(workers=2) as other:
            with openai.OpenAI(base_url=other.base_url, api_key="any", max_retries=4) as client:
                status = other.status()
                assert [worker.num_output_tokens > 0 for worker in status.workers].count(True) == 1  # its first answer
                assert [ask(client, other, question) for question in questions] == here
                assert all(worker.num_output_tokens > 0 for worker in other.status().workers)
                assert list(other.logs()) == ["frontend", "worker-0", "worker-1"]
                victim = other.fleet.parts[1].process
                os.kill(victim.pid, signal.SIGKILL)
                victim.wait()
                with pytest.raises(ProcessError, match="worker-0 was killed by SIGKILL"):
                    other.status()
                assert [ask(client, other, question) for question in questions] == here
                hasty = client.with_options(max_retries=0)
                with pytest.raises(openai.InternalServerError):
                    [ask(hasty, other, question) for question in questions]
                return [part.process.pid for part in other.fleet.parts]

    pids = asyncio.run(elsewhere())
    assert not any(map(is_alive, pids))


# Threads and sudden death.

STARTED_ON_A_THREAD = """
import sys, threading
from mock_engine.testing import MockEngineServer

server = MockEngineServer()
thread = threading.Thread(target=server.start)
thread.start()
thread.join()
print(*[part.process.pid for part in server.fleet.parts], flush=True)
for line in sys.stdin:
    server.check()
    print("ok", flush=True)
"""


@needs_processes
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_it_outlives_the_thread_that_started_it_but_not_the_process(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", STARTED_ON_A_THREAD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    ) as process:
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == 2
        client = openai.OpenAI(base_url=base_url_of(pids[0]), api_key="any")
        for _ in range(3):  # a signal that the thread's end sent would have come by now
            assert len(list(client.models.list())) == 1
            process.stdin.write("\n")
            process.stdin.flush()
            assert process.stdout.readline() == "ok\n"
        process.kill()
        process.wait()
        wait_for(lambda: not any(map(is_alive, pids)), "the parts are gone")


def base_url_of(frontend_pid):
    words = Path(f"/proc/{frontend_pid}/cmdline").read_text(encoding="utf-8").split("\0")
    return f"http://127.0.0.1:{words[words.index('--http-port') + 1]}/v1"
