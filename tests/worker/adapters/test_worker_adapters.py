"""A worker's adapters: wanted adapters become ready, adapters in use stay loaded, and a failure affects one adapter."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.api.adapters import ADAPTERS, AdapterSpec, AdapterState, AdapterStatus
from cluster.api.ports import EngineCorrupt, EngineDead, EngineRefused
from cluster.api.types import EngineInfo, EngineRequest, Sampling, WorkerIdentity
from cluster.link.v1 import link_pb2 as pb
from cluster.link.v1 import link_pb2_grpc as pb_grpc
from cluster.wire.bundle import Bundle
from cluster.wire.codecs import codec
from cluster.wire.codecs.adapter_codec import AdapterSet, adapter_report_from_pb, adapter_set_to_pb
from cluster.wire.dial import read
from cluster.wire.outbox import Outbox
from cluster.worker.adapters.fetches import PARALLEL_FETCHES
from cluster.worker.adapters.worker_adapters import WorkerAdapters
from cluster.worker.engine.simulated.engine import SimConfig, SimEngine
from cluster.worker.session import WorkerSession
from cluster.worker.weights.adapter_store import StoredAdapter
from tests.support.cluster import until

SLOTS, CAPACITY = 2, 3


def digest_of(source: str) -> str:
    """Return the digest of the adapter that `Files` fetches from a source."""
    return source.encode().hex().rjust(64, "0")


class Files:
    """A store of adapters without files. `faults`: errors to raise, by source; `fetched`: all fetched sources, in
    order."""

    def __init__(self) -> None:
        self.faults: dict[str, Exception] = {}
        self.fetched: list[str] = []
        self.refused: dict[str, str] = {}

    def fetch(self, spec: AdapterSpec, progress: Callable[[], None]) -> StoredAdapter:
        self.fetched.append(spec.source)
        if (fault := self.faults.get(spec.source)) is not None:
            raise fault
        digest = digest_of(spec.source)
        return StoredAdapter(digest, Path("/adapters") / digest)

    def mark_corrupting(self, digest: str, reason: str) -> None:
        self.refused[digest] = reason


class Engine:
    """An engine that holds adapters and checks the rules of loading. `gates`: events by digest; loading the adapter
    with this digest waits for its event."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self.capacity = capacity
        self.loaded: set[str] = set()
        self.in_use: list[str] = []
        self.faults: dict[str, Exception] = {}
        self.gates: dict[str, asyncio.Event] = {}

    async def load_adapter(self, digest: str, folder: str, *, pinned: bool) -> None:
        assert digest in folder, "the path holds the digest"
        if (gate := self.gates.get(digest)) is not None:
            await gate.wait()
        await asyncio.sleep(0)
        if (fault := self.faults.get(digest)) is not None:
            raise fault
        self.loaded.add(digest)
        assert len(self.loaded) <= self.capacity

    async def unload_adapter(self, digest: str) -> None:
        assert digest not in self.in_use, "what is in use is not dropped"
        self.loaded.discard(digest)
        await asyncio.sleep(0)


class Subject:
    """A worker's adapters, with a fake engine and a fake store."""

    def __init__(self, capacity: int = CAPACITY, version: str = "", hold_s: float = 60.0) -> None:
        self.files, self.engine = Files(), Engine(capacity)
        self.deaths: list[EngineDead] = []
        info = info_of(adapter_slots=SLOTS, adapter_capacity=capacity)
        self.adapters = WorkerAdapters(
            info,
            self.engine,
            self.files,
            self.deaths.append,
            version=version,
            retry_s=0.001,
            report_s=0.0,
            hold_s=hold_s,
        )
        self.revision = 0

    async def __aenter__(self) -> Subject:
        self.task = asyncio.create_task(self.adapters.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)

    def want(self, *names: str, link: int = 1, pinned: Sequence[str] = ()) -> None:
        """Send the set of wanted adapters. The source of each adapter is its name."""
        self.revision += 1
        specs = tuple(AdapterSpec(name, name, pinned=name in pinned) for name in names)
        self.adapters.receive(link, AdapterSet(self.revision, specs))

    def status(self, name: str) -> AdapterStatus:
        """Return the state of one adapter."""
        return next(status for status in self.adapters.statuses() if status.name == name)

    async def all_ready(self) -> None:
        """Wait until all wanted adapters are ready."""
        await until(
            lambda: all(status.state is AdapterState.READY for status in self.adapters.statuses()), "all are ready"
        )


