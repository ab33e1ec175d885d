"""
Tests of a router against mock engines: `pip install pytest openai mock-engine`, and `pytest` (docs/ci.md).

The router is the project under test, here a toy of ten lines. The fixtures come from mock-engine's pytest plugin.
"""

from concurrent.futures import ThreadPoolExecutor

import openai
import pytest


class Router:
    """Sends each request to the server with the fewest requests under way."""

    def __init__(self, clients):
        self.under_way = dict.fromkeys(clients, 0)

    def ask(self, **request):
        client = min(self.under_way, key=self.under_way.get)
        self.under_way[client] += 1
        try:
            return client.chat.completions.create(**request)
        finally:
            self.under_way[client] -= 1


@pytest.fixture
def servers(mock_engine_server, mock_engine_server_factory):
    """One as the settings say, and a small one that computes two requests at a time."""
    return [mock_engine_server, mock_engine_server_factory(max_num_seqs=2)]


@pytest.fixture
def clients(servers):
    return [openai.OpenAI(base_url=server.base_url, api_key=server.api_key) for server in servers]


def question(text, **options):
    return {"model": "llama-3.1-8b", "messages": [{"role": "user", "content": text}], "max_tokens": 200, **options}


def test_requests_are_spread_over_the_servers(servers, clients):
    before = [server.status().num_output_tokens for server in servers]
    router = Router(clients)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda number: router.ask(**question(f"question {number}")), range(8)))
    assert all(answer.usage.completion_tokens == 200 for answer in answers)
    made = [server.status().num_output_tokens - tokens for server, tokens in zip(servers, before, strict=True)]
    assert sum(made) == 1600
    assert min(made) >= 400


def test_the_same_question_has_the_same_answer_on_every_server(clients):
    answers = {client.chat.completions.create(**question("hello")).choices[0].message.content for client in clients}
    assert len(answers) == 1


def test_a_full_server_queues_and_a_client_that_leaves_frees_its_place(servers, clients):
    request = question("tell me all", max_tokens=20_000, stream=True)
    streams = [clients[1].chat.completions.create(**request) for _ in range(3)]
    servers[1].wait_until(lambda status: status.num_running == 2 and status.num_waiting == 1)
    for stream in streams:
        stream.close()
    servers[1].wait_until(lambda status: status.num_open_requests == status.kv_used_blocks == 0)


def test_a_prompt_that_is_too_long_is_the_client_s_mistake(clients):
    with pytest.raises(openai.BadRequestError):
        Router(clients).ask(**question("word " * 140_000))
