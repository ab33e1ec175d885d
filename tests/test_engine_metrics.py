"""What the engine says on /metrics: names, types and buckets of the real ones, and counts of what it did."""

from __future__ import annotations

import asyncio
import csv
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.parser import text_string_to_metric_families

from conformance.bridge import BridgeStream
from conformance.context import RequestContext
from mock_engine.bucket_counts import BucketCounts
from mock_engine.drive_realtime import RealTimeDrive
from mock_engine.engine_settings import EngineSettings, build_engine
from mock_engine.exposition import EngineCollector
from mock_engine.live_request import LiveRequest
from mock_engine.llm_engine import MockLLMEngine
from mock_engine.prompt import Answer
from mock_engine.request import Request
from tests.helpers.jumping_loop import LoopClock, run

REFERENCE = Path(__file__).parent / "reference" / "engine_metrics.csv"
SMALL = (
    *("--max-model-len", "128", "--block-size", "8", "--num-gpu-blocks-override", "24"),
    *("--max-num-seqs", "4", "--jitter", "0"),
)
CONTEXT_OF_REFERENCE = 40_960

pytestmark = pytest.mark.usefixtures("no_wall_clock")


class DynamoMetrics:
    """What Dynamo gives to `register_prometheus`."""

    def __init__(self):
        self.auto_labels = {"dynamo_component": "backend", "worker_id": "1f", "model_name": "not ours"}
        self.texts = []

    def register_prometheus_expfmt_callback(self, callback):
        self.texts.append(callback)


class Samples:
    """A parsed exposition: values by sample name, summed over all labels but those named."""

    def __init__(self, text):
        self.families = list(text_string_to_metric_families(text))

    def __getitem__(self, name):
        return sum(sample.value for sample in self._named(name))

    def by(self, name, label):
        """Values by a label's values."""
        values = Counter()
        for sample in self._named(name):
            values[sample.labels[label]] += sample.value
        return dict(values)

    def _named(self, name):
        found = [sample for family in self.families for sample in family.samples if sample.name == name]
        assert found, f"no {name}"
        return found


async def started(*flags):
    """An engine that has started, and a function that scrapes it."""
    engine, _ = await MockLLMEngine.from_args([*SMALL, *flags])
    await engine.start(1)
    metrics = DynamoMetrics()
    await engine.register_prometheus(metrics)
    (text,) = metrics.texts
    return engine, lambda: Samples(text())


def request_of(isl_tokens, max_tokens, num_choices=1):
    return {
        "token_ids": list(range(100, 100 + isl_tokens)),
        "stop_conditions": {"max_tokens": max_tokens, "ignore_eos": True},
        "sampling_options": {"n": num_choices},
    }


def reference_of(engine_type):
    with REFERENCE.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(line for line in file if not line.startswith("#"))
        return {
            row["name"]: (row["type"], [float(edge) for edge in row["edges"].split()])
            for row in rows
            if row["engine"] == engine_type
        }


@pytest.mark.parametrize("engine_type", ["vllm", "sglang", "trtllm"])
def test_names_types_and_buckets_are_those_of_the_real_engine(engine_type):
    engine = build_engine(EngineSettings(engine_type=engine_type, max_model_len=CONTEXT_OF_REFERENCE))
    collector = EngineCollector(engine, EngineSettings(), "m")
    collector.watch([RealTimeDrive(engine.core, LoopClock(), 0.0)], tuple)
    found = {}
    for line in collector.text().splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split()
            found[name] = (kind, [])
        elif "_bucket{" in line and 'le="+Inf"' not in line:
            name = line.partition("_bucket{")[0]
            found[name][1].append(float(line.partition('le="')[2].partition('"')[0]))
    own = {name for name in found if name.startswith("mock_engine_")}
    assert "mock_engine_token_lateness_seconds" in own
    assert {name: metric for name, metric in found.items() if name not in own} == reference_of(engine_type)


@pytest.mark.parametrize(("engine_type", "rank_label"), [("vllm", "engine"), ("sglang", "dp_rank")])
def test_every_rank_has_samples_of_its_own_and_dynamos_labels_are_on_all(engine_type, rank_label):
    settings_ = EngineSettings(engine_type=engine_type)
    engines = [build_engine(settings_) for _ in range(3)]
    collector = EngineCollector(engines[0], settings_, "llama", num_ranks=3)
    collector.watch([RealTimeDrive(engine.core, LoopClock(), 0.0, rank) for rank, engine in enumerate(engines)], tuple)
    collector.add_labels({"worker_id": "1f", "model_name": "not ours"})
    for family in text_string_to_metric_families(collector.text()):
        label = "engine" if family.name.startswith("mock_engine_") else rank_label
        assert {sample.labels[label] for sample in family.samples} == {"0", "1", "2"}, family.name
        assert {sample.labels["worker_id"] for sample in family.samples} == {"1f"}
        assert {sample.labels["model_name"] for sample in family.samples} == {"llama"}