def info_of(**changes: Any) -> EngineInfo:
    """Return the EngineInfo of a simulated engine, with the fields in `changes` added."""
    plain = {"engine_class": "sim", "engine_path": "sim", "engine_version": "1", "block_size": 16, "kv_blocks": 64}
    sizes = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 512, "vocab_size": 99}
    return EngineInfo(**plain, **sizes, **changes)  # type: ignore[arg-type]


def report_in(outbox: Outbox) -> Callable[[], dict[str, AdapterState]]:
    """Return a function that returns the state of each adapter in the report that waits in an outbox."""
    return lambda: {status.name: status.state for status in outbox._adapters or ()}


async def test_what_is_wanted_becomes_ready_and_every_link_knows() -> None:
    """Every link gets each change of the adapters. A new link gets all adapters, and an ended link gets nothing
    more."""
    async with Subject() as subject:
        first, second = Outbox(), Outbox()
        subject.adapters.attach(1, first)
        assert report_in(first)() == {}
        subject.want("a", "b")
        assert [subject.status(name).state for name in "ab"] == [AdapterState.LOADING] * 2
        await until(lambda: report_in(first)() == dict.fromkeys("ab", AdapterState.READY), "the link knows")
        subject.adapters.attach(2, second)
        assert report_in(second)() == dict.fromkeys("ab", AdapterState.READY)
        subject.adapters.detach(1)
        subject.want("a", link=2)
        await until(lambda: list(report_in(second)()) == ["a"], "the second link knows")
        assert set(report_in(first)()) == {"a", "b"}
        await until(lambda: subject.engine.loaded == {digest_of("a")}, "b has left the engine")


async def test_a_failure_is_told_with_its_reason_and_tried_again() -> None:
    """A failed adapter does not delay the other adapters, and becomes ready once its files can be fetched."""
    async with Subject() as subject:
        subject.files.faults = {"a": ValueError("r: 512 is too much"), "b": OSError("no disk"), "c": KeyError("odd")}
        subject.want("a", "b", "c", "d")
        await until(lambda: subject.status("d").state is AdapterState.READY, "d is ready")
        for name, reason in (("a", "r: 512 is too much"), ("b", "no disk"), ("c", "KeyError: 'odd'")):
            await until(lambda name=name: subject.status(name).state is AdapterState.FAILED, f"{name} failed")  # type: ignore[misc]
            assert subject.status(name).reason == reason
        await until(lambda: subject.files.fetched.count("a") > 2, "it is tried again")
        subject.files.faults.clear()
        await until(lambda: subject.status("a").state is AdapterState.READY, "a is ready")
        assert subject.status("a").reason == ""


async def test_a_failed_adapter_that_is_loaded_again_is_tried_at_once() -> None:
    """If the adapter is loaded again, a worker on which it has failed does not wait for the end of its pause. A ready
    adapter stays as it is. Reports have the number of the load, and no credentials of the source."""
    async with Subject() as subject:
        subject.adapters._retry_s = 60.0
        subject.files.faults = {"a": ValueError("403: https://user:word@host/a?key=secret")}

        def load(number: int) -> None:
            subject.adapters.receive(1, AdapterSet(number, (AdapterSpec("a", "a", load_number=number),)))

        load(1)
        await until(lambda: subject.status("a").state is AdapterState.FAILED, "it has failed")
        assert (subject.status("a").load_number, subject.status("a").reason) == (1, "403: https://host/a")
        subject.files.faults.clear()
        load(2)
        assert (subject.status("a").load_number, subject.status("a").state) == (2, AdapterState.LOADING)
        await subject.all_ready()
        load(3)
        assert (subject.status("a").load_number, subject.status("a").state) == (3, AdapterState.READY)
        assert subject.files.fetched == ["a", "a"]


