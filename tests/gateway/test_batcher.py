"""The batcher. Requests that arrive while one batch runs are sent together as the next batch."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from cluster.gateway.batcher import Batcher


class Store:
    """A store that answers each request with its uppercase text, once `go` is set. The request "bad" gets an error."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.go = asyncio.Event()
        self.away = False

    async def __call__(self, asks: Sequence[str]) -> Sequence[str | Exception]:
        """Answer the requests of one batch."""
        self.asked.append(list(asks))
        await self.go.wait()
        if self.away:
            raise OSError("away")
        return [ValueError(one) if one == "bad" else one.upper() for one in asks]


async def test_what_comes_meanwhile_goes_together() -> None:
    """The first request is sent at once. Later requests are sent in the next batch, up to the maximum size. Each
    request gets its own answer."""
    store = Store()
    ask = Batcher(store, most=3)
    first = ask("a")
    await asyncio.sleep(0)
    others = [ask(one) for one in ("b", "bad", "c", "d")]
    await asyncio.sleep(0)
    assert store.asked == [["a"]]
    store.go.set()
    assert await first == "A"
    got = await asyncio.gather(*others, return_exceptions=True)
    assert [str(one) for one in got] == ["B", "bad", "C", "D"]
    assert isinstance(got[1], ValueError)
    assert store.asked == [["a"], ["b", "bad", "c"], ["d"]]
    assert await ask("e") == "E"


async def test_a_store_that_is_away_is_everyones_error() -> None:
    """All requests of a batch fail with the store's error. The next request is sent to the store again."""
    store = Store()
    store.go.set()
    store.away = True
    ask = Batcher(store)
    got = await asyncio.gather(ask("a"), ask("b"), return_exceptions=True)
    assert [type(one) for one in got] == [OSError, OSError]
    store.away = False
    assert await ask("c") == "C"


async def test_who_waits_behind_a_failure_does_not_wait_for_another() -> None:
    """Requests that waited behind a failed batch fail together with it. So a request waits only once for a lost
    store."""
    store = Store()
    store.away = True
    ask = Batcher(store)
    first = ask("a")
    await asyncio.sleep(0)
    second = ask("b")
    store.go.set()
    got = await asyncio.gather(first, second, return_exceptions=True)
    assert [type(one) for one in got] == [OSError, OSError]
    assert store.asked == [["a"]]


async def test_who_no_longer_waits_is_not_asked() -> None:
    """A request that is cancelled before its batch is sent is left out. A later cancellation does not affect the other
    requests of the batch."""
    store = Store()
    ask = Batcher(store)
    first, gone = ask("a"), ask("b")
    gone.cancel()
    await asyncio.sleep(0)
    first.cancel()
    other = ask("c")
    store.go.set()
    assert await other == "C"
    assert store.asked == [["a"], ["c"]]
    with pytest.raises(asyncio.CancelledError):
        await first
