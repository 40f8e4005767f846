"""Fetches of adapters whose sources do not answer."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from cluster.api.adapters import AdapterSpec
from cluster.worker.adapters.fetches import MAX_ABANDONED, PARALLEL_FETCHES, AdapterFetches
from cluster.worker.weights.adapter_store import StoredAdapter


class Sources:
    """A store of adapters. Sources that begin with `slow` answer once `gate` is set."""

    def __init__(self) -> None:
        self.gate = threading.Event()

    def fetch(self, spec: AdapterSpec, progress: Callable[[], None]) -> StoredAdapter:
        if spec.source.startswith("slow"):
            self.gate.wait()
        return StoredAdapter(spec.source, Path("/none"))

    def mark_corrupting(self, digest: str, reason: str) -> None:
        raise AssertionError("no engine is here")


@pytest.fixture
async def sources() -> AsyncIterator[Sources]:
    """Provide sources, which all answer at the end."""
    sources = Sources()
    yield sources
    sources.gate.set()


async def fetch(fetches: AdapterFetches, source: str) -> str:
    """Fetch an adapter, and return its digest."""
    return (await fetches.fetch(AdapterSpec("a", source))).digest


async def test_sources_that_do_not_answer_stop_no_others(sources: Sources) -> None:
    """A fetch without progress fails, and the next source is fetched. A source that hangs is not asked again until its
    first fetch has ended."""
    fetches = AdapterFetches(sources, silence_s=0.05)
    for number in range(PARALLEL_FETCHES):
        with pytest.raises(ValueError, match=r"the source did not answer within 0 s$"):
            await fetch(fetches, f"slow-{number}")
    assert await fetch(fetches, "good") == "good"
    with pytest.raises(ValueError, match="still hangs"):
        await fetch(fetches, "slow-0")
    sources.gate.set()
    for hung in list(fetches._abandoned):
        hung.result(60)
    assert await fetch(fetches, "slow-0") == "slow-0"
    await fetches.close()


async def test_the_number_of_fetches_that_hang_is_bounded(sources: Sources) -> None:
    """While too many fetches hang, others fail at once with this reason."""
    fetches = AdapterFetches(sources, silence_s=0.01)
    for number in range(MAX_ABANDONED):
        with pytest.raises(ValueError, match="did not answer"):
            await fetch(fetches, f"slow-{number}")
    with pytest.raises(ValueError, match=f"{MAX_ABANDONED} fetches of other adapters hang"):
        await fetch(fetches, "good")
    await fetches.close()