async def test_a_slow_load_holds_nobody_up() -> None:
    """While an adapter loads, requests for other adapters and for the base model do not wait."""
    async with Subject() as subject:
        subject.engine.gates[digest_of("slow")] = gate = asyncio.Event()
        subject.want("a")
        await subject.all_ready()
        subject.want("a", "slow")
        await until(lambda: subject.status("slow").digest != "", "the slow one loads")
        assert subject.adapters.loads.is_held("")
        assert subject.adapters.loads.is_held(digest_of("a"))
        waiting = asyncio.create_task(subject.adapters.loads.hold(digest_of("slow")))
        await subject.adapters.loads.hold(digest_of("a"))
        assert not waiting.done()
        gate.set()
        await waiting
        assert subject.status("slow").resident


async def test_more_adapters_than_memory_are_loaded_on_demand() -> None:
    """All wanted adapters are READY, although not all of them fit into the engine's memory. A request for an adapter
    that is not in memory loads it in place of the least recently used adapter that no request uses."""
    async with Subject() as subject:
        subject.want(*"abcde")
        await subject.all_ready()
        assert len(subject.engine.loaded) == CAPACITY
        for name in "abc":
            await subject.adapters.loads.hold(digest_of(name))
            subject.engine.in_use.append(digest_of(name))
        waiting = asyncio.create_task(subject.adapters.loads.hold(digest_of("d")))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not waiting.done(), "all three are in use"
        subject.engine.in_use.remove(digest_of("b"))
        subject.adapters.loads.release(digest_of("b"))
        await waiting
        assert subject.engine.loaded == {digest_of(name) for name in "acd"}
        assert {status.name for status in subject.adapters.statuses() if status.resident} == {"c", "d"}
        assert {status.state for status in subject.adapters.statuses()} == {AdapterState.READY}


async def test_what_is_gone_serves_its_requests_to_the_end() -> None:
    async with Subject() as subject:
        subject.want("a", "b")
        await subject.all_ready()
        await subject.adapters.loads.hold(digest_of("a"))
        subject.engine.in_use.append(digest_of("a"))
        subject.want("b")
        with pytest.raises(EngineRefused) as refusal:
            await subject.adapters.loads.hold(digest_of("a"))
        assert (refusal.value.reason, refusal.value.field) == ("ADAPTER_INVALID", "adapter")
        for _ in range(20):
            await asyncio.sleep(0)
        assert digest_of("a") in subject.engine.loaded
        subject.engine.in_use.clear()
        subject.adapters.loads.release(digest_of("a"))
        await until(lambda: subject.engine.loaded == {digest_of("b")}, "a has left the engine")


async def test_a_digest_that_the_catalog_learns_changes_nothing() -> None:
    """An adapter is not loaded again if the catalog later names the digest that the worker has computed. A change of
    the tenants that may use the adapter does not reload it either."""
    async with Subject() as subject:
        subject.want("a")
        await subject.all_ready()
        spec = AdapterSpec("a", "a", digest_of("a"), tenants=("t",), pinned=True)
        subject.adapters.receive(1, AdapterSet(9, (spec,)))
        assert subject.status("a").state is AdapterState.READY
        assert subject.adapters.loads.is_held(digest_of("a"))
        assert subject.files.fetched == ["a"]
        subject.adapters.receive(1, AdapterSet(10, (AdapterSpec("a", "a", "f" * 64),)))
        assert subject.status("a").state is AdapterState.LOADING, "another digest is another adapter"