# isl, max_tokens, n, and after how many reads the client leaves (only where there is one choice)
clients = st.lists(
    st.tuples(
        st.integers(1, 60), st.integers(1, 40), st.integers(1, 3), st.none() | st.integers(0, 20), st.integers(0, 30)
    ),
    min_size=1,
    max_size=8,
)


class Client:
    """What one client saw, by the loop's clock."""

    def __init__(self, engine, number, plan):
        self.isl_tokens, self.max_tokens, num_choices, leaves_after, self.begin = plan
        self.leaves_after = leaves_after if num_choices == 1 else None
        self.num_choices = num_choices
        self.tokens = Counter()
        self.times = []
        self.is_whole = False
        self._engine, self._number = engine, number

    async def talk(self):
        loop = asyncio.get_running_loop()
        await asyncio.sleep(self.begin * 0.003)
        self.arrival_s = loop.time()
        request = request_of(self.isl_tokens, self.max_tokens, self.num_choices)
        stream = BridgeStream(self._engine, request, RequestContext(f"r{self._number}"))
        while self.leaves_after is None or len(self.times) < self.leaves_after:
            chunk = await stream.read()
            if chunk is None or chunk.get("finish_reason") == "cancelled":
                break
            self.times.append(loop.time())
            self.tokens[chunk["index"]] += len(chunk["token_ids"])
            self.is_whole = "finish_reason" in chunk
        if not self.is_whole:
            await stream.drop()


@given(plans=clients, speedup_ratio=st.sampled_from(["1", "4"]), scrapes=st.integers(0, 5))
@settings(max_examples=40)
def test_counts_are_what_the_clients_saw_whenever_they_are_read(plans, speedup_ratio, scrapes):
    async def main():
        engine, scrape = await started("--speedup-ratio", speedup_ratio)
        talkers = [Client(engine, number, plan) for number, plan in enumerate(plans)]
        tasks = [asyncio.create_task(talker.talk()) for talker in talkers]
        seen = [scrape()]
        for _ in range(scrapes):
            await asyncio.sleep(0.05)
            seen.append(scrape())
        await asyncio.gather(*tasks)
        samples = scrape()
        again = scrape()
        seen.append(samples)
        await engine.cleanup()

        num_tokens = sum(talker.tokens.total() for talker in talkers)
        with_tokens = [talker for talker in talkers if talker.tokens]
        whole = [talker for talker in talkers if talker.is_whole]
        num_whole = sum(talker.num_choices for talker in whole)
        num_left = len(talkers) - len(whole)
        num_first = sum(len(talker.tokens) for talker in with_tokens)

        assert samples["vllm:generation_tokens_total"] == num_tokens
        assert samples["vllm:prompt_tokens_total"] == sum(t.isl_tokens * len(t.tokens) for t in with_tokens)
        assert samples.by("vllm:request_success_total", "finished_reason") == {
            "stop": 0,
            "length": num_whole,
            "abort": num_left - sum(not talker.times and talker.leaves_after == 0 for talker in talkers),
        }
        assert samples["vllm:time_to_first_token_seconds_count"] == num_first
        assert samples["vllm:inter_token_latency_seconds_count"] == num_tokens - num_first
        assert samples["mock_engine_token_lateness_seconds_count"] == num_tokens
        for name in ("e2e_request_latency", "request_queue_time", "request_prefill_time", "request_decode_time"):
            assert samples[f"vllm:{name}_seconds_count"] == num_whole
        assert samples["vllm:request_params_n_count"] == len(whole)
        assert samples["vllm:request_params_n_sum"] == sum(talker.num_choices for talker in whole)
        assert samples["vllm:request_params_max_tokens_sum"] == sum(t.max_tokens * t.num_choices for t in whole)
        assert samples["vllm:request_prompt_tokens_sum"] == sum(t.isl_tokens * t.num_choices for t in whole)

        # Times are those of the clients' clock, also with a speed-up. (Of several choices, who sees which end?)
        if all(talker.num_choices == 1 for talker in whole):
            e2e_s = sum(talker.times[-1] - talker.arrival_s for talker in whole)
            assert samples["vllm:e2e_request_latency_seconds_sum"] == pytest.approx(e2e_s, abs=1e-6)
        parts = [samples[f"vllm:request_{part}_time_seconds_sum"] for part in ("queue", "prefill", "decode")]
        assert sum(parts) == pytest.approx(samples["vllm:e2e_request_latency_seconds_sum"])
        assert parts[1] + parts[2] == pytest.approx(samples["vllm:request_inference_time_seconds_sum"])

        assert samples["vllm:num_requests_running"] == samples["vllm:num_requests_waiting"] == 0
        assert samples["vllm:kv_cache_usage_perc"] == 0
        for name in ("vllm:generation_tokens_total", "vllm:prompt_tokens_total", "mock_engine_steps_total"):
            assert again[name] == samples[name]
            values = [each[name] for each in seen]
            assert values == sorted(values), name
        assert samples["mock_engine_step_seconds_count"] == samples["mock_engine_steps_total"]
        assert samples["mock_engine_step_seconds_sum"] == pytest.approx(samples["mock_engine_busy_seconds_total"])

    run(main())


