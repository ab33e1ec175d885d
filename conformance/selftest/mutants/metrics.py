"""Broken engines for the rules on ranks, snapshots and Prometheus."""

from __future__ import annotations

import math
from typing import Any

from conformance.release import submodule
from conformance.selftest.mutants import mutant
from conformance.selftest.toy import NUM_BLOCKS, ToyEngine

METRICS = "--metrics"


@mutant("metrics.ranks", "the ranks are a range", engine_args=METRICS)
class RanksAreRange(ToyEngine):
    def component_metrics_dp_ranks(self) -> Any:
        return range(1)


@mutant("metrics.ranks", "a rank comes twice", engine_args=METRICS)
class RanksTwice(ToyEngine):
    def component_metrics_dp_ranks(self) -> Any:
        return [0, 0]


@mutant("metrics.ranks", "a rank is -1", engine_args=METRICS)
class RankIsNegative(ToyEngine):
    def component_metrics_dp_ranks(self) -> Any:
        return [-1]


@mutant("metrics.ranks", "each call gives another rank", engine_args=METRICS)
class RanksChange(ToyEngine):
    num_calls = 0

    def component_metrics_dp_ranks(self) -> Any:
        self.num_calls += 1
        return [self.num_calls]


class OwnSnapshot(ToyEngine):
    """A toy engine that says something else of its load."""

    def publish_snapshot(self) -> None:
        module: Any = submodule("publisher")
        if self.snapshots is None or not self.is_running:
            return
        used = len(self.blocks.users)
        fields = {
            "kv_used_blocks": used,
            "kv_total_blocks": NUM_BLOCKS,
            "gpu_cache_usage": used / NUM_BLOCKS,
            "dp_rank": 0,
            "kv_cache_hit_rate": None,
        } | self.said(used)
        self.snapshots.publish(fields["dp_rank"], module.ComponentSnapshot(**fields))

    def said(self, used: int) -> dict[str, Any]:
        raise NotImplementedError


@mutant("metrics.snapshot", "usage is a percentage", engine_args=METRICS)
class UsageInPercent(OwnSnapshot):
    def said(self, used: int) -> dict[str, Any]:
        return {"gpu_cache_usage": 100 * used / NUM_BLOCKS}


@mutant("metrics.snapshot", "usage is NaN while nothing is used", engine_args=METRICS)
class UsageNotANumber(OwnSnapshot):
    def said(self, used: int) -> dict[str, Any]:
        return {} if used else {"gpu_cache_usage": math.nan}


@mutant("metrics.snapshot", "used blocks are a float", engine_args=METRICS)
class UsedBlocksFloat(OwnSnapshot):
    def said(self, used: int) -> dict[str, Any]:
        return {"kv_used_blocks": float(used)}


@mutant("metrics.snapshot", "the rank was not declared", engine_args=METRICS)
class UndeclaredRank(OwnSnapshot):
    def said(self, used: int) -> dict[str, Any]:
        del used
        return {"dp_rank": 1}


@mutant("metrics.snapshot", "the hit rate is a percentage", engine_args=METRICS)
class HitRateInPercent(OwnSnapshot):
    def said(self, used: int) -> dict[str, Any]:
        del used
        return {"kv_cache_hit_rate": 37.5}


@mutant(
    "metrics.snapshot",
    "reports more blocks used than there are (2500 of 1000)",
    seen_in="NVIDIA's sample engine 1.4.2-1.6.1",
    engine_args=METRICS,
)
class MoreUsedThanThereAre(OwnSnapshot):
    def engine_config(self) -> Any:
        config = super().engine_config()
        config.llm.total_kv_blocks = 40
        return config

    def said(self, used: int) -> dict[str, Any]:
        return {"kv_total_blocks": 40, "gpu_cache_usage": used / 40}


@mutant("metrics.attach_once", "publishes without a publisher", engine_args=METRICS)
class NeedsSnapshotPublisher(OwnSnapshot):
    def said(self, used: int) -> dict[str, Any]:
        del used
        return {}

    def take_blocks(self, work: Any) -> None:
        super().take_blocks(work)
        self.snapshots.publish  # noqa: B018


@mutant("metrics.attach_once", "cannot be attached once a request is open", engine_args=METRICS)
class AttachesWhenIdleOnly(ToyEngine):
    def attach_snapshot_publisher(self, publisher: Any) -> None:
        if self.open:
            raise RuntimeError("too late")
        super().attach_snapshot_publisher(publisher)


@mutant("metrics.prometheus", "keeps the metrics")
class KeepsMetrics(ToyEngine):
    async def register_prometheus(self, metrics: Any) -> None:
        self.metrics = metrics


@mutant("metrics.prometheus", "a callback keeps the metrics")
class CallbackKeepsMetrics(ToyEngine):
    async def register_prometheus(self, metrics: Any) -> None:
        metrics.register_prometheus_expfmt_callback(lambda: f"toy{metrics.auto_labels}")


@mutant("metrics.prometheus", "wants a label that is not there")
class WantsLabel(ToyEngine):
    async def register_prometheus(self, metrics: Any) -> None:
        self.label = metrics.auto_labels["engine_id"]
