"""A replica without Ray: it starts and connects to gateways, or reports why it cannot. Its process ends with its
engine.
"""

from __future__ import annotations

import asyncio
import re
import threading
from dataclasses import replace

import grpc
import pytest

from cluster.api.ports import EngineCorrupt, EngineDead
from cluster.api.types import DrainState, ModelSpec
from cluster.link.v1 import link_pb2 as link_pb
from cluster.wire.bundle import Bundle
from cluster.worker.engine.simulated.engine import SimConfig, SimEngine
from cluster.worker.open_model import open_model
from cluster.worker.replica import OpenedModel, Replica, ReplicaPlacement
from cluster.worker.settings import ModelRefused, ReplicaSettings
from cluster.worker.starting import FIRST_S, StartingReports
from cluster.worker.weights.fetch_progress import FetchProgress
from tests.support.serving import Door, eventually, greedy

SOURCE = "sim://?vocab=1000&decode_ms=1"


def settings(door: Door, source: str = SOURCE, **more: object) -> ReplicaSettings:
    """Return the settings of a replica with a simulated model. The replica connects to `door`, the gateway's side of
    links in this test."""
    spec = ModelSpec(name="m", source=source, **more)  # type: ignore[arg-type]
    return ReplicaSettings(spec, "test", gateways=(door.address,))


async def test_serves_until_stopped(door: Door) -> None:
    """A started replica connects to the gateway, serves and passes `check`. A stopped replica does none of these."""
    replica = Replica(settings(door), ReplicaPlacement("r1", "node1"), open_model)
    with pytest.raises(EngineDead, match="not started"):
        await replica.check()
    await replica.start()
    link = await door.worker("m")
    assert (link.identity.worker_id, link.identity.node) == ("m-r1", "node1")
    assert link.identity.incarnation == replica.incarnation
    assert len(await greedy(link, [1, 2], 3)) == 3
    await replica.check()
    await replica.stop()
    await eventually(lambda: not door.hub.links, "its link has ended")
    with pytest.raises(EngineDead):
        await replica.check()
    await replica.stop()


async def test_a_start_shows_how_far_its_weights_are(door: Door) -> None:
    """While a replica fetches its weights, the gateway gets reports with the fetched bytes and the replica's pod and
    node. Once the start has succeeded or failed, there are no more reports."""
    for fails in (False, True):
        go_on, progress = threading.Event(), FetchProgress()

        def opener(
            settings: ReplicaSettings,
            progress: FetchProgress = progress,
            go_on: threading.Event = go_on,
            fails: bool = fails,
        ) -> OpenedModel:
            progress.report(30, 70)
            assert go_on.wait(60.0)
            if fails:
                raise ValueError("no such model")
            return open_model(settings)

        place = ReplicaPlacement("r1", "ray-node", gpus=1, pod="gpu-0", host="ip-10-0-3-7")
        replica = Replica(settings(door, gpu="H100"), place, opener, fetching=progress)
        starting = asyncio.create_task(replica.start())
        (seen,) = await eventually(lambda: door.hub.starting.current, "the gateway has the report")
        assert (seen.worker_id, seen.model, seen.fetched_bytes, seen.total_bytes) == ("m-r1", "m", 30, 70)
        assert (seen.pod, seen.node, seen.gpu) == ("gpu-0", "ip-10-0-3-7", "H100")
        go_on.set()
        if fails:
            with pytest.raises(ModelRefused):
                await starting
        else:
            await starting
            await door.worker("m")
        await eventually(lambda: not door.hub.starting.current, "its reports have ended")
        await replica.stop()


@pytest.mark.slow
async def test_a_gateway_of_an_older_release_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A starting worker sends a report to each gateway. A gateway of an older release, which lacks the method, gets one
    call and no further reports."""
    monkeypatch.setattr("cluster.worker.starting.REPORT_S", 0.01)
    asked: list[str] = []

    class Unknown(grpc.GenericRpcHandler):
        def service(self, handler_call_details: grpc.HandlerCallDetails) -> None:
            asked.append(handler_call_details.method)

    server = grpc.aio.server()
    server.add_generic_rpc_handlers((Unknown(),))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    spec = ModelSpec(name="m", source=SOURCE)
    reports = StartingReports("m-r1", "", "n", "", ReplicaSettings(spec, "test", (address,)), FetchProgress())
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(FIRST_S + 1.0):
            await reports.run()
    assert asked == ["/cluster.link.v1.Link/Starting"]
    await server.stop(0)


async def test_stop_drains_what_runs(door: Door) -> None:
    """When the replica stops, a running request is finished within the drain time."""
    replica = Replica(settings(door, SOURCE + "&max_num_seqs=4"), ReplicaPlacement("r1", "n"), open_model)
    await replica.start()
    running = asyncio.create_task(greedy(await door.worker("m"), [1, 2], 60))
    await eventually(lambda: replica.end is not None and replica.end.statistics().running, "it runs")
    await replica.stop()
    assert len(await running) == 60


async def test_a_node_that_ends_drains_its_replica(door: Door) -> None:
    """A replica on an ending node takes no new requests, finishes its running requests and then fails `check`.

    An operator's uncordon does not change that.
    """
    replica = Replica(settings(door, SOURCE + "&max_num_seqs=4"), ReplicaPlacement("r1", "n"), open_model)
    await replica.start()
    link = await door.worker("m")
    running = asyncio.create_task(greedy(link, [1, 2], 600))
    await eventually(lambda: replica.end is not None and replica.end.statistics().running, "it runs")
    leaving = asyncio.create_task(replica.leave(20.0))
    await eventually(lambda: not link.takes_new_requests, "the gateway knows")
    link.box.command(link_pb.Command(uncordon=link_pb.Uncordon()))
    assert len(await running) == 600
    await leaving
    await eventually(lambda: link.drain_state is DrainState.DRAINED, "it has drained, and takes nothing")
    with pytest.raises(EngineDead, match="its node is about to end"):
        await replica.check()
    await replica.stop()


async def test_a_stop_takes_no_longer_than_its_node(door: Door) -> None:
    """A stop takes at most `within_s`, even if the settings' drain time is longer."""
    replica = Replica(replace(settings(door, SOURCE), drain_timeout_s=300.0), ReplicaPlacement("r1", "n"), open_model)
    await replica.start()
    link = await door.worker("m")
    endless = asyncio.create_task(greedy(link, [1, 2], 100_000))
    await eventually(lambda: replica.end is not None and replica.end.statistics().running, "it runs")
    async with asyncio.timeout(60):
        await replica.stop(within_s=0.4)
    with pytest.raises(AssertionError, match="lost"):
        await endless


