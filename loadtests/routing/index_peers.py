"""Program that measures a peer's index of KV blocks: a dict of sets, or the index of Dynamo's router. It prints the
figures as JSON.

python index_peers.py dict|dynamo SEED WORKERS PAIRS

The program runs with the Python of the peers' environment, so it imports nothing of this repository.
"""

from __future__ import annotations

import importlib
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np

SHORT, LONG, CALLS = 250, 8000, 2000


class Index(Protocol):
    """An index from blocks to workers."""

    def prepare(self, hashes: list[int]) -> Any:
        """Return a prompt in the form that `store` and `match` take."""

    def store(self, worker: int, prompt: Any) -> None:
        """Record that a worker holds a prompt."""

    def match(self, prompt: Any) -> Any:
        """Return how much of a prompt each worker holds."""


class DictOfSets:
    """An index as a dict: for each hash, the set of workers that hold the block."""

    def __init__(self) -> None:
        self._holders: dict[int, set[int]] = {}

    def prepare(self, hashes: list[int]) -> list[int]:
        """Implements `Index.prepare`."""
        return hashes

    def store(self, worker: int, prompt: list[int]) -> None:
        """Implements `Index.store`."""
        for value in prompt:
            self._holders.setdefault(value, set()).add(worker)

    def match(self, prompt: list[int]) -> dict[int, int]:
        """Implements `Index.match`."""
        depths: dict[int, int] = {}
        alive: set[int] | None = None
        for depth, value in enumerate(prompt):
            holders = self._holders.get(value, set())
            still = holders if alive is None else alive & holders
            if alive is not None and len(still) < len(alive):
                depths.update(dict.fromkeys(alive - still, depth))
            alive = still
            if not alive:
                return depths
        depths.update(dict.fromkeys(alive or (), len(prompt)))
        return depths


class Dynamo:
    """The index of Dynamo's router, `dynamo.llm.RadixTree`. Its events are JSON; the time to make the JSON is not
    measured."""

    def __init__(self) -> None:
        self._tree = importlib.import_module("dynamo.llm").RadixTree()

    def prepare(self, hashes: list[int]) -> tuple[list[int], bytes]:
        """Implements `Index.prepare`."""
        blocks = [{"block_hash": value, "tokens_hash": value} for value in hashes]
        event = {"event_id": 0, "data": {"stored": {"parent_hash": None, "blocks": blocks}}}
        return hashes, json.dumps(event).encode()

    def store(self, worker: int, prompt: tuple[list[int], bytes]) -> None:
        """Implements `Index.store`."""
        self._tree.apply_event(worker, prompt[1])

    def match(self, prompt: tuple[list[int], bytes]) -> Any:
        """Implements `Index.match`."""
        return self._tree.find_matches(prompt[0]).scores


def random_hashes(seed: int, number: int, count: int) -> list[int]:
    """Return `count` random hashes, which stand for the block hashes of a prompt. The same `seed` and `number` (of the
    prompt) give the same hashes."""
    hashes: list[int] = np.random.default_rng((seed, number)).integers(1, 1 << 63, count, np.uint64).tolist()
    return hashes


def resident_bytes() -> int:
    """Return the resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def times_us(index: Index, prompts: list[Any]) -> tuple[float, float]:
    """Return the median and the p99 of `match` in microseconds."""
    took = []
    for prompt in prompts:
        begun = time.perf_counter()
        index.match(prompt)
        took.append(time.perf_counter() - begun)
    p50, p99 = np.percentile(took, (50, 99)) * 1e6
    return float(p50), float(p99)


def main() -> None:
    """Fill the index and print its figures."""
    name, seed, workers, pairs = sys.argv[1], *map(int, sys.argv[2:5])
    index: Index = DictOfSets() if name == "dict" else Dynamo()
    before, store_s, count = resident_bytes(), 0.0, pairs // SHORT
    for number in range(count):
        prompt = index.prepare(random_hashes(seed, number, SHORT))
        begun = time.perf_counter()
        index.store(number % workers, prompt)
        store_s += time.perf_counter() - begun
    index.match(prompt)  # after all events that another thread applies
    used = resident_bytes() - before
    longs = [index.prepare(random_hashes(seed, count + number, LONG)) for number in range(8)]
    for number, prompt in enumerate(longs):
        index.store(number, prompt)
    step = max(count // CALLS, 1)
    p50, p99 = times_us(index, [index.prepare(random_hashes(seed, at, SHORT)) for at in range(0, count, step)])
    long_p50, _ = times_us(index, longs * 20)
    print(
        json.dumps(
            {
                "pairs": count * SHORT,
                "bytes_a_pair": used / (count * SHORT),
                "stored_per_s": count * SHORT / store_s,
                "p50_us": p50,
                "p99_us": p99,
                "long_p50_us": long_p50,
            }
        )
    )


if __name__ == "__main__":
    main()
