"""A short soak test. A thousand calls and many lost links leave nothing behind in gateway, worker and engine.

The test counts objects, since memory use shows nothing within seconds; `python -m loadtests faults --only soak` checks
memory for minutes.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster.api.types import EngineRequest
from cluster.gateway.calls.call import Call
from cluster.gateway.calls.sequences.sequence import OutputSequence
from cluster.gateway.console.overview import parts
from cluster.gateway.links import hub
from cluster.wire.bundle import Bundle
from cluster.wire.dial import Timing
from cluster.worker.link_runner import LinkRunner
from tests.support.calls import chat
from tests.support.cluster import TestCluster, sim_engine, until

pytestmark = [pytest.mark.slow, pytest.mark.alone]

CALLS, AT_ONCE, LINKS = 400, 20, 30
ROUNDS, KEPT = 2, 0.2
REST_S = 30.0
"""Seconds within which everything that has ended must be freed. One count of all objects takes seconds, and more on a
busy machine."""
STILL, STILL_S = 5, 10.0
"""Number of counts in a row without growth after which a new link counts as complete, and the most seconds that they
may take."""
QUICK = Timing(redial_min_s=0.01, redial_max_s=0.02, silence_s=60.0, hang_s=60.0)
"""Timing with long heartbeat timeouts, because counting all objects may block this process's only event loop for
seconds."""


READER = LinkRunner._read.__qualname__
"""Name of the task that every complete link has in the worker."""
BULK = hub._write_blobs.__qualname__
"""Name of the task that every complete link has in the gateway for its large blobs."""
LAZY = ("asyncio.events.TimerHandle", "_contextvars.Context")
"""Names of types that are not counted. The event loop frees cancelled timers and their contexts late; live timers are
counted separately."""


def _name(called: Any) -> str:
    return getattr(called, "__qualname__", type(called).__name__)


def _file(number: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{number}")
    except OSError:  # the descriptor of the listing itself
        return "gone"


@dataclass(frozen=True)
class Held:
    """Counts of everything that this process holds when idle."""

    tasks: Counter[str]
    timers: Counter[str]
    files: Counter[str]
    threads: Counter[str]
    objects: Counter[str]

    @classmethod
    def now(cls) -> Held:
        """Return the counts after a garbage collection."""
        gc.unfreeze()  # objects frozen at start (process/memory.py) would not be counted
        gc.collect()
        loop: Any = asyncio.get_running_loop()
        kinds: Counter[str] = Counter()
        for kind_of_object, count in Counter(map(type, gc.get_objects())).items():
            kinds[f"{kind_of_object.__module__}.{kind_of_object.__qualname__}"] += count
        for kind in LAZY:
            del kinds[kind]
        timers = Counter(_name(handle._callback) for handle in loop._scheduled if not handle.cancelled())
        tasks = Counter(getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks())
        files = Counter(_file(number) for number in os.listdir("/proc/self/fd"))
        return cls(tasks, timers, files, Counter(t.name for t in threading.enumerate()), kinds)

    def grown(self, before: Held, objects: float) -> dict[str, int]:
        """Return what has grown since `before`, and by how much. A type of objects is returned only if it has at least
        `objects` more instances."""
        found = {kind: count for kind, count in (self.objects - before.objects).items() if count >= objects}
        for name in ("tasks", "timers", "files", "threads"):
            now, then = getattr(self, name), getattr(before, name)
            if now.total() > then.total():
                found |= {f"{name}: {one}": count for one, count in (now - then).items()}
        return found


async def calls(cluster: TestCluster) -> None:
    """Make many calls at once: unary calls, streams, and streams that are cancelled midway."""
    turns = asyncio.Semaphore(AT_ONCE)

    async def one(number: int) -> None:
        async with turns:
            request = chat(f"call {number}", max_tokens=6, ignore_eos=True, seed=number, temperature=0.5)
            if number % 3 == 0:
                await cluster.stub.Chat(request)
            else:
                stream = cluster.stub.StreamChat(request)
                async for _ in stream:
                    if number % 3 == 1:
                        stream.cancel()
                        break

    await asyncio.gather(*map(one, range(CALLS)))
    await cluster.until_idle()


async def losses(cluster: TestCluster) -> None:
    """Break links that have running calls, and let the links reconnect."""
    for number in range(LINKS):
        await until(lambda: bool(cluster.gateway.hub.links), "the worker is back")
        (link,) = cluster.gateway.hub.links
        running = asyncio.ensure_future(cluster.stub.Chat(chat(f"lost {number}", max_tokens=60, ignore_eos=True)))
        await until(lambda link=link: link.running > 0, "it runs")  # type: ignore[misc]
        link.close("as if it had been taken for silent")
        assert (await running).usage.completion_tokens == 60
    await cluster.until_idle()


async def at_rest(cluster: TestCluster) -> None:
    """Wait until no call runs and the worker's link is up at both ends."""
    await cluster.until_idle()
    (worker,) = cluster.workers
    await until(lambda: cluster.linked(worker.identity.worker_id), "the worker is back")
    await until(lambda: worker.end.statistics().links == 1, "it knows")


