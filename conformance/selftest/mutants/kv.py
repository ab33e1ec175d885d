"""Broken engines for the rules on KV events."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from conformance.release import submodule
from conformance.selftest.mutants import mutant
from conformance.selftest.toy import BLOCK_SIZE, Blocks, ToyEngine, Work

KV = "--kv-events"


class OwnBlocks(ToyEngine):
    """A toy engine whose KV cache is of another class."""

    blocks_class: type[Blocks] = Blocks

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.blocks = self.blocks_class(self.blocks.num_blocks)


# Sources.


@mutant("kv.sources_shape", "the sources are a tuple", engine_args=KV)
class TupleOfSources(ToyEngine):
    async def kv_event_sources(self) -> Any:
        return tuple(await super().kv_event_sources())


@mutant("kv.sources_shape", "the source is of a subclass of PushSource", engine_args=KV)
class SubclassedSource(ToyEngine):
    async def kv_event_sources(self) -> Any:
        base: Any = getattr(submodule("publisher"), "PushSource", object)
        return [type("ToySource", (base,), {})(on_ready=self.on_kv_ready)]


@mutant("kv.sources_shape", "on_ready is missing", engine_args=KV)
class SourceWithoutOnReady(ToyEngine):
    async def kv_event_sources(self) -> Any:
        module: Any = submodule("publisher")
        return [module.PushSource(on_ready=None, dp_rank=0)]


@mutant("kv.sources_shape", "dp_rank is a str", engine_args=KV)
class RankAsText(ToyEngine):
    async def kv_event_sources(self) -> Any:
        module: Any = submodule("publisher")
        return [module.PushSource(on_ready=self.on_kv_ready, dp_rank="0")]


@mutant("kv.sources_shape", "on_ready wants the event loop of its thread", engine_args=KV)
class OnReadyWantsLoop(ToyEngine):
    def on_kv_ready(self, publisher: Any) -> None:
        asyncio.get_running_loop()
        super().on_kv_ready(publisher)


@mutant("kv.sources_stable", "each call gives the next rank", engine_args=KV)
class RanksGoOn(ToyEngine):
    num_calls = 0

    async def kv_event_sources(self) -> Any:
        module: Any = submodule("publisher")
        self.num_calls += 1
        return [module.PushSource(on_ready=self.on_kv_ready, dp_rank=self.num_calls)]


@mutant("kv.sources_stable", "two sources for one rank", engine_args=KV)
class RankTwice(ToyEngine):
    async def kv_event_sources(self) -> Any:
        return 2 * await super().kv_event_sources()


# Events.


class _PartialBlocks(Blocks):
    def publish_stored(self, token_ids: Sequence[int], hashes: list[int], first: int) -> None:
        rest = len(token_ids) % BLOCK_SIZE
        if self.publisher is not None:
            self.publisher.publish_stored(
                token_ids=list(token_ids[first * BLOCK_SIZE :]),
                num_block_tokens=[BLOCK_SIZE] * (len(hashes) - first) + [rest] * bool(rest),
                block_hashes=hashes[first:] + [hash(tuple(token_ids))] * bool(rest),
                parent_hash=hashes[first - 1] if first else None,
            )


@mutant("kv.block_shape", "the last block, not full yet, is published", engine_args=KV)
class PublishesPartialBlock(OwnBlocks):
    blocks_class = _PartialBlocks


class _UnsignedHashes(Blocks):
    def hashes_of(self, token_ids: Sequence[int]) -> list[int]:
        return [value % 2**64 for value in super().hashes_of(token_ids)]


@mutant("kv.block_shape", "hashes are unsigned", engine_args=KV)
class HashesUnsigned(OwnBlocks):
    blocks_class = _UnsignedHashes


class _FewTokens(Blocks):
    def publish_stored(self, token_ids: Sequence[int], hashes: list[int], first: int) -> None:
        super().publish_stored(token_ids[: len(hashes) * BLOCK_SIZE - 1], hashes, first)


@mutant("kv.block_shape", "the last token of the last block is left out", engine_args=KV)
class PublishesTooFewTokens(OwnBlocks):
    blocks_class = _FewTokens


class _OneSize(Blocks):
    def publish_stored(self, token_ids: Sequence[int], hashes: list[int], first: int) -> None:
        if self.publisher is not None:
            self.publisher.publish_stored(list(token_ids), [BLOCK_SIZE], hashes[first:], None)


@mutant("kv.block_shape", "one num_block_tokens for all blocks", engine_args=KV)
class OneSizeForAllBlocks(OwnBlocks):
    blocks_class = _OneSize


class _RootIsZero(Blocks):
    def publish_stored(self, token_ids: Sequence[int], hashes: list[int], first: int) -> None:
        if self.publisher is not None:
            self.publisher.publish_stored(
                list(token_ids[first * BLOCK_SIZE : len(hashes) * BLOCK_SIZE]),
                [BLOCK_SIZE] * (len(hashes) - first),
                hashes[first:],
                parent_hash=hashes[first - 1] if first else 0,
            )


@mutant("kv.parent", "a prompt's first block has the parent 0", engine_args=KV)
class ParentOfRootIsZero(OwnBlocks):
    blocks_class = _RootIsZero


class _DeepestFirst(Blocks):
    def publish_stored(self, token_ids: Sequence[int], hashes: list[int], first: int) -> None:
        for i in reversed(range(first, len(hashes))):
            super().publish_stored(token_ids, hashes[: i + 1], i)


@mutant("kv.parent", "blocks are published before their parents", engine_args=KV)
class ChildrenFirst(OwnBlocks):
    blocks_class = _DeepestFirst


@mutant(
    "kv.balance", "takes more blocks than it says it has", seen_in="NVIDIA's sample engine 1.4.2-1.6.1", engine_args=KV
)
class MoreBlocksThanThereAre(ToyEngine):
    def engine_config(self) -> Any:
        config = super().engine_config()
        config.llm.total_kv_blocks = 40
        return config


class _LateRemovals(Blocks):
    """Publishes removals from time to time, as a thread with a queue does."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks)
        self.waiting: list[int] = []

    def publish_removed(self, hashes: list[int]) -> None:
        self.waiting.extend(hashes)

    def flush(self) -> None:
        hashes, self.waiting = self.waiting, []
        if hashes:
            super().publish_removed(hashes)

    def publish_stored(self, token_ids: Sequence[int], hashes: list[int], first: int) -> None:
        self.flush()
        super().publish_stored(token_ids, hashes, first)


