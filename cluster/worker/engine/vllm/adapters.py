"""The LoRA adapters in a vLLM engine's memory.

Problem: if a request names an adapter that vLLM does not hold, vLLM loads the adapter during the request's step. An
error of this load ends the engine. If the memory for adapters is full, vLLM silently drops the least recently used one.
Invariants: a request names only an adapter that the engine has acknowledged and still holds; at most `capacity`
adapters are held, so that vLLM never drops one; an adapter is removed only after its last request has ended; the number
of an adapter in vLLM (`lora_int_id`) is never used again.

vLLM's pins are not used, since a pinned adapter also occupies a slot in every step. If a step then needs more adapters
than there are free slots, vLLM replaces an adapter that the step itself needs.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from typing import Any

from cluster.api.outcomes import Outcome
from cluster.api.ports import EngineCorrupt, EngineDead, EngineRefused
from cluster.worker.engine.vllm.paths import EnginePath

FIRST_NUMBER = 1 << 20
"""Smallest number given to an adapter here. Adapters that vLLM loads by itself at its start have smaller numbers."""
MAX_MESSAGE_CHARACTERS = 300


@dataclass(slots=True)
class HeldAdapter:
    """An adapter that vLLM holds. `request`: vLLM's LoRARequest."""

    request: Any
    live: int = 0
    """Number of requests that vLLM holds for this adapter."""
    leaving: bool = False
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    """Set while no request uses this adapter."""


class EngineAdapters(Container[str]):
    """The adapters of one engine, by digest.

    `digest in adapters` is true while requests for the adapter can be submitted.
    """

    def __init__(self, slots: int = 0, capacity: int = 0, ranks: int = 1) -> None:
        """Create the object without adapters.

        `slots`: maximum number of adapters in one step. `capacity`: maximum number of adapters in the engine's memory.
        `ranks`: number of the engine's ranks.
        """
        self.slots = slots
        self.capacity = capacity
        self._ranks = ranks
        self._held: dict[str, HeldAdapter] = {}
        self._numbers: Iterator[int] = itertools.count(FIRST_NUMBER)
        self._changing = asyncio.Lock()
        self.loading = False
        """Whether the engine is loading an adapter. The engine's steps wait for the end of the load."""

    def __contains__(self, digest: object) -> bool:
        held = self._held.get(digest) if isinstance(digest, str) else None
        return held is not None and not held.leaving

    def request_of(self, digest: str) -> Any:
        """Return vLLM's LoRARequest for the adapter with this digest; None for the base model, whose digest is ""."""
        return self._held[digest].request if digest else None

    def began(self, digest: str) -> None:
        """Count one more request that uses the adapter in vLLM."""
        if digest:
            held = self._held[digest]
            held.live += 1
            held.idle.clear()

    def ended(self, digest: str) -> None:
        """Count one request fewer that uses the adapter in vLLM. The request must have been counted with `began`."""
        if digest:
            held = self._held[digest]
            held.live -= 1
            if not held.live:
                held.idle.set()

    async def load(self, path: EnginePath, digest: str, folder: str) -> None:
        """Load an adapter from its folder. `digest`: the adapter's name in the engine. An adapter that is already
        loaded is kept. Raises EngineRefused if the engine's memory for adapters is full."""
        from vllm.lora.request import LoRARequest

        async with self._changing:
            if digest in self._held:
                self._held[digest].leaving = False
                return
            if len(self._held) >= self.capacity:
                raise _refused(f"the engine's memory holds {self.capacity} adapters (engine.max_cpu_loras) already")
            request = LoRARequest(lora_name=digest, lora_int_id=next(self._numbers), lora_path=folder)
            self.loading = True
            try:
                await self._add(path, request)
            finally:
                self.loading = False
            held = HeldAdapter(request)
            held.idle.set()
            self._held[digest] = held

    async def _add(self, path: EnginePath, request: Any) -> None:
        try:
            if await path.add_adapter(request):
                return
            why = "vLLM did not take it"
        except EngineDead:
            raise
        except Exception as error:  # whatever vLLM's loader raised in a rank, which arrives as text
            why = " ".join(str(error).split())[:MAX_MESSAGE_CHARACTERS]
        if self._ranks > 1:  # vLLM's executor would give the ranks' next replies to the wrong calls
            raise EngineCorrupt(f"the engine failed to load the adapter {request.lora_name} in one of its ranks: {why}")
        await path.remove_adapter(request.lora_int_id)  # it may be half there
        raise _refused(f"the engine cannot load it: {why}")

    async def unload(self, path: EnginePath, digest: str) -> None:
        """Refuse new requests for an adapter at once, wait for its last request to end, and remove the adapter."""
        if digest not in self:
            return
        held = self._held[digest]
        held.leaving = True
        while held.leaving:
            await held.idle.wait()
            async with self._changing:
                if held.leaving and not held.live:
                    await path.remove_adapter(held.request.lora_int_id)
                    del self._held[digest]
                    return


def _refused(message: str) -> EngineRefused:
    return EngineRefused(Outcome.ADAPTER_INVALID.name, f"adapter: {message}", "adapter")