async def test_a_change_that_needs_no_other_files_keeps_an_adapter_in_service() -> None:
    """A ready adapter whose license or version changes is neither fetched nor loaded again, also while its source is
    down, and the report has the number of the new load. It ends if it no longer belongs to the version that the worker
    runs."""
    async with Subject(version="v2") as subject:
        subject.want("a")
        await subject.all_ready()
        await subject.adapters.loads.hold(digest_of("a"))
        subject.files.faults["a"] = OSError("the source is down")
        for number, (named, version) in enumerate((("mit", ""), ("mit", "v2"), ("", "")), 2):
            spec = AdapterSpec("a", "a", license=named, version=version, load_number=number)
            subject.adapters.receive(1, AdapterSet(number, (spec,)))
            status = subject.status("a")
            assert (status.state, status.load_number, status.resident) == (AdapterState.READY, number, True)
            await subject.adapters.loads.hold(digest_of("a"))
            assert subject.adapters._wanted["a"].spec == spec
        assert subject.files.fetched == ["a"]
        subject.adapters.receive(1, AdapterSet(9, (AdapterSpec("a", "a", license="mit", version="v1"),)))
        assert subject.adapters.statuses() == []
        with pytest.raises(EngineRefused, match="is not ready on this worker"):
            await subject.adapters.loads.hold(digest_of("a"))


async def test_a_failed_adapter_is_tried_at_once_under_a_new_license() -> None:
    """An adapter that failed, perhaps because of its license, is prepared at once when its license changes."""
    async with Subject() as subject:
        subject.adapters._retry_s = 60.0
        subject.files.faults["a"] = ValueError("license: 'x' is not among weights.allow.licenses")
        subject.adapters.receive(1, AdapterSet(1, (AdapterSpec("a", "a", license="x"),)))
        await until(lambda: subject.status("a").state is AdapterState.FAILED, "it has failed")
        subject.files.faults.clear()
        subject.adapters.receive(1, AdapterSet(2, (AdapterSpec("a", "a", license="mit"),)))
        await subject.all_ready()


async def test_only_adapters_of_this_version_are_loaded() -> None:
    async with Subject(version="v2") as subject:
        specs = [AdapterSpec(name, name, version=version) for name, version in (("a", ""), ("b", "v1"), ("c", "v2"))]
        subject.adapters.receive(1, AdapterSet(1, tuple(specs)))
        assert [status.name for status in subject.adapters.statuses()] == ["a", "c"]


async def test_pinned_adapters_stay_and_what_finds_no_place_says_so() -> None:
    async with Subject(capacity=2) as subject:
        subject.want("p", "q", pinned="pq")
        await subject.all_ready()
        subject.want("p", "q", "a", pinned="pq")
        await until(lambda: subject.status("a").state is AdapterState.FAILED, "a finds no place")
        assert "2 pinned adapters: raise engine.max_cpu_loras, or pin fewer" in subject.status("a").reason
        assert subject.engine.loaded == {digest_of("p"), digest_of("q")}
        subject.want("p", "q", "a", pinned="p")
        await subject.all_ready()
        await subject.adapters.loads.hold(digest_of("a"))
        assert subject.engine.loaded == {digest_of("p"), digest_of("a")}


async def test_what_the_engine_refuses_has_failed() -> None:
    """If the engine refuses to load an adapter, the request and the adapter fail, and the load is tried again."""
    async with Subject(capacity=1) as subject:
        subject.want("a", "b")
        await subject.all_ready()
        (held,) = subject.engine.loaded
        name = "b" if held == digest_of("a") else "a"
        subject.engine.faults[digest_of(name)] = EngineRefused("ADAPTER_INVALID", "adapter: bad", "adapter")
        with pytest.raises(EngineRefused, match="adapter: bad"):
            await subject.adapters.loads.hold(digest_of(name))
        await until(lambda: subject.files.fetched.count(name) > 1, "it is tried again")
        subject.engine.faults.clear()
        await subject.all_ready()
        await subject.adapters.loads.hold(digest_of(name))
        assert not subject.deaths


async def test_a_load_that_spoils_the_engine_ends_it_once() -> None:
    """If a load corrupts the engine, the engine is reported as dead, and the store marks the adapter as refused."""
    async with Subject() as subject:
        subject.engine.faults[digest_of("a")] = EngineCorrupt("rank 1 failed")
        subject.want("a")
        await until(lambda: bool(subject.deaths), "the engine is reported")
        assert str(subject.deaths[0]) == "rank 1 failed"
        assert subject.files.refused == {digest_of("a"): "rank 1 failed"}