@mutant(
    "kv.balance",
    "removals that wait to be published are lost at cleanup",
    seen_in="NVIDIA's sample engine 1.4.2-1.6.1",
    engine_args=KV,
)
class RemovalsLostAtCleanup(OwnBlocks):
    blocks_class = _LateRemovals

    async def background(self) -> None:
        while True:
            await asyncio.sleep(0.5)
            if isinstance(self.blocks, _LateRemovals):
                self.blocks.flush()


@mutant("kv.balance", "an aborted or stopped request's blocks are removed twice", engine_args=KV)
class RemovesTwice(ToyEngine):
    def cancelled(self, work: Work) -> dict[str, Any]:
        if work.block_hashes and all(self.blocks.users[one] == 1 for one in work.block_hashes):
            self.blocks.publish_removed(list(work.block_hashes))
        return super().cancelled(work)


@mutant(
    "kv.balance",
    "a request cancelled before its blocks were handed over keeps them",
    seen_in="dynamo#7489, TensorRT-LLM#12314",
    engine_args=KV,
    role="prefill",
)
class PinnedByCancelledTransfer(ToyEngine):
    def give_blocks_back(self, work: Work) -> None:
        if work.output:
            super().give_blocks_back(work)


class _CountsUp(Blocks):
    def publish_stored(self, token_ids: Sequence[int], hashes: list[int], first: int) -> None:
        super().publish_stored(range(len(token_ids)), hashes, first)


@mutant(
    "kv.tokens_true",
    "the tokens of stored events are 0, 1, 2 ...",
    seen_in="NVIDIA's sample engine 1.4.2-1.6.1",
    engine_args=KV,
)
class PublishesCountingTokens(OwnBlocks):
    blocks_class = _CountsUp


class _Shifted(Blocks):
    def publish_stored(self, token_ids: Sequence[int], hashes: list[int], first: int) -> None:
        super().publish_stored([*token_ids[1:], 0], hashes, first)


@mutant("kv.tokens_true", "the tokens of stored events begin one too late", engine_args=KV)
class PublishesShiftedTokens(OwnBlocks):
    blocks_class = _Shifted