async def test_dead_engine_ends_the_process(door: Door) -> None:
    """When the engine dies, the links end, then the process ends. `check` reports the reason."""
    engine = SimEngine(SimConfig.from_source(SOURCE))
    exits: list[int] = []
    opened = OpenedModel(engine, Bundle({}), "")
    replica = Replica(settings(door), ReplicaPlacement("r1", "n"), lambda _: opened, on_engine_death=exits.append)
    await replica.start()
    await door.worker("m")
    engine.faults.kill("power cut")
    await eventually(lambda: exits, "the process is ended")
    assert exits == [70]
    await eventually(lambda: not door.hub.links, "its link has ended")
    (lost,) = door.lost_engines()
    assert (lost.model, lost.worker_id, lost.node) == ("m", "m-r1", "n")
    assert "power cut" in lost.reason
    with pytest.raises(EngineDead, match="power cut"):
        await replica.check()
    await replica.stop()


async def test_a_sick_engine_goes_the_way_of_a_dead_one(door: Door) -> None:
    """After an error, an engine must answer a fixed prompt (the golden check). If the engine's answer is wrong, the
    link is closed and the process ends. The reason names the node."""
    engine = SimEngine(SimConfig.from_source(SOURCE))
    exits: list[int] = []
    opened = OpenedModel(engine, Bundle({}), "")
    replica = Replica(settings(door), ReplicaPlacement("r1", "node-7"), lambda _: opened, on_engine_death=exits.append)
    await replica.start()
    link = await door.worker("m")
    assert len(await greedy(link, [1, 2], 3)) == 3
    engine.faults.arm("step", "wrong")
    engine.faults.arm("step", "nan", at=2)
    assert len(await greedy(link, [1, 2], 3)) == 1
    await eventually(lambda: exits, "the process is ended")
    await eventually(lambda: not door.hub.links, "its link has ended")
    assert "engine on node node-7 is sick" in door.lost_engines()[0].reason
    with pytest.raises(EngineDead, match="engine on node node-7 is sick: its answer to the golden prompt"):
        await replica.check()
    await replica.stop()


async def test_an_engine_that_is_sick_from_the_start_never_links(door: Door) -> None:
    """If the engine's answer to the first golden (fixed) request has NaN, the replica's start fails. The error is not
    ModelRefused, since another node may have a healthy GPU."""
    replica = Replica(settings(door, SOURCE + "&fault=nan@step:3"), ReplicaPlacement("r1", "node-7"), open_model)
    with pytest.raises(EngineCorrupt, match=r"node-7 is sick.*NaN in the logits"):
        await replica.start()
    assert not door.hub.links


@pytest.mark.parametrize(
    ("source", "place", "more", "reason"),
    [
        ("sim://?vocab=9&speed=1", ReplicaPlacement("r", "n"), {}, "'speed' is no parameter"),
        ("/no/such/folder", ReplicaPlacement("r", "n"), {}, r"models\[m\].source: there is no folder /no/such/folder"),
        ("sim://", ReplicaPlacement("r", "n"), {}, "vocab is not given"),
        (
            "/m",
            ReplicaPlacement("r", "n"),
            {"engine": {"worker_cls": "a.B"}},
            r"models\[m\].engine.worker_cls: names code",
        ),
        (
            SOURCE,
            ReplicaPlacement("r", "n"),
            {"digest": "sha256:0"},
            r"models\[m\].digest: the weights .* have sha256:.* requires",
        ),
        (
            SOURCE,
            ReplicaPlacement("r", "a", ("a", "b")),
            {"tensor_parallel_size": 2},
            r"models\[m\]: ranks 0 to 1, .* 2 nodes",
        ),
    ],
)
async def test_what_cannot_work_is_refused(
    door: Door, source: str, place: ReplicaPlacement, more: dict[str, object], reason: str
) -> None:
    """A wrong setting raises ModelRefused, which names the setting, and no link is made."""
    replica = Replica(settings(door, source, **more), place, open_model)
    with pytest.raises(ModelRefused) as caught:
        await replica.start()
    assert re.search(reason, caught.value.reason)
    assert not door.hub.links


async def test_bad_luck_is_not_a_refusal(door: Door) -> None:
    """An error that a retry may avoid is not turned into ModelRefused."""

    def unlucky(settings: ReplicaSettings) -> OpenedModel:
        raise OSError("the disk is away")

    model = settings(door)
    with pytest.raises(OSError, match="disk"):
        await Replica(model, ReplicaPlacement("r", "n"), unlucky).start()