async def test_fetches_that_hang_occupy_only_their_own_threads() -> None:
    """Fetches that hang after they were cancelled occupy only the threads of fetches, and do not delay the worker's
    end."""
    names, gate = list[str](), threading.Event()

    class HangingFiles(Files):
        def fetch(self, spec: AdapterSpec, progress: Callable[[], None]) -> StoredAdapter:
            names.append(threading.current_thread().name)
            gate.wait()
            return super().fetch(spec, progress)

    subject = Subject()
    subject.adapters = WorkerAdapters(
        info_of(adapter_slots=SLOTS, adapter_capacity=CAPACITY), subject.engine, HangingFiles(), subject.deaths.append
    )
    try:
        async with subject:
            for i in range(4):
                subject.want(f"a{i}", f"b{i}")
                await until(lambda: len(names) >= PARALLEL_FETCHES, "fetches have begun")
                for _ in range(5):
                    await asyncio.sleep(0)
            assert len(names) == PARALLEL_FETCHES
            assert all(name.startswith("adapter-fetch") for name in names)
        assert not gate.is_set()
        assert len(names) == PARALLEL_FETCHES, "cancelled fetches do not begin"
    finally:
        gate.set()


async def test_a_worker_without_adapters_refuses_them() -> None:
    """A worker without adapters refuses a request that needs an adapter. It ignores the list of wanted adapters from a
    gateway, and reports no adapters."""
    adapters = WorkerAdapters(info_of(), Engine(), Files(), lambda dead: pytest.fail(str(dead)))
    outbox = Outbox()
    adapters.attach(1, outbox)
    adapters.receive(1, AdapterSet(1, (AdapterSpec("a", "a"),)))
    assert report_in(outbox)() == {}
    await adapters.loads.hold("")
    for digest in (digest_of("a"), "x" * 10_000):
        assert not adapters.loads.is_held(digest)
        with pytest.raises(EngineRefused, match="is not ready on this worker") as refusal:
            await adapters.loads.hold(digest)
        assert len(refusal.value.message) < 200


async def test_waiting_requests_that_are_cut_hold_nothing() -> None:
    async with Subject(capacity=1) as subject:
        subject.want("a", "b")
        await subject.all_ready()
        (held,) = subject.engine.loaded
        other = digest_of("a") if held == digest_of("b") else digest_of("b")
        await subject.adapters.loads.hold(held)
        waiting = asyncio.create_task(subject.adapters.loads.hold(other))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        subject.adapters.loads.release(held)
        await until(lambda: subject.engine.loaded == {other}, "the load goes on")
        await subject.adapters.loads.hold(held)
        assert subject.engine.loaded == {held}, "the cut request holds nothing"


async def test_requests_cause_few_reports() -> None:
    """Requests that move adapters between slots cause a single delayed report; the delay grows with the number of
    adapters."""
    async with Subject(capacity=100) as subject:
        outbox = Outbox()
        subject.adapters.attach(1, outbox)
        names = [f"a{i}" for i in range(100)]
        subject.want(*names)
        await subject.all_ready()
        await until(lambda: set(report_in(outbox)().values()) == {AdapterState.READY}, "all is reported")
        await until(lambda: subject.adapters._reports._timer is None, "no report is due")
        outbox._adapters, subject.adapters._reports._report_s = [], 60.0
        for name in names:
            await subject.adapters.loads.hold(digest_of(name))
            subject.adapters.loads.release(digest_of(name))
            await asyncio.sleep(0)
            assert not subject.adapters._reports._changed.is_set()
        timer = subject.adapters._reports._timer
        assert timer is not None
        assert timer.when() > asyncio.get_running_loop().time() + 60.0
        timer.cancel()
        subject.adapters._reports._timer, subject.adapters._reports._report_s = None, 0.0
        await subject.adapters.loads.hold(digest_of("a7"))
        await until(lambda: bool(report_in(outbox)()), "the slots are reported")
        assert {status.name for status in subject.adapters.statuses() if status.resident} == {"a99", "a7"}


