"""Adapters of a simulated cluster: which calls name an adapter, and which adapters lie in the slots of a worker's
engine.

All workers have loaded all adapters. An engine computes only with adapters that lie in one of its few slots. If a
call's adapter lies in no slot, the engine stops while the adapter is copied in place of the least recently used one.
"""

from __future__ import annotations

from bisect import bisect
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from itertools import accumulate


@dataclass(frozen=True)
class AdapterMix:
    """The mix of adapters in simulated calls. `share`: share of the calls that request an adapter. `count`: number of
    adapters; their popularity follows Zipf's law. `slots`: number of adapters that an engine holds ready at a time.
    `copy_s`: time to copy an adapter into a slot, in seconds."""

    share: float
    count: int = 64
    slots: int = 8
    copy_s: float = 0.02

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share of calls with adapters: must be above 0 and at most 1, got {self.share}")

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of all adapters, the most popular one first."""
        return tuple(f"a{number}" for number in range(self.count))

    @cached_property
    def _sums(self) -> list[float]:
        return list(accumulate(1 / (1 + number) for number in range(self.count)))

    def adapter_of(self, key: object) -> str:
        """Return the adapter that a call with this key names; "" for the base model. Equal keys give equal adapters."""
        digest = blake2b(repr(key).encode(), digest_size=16).digest()
        first, second = (int.from_bytes(half) / 2**64 for half in (digest[:8], digest[8:]))
        return self.names[bisect(self._sums, second * self._sums[-1])] if first < self.share else ""


class AdapterSlots:
    """The adapter slots of one simulated engine, and the adapters in them."""

    def __init__(self, mix: AdapterMix) -> None:
        self._mix = mix
        self._slots: OrderedDict[str, None] = OrderedDict()
        self.copies = 0
        """Number of copies so far."""

    @property
    def resident(self) -> frozenset[str]:
        """The adapters in the slots."""
        return frozenset(self._slots)

    def use(self, adapter: str) -> float:
        """Use an adapter ("" for none); return how many seconds the engine stops to copy the adapter into a slot."""
        if not adapter:
            return 0.0
        is_resident = adapter in self._slots
        self._slots[adapter] = None
        self._slots.move_to_end(adapter)
        if is_resident:
            return 0.0
        self.copies += 1
        if len(self._slots) > self._mix.slots:
            self._slots.popitem(last=False)
        return self._mix.copy_s
