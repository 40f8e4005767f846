"""Workers and controllers dial the configured gateways, and the siblings that those gateways name in their first
message (Welcome).
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc

from cluster.api.types import WorkerIdentity
from cluster.cli.local.ports import choose_ports
from cluster.config.document import parse
from cluster.config.schema import Config
from cluster.controller.links import ControllerLinks
from cluster.gateway.server import Gateway
from cluster.policy.routing.gateway_subset import GatewaySubset
from cluster.v1 import inference_pb2_grpc as pb_grpc
from cluster.wire.addresses import GatewayAddresses
from cluster.wire.bundle import Bundle
from cluster.wire.dial import LinkEnded, Timing
from cluster.worker.session import WorkerSession
from tests.support.calls import chat
from tests.support.cluster import LOOPBACK, TestCluster, sim_engine, until

OWN_CONNECTION = (("grpc.use_local_subchannel_pool", 1),)
QUICK = Timing(redial_min_s=0.001, redial_max_s=0.01)


def test_siblings_are_dialled_on_the_host_that_was_dialled() -> None:
    """If a sibling's address has no host, it is dialled on the host of the gateway that reported it. A complete address
    is used unchanged."""
    gateways = GatewayAddresses(["[::1]:50052", "b.example:1"])
    gateways.record_welcome("[::1]:50052", "i0", [":50061", "c.example:2"])
    assert gateways.addresses == ("[::1]:50052", "b.example:1", "[::1]:50061", "c.example:2")


def test_only_what_is_reached_counts() -> None:
    """Siblings are the other gateway processes of a host. The siblings that a gateway names are dialled, and so are
    their siblings. Two siblings that name each other are dropped once no configured gateway names them."""
    gateways = GatewayAddresses(["a:1"])

    def now() -> list[str]:
        return list(gateways.addresses)

    gateways.record_welcome("a:1", "i1", [":2"])
    gateways.record_welcome("a:2", "i2", [":1", ":3"])
    gateways.record_welcome("a:3", "i3", [":1", ":2"])
    assert now() == ["a:1", "a:2", "a:3"]
    gateways.record_welcome("a:1", "i1-later", [])
    assert now() == ["a:1"]


def test_one_process_under_two_names_is_dialled_once() -> None:
    """A gateway process may have two addresses. A worker dials it only at the configured address, because a second link
    to the same process would end the first."""
    gateways = GatewayAddresses(["host:1", "10.0.0.1:2"])
    gateways.record_welcome("host:1", "i1", [":2"])
    assert "host:2" in gateways.addresses, "no gateway has answered at either name yet"
    gateways.record_welcome("10.0.0.1:2", "i2", [])
    gateways.record_welcome("host:2", "i2", [":1"])
    assert gateways.addresses == ("host:1", "10.0.0.1:2")


def test_only_chosen_gateways_are_dialled() -> None:
    """If there are many gateways, a worker dials only the addresses that `choose` selects. `choose` gets the configured
    addresses and the addresses of their sibling processes."""
    rule = GatewaySubset("w1", most=3, replicas=1000)
    gateways = GatewayAddresses([f"g{number}:1" for number in range(5)], choose=rule.of)
    assert len(gateways.addresses) == 3
    first = gateways.addresses[0]
    gateways.record_welcome(first, "i1", [":2", ":3", ":4"])
    assert len(gateways.addresses) == 3
    host = first.split(":")[0]
    every = [*(f"g{number}:1" for number in range(5)), *(f"{host}:{port}" for port in (2, 3, 4))]
    assert set(gateways.addresses) == set(rule.of(every))


class Answering:
    """Fake sessions, by address. A session ends when the event of its address is set."""

    def __init__(self) -> None:
        self.open: dict[str, asyncio.Event] = {}
        self.opened: list[str] = []

    async def session(self, address: str) -> None:
        """Run a session with a gateway until the session's event is set."""
        self.opened.append(address)
        end = self.open[address] = asyncio.Event()
        await end.wait()
        raise LinkEnded("told to")

    async def until_open(self, address: str, times: int) -> None:
        """Wait until `times` sessions with an address were started."""
        await until(lambda: self.opened.count(address) == times, f"session {times} with {address}")


