"""A gateway that stops reading does not slow other gateways. Its link is closed when its outbox is full."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest

from cluster.api.adapters import AdapterState, AdapterStatus
from cluster.api.types import EngineRequest, FinishReason, Sampling, TokenOutput, WorkerIdentity
from cluster.link.v1 import link_pb2 as pb
from cluster.link.v1 import link_pb2_grpc as pb_grpc
from cluster.wire.bundle import Bundle
from cluster.wire.codecs import codec
from cluster.wire.dial import Timing, read
from cluster.wire.ended_requests import EndedUsage
from cluster.wire.outbox import MAX_VECTOR_BYTES, STEP_VECTOR_BYTES, CommandBox, Outbox
from cluster.worker.session import WorkerSession
from tests.support.calls import chat
from tests.support.cluster import TestCluster, sim_engine, until


class DeafGateway(pb_grpc.LinkServicer):
    """A gateway that sends a Welcome and requests to a worker, and then never reads."""

    def __init__(self) -> None:
        self.hellos = 0
        self.open = asyncio.Event()

    async def Turn(self, request_iterator: object, context: Any) -> None:  # type: ignore[override]
        await context.read()
        self.hellos += 1
        await self.open.wait()
        await context.write(pb.GatewayTurn(welcome=pb.Welcome(protocol=1, gateway_id="deaf", incarnation="d")))
        sampling = Sampling(max_tokens=100_000, temperature=0.0, ignore_eos=True)
        submits = [codec.submit_to_pb(slot, 1, EngineRequest("", [50 + slot], sampling)) for slot in range(1, 33)]
        await context.write(pb.GatewayTurn(seq=1, submits=submits))
        await asyncio.Event().wait()

    async def Beat(self, request_iterator: Any, context: Any) -> None:  # type: ignore[override]
        while await read(context) is not None:
            await context.write(pb.GatewayBeat())

    async def Control(self, request_iterator: object, context: Any) -> None:  # type: ignore[override]
        raise AssertionError("no controller dials here")

    async def Bulk(self, request_iterator: object, context: Any) -> None:  # type: ignore[override]
        await asyncio.Event().wait()

    async def ReadOperatorState(self, request: object, context: Any) -> pb.OperatorState:
        raise AssertionError("no controller asks here")

    async def Starting(self, request_iterator: object, context: Any) -> None:  # type: ignore[override]
        raise AssertionError("no worker starts here")


@pytest.mark.slow
async def test_a_deaf_gateway_slows_nobody(cluster: TestCluster, checkpoint: Path, bundle: Bundle) -> None:
    """While one gateway does not read, the streams of another gateway keep the engine's pace. The first gateway's link
    is closed, and its requests leave the engine."""
    engine = sim_engine(checkpoint, decode_ms=2, max_model_len=200_000, kv_blocks=60_000)
    info = await engine.start()
    deaf = DeafGateway()
    server = grpc.aio.server()
    pb_grpc.add_LinkServicer_to_server(deaf, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    end = WorkerSession(
        identity=WorkerIdentity("w", "i", "sim", bundle_digest=bundle.digest),
        engine=engine,
        info=info,
        bundle=bundle,
        gateways=[cluster.gateway.endpoints["link"], f"127.0.0.1:{port}"],
        timing=Timing(welcome_s=20, silence_s=2, redial_min_s=30, redial_max_s=30),
        outbox_tokens=2_000,
    )
    task = asyncio.create_task(end.run())
    await until(lambda: cluster.linked("w"), "the good gateway's link is up")
    deaf.open.set()
    await until(lambda: end.statistics().running == 32, "the deaf one's work runs")
    before = engine.load().steps
    answer = await cluster.stub.Chat(chat(max_tokens=200, ignore_eos=True))
    steps = engine.load().steps - before
    assert answer.usage.completion_tokens == 200
    assert steps <= 230, "a step gives a token: nothing waited for the deaf gateway"
    await until(lambda: end.statistics().running == 0, "the deaf gateway's requests have left the engine", 60)
    assert end.statistics().links == 1
    assert deaf.hellos == 1
    await end.close()
    await task
    await server.stop(0)


async def test_frames_merge_until_they_are_taken() -> None:
    """Outputs are merged into one message until `next_message` is called. An outbox with more than `max_tokens` tokens
    is full."""
    outbox = Outbox(max_tokens=3)
    for token in (5, 6):
        outbox.output(1, TokenOutput("r", [token]))
    outbox.accepted(1)
    outbox.flush()
    full = [outbox.full]
    outbox.output(2, TokenOutput("s", [7, 8]))
    full.append(outbox.full)
    message = await outbox.next_message()
    full.append(outbox.full)
    assert full == [False, True, False]
    assert [(slot, list(o.token_ids)) for slot, o in codec.outputs_from_pb(message.step)] == [(1, [5, 6]), (2, [7, 8])]
    assert [a.slot for a in message.accepted] == [1]


async def test_vectors_are_sent_in_bounded_messages_before_their_usage() -> None:
    """The vectors of one engine step are split into messages of little more than a megabyte. The usage records, and the
    report that the engine has ended, are sent with the last of these messages. The outbox is full if the unsent vectors
    exceed a limit."""
    outbox = Outbox()
    outbox.usage = lambda: [EndedUsage(b"r", 1, 0, 0, 0, 0, 0.0, "", "ok", 0.1)]
    vector = bytes(250_000)
    for slot in range(1, 10):
        outbox.output(slot, TokenOutput("", (), finish=FinishReason.STOP, vector=vector))
    assert not outbox.full
    outbox.engine_ended("why")
    slots: list[int] = []
    while len(slots) < 9:
        message = await outbox.next_message()
        outputs = dict(codec.outputs_from_pb(message.step))
        assert all(output.vector == vector and output.finish for output in outputs.values())
        assert message.ByteSize() < STEP_VECTOR_BYTES + 2 * len(vector)
        slots += outputs
        assert bool(message.usage) is bool(message.engine_ended) is (len(slots) == 9)
    assert slots == list(range(1, 10))
    for slot in range(MAX_VECTOR_BYTES // len(vector) + 1):
        outbox.output(slot, TokenOutput("", (), finish=FinishReason.STOP, vector=vector))
    assert outbox.full


async def test_only_the_newest_states_of_adapters_and_the_newest_set_are_sent() -> None:
    out = Outbox()
    out.adapters([AdapterStatus("a", "", AdapterState.LOADING)])
    out.adapters([AdapterStatus("b", "", AdapterState.FAILED)])
    assert [status.name for status in (await out.next_message()).adapters.adapters] == ["b"]
    out.flush()
    assert not (await out.next_message()).HasField("adapters")
    box = CommandBox()
    box.adapters(pb.AdapterSet(revision=1))
    box.adapters(pb.AdapterSet(revision=2))
    assert (await box.next_message()).adapters.revision == 2
    box.grant_ack(1)
    assert not (await box.next_message()).HasField("adapters")
