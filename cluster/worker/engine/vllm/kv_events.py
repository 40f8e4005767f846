"""KV events of a vLLM engine, read from the ZeroMQ socket on which its engine core publishes them.

Facts of vLLM 0.32 (`distributed/kv_events.py`, `v1/core/block_pool.py`): batches of events are numbered from 0. A
subscriber that is late or slow misses batches, and may request the last 10,000 batches again. `extra_keys` contains the
cache salt only for the first block of a prompt. A hybrid model reports the blocks of each group of layers; only the
blocks of full attention correspond to the tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import structlog

from cluster.api.kv_events import BlocksCleared, BlocksRemoved, BlocksStored, KvEvent
from cluster.api.types import KV_EVENTS, PREFIX_EXACT, ModelSpec

log = structlog.get_logger("engine")

REPLAY_S = 5.0
"""Longest wait, in seconds, for batches that were requested again."""
MAX_BATCHES = 64
"""Greatest number of waiting batches that are read at once."""
_FULL_ATTENTION = (None, "full_attention", "mla_attention", "sink_full_attention")
"""Kinds of layers that keep the blocks of all tokens. DeepSeek's latent attention (MLA) is one of them."""


def has_events(spec: ModelSpec) -> bool:
    """Return whether the KV events of a catalog entry's engine can be read.

    The engine must cache prefixes and have one engine core, and the entry must not have its own `kv_events_config`.
    """
    engine: Mapping[str, Any] = spec.engine
    several = int(engine.get("data_parallel_size") or 1) > 1
    return engine.get("enable_prefix_caching") is not False and "kv_events_config" not in engine and not several


def capabilities(config: Any) -> tuple[str, ...]:
    """Return the capabilities of an engine with KV events. `config`: vLLM's VllmConfig.

    One capability says that gateways can predict exactly how many tokens of a prompt are cached. The engine
    has it only if all layers have full attention, because they then share one group of blocks. Layers with
    a sliding window, chunked attention or state have groups of their own, and the engine finds only blocks
    that all groups still have. An engine with speculative decoding does not have it either, because the
    last block may be dropped, nor an engine with a KV connector, because the connector may find more blocks.
    """
    model = config.model_config
    layers = getattr(model.hf_text_config, "layer_types", None)
    is_full = set(layers) <= {"full_attention", "attention"} if layers else model.get_sliding_window() is None
    others = model.is_hybrid or model.is_attention_free or model.is_encoder_decoder or model.use_mla
    is_full = is_full and not others and model.attention_chunk_size is None
    is_exact = is_full and config.speculative_config is None and config.kv_transfer_config is None
    return (KV_EVENTS, PREFIX_EXACT) if is_exact else (KV_EVENTS,)