async def test_a_session_outlives_its_name_but_is_not_begun_again() -> None:
    """If a gateway no longer lists one of its sibling processes in its Welcome, an open link to this sibling continues.
    Once the link ends, the sibling is dialled again only if it is listed again."""
    peers = Answering()
    gateways = GatewayAddresses(["a:1"])
    dialling = asyncio.create_task(gateways.dial(peers.session, QUICK))
    await peers.until_open("a:1", 1)
    gateways.record_welcome("a:1", "i1", [":2"])
    await peers.until_open("a:2", 1)
    gateways.record_welcome("a:1", "i1", [])
    peers.open["a:1"].set()
    await peers.until_open("a:1", 2)
    assert not peers.open["a:2"].is_set(), "the other's link stays up"
    peers.open["a:2"].set()
    for times in range(3, 6):  # each redial of a:1 leaves time for a wrong redial of a:2
        peers.open["a:1"].set()
        await peers.until_open("a:1", times)
    assert peers.opened.count("a:2") == 1
    gateways.record_welcome("a:1", "i1", [":2"])
    await peers.until_open("a:2", 2)
    dialling.cancel()
    await asyncio.gather(dialling, return_exceptions=True)


def two_processes() -> Config:
    """Return a configuration of two gateway processes with fixed ports."""
    return choose_ports(parse(LOOPBACK.replace("drain_timeout_s: 0", "drain_timeout_s: 0\n  processes: 2")))


async def test_two_processes_share_one_workers_room(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> None:
    """A worker or controller that dials one of two sibling gateways links to both. Both gateways send requests to the
    worker, together no more than its capacity. After one gateway has stopped, the other gets the whole capacity."""
    config, sequences = two_processes(), 6
    gateways = [Gateway(config, tmp_path / str(i), process=i) for i in range(2)]
    engine = sim_engine(checkpoint, decode_ms=2, max_num_seqs=sequences)
    for gateway in gateways:
        await gateway.start()
    assert gateways[0].endpoints["grpc"] == gateways[1].endpoints["grpc"]
    assert "admin" not in gateways[1].endpoints
    address = gateways[0].endpoints["link"]
    end = WorkerSession(
        identity=WorkerIdentity("w", "i", "sim", bundle_digest=bundle.digest),
        engine=engine,
        info=await engine.start(),
        bundle=bundle,
        gateways=[address],
    )
    controller = ControllerLinks(controller_id="c", gateways=[address], tls=None, bundles=lambda _: None)
    controller.publish([])
    tasks = [asyncio.create_task(end.run()), asyncio.create_task(controller.run())]
    clusters = [TestCluster(gateway) for gateway in gateways]
    # The kernel distributes connections: the chance that one gateway gets all of them is 1 in 32768.
    channels = [grpc.aio.insecure_channel(gateways[0].endpoints["grpc"], options=OWN_CONNECTION) for _ in range(16)]
    stubs = [pb_grpc.InferenceStub(channel) for channel in channels]
    try:
        await until(lambda: all(c.linked("w") for c in clusters), "both have a link with capacity")
        await until(lambda: controller.linked == 2, "the controller has dialled both")
        await until(lambda: [gateway.hub.controller.gateways for gateway in gateways] == [2, 2], "both know of another")
        calls = [
            asyncio.ensure_future(stub.Chat(chat(f"{i}", max_tokens=20, ignore_eos=True)))
            for i in range(3)
            for stub in stubs
        ]
        busy: set[int] = set()
        while not all(call.done() for call in calls):
            now = end.statistics()
            assert now.running + now.promised.sequences <= sequences + 2
            busy |= {i for i, gateway in enumerate(gateways) if gateway.hub.statistics().running}
            await asyncio.sleep(0.001)
        assert busy == {0, 1}
        assert all(call.result().usage.completion_tokens == 20 for call in calls)
        await gateways[1].stop(0)
        await until(lambda: end.statistics().links == 1, "the link of the second is gone")
        await until(lambda: gateways[0].hub.links[0].free.sequences == sequences, "its room is the first's")
        await until(lambda: gateways[0].hub.controller.gateways == 1, "it knows that it is alone")
    finally:
        await end.close()
        for channel in (*channels, *(cluster.channel for cluster in clusters)):
            await channel.close()
        tasks[1].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for gateway in gateways:
            await gateway.stop(0)
