"""
An engine's figures as Prometheus reads them.

    collector = EngineCollector(engine, settings, model, num_ranks)
    drive.on_step = collector.stats.ranks[drive.dp_rank].steps.add
    collector.watch(drives, open_requests)
    text = collector.text()              text format 0.0.4, in the names of vLLM, SGLang or TensorRT-LLM

Figures are read when somebody asks, and not before. `text` works on any thread: Dynamo's worker calls it on one of
its own. It takes 4 ms for one rank, nearly all of it formatting; so after each metric it lets go of the interpreter's
lock, and no token waits for more than one metric.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from mock_engine.drive_realtime import RealTimeDrive
from mock_engine.engine_settings import Engine, EngineSettings
from mock_engine.engine_stats import EngineStats, RankStats
from mock_engine.live_request import LiveRequest
from mock_engine.metric_tables import LABELS, MODEL_LABEL, OWN_LABELS, EngineLabels, Metric, metrics_of, own_metrics

OpenRequests = Callable[[], Iterable[LiveRequest]]


class EngineCollector(Collector):
    """What `prometheus_client` asks for metrics, and the figures behind them."""

    def __init__(self, engine: Engine, settings: EngineSettings, model: str, num_ranks: int = 1) -> None:
        self._tables = (
            (
                LABELS[engine.engine_type],
                metrics_of(
                    engine.engine_type,
                    engine.scheduler.max_model_len,
                    engine.core.scheduler.speculation_counts is not None,
                ),
            ),
            (OWN_LABELS, own_metrics()),
        )
        all_metrics = [metric for _, metrics in self._tables for metric in metrics]
        self.stats = EngineStats(engine.profile, all_metrics, settings.speedup_ratio, num_ranks)
        self._labels: Mapping[str, str] = {}
        self._engine = engine
        self._settings = settings
        self._model = model
        self._drives: Sequence[RealTimeDrive] = ()
        self._open_requests: OpenRequests = tuple

    def watch(self, drives: Sequence[RealTimeDrive], open_requests: OpenRequests) -> None:
        """Where figures are read from now on: a drive for each rank, and the requests that have not ended."""
        self._drives = drives
        self._open_requests = open_requests

    def add_labels(self, labels: Mapping[str, str]) -> None:
        """Labels for all metrics, such as the name of the worker. A metric's own label of that name wins."""
        self._labels = dict(labels)  # they come first, and of two labels of one name the last counts

    def collect(self) -> Iterator[Family]:
        """Every metric family, with the figures of this moment."""
        self.stats.fold(self._open_requests())
        ranks = list(zip(self.stats.ranks, (self._values(number) for number in range(len(self._drives))), strict=False))
        for labels, metrics in self._tables:
            for metric in metrics:
                family = _family(metric, labels, self._labels)
                for number, (rank, values) in enumerate(ranks):
                    own = [*self._labels.values(), *labels.fixed.values(), str(number), self._model]
                    _add(family, metric, rank, values, own, self._drives[number])
                yield family
                time.sleep(0)  # see the module
        yield from self._infos()

    def text(self) -> str:
        """The exposition, in text format 0.0.4."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        return generate_latest(registry).decode()

    def _values(self, rank: int) -> dict[str, float]:
        return self.stats.ranks[rank].values(self._drives[rank])

    def _infos(self) -> Iterator[Family]:
        engine, settings = self._engine, self._settings
        profile = engine.profile
        if engine.engine_type == "vllm":
            cache = {
                "block_size": str(engine.block_size),
                "cache_dtype": profile.kv_cache_dtype,
                "enable_prefix_caching": str(settings.enable_prefix_caching),
                "gpu_memory_utilization": str(settings.gpu_memory_utilization),
                "num_gpu_blocks": str(engine.num_blocks),
                "num_gpu_blocks_override": str(settings.num_gpu_blocks_override),
            }
            yield self._info("vllm:cache_config_info", "Information of the LLMEngine CacheConfig", cache)
        about = {
            "profile": profile.name,
            "gpu": profile.gpu,
            "tp": str(profile.tp),
            "is_measured": str(profile.is_measured),
        }
        yield self._info("mock_engine_info", "What the engine pretends to be.", about)

    def _info(self, name: str, text: str, values: Mapping[str, str]) -> Family:
        every = {**self._labels, MODEL_LABEL: self._model, **values}
        family = GaugeMetricFamily(name, text, labels=[*every, OWN_LABELS.rank])
        for rank in range(len(self._drives)):
            family.add_metric([*every.values(), str(rank)], 1)
        return family


def _family(metric: Metric, labels: EngineLabels, extra_labels: Mapping[str, str]) -> Family:
    names = [*extra_labels, *labels.fixed, labels.rank, MODEL_LABEL]
    if metric.kind == "histogram":
        return HistogramMetricFamily(metric.name, metric.text, labels=names)
    if metric.kind == "gauge":
        return GaugeMetricFamily(metric.name, metric.text, labels=names)
    return CounterMetricFamily(
        metric.name, metric.text, labels=names if metric.label is None else [*names, metric.label]
    )


def _add(
    family: Family,
    metric: Metric,
    rank: RankStats,
    values: Mapping[str, float],
    labels: Sequence[str],
    drive: RealTimeDrive,
) -> None:
    """The samples of one rank."""
    if isinstance(family, HistogramMetricFamily):
        counts = rank.histograms[metric.series]
        family.add_metric(labels, buckets=counts.cumulative(), sum_value=counts.sum)
    elif isinstance(family, CounterMetricFamily) and metric.label is not None:
        for value, number in rank.labelled(metric.series, drive).items():
            family.add_metric([*labels, value], number)
    elif isinstance(family, CounterMetricFamily | GaugeMetricFamily):
        family.add_metric(labels, values[metric.series])
