"""Dynamo's own KV router in front of our workers: it knows what is in their KV caches, and goes by that."""

from __future__ import annotations

import re
import sys
import urllib.request

import pytest

from mock_engine.planes import MAX_WATCHES
from mock_engine.processes import http_json
from tests.helpers.processes import num_inotify_instances, serving, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]

NUM_BLOCKS = 160


def cached_tokens(facts, content):
    """Of a question, how many prompt tokens were in the cache of the worker that got it; and how many it has."""
    body = {"model": facts["model"], "messages": [{"role": "user", "content": content}], "max_tokens": 2}
    usage = http_json(f"{facts['url']}/v1/chat/completions", body, 60)["usage"]
    return usage["prompt_tokens_details"]["cached_tokens"], usage["prompt_tokens"]


def applied_events(facts):
    """What the router has made of KV events: (type, status) -> how many, those that are 0 left out."""
    with urllib.request.urlopen(f"{facts['url']}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    found = {}
    for line in lines:
        if line.startswith("dynamo_component_kv_cache_events_applied{"):
            labels, value = dict(re.findall(r'(\w+)="([^"]*)"', line)), int(line.rsplit(" ", 1)[1])
            if value:
                found[labels["event_type"], labels["status"]] = value
    return found


def test_the_kv_router_sends_a_prompt_to_the_rank_that_has_it_and_learns_of_evictions(tmp_path):
    flags = ["--workers", "2", "--data-parallel-size", "2", "--router-mode", "kv", "--max-model-len", "1024"]
    with serving(tmp_path, *flags, "--num-gpu-blocks-override", str(NUM_BLOCKS)) as (command, facts):
        assert (facts["router_mode"], facts["data_parallel_size"]) == ("kv", 2)
        assert f"2 workers of 2 ranks, each with {NUM_BLOCKS} KV blocks" in command.output
        assert 0 < num_inotify_instances(facts["pids"]["frontend"]) <= MAX_WATCHES
        prompts = ["other world " * 200, "some new thing " * 150, "first of all " * 150]
        for prompt in prompts:
            assert cached_tokens(facts, prompt)[0] < 32  # what all prompts begin with
        wait_for(lambda: applied_events(facts).get(("stored", "ok"), 0) >= len(prompts), "the router has heard of all")
        for _ in range(3):  # by chance, once in 4**9 runs
            for prompt in prompts:
                num_cached, num_prompt = cached_tokens(facts, prompt)
                assert num_prompt - 17 <= num_cached < num_prompt
        # Each fills a third of a rank's cache. Which of the four ranks gets one is chance: that the one with the first
        # prompt gets too few to forget it happens once in 10**8 runs.
        for number in range(100):
            cached_tokens(facts, f"{number} " * 400)
        wait_for(lambda: applied_events(facts).get(("removed", "ok")), "the router has heard of evictions")
        assert {status for _, status in applied_events(facts)} == {"ok"}
        assert cached_tokens(facts, prompts[0])[0] < 32