async def test_a_request_waits_for_memory_for_a_bounded_time() -> None:
    """If all adapters in the engine's memory are in use, a request for another adapter is refused after at most
    `hold_s` seconds. The load of this adapter goes on: the adapter is reported as LOADING, and is loaded when a used
    adapter is released."""
    async with Subject(capacity=1, hold_s=0.01) as subject:
        subject.want("a", "b")
        await subject.all_ready()
        (held,) = subject.engine.loaded
        name, other = ("a", digest_of("a")) if held == digest_of("b") else ("b", digest_of("b"))
        await subject.adapters.loads.hold(held)
        for _ in range(3):  # the first waits, the others find that the load is overdue
            with pytest.raises(EngineRefused, match=r"memory, whose 1 adapters \(engine.max_cpu_loras\)") as refusal:
                await subject.adapters.loads.hold(other)
            assert refusal.value.reason == "ADAPTER_INVALID"
        assert subject.status(name).state is AdapterState.LOADING
        assert "are in use" in subject.status(name).reason
        subject.adapters.loads.release(held)
        await subject.all_ready()
        assert subject.engine.loaded == {other}
        await subject.adapters.loads.hold(other)
        subject.adapters.loads.release(other)


async def test_steady_requests_for_one_adapter_do_not_keep_another_out() -> None:
    """If requests for two adapters overlap without end, and memory has space for one adapter, both adapters are served
    in turn."""
    async with Subject(capacity=1, hold_s=0.01) as subject:
        subject.want("a", "b")
        await subject.all_ready()
        served = {"a": 0, "b": 0}

        async def call(name: str) -> None:
            if subject.status(name).state is not AdapterState.READY:  # the gateway would not send it
                return
            with suppress(EngineRefused):
                await subject.adapters.loads.hold(digest_of(name))
                served[name] += 1
                await asyncio.sleep(0.005)
                subject.adapters.loads.release(digest_of(name))

        async def steady(name: str) -> None:
            async with asyncio.TaskGroup() as calls:
                while min(served.values()) < 20:
                    calls.create_task(call(name))
                    await asyncio.sleep(0.001)

        async with asyncio.timeout(60):
            await asyncio.gather(steady("a"), steady("b"))
        await subject.all_ready()
        assert not subject.adapters.loads._closing


async def test_a_new_pinned_adapter_gets_its_place_under_steady_requests() -> None:
    """Although requests for the adapters in memory overlap without end, an adapter that is loaded as pinned, for which
    no request waits, becomes ready, and so does an adapter that is not in memory."""
    async with Subject(capacity=2, hold_s=0.01) as subject:
        subject.want("a", "b")
        await subject.all_ready()
        is_over = False

        async def call(name: str) -> None:
            if subject.status(name).state is not AdapterState.READY:  # the gateway would not send it
                return
            with suppress(EngineRefused):
                await subject.adapters.loads.hold(digest_of(name))
                await asyncio.sleep(0.005)
                subject.adapters.loads.release(digest_of(name))

        async def steady(name: str) -> None:
            async with asyncio.TaskGroup() as calls:
                while not is_over:
                    calls.create_task(call(name))
                    await asyncio.sleep(0.001)

        async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
            for name in "ab":
                tasks.create_task(steady(name))
            subject.want("a", "b", "c", "p", pinned="p")
            await until(lambda: subject.status("p").state is AdapterState.READY, "the pinned adapter is ready")
            await until(lambda: subject.status("c").state is AdapterState.READY, "the other adapter is ready")
            is_over = True
        assert digest_of("p") in subject.engine.loaded


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), capacity=st.integers(1, 3), failing=st.sets(st.sampled_from("abcdef"), max_size=2))
def test_any_order_of_sets_and_requests_keeps_the_rules(seed: int, capacity: int, failing: set[str]) -> None:
    """Every accepted request finds its adapter in the engine until the request ends.

    The engine never holds more adapters than its capacity. At the end it holds only adapters that the gateways
    want. All this holds for any order of requests and of changes to the wanted adapters.
    """

    async def scene() -> None:
        rng = random.Random(seed)
        async with Subject(capacity) as subject:
            subject.engine.faults = {digest_of(n): EngineRefused("ADAPTER_INVALID", "bad", "adapter") for n in failing}

            async def call(name: str) -> None:
                try:
                    await subject.adapters.loads.hold(digest_of(name))
                except EngineRefused:
                    return
                subject.engine.in_use.append(digest_of(name))
                try:
                    for _ in range(rng.randrange(12)):
                        assert digest_of(name) in subject.engine.loaded
                        await asyncio.sleep(0)
                finally:  # also of a cancelled call
                    subject.engine.in_use.remove(digest_of(name))
                    subject.adapters.loads.release(digest_of(name))

            calls = []
            for _ in range(40):
                if rng.random() < 0.25:
                    names = rng.sample("abcdef", rng.randrange(1, 7))
                    subject.want(*names, pinned=names[: max(capacity - 1, 0)] if rng.random() < 0.3 else ())
                calls.append(asyncio.create_task(call(rng.choice("abcdef"))))
                if rng.random() < 0.1:
                    rng.choice(calls).cancel()
                for _ in range(rng.randrange(6)):
                    await asyncio.sleep(0)
            async with asyncio.timeout(60):
                done = await asyncio.gather(*calls, return_exceptions=True)
            assert [error for error in done if isinstance(error, Exception)] == []
            subject.want("a", "b")
            wanted = {digest_of("a"), digest_of("b")}
            await until(lambda: subject.engine.loaded <= wanted, "only wanted adapters are held")
            assert not subject.deaths

    asyncio.run(scene())


