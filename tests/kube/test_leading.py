"""With a Lease over a real HTTP API, one process leads, another process takes over, and a leader that loses the Lease
stops.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.kube.api import ApiUnavailable, Conflict, KubeLease
from cluster.kube.leading import Leader, WorkNotStopped
from cluster.kube.lease import LeaseRecord, LeaseTerms
from tests.support.kube_api import FakeApi, kube_api

pytestmark = pytest.mark.slow

QUICK = LeaseTerms(lease_s=1.2, yield_s=0.8, again_s=0.03)


@pytest.fixture
def api(tmp_path: Path) -> Iterator[FakeApi]:
    """A running fake of the Kubernetes API."""
    with kube_api(tmp_path) as running:
        yield running


async def until(true: Callable[[], bool], within_s: float = 60.0) -> None:
    """Wait until the condition `true` holds. Other tasks run meanwhile."""
    async with asyncio.timeout(within_s):
        while not true():  # noqa: ASYNC110 - the condition has no event
            await asyncio.sleep(0.005)


def test_a_lease_is_made_kept_and_taken(api: FakeApi) -> None:
    """A write that is based on an outdated record of the Lease raises Conflict. The record counts how often the holder
    has changed. The stored Lease has the field names of the Kubernetes API."""
    store = api.lease()
    assert store.read() is None
    made = store.write("a", None)
    assert store.read() == made
    assert made == LeaseRecord("a", made.version, 0)
    with pytest.raises(Conflict, match="already exists"):
        store.write("b", None)
    kept = store.write("a", made)
    assert kept == LeaseRecord("a", kept.version, 0)
    with pytest.raises(Conflict, match="has been modified"):
        store.write("b", made)
    assert store.write("b", kept).transitions == 1
    spec = api.leases["headrace-controller"]["spec"]
    assert spec["leaseDurationSeconds"] == 15
    assert spec["renewTime"].endswith("Z")


def test_an_api_that_is_away_or_refuses_is_told(api: FakeApi, tmp_path: Path) -> None:
    """An HTTP error, a network error and a missing token file raise ApiUnavailable."""
    store = api.lease()
    api.away = True
    with pytest.raises(ApiUnavailable, match="503 the server is currently unable"):
        store.read()
    api.away = False
    (tmp_path / "wrong").write_text("another token")
    with pytest.raises(ApiUnavailable, match="401"):
        KubeLease(api.url, "ns", "x", 15, tmp_path / "wrong").write("a", None)
    with pytest.raises(ApiUnavailable):
        KubeLease(api.url, "ns", "x", 15, tmp_path / "none").read()
    with pytest.raises(ApiUnavailable):
        KubeLease("http://127.0.0.1:1", "ns", "x", 15, tmp_path / "wrong").read()


def test_outside_a_pod_there_is_none(tmp_path: Path) -> None:
    """Outside a pod, `KubeLease.of_this_pod` raises an error that says that a Lease needs a pod."""
    with pytest.raises(ValueError, match="needs a pod"):
        KubeLease.of_this_pod("x", 15, tmp_path)


class Work:
    """Work that runs under a Lease. It records the largest number of processes that ran the work at the same time."""

    def __init__(self) -> None:
        self.running: set[str] = set()
        self.most = 0

    def of(self, name: str) -> Callable[[asyncio.Event], object]:
        """Return the work as a function that process `name` runs while it holds the Lease."""

        async def work(stop: asyncio.Event) -> None:
            self.running.add(name)
            self.most = max(self.most, len(self.running))
            try:
                await stop.wait()
            finally:
                self.running.discard(name)

        return work


@contextlib.asynccontextmanager
async def led(api: FakeApi, names: str, work: Work):  # type: ignore[no-untyped-def]
    """Run one candidate for the leadership for each letter of `names`, and stop all candidates at the end."""
    stops = {name: asyncio.Event() for name in names}
    leaders = {name: Leader(api.lease(), name, QUICK) for name in names}
    tasks = {name: asyncio.create_task(leaders[name].run(work.of(name), stops[name])) for name in names}  # type: ignore[arg-type]
    try:
        yield leaders, stops, tasks
    finally:
        for stop in stops.values():
            stop.set()
        await asyncio.gather(*tasks.values(), return_exceptions=True)


async def test_one_of_two_works_and_hands_over_when_it_stops(api: FakeApi) -> None:
    """When a leader stops, it gives up the Lease, so that the other process can lead before the term ends."""
    work = Work()
    async with led(api, "ab", work) as (leaders, stops, tasks):
        await until(lambda: len(work.running) == 1)
        (first,) = work.running
        (other,) = {"a", "b"} - {first}
        stops[first].set()
        await asyncio.wait_for(tasks[first], 60)
        assert api.leases["headrace-controller"]["spec"]["holderIdentity"] in ("", other)
        await until(lambda: work.running == {other})
        assert leaders[other].leads
    assert work.most == 1
    assert api.leases["headrace-controller"]["spec"]["leaseTransitions"] == 1


@pytest.mark.parametrize("held_up", ["read", "write"])
async def test_a_leader_that_stops_while_it_renews_gives_up_the_lease(api: FakeApi, held_up: str) -> None:
    """A leader that stops while a renewal is on its way gives up the Lease, wherever the renewal is held up."""
    on_its_way, go_on, arrived = threading.Event(), threading.Event(), threading.Event()

    class SlowStore:
        """Lease whose first renewal is held up: before its record is read, or after its write was sent."""

        def __init__(self) -> None:
            self.lease = api.lease()
            self.calls = {"read": 0, "write": 0}

        def read(self) -> LeaseRecord | None:
            self._hold_up("read")
            return self.lease.read()

        def write(self, holder: str, over: LeaseRecord | None) -> LeaseRecord:
            if holder == "":
                go_on.set()
                arrived.wait(60)
            self._hold_up("write")
            try:
                return self.lease.write(holder, over)
            finally:
                arrived.set()

        def _hold_up(self, call: str) -> None:
            self.calls[call] += 1
            if self.calls[call] == 2 and call == held_up:
                on_its_way.set()
                go_on.wait(60)
                if call == "read":
                    arrived.set()

    leader, stop = Leader(SlowStore(), "a", QUICK), asyncio.Event()
    task = asyncio.create_task(leader.run(Work().of("a"), stop))  # type: ignore[arg-type]
    await until(on_its_way.is_set)
    stop.set()
    await asyncio.wait_for(task, 60)
    await asyncio.sleep(QUICK.again_s)  # a renewal that goes on would write now
    assert api.leases["headrace-controller"]["spec"]["holderIdentity"] == ""


async def test_who_cannot_renew_stops_and_begins_again(api: FakeApi) -> None:
    """While the Kubernetes API is down, the holder of the Lease stops its work once the lease time is over. When the
    API is back, exactly one process works."""
    work = Work()
    async with led(api, "ab", work):
        await until(lambda: len(work.running) == 1)
        api.away = True
        await until(lambda: not work.running)
        api.away = False
        await until(lambda: len(work.running) == 1)
    assert work.most == 1


async def test_a_killed_holder_is_followed(api: FakeApi) -> None:
    """After the holder is killed, the other processes wait until its term ends, and then one of them leads."""
    store = api.lease()
    store.write("killed", None)
    work = Work()
    began = asyncio.get_running_loop().time()
    async with led(api, "b", work):
        await until(lambda: work.running == {"b"})
        assert asyncio.get_running_loop().time() - began >= QUICK.lease_s
    assert api.leases["headrace-controller"]["spec"]["leaseTransitions"] == 1


async def test_work_that_fails_is_raised_and_the_lease_is_free(api: FakeApi) -> None:
    """If the work raises an error, `run` raises this error, and the Lease has no holder, so that another process can
    lead at once."""

    async def fails(stop: asyncio.Event) -> None:
        raise RuntimeError("Ray has gone mad")

    with pytest.raises(RuntimeError, match="gone mad"):
        await Leader(api.lease(), "a", QUICK).run(fails, asyncio.Event())
    record = api.lease().read()
    assert record is not None
    assert record.holder == ""


async def test_work_that_does_not_stop_ends_the_process(api: FakeApi) -> None:
    """If work does not stop after the Lease is lost, `run` raises WorkNotStopped, because no work may run without the
    Lease."""

    async def deaf(stop: asyncio.Event) -> None:
        await asyncio.Event().wait()

    leader = Leader(api.lease(), "a", QUICK)
    running = asyncio.create_task(leader.run(deaf, asyncio.Event()))
    await until(lambda: leader.leads)
    api.away = True
    with pytest.raises(WorkNotStopped):
        await asyncio.wait_for(running, 60)
