"""Fuzz tests of the link: random messages that a faulty worker sends to a gateway, and that a faulty gateway sends to a
worker."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import strategies as st

from cluster.gateway.links.hub import Hub, hub_server
from cluster.link.v1 import link_pb2 as pb
from cluster.link.v1 import link_pb2_grpc as pb_grpc
from cluster.wire.bundle import Bundle
from cluster.wire.dial import Timing, read
from tests.support.calls import chat
from tests.support.cluster import TestCluster, running_cluster, sim_engine, until
from tests.support.fuzz import batches, messages, nothing_unexpected
from tests.support.links import played_hello
from tests.support.serving import Door

pytestmark = pytest.mark.slow

QUICK = Timing(silence_s=2.0, welcome_s=1.0, redial_min_s=0.01, redial_max_s=0.02)


@pytest.fixture
async def cluster(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> AsyncIterator[TestCluster]:
    """A gateway with one healthy worker of the model `sim`."""
    async with running_cluster(tmp_path, timing=QUICK) as cluster:
        await cluster.add_worker(sim_engine(checkpoint, decode_ms=0.2), bundle)
        yield cluster


async def check_healthy(cluster: TestCluster) -> None:
    """Check that the healthy worker has its link, that calls to it are answered, and that no other call remains.

    Before the check, wait until the faulty workers have left. One of them may serve the same model with less capacity
    than a call needs.
    """
    await until(lambda: len(cluster.gateway.hub.links) == 1, "the faulty workers have left")
    assert (await cluster.stub.Chat(chat(max_tokens=3, ignore_eos=True), timeout=60)).usage.completion_tokens == 3
    await cluster.until_idle()


def slots() -> st.SearchStrategy[int]:
    """Return a strategy for slot numbers: of running calls, and of calls that do not exist."""
    return st.integers(1, 4) | st.integers(0, (1 << 32) - 1)


def steps() -> st.SearchStrategy[pb.StepOutputs]:
    """Return a strategy for step outputs with consistent or inconsistent columns."""
    ids = st.integers(0, 300) | st.integers(0, (1 << 32) - 1)
    fitting = st.lists(st.tuples(slots(), ids), max_size=4).map(
        lambda pairs: pb.StepOutputs(slots=[slot for slot, _ in pairs], token_ids=[token for _, token in pairs])
    )
    return fitting | messages(pb.StepOutputs, slots=st.lists(slots(), max_size=4), token_ids=st.lists(ids, max_size=6))


def turns() -> st.SearchStrategy[list[pb.WorkerTurn]]:
    """Return a strategy for the messages that a worker sends after its Hello."""
    room = st.just(pb.Credit(grant_id=1, sequences=8, tokens=10_000))
    turn = messages(pb.WorkerTurn, step=steps(), credit=room | messages(pb.Credit))
    return st.lists(turn, max_size=8).map(
        lambda rest: [pb.WorkerTurn(credit=pb.Credit(grant_id=1, sequences=8, tokens=9999)), *rest]
    )


async def test_a_mad_workers_turns(cluster: TestCluster, bundle: Bundle) -> None:
    """Whatever messages a faulty worker sends while calls wait for it, the calls end in time and the gateway stays
    healthy."""
    number = 0
    async with grpc.aio.insecure_channel(cluster.gateway.endpoints["link"]) as channel, nothing_unexpected():
        for batch in batches(turns()):
            for sequence in batch:
                number += 1
                call: Any = pb_grpc.LinkStub(channel).Turn(timeout=5)
                hello = played_hello(bundle, f"{number}")
                await call.write(pb.WorkerTurn(hello=hello))
                await read(call)
                request = chat(model="mad", max_tokens=4)
                waiting = [asyncio.ensure_future(cluster.stub.Chat(request, timeout=2)) for _ in range(3)]
                await until(lambda: any(x.identity.model == "mad" for x in cluster.gateway.hub.links), "it is linked")
                with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                    for turn in sequence:
                        await call.write(turn)
                    await call.done_writing()
                    while await read(call) is not None:
                        pass
                for task in waiting:
                    task.cancel()
                await asyncio.gather(*waiting, return_exceptions=True)
            await check_healthy(cluster)


async def test_any_first_messages(cluster: TestCluster) -> None:
    """A peer may send anything as its first messages: any Hello, blob, heartbeat, controller frame or invalid bytes. A
    healthy worker of the same gateway keeps its link."""
    kinds = {"Turn": pb.WorkerTurn, "Bulk": pb.Blob, "Beat": pb.WorkerBeat, "Control": pb.ControllerFrame}
    frames = st.one_of(
        *(
            st.tuples(
                st.just(name), messages(kind).map(lambda m: bytes(m.SerializeToString())) | st.binary(max_size=60)
            )
            for name, kind in kinds.items()
        )
    )
    async with grpc.aio.insecure_channel(cluster.gateway.endpoints["link"]) as channel, nothing_unexpected():
        for batch in batches(st.lists(frames, min_size=1, max_size=3)):
            for sequence in batch:
                call: Any = channel.stream_stream(f"/cluster.link.v1.Link/{sequence[0][0]}")(timeout=2)
                with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                    for _, data in sequence:
                        await call.write(data)
                    await call.done_writing()
                    while await call.read() is not grpc.aio.EOF:
                        pass
                call.cancel()
            await check_healthy(cluster)


async def test_a_worker_that_tells_no_length_hides_none(cluster: TestCluster) -> None:
    """If a faulty worker's Hello lacks max_model_len, calls to the same model are still served by the healthy
    worker."""
    async with grpc.aio.insecure_channel(cluster.gateway.endpoints["link"]) as channel:
        call: Any = pb_grpc.LinkStub(channel).Turn(timeout=5)
        hello = pb.Hello(protocol_min=1, protocol_max=1, worker_id="mad", incarnation="1", model="sim", epoch=1)
        await call.write(pb.WorkerTurn(hello=hello))
        await read(call)
        await until(lambda: len(cluster.gateway.hub.links) == 2, "it is linked")
        assert (await cluster.stub.Chat(chat(max_tokens=3, ignore_eos=True), timeout=60)).usage.completion_tokens == 3
        assert len(cluster.gateway.hub.links) == 2, "the worker left before it was tried"
        call.cancel()


class FaultyGateway(Hub):
    """A faulty gateway that accepts a worker and sends it the given messages."""

    def __init__(self) -> None:
        super().__init__("mad", Door(), tuple, tuple)
        self.turns: asyncio.Queue[list[pb.GatewayTurn]] = asyncio.Queue()
        self.done = 0
        self.refused = 0
        self.stays_s = 0.05

    async def Turn(self, request_iterator: object, context: Any) -> None:  # type: ignore[override]
        """Send one sequence of messages on each link."""
        await read(context)
        await context.write(pb.GatewayTurn(welcome=pb.Welcome(protocol=1, gateway_id="mad", incarnation="m")))
        turns = await self.turns.get()
        try:
            for turn in turns:
                await context.write(turn)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.stays_s):
                    while (turn := await read(context)) is not None:
                        self.refused += len(turn.refused)
        finally:
            self.done += 1


def commands() -> st.SearchStrategy[list[pb.GatewayTurn]]:
    """Return a strategy for messages of a gateway, mostly Submits."""
    prompt = st.lists(st.integers(0, 300), max_size=5).map(lambda ids: b"".join(i.to_bytes(4, "little") for i in ids))
    submit = messages(pb.Submit, slot=slots(), prompt_ids=prompt | st.binary(max_size=9), prompt_blob=st.just(""))
    # Valid commands that would take the healthy gateway's credit or drain the worker are left out.
    quiet: dict[str, Any] = {
        "backlog": messages(pb.Backlog, waiting=st.just(0), claim=st.just(0)),
        "commands": st.just([]),
    }
    turn = messages(pb.GatewayTurn, **quiet, submits=st.lists(submit, max_size=3), aborts=st.lists(slots(), max_size=3))
    return st.lists(turn, max_size=5)


async def test_a_mad_gateways_turns(cluster: TestCluster, checkpoint: Path, bundle: Bundle) -> None:
    """Whatever messages a faulty gateway sends, the worker keeps serving the other gateway and keeps no call of the
    faulty one."""
    faulty = FaultyGateway()
    server = hub_server(faulty)
    port = await server.start("127.0.0.1", 0)
    links = [cluster.gateway.endpoints["link"], f"127.0.0.1:{port}"]
    engine = sim_engine(checkpoint, decode_ms=0.2)
    worker = await cluster.add_worker(engine, bundle, model="shared", gateways=links, timing=QUICK)
    async with nothing_unexpected():
        for batch in batches(commands()):
            before = faulty.done
            for sequence in batch:
                faulty.turns.put_nowait(sequence)
            await until(lambda: faulty.done == before + len(batch) or worker.task.done(), "all were sent", 60)  # noqa: B023
            if worker.task.done():
                await worker.task
            await until(lambda: cluster.linked(worker.identity.worker_id), "the good gateway has credit")
            answer = await cluster.stub.Chat(chat(model="shared", max_tokens=3, ignore_eos=True), timeout=60)
            assert answer.usage.completion_tokens == 3
            await until(lambda: worker.end.statistics().running == 0, "no call of the faulty gateway runs")
            assert worker.end.statistics().tokens == 0
    await worker.stop()
    await server.stop(0)


@pytest.mark.parametrize(
    ("submits", "link_ends"),
    [
        ([pb.Submit(slot=1, prompt_ids=b"abc")], False),
        ([pb.Submit(slot=1, prompt_ids=b"abcd", priority=-1)], False),
        ([pb.Submit(slot=1, prompt_ids=b"\1\0\0\0", sampling=pb.Sampling(max_tokens=9999))] * 2, True),
    ],
    ids=["cut-ids", "negative-rank", "slot-twice"],
)
async def test_what_fuzzing_found(
    cluster: TestCluster, checkpoint: Path, bundle: Bundle, submits: list[pb.Submit], link_ends: bool
) -> None:
    """An invalid Submit is refused or ends its link. The worker's process and its other links stay."""
    faulty = FaultyGateway()
    server = hub_server(faulty)
    port = await server.start("127.0.0.1", 0)
    links = [cluster.gateway.endpoints["link"], f"127.0.0.1:{port}"]
    worker = await cluster.add_worker(sim_engine(checkpoint), bundle, model="shared", gateways=links, timing=QUICK)
    faulty.stays_s = 1.0
    faulty.turns.put_nowait([pb.GatewayTurn(seq=1, submits=submits)])
    await until(lambda: faulty.done == 1, "the Submit was sent, and its link has ended or its time is over")
    faulty.turns.put_nowait([])
    await until(lambda: faulty.done == 2, "the worker has dialed again")
    assert (await cluster.stub.Chat(chat(model="shared", max_tokens=3, ignore_eos=True), timeout=60)).choices
    assert faulty.refused == (0 if link_ends else 1)
    await until(lambda: worker.end.statistics().tokens == 0, "no call of the faulty gateway is held")
    await worker.stop()
    await server.stop(0)