# ---- over a link


class Gateway(pb_grpc.LinkServicer):
    """A gateway that sends what a test puts into `to_send` and records what the worker sends."""

    def __init__(self) -> None:
        self.to_send: asyncio.Queue[pb.GatewayTurn] = asyncio.Queue()
        self.hello = pb.Hello()
        self.states: dict[str, AdapterStatus] = {}
        self.refused: dict[int, pb.Refused] = {}
        self.tokens: dict[int, list[int]] = {}
        self.finished: set[int] = set()

    async def ReadOperatorState(self, request: object, context: Any) -> pb.OperatorState:
        raise AssertionError("no controller asks here")

    async def Starting(self, request_iterator: object, context: Any) -> None:  # type: ignore[override]
        raise AssertionError("no worker starts here")

    async def Turn(self, request_iterator: object, context: Any) -> None:  # type: ignore[override]
        self.hello = (await context.read()).hello
        await context.write(pb.GatewayTurn(welcome=pb.Welcome(protocol=1, gateway_id="g", incarnation="g1")))
        reading = asyncio.create_task(self._read(context))
        try:
            while True:
                await context.write(await self.to_send.get())
        finally:
            reading.cancel()

    async def _read(self, context: Any) -> None:
        while (message := await read(context)) is not None:
            if message.HasField("adapters"):
                self.states = {status.name: status for status in adapter_report_from_pb(message.adapters)}
            for refused in message.refused:
                self.refused[refused.slot] = refused
            for slot, output in codec.outputs_from_pb(message.step):
                self.tokens.setdefault(slot, []).extend(output.token_ids)
                if output.finish is not None:
                    self.finished.add(slot)
            if message.HasField("credit"):
                self.to_send.put_nowait(pb.GatewayTurn(grant_ack=message.credit.grant_id))

    async def Control(self, request_iterator: object, context: Any) -> None:  # type: ignore[override]
        raise AssertionError("no controller dials here")

    async def Beat(self, request_iterator: Any, context: Any) -> None:  # type: ignore[override]
        while await read(context) is not None:
            await context.write(pb.GatewayBeat())

    async def Bulk(self, request_iterator: object, context: Any) -> None:  # type: ignore[override]
        await asyncio.Event().wait()

    def submit(self, slot: int, adapter: str, max_tokens: int = 6) -> None:
        """Send a Submit for an adapter's digest."""
        sampling = Sampling(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        request = EngineRequest("", [50, 51], sampling, adapter=adapter)
        self.to_send.put_nowait(pb.GatewayTurn(submits=[codec.submit_to_pb(slot, 1, request)]))


@asynccontextmanager
async def serving(max_cpu_loras: int, decode_ms: float = 1.0) -> AsyncIterator[tuple[Gateway, WorkerSession]]:
    """Yield a gateway and the session of a worker that is linked to it.

    The worker's engine has one slot for adapters, and memory for `max_cpu_loras` adapters.
    """
    memory = max_cpu_loras
    engine = SimEngine(SimConfig(vocab=1000, max_model_len=512, decode_ms=decode_ms, max_loras=1, max_cpu_loras=memory))
    info = await engine.start()
    assert ADAPTERS in info.capabilities
    gateway, server = Gateway(), grpc.aio.server()
    pb_grpc.add_LinkServicer_to_server(gateway, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    session = WorkerSession(
        identity=WorkerIdentity("w", "i", "sim"),
        engine=engine,
        info=info,
        bundle=Bundle({}),
        gateways=[address],
        adapter_engine=engine,
        adapter_files=Files(),
    )
    task = asyncio.create_task(session.run())
    try:
        yield gateway, session
    finally:
        await session.close()
        await asyncio.gather(task, return_exceptions=True)
        await server.stop(0)
        await engine.close()


async def test_requests_for_adapters_over_a_link() -> None:
    """Over a real link, each adapter generates its own tokens, also an adapter that is loaded on demand. A request with
    an unknown digest is refused."""
    async with serving(max_cpu_loras=2) as (gateway, _):
        specs = tuple(AdapterSpec(name, name) for name in "abc")
        gateway.to_send.put_nowait(pb.GatewayTurn(adapters=adapter_set_to_pb(AdapterSet(3, specs))))
        await until(
            lambda: [status.state for status in gateway.states.values()] == [AdapterState.READY] * 3, "all are ready"
        )
        for slot, adapter in enumerate(("", *map(digest_of, "abc"), digest_of("a"), "f" * 64), 1):
            gateway.submit(slot, adapter)
        await until(lambda: gateway.finished == {1, 2, 3, 4, 5} and 6 in gateway.refused, "all have ended")
        assert gateway.refused[6].reason == "ADAPTER_INVALID"
        assert gateway.refused[6].field == "adapter"
        assert len({tuple(gateway.tokens[slot]) for slot in (1, 2, 3, 4)}) == 4
        assert gateway.tokens[5] == gateway.tokens[2]
        await until(lambda: sum(status.resident for status in gateway.states.values()) == 1, "one slot is told")
        gateway.to_send.put_nowait(pb.GatewayTurn(adapters=adapter_set_to_pb(AdapterSet(4, specs[:1]))))
        await until(lambda: list(gateway.states) == ["a"], "the others are gone")
        gateway.submit(7, digest_of("b"))
        await until(lambda: 7 in gateway.refused, "b is refused")


async def test_an_abort_ends_the_wait_for_memory() -> None:
    """A request that waits for memory for its adapter counts as running. An abort ends it at once, and nothing of it
    remains."""
    async with serving(max_cpu_loras=1, decode_ms=50.0) as (gateway, session):
        session._adapters.loads._hold_s = 60.0
        specs = tuple(AdapterSpec(name, name) for name in "ab")
        gateway.to_send.put_nowait(pb.GatewayTurn(adapters=adapter_set_to_pb(AdapterSet(3, specs))))
        await until(
            lambda: [status.state for status in gateway.states.values()] == [AdapterState.READY] * 2, "both are ready"
        )
        gateway.submit(1, digest_of("a"), max_tokens=400)
        await until(lambda: 1 in gateway.tokens, "a is in use")
        before, adapters = session._requests.capacity(), session._adapters
        gateway.submit(2, digest_of("b"))
        await until(lambda: bool(adapters.loads.memory.uses(digest_of("b"))), "the request waits")
        (capacity, slots), (capacity_before, slots_before) = session._requests.capacity(), before
        assert slots == slots_before - 1
        assert capacity.tokens <= capacity_before.tokens - 2
        gateway.to_send.put_nowait(pb.GatewayTurn(aborts=[2]))
        await until(lambda: not adapters.loads.memory.uses(digest_of("b")), "the wait has ended")
        await until(lambda: 2 in gateway.refused, "the gateway knows")
        assert gateway.refused[2].reason == "CANCELLED"
        assert session.statistics().running == 1, "a is still in use"
        assert session._requests._expected == session._requests._expected_tokens == 0