async def settled(cluster: TestCluster) -> Held:
    """Return the counts of objects once a new link is complete and the counts no longer change. The threads and stubs
    of a link are created a little later than the link itself. On a busy machine, counting may block the event loop for
    so long that the link is lost and made again; then the wait begins anew."""
    (worker,) = cluster.workers
    held = [Held.now()]

    def still() -> bool:
        if not cluster.linked(worker.identity.worker_id):
            del held[1:]
            return False
        count = Held.now()
        if not count.tasks[READER]:  # the worker has lost the link, and the gateway does not know it yet
            return False
        if count.tasks[BULK] < count.tasks[READER]:  # the connection for large blobs comes after that of the link
            return False
        held.append(count)
        return len(held) > STILL and not any(held[-1].grown(earlier, 1) for earlier in held[-STILL:])

    with contextlib.suppress(AssertionError):  # then use the last count
        await until(still, "nothing more comes", STILL_S)
    # If each count has cost the link, the first count is the only one, made before the link was complete.
    while len(held) == 1 or not held[-1].tasks[READER]:
        await at_rest(cluster)
        await some_passes()
        held.append(Held.now())
    return held[-1]


async def some_passes() -> None:
    """Let the event loop run for a tenth of a second, so that ended calls are closed and freed, and new links are
    ready."""
    for _ in range(50):
        await asyncio.sleep(0.002)


@pytest.mark.thorough
async def test_nothing_is_left_behind(
    cluster: TestCluster, checkpoint: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first round fills caches and pools. Further rounds, of many calls and of many lost links, leave no task, timer,
    file or thread behind. The number of objects of any Python type grows by less than one for every five calls or lost
    links."""
    monkeypatch.setattr(parts, "WINDOW_S", 0.0)  # a minute of snapshots, which a slow first round does not fill
    cluster.gateway.scheduler.routes.history.max_bytes = 10_000  # so that the first round fills it
    cluster.gateway.live.recent.calls.max_calls = 10
    await cluster.add_worker(sim_engine(checkpoint, decode_ms=0.5), bundle, timing=QUICK)
    for what, count in ((calls, CALLS), (losses, LINKS)):
        await what(cluster)
        await at_rest(cluster)
        before = await settled(cluster)
        for _ in range(ROUNDS):
            await what(cluster)
        await at_rest(cluster)
        deadline = time.monotonic() + REST_S
        while (grown := Held.now().grown(before, ROUNDS * count * KEPT)) and time.monotonic() < deadline:
            await some_passes()
            await at_rest(cluster)  # the count may have blocked the loop for so long that the link was lost
        assert not grown, "\n".join(f"{count} {kind} after {what.__name__}" for kind, count in sorted(grown.items()))


async def test_calls_are_freed_without_the_collector(cluster: TestCluster, checkpoint: Path, bundle: Bundle) -> None:
    """The prompt, text and tokens of a call are freed when the call ends, without the garbage collector, which runs
    rarely."""
    await cluster.add_worker(sim_engine(checkpoint, decode_ms=0.5), bundle)
    await calls(cluster)
    gc.unfreeze()  # the collector would not visit what the gateway froze at its start
    gc.collect()
    before = Counter(type(item) for item in gc.get_objects())
    gc.disable()
    try:
        await calls(cluster)
        gc.unfreeze()
        left = Counter(type(one) for one in gc.get_objects()) - before
    finally:
        gc.enable()
        gc.freeze()
    assert not {kind: left[kind] for kind in (Call, OutputSequence, EngineRequest) if left[kind] > CALLS / 20}