class KvEventSocket:
    """The subscription to one engine core's KV events. Create it before the engine starts."""

    def __init__(self, folder: Path) -> None:
        """Choose the addresses of the sockets. `folder`: private folder for the files of the sockets."""
        name = uuid.uuid4().hex[:12]
        self._endpoint, self._replay_endpoint = (f"ipc://{folder}/kv-{name}{kind}" for kind in ("", "-replay"))
        self._next = 0
        self._groups: set[int | None] = set()
        self._context: Any = None
        self._subscriber: Any = None
        self._decoder: Any = None
        self._received: list[Sequence[bytes]] = []
        self._missed: Sequence[bytes] | None = None
        self._has_lost = False
        """Whether events were lost for good since the last event that was returned."""

    def config(self) -> Any:
        """Return the KVEventsConfig of vLLM that makes the engine core publish its events to this socket."""
        from vllm.config import KVEventsConfig

        return KVEventsConfig(
            enable_kv_cache_events=True,
            publisher="zmq",
            endpoint=self._endpoint,
            replay_endpoint=self._replay_endpoint,
        )

    async def kv_events(self) -> Sequence[KvEvent]:
        """Wait for events and return them in order. The first call subscribes."""
        if self._subscriber is None:
            self._subscribe()
        while True:
            if not self._received:
                self._received.append(await self._subscriber.recv_multipart())
            while len(self._received) < MAX_BATCHES and await self._subscriber.poll(0):
                self._received.append(await self._subscriber.recv_multipart())
            if (number := _number(self._received[0])) > self._next and self._missed is None:
                self._missed = await self._replayed(number)
            end = _run_length(self._received)  # the next pass requests the batches that are missing after this run
            received, self._received = self._received[:end], self._received[end:]
            missed, self._missed = self._missed, None
            if events := list(self._in_order(missed or (), received)):
                return events

    def _subscribe(self) -> None:
        import msgspec
        import zmq
        import zmq.asyncio
        from vllm.distributed.kv_events import KVEventBatch

        self._decoder = msgspec.msgpack.Decoder(KVEventBatch)
        self._context = zmq.asyncio.Context()
        self._subscriber = self._context.socket(zmq.SUB)
        self._subscriber.set_hwm(0)
        self._subscriber.subscribe(b"")
        self._subscriber.connect(self._endpoint)

    def _in_order(self, missed: Sequence[bytes], received: Sequence[Sequence[bytes]]) -> Iterator[KvEvent]:
        """Yield the events of the batches in `missed`, which were requested again, and then of the batches in
        `received`."""
        for payload in missed:
            yield from self._decoded(payload)
        if self._has_lost:  # blocks whose removal is among the lost events would be reported as held for ever
            self._has_lost = False
            yield BlocksCleared()
        for frames in received:
            if (number := _number(frames)) >= self._next:  # otherwise the batch is among those requested again
                self._next = number + 1
                yield from self._decoded(frames[2])

    async def _replayed(self, end: int) -> Sequence[bytes]:
        """Request missed batches again: those from the next expected number to `end` (exclusive). Return their
        payloads.

        Batches that vLLM no longer has are left out.
        """
        import zmq

        found: list[bytes] = []
        socket = self._context.socket(zmq.DEALER)
        try:
            socket.connect(self._replay_endpoint)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REPLAY_S):
                    await socket.send_multipart([b"", self._next.to_bytes(8, "big")])
                    while True:
                        *_, number, payload = await socket.recv_multipart()
                        if not self._next <= int.from_bytes(number, "big", signed=True) < end:
                            break
                        found.append(payload)
        finally:
            socket.close(linger=0)
        lost = end - self._next - len(found)
        if lost:
            log.warning("engine.kv_events_lost", batches=lost)
            self._has_lost = True
        return found

    def _decoded(self, payload: bytes) -> Iterator[KvEvent]:
        from vllm.distributed.kv_events import MEDIUM_GPU, AllBlocksCleared, BlockRemoved, BlockStored

        for event in self._decoder.decode(payload).events:
            if isinstance(event, AllBlocksCleared):
                yield BlocksCleared()
            elif event.medium not in (None, MEDIUM_GPU):
                continue  # a KV connector's copy in the CPU's memory or on a disk, with the hash of the engine's block
            elif isinstance(event, BlockRemoved):
                if event.group_idx in self._groups:
                    yield BlocksRemoved(event.block_hashes)
            elif isinstance(event, BlockStored) and event.kv_cache_spec_kind in _FULL_ATTENTION:
                self._groups.add(event.group_idx)
                keys = None if event.extra_keys is None else _prefix_keys(event)
                if keys is not None or event.extra_keys is None:
                    salt, adapter = keys or ("", event.lora_name or "")
                    yield BlocksStored(
                        event.block_hashes, event.parent_block_hash, event.token_ids, event.block_size, salt, adapter
                    )

    def close(self) -> None:
        """End the subscription."""
        if self._subscriber is not None:
            self._subscriber.close(linger=0)
            self._context.term()
            self._subscriber = None


def _number(frames: Sequence[bytes]) -> int:
    """Return the number of a batch, given the ZeroMQ frames of its message."""
    return int.from_bytes(frames[1], "big")


def _run_length(batches: Sequence[Sequence[bytes]]) -> int:
    """Return how many batches at the beginning of `batches` have consecutive numbers."""
    numbers = list(map(_number, batches))
    return next((at for at in range(1, len(numbers)) if numbers[at] > numbers[at - 1] + 1), len(numbers))


def _prefix_keys(event: Any) -> tuple[str, str] | None:
    """Return the cache salt and the adapter that apply to the event's blocks.

    Returns None if a block of the event depends on more than its tokens, salt and adapter, for example on an image.
    """
    adapter = event.lora_name or ""
    salts = []
    for keys in event.extra_keys:
        rest = list(keys or ())
        if adapter and rest and rest[0] == adapter:
            del rest[0]
        if len(rest) > 1 or not all(isinstance(key, str) for key in rest):
            return None
        salts.append(rest[0] if rest else "")
    return (salts[0] if salts else ""), adapter