def test_an_open_request_counts_before_it_ends():
    async def main():
        engine, scrape = await started()
        stream = BridgeStream(engine, request_of(20, 60), RequestContext("r"))
        for _ in range(5):
            await stream.read()
        samples = scrape()
        assert samples["vllm:generation_tokens_total"] == 5
        assert samples["vllm:inter_token_latency_seconds_count"] == 4
        assert samples["vllm:time_to_first_token_seconds_count"] == 1
        assert samples["vllm:num_requests_running"] == 1
        assert 0 < samples["vllm:kv_cache_usage_perc"] <= 4 / 24
        assert samples["vllm:e2e_request_latency_seconds_count"] == 0
        await stream.drop()
        await engine.cleanup()

    run(main())


def test_dynamos_health_check_is_answered_and_counted_nowhere_else():
    async def main():
        engine, scrape = await started()
        payload = await engine.health_check_payload()
        if payload is None:
            pytest.skip("this release of Dynamo has no health check")
        before = scrape()
        chunks = await BridgeStream(engine, payload, RequestContext("probe")).read_all()
        assert chunks[-1]["finish_reason"] == "length"
        assert len(chunks[-1]["token_ids"]) == 1
        samples = scrape()
        assert samples["mock_engine_health_probes_total"] == 1
        for name in (
            *("vllm:generation_tokens_total", "vllm:prompt_tokens_total", "vllm:prefix_cache_queries_total"),
            *("vllm:request_success_total", "vllm:time_to_first_token_seconds_count"),
        ):
            assert samples[name] == before[name] == 0, name
        await engine.cleanup()

    run(main())


def test_draft_tokens_are_counted_where_there_are_any():
    async def main():
        engine, scrape = await started("--num-speculative-tokens", "3")
        await BridgeStream(engine, request_of(20, 40), RequestContext("r")).read_all()
        samples = scrape()
        await engine.cleanup()
        counts = engine._drives[0].core.scheduler.speculation_counts
        assert samples["vllm:spec_decode_num_drafts_total"] == counts.num_drafts > 0
        assert samples["vllm:spec_decode_num_draft_tokens_total"] == counts.num_draft_tokens
        accepted = samples.by("vllm:spec_decode_num_accepted_tokens_per_pos_total", "position")
        assert accepted == {str(i): number for i, number in enumerate(counts.num_accepted_tokens_per_pos)}
        assert samples["vllm:spec_decode_num_accepted_tokens_total"] == sum(accepted.values())
        assert samples["vllm:generation_tokens_total"] == 40

    run(main())


def make_closed(drive, tokens_at):
    """A request that has sent all its tokens, at those times."""
    request = Request("r", 10, len(tokens_at))
    stream = drive.submit([request])
    stream.started_s[0] = tokens_at[0] / 2
    stream.due_s[0].extend(tokens_at)
    stream.sent_s[0].extend(tokens_at)
    live = LiveRequest("r", [Answer(request, [1] * len(tokens_at), "length")], stream)
    live._num_left = 0
    live.is_closed = True
    return live


def make_collector():
    engine = build_engine(EngineSettings(jitter=0))
    collector = EngineCollector(engine, EngineSettings(), "m")
    drive = RealTimeDrive(engine.core, LoopClock(), 0.0)
    collector.watch([drive], tuple)
    return collector, drive


def test_who_ends_a_request_while_others_count_does_not_wait_and_is_counted_once():
    """A request may end in a garbage collection inside `fold`; waiting for the lock would be for ever."""

    async def main():
        collector, drive = make_collector()
        live = make_closed(drive, [1.0, 2.0, 4.0])
        stats = collector.stats
        with stats._lock:
            stats.add_closed(live)
        assert stats.ranks[0].output_tokens == 0
        stats.fold([live])  # as a snapshot of the open ones from before
        stats.fold([live])
        assert stats.ranks[0].output_tokens == 3
        assert stats.ranks[0].ended_by_reason["length"] == 1
        assert stats.ranks[0].histograms["itl_s"].sum == 3.0
        assert not stats.ranks[0]._num_counted

    run(main())


@given(
    values=st.lists(st.floats(0, 20) | st.sampled_from([0.1, 0.5, 2.0, 10.0])),
    edges=st.just((0.1, 0.5, 2.0, 10.0)),
    split=st.integers(0, 10),
)
def test_a_histogram_counts_as_prometheus_client_does(values, edges, split):
    registry = CollectorRegistry()
    theirs = Histogram("h", "text", buckets=edges, registry=registry)
    ours = BucketCounts(edges)
    for value in values:
        theirs.observe(value)
    for value in values[:split]:
        ours.add(value)
    ours.add_many(values[split:])
    (family,) = registry.collect()
    expected = [(s.labels["le"], int(s.value)) for s in family.samples if s.name == "h_bucket"]
    assert ours.cumulative() == expected
    assert ours.count == len(values)
    assert ours.sum == pytest.approx(sum(values))
