"""The commands drain, cordon and uncordon, run from the command line over real gateways and links."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster.api.types import DrainState
from cluster.link.v1 import link_pb2 as pb
from cluster.wire.bundle import Bundle
from cluster.wire.outbox import Outbox
from cluster.worker.drain_state import DrainStates
from tests.support.calls import chat, rest_of, text_of
from tests.support.cluster import TestCluster, Worker, running_cluster, sim_engine, until

LONG: dict[str, Any] = {"max_tokens": 400, "ignore_eos": True}


@dataclass(frozen=True)
class Done:
    """The result of a run of the command line."""

    exit_code: int
    stdout: str
    stderr: str


async def ask(cluster: TestCluster, *arguments: str) -> Done:
    """Run the command line in its own process, with the admin port of the cluster's gateway."""
    command = ("-m", "cluster.cli.main", *arguments, "--admin", cluster.gateway.endpoints["admin"])
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(sys.executable, *command, stdout=pipe, stderr=pipe)
    stdout, stderr = await process.communicate()
    return Done(process.returncode or 0, stdout.decode(), stderr.decode())


def drain_state_at(cluster: TestCluster, worker: Worker) -> DrainState:
    """Return a worker's drain state as the gateway knows it."""
    return next(x.drain_state for x in cluster.gateway.hub.links if x.identity.worker_id == worker.identity.worker_id)


@pytest.fixture
async def two(tmp_path: Path) -> AsyncIterator[tuple[TestCluster, TestCluster]]:
    """Two clusters whose gateways have no connection to each other."""
    async with running_cluster(tmp_path / "a") as a, running_cluster(tmp_path / "b") as b:
        yield a, b


async def add(two: tuple[TestCluster, TestCluster], checkpoint: Path, bundle: Bundle, decode_ms: float = 4) -> Worker:
    """Add a worker that is linked to both gateways."""
    links = [cluster.gateway.endpoints["link"] for cluster in two]
    worker = await two[0].add_worker(sim_engine(checkpoint, decode_ms=decode_ms), bundle, gateways=links)
    await until(lambda: two[1].linked(worker.identity.worker_id), "the second gateway has room there")
    return worker


@pytest.mark.slow
@pytest.mark.thorough
async def test_a_cordon_through_one_gateway_holds_at_both(
    two: tuple[TestCluster, TestCluster], checkpoint: Path, bundle: Bundle
) -> None:
    """A cordoned worker gets no new calls from either gateway and finishes its running call. Uncordon undoes the
    cordon."""
    a, b = two
    worker = await add(two, checkpoint, bundle, decode_ms=20)
    name = worker.identity.worker_id
    running = asyncio.ensure_future(b.stub.Chat(chat(**LONG)))
    await until(lambda: worker.end.statistics().running == 1, "the call runs")
    done = await ask(a, "cordon", name)
    assert done.exit_code == 0, done
    assert "has no other worker that takes calls" in done.stderr
    await until(lambda: drain_state_at(b, worker) is DrainState.CORDONED, "the other gateway knows")
    other = await add(two, checkpoint, bundle)
    for gateway in two:
        for _ in range(4):
            await gateway.stub.Chat(chat(max_tokens=2))
    assert worker.end.statistics().running == 1, "nothing new has come, and what ran runs"
    assert other.engine.load().steps > 0
    assert "CORDONED" in (await ask(b, "workers")).stdout
    assert (await running).usage.completion_tokens == 400
    assert (await ask(b, "uncordon", name)).exit_code == 0
    await until(lambda: drain_state_at(a, worker) is DrainState.SERVING, "the other gateway knows")
    await other.stop()
    assert (await a.stub.Chat(chat(max_tokens=2))).choices


@pytest.mark.slow
async def test_a_drained_worker_ends_empty_and_nothing_is_cut(
    two: tuple[TestCluster, TestCluster], checkpoint: Path, bundle: Bundle
) -> None:
    """An operator drains a worker through one of two gateways. The streams of both gateways leave the worker
    within the drain time, and their texts equal the text of an undisturbed stream.

    Both gateways get the drain state. After `uncordon` the worker serves again.
    """
    a, b = two
    worker = await add(two, checkpoint, bundle, decode_ms=30)  # so slow that no stream ends before the command arrives
    name = worker.identity.worker_id
    streams = [gateway.stub.StreamChat(chat(max_tokens=800, ignore_eos=True)) for gateway in two]
    begun = [await stream.read() for stream in streams]
    await until(lambda: worker.end.statistics().running == 2, "both run there")
    await add(two, checkpoint, bundle, decode_ms=1)
    done = await ask(a, "drain", name, "--timeout-s", "4", "--json")
    (row,) = json.loads(done.stdout)
    assert (done.exit_code, row["state"], row["running"]) == (0, "DRAINED", 0), done
    ended = [[first, *await rest_of(stream)] for first, stream in zip(begun, streams, strict=True)]
    whole = [chunk async for chunk in a.stub.StreamChat(chat(max_tokens=800, ignore_eos=True))]
    for chunks in ended:
        assert text_of(chunks) == text_of(whole)
        assert chunks[-1].usage.resumed == 1
    await until(lambda: drain_state_at(b, worker) is DrainState.DRAINED, "the other gateway knows")
    assert (await ask(b, "uncordon", name)).exit_code == 0
    await until(lambda: a.linked(name) and drain_state_at(a, worker) is DrainState.SERVING, "it serves again")


@pytest.mark.slow
@pytest.mark.thorough
async def test_a_drain_without_another_worker_cuts_nothing(
    cluster: TestCluster, checkpoint: Path, bundle: Bundle
) -> None:
    """If no other worker can take over a stream, the stream continues after the drain time. The drain command then
    reports that the stream still runs, and ends with exit code 1."""
    worker = await cluster.add_worker(sim_engine(checkpoint, decode_ms=10), bundle)
    stream = cluster.stub.StreamChat(chat(max_tokens=600, ignore_eos=True))
    first = await stream.read()
    done = await ask(cluster, "drain", worker.identity.worker_id, "--timeout-s", "0.2")
    assert done.exit_code == 1
    assert "DRAINING" in done.stdout
    assert (await ask(cluster, "uncordon", worker.identity.worker_id)).exit_code == 0
    assert [first, *await rest_of(stream)][-1].usage.completion_tokens == 600


@pytest.mark.slow
async def test_a_node_names_all_its_workers(cluster: TestCluster, checkpoint: Path, bundle: Bundle) -> None:
    """A command that names a node applies to every worker of the node and to no other worker."""
    here = [await cluster.add_worker(sim_engine(checkpoint), bundle, node="rack-1") for _ in range(2)]
    there = await cluster.add_worker(sim_engine(checkpoint), bundle, node="rack-2")
    assert (await ask(cluster, "drain", "rack-1", "--timeout-s", "5")).exit_code == 0
    assert [drain_state_at(cluster, worker) for worker in here] == [DrainState.DRAINED] * 2
    assert drain_state_at(cluster, there) is DrainState.SERVING


@pytest.mark.slow
async def test_kubernetes_names_are_known(cluster: TestCluster, checkpoint: Path, bundle: Bundle) -> None:
    """`headrace drain` with the name of a Kubernetes node drains all workers of the node. With the name of a pod,
    it drains only the pod's worker.

    `headrace workers` shows both names, in JSON and in the table. A worker of an older release has no such
    names.
    """
    where = [("4506fed2511a", "ip-10-0-3-7", "gpu-a"), ("4506fed2511a", "ip-10-0-3-7", "gpu-b"), ("7e1", "", "")]
    first, second, old = [
        await cluster.add_worker(sim_engine(checkpoint), bundle, node=node, host=host, pod=pod)
        for node, host, pod in where
    ]
    rows = {row["worker_id"]: row for row in json.loads((await ask(cluster, "workers", "--json")).stdout)}
    names = [
        [rows[worker.identity.worker_id][key] for key in ("node", "host", "pod")] for worker in (first, second, old)
    ]
    assert names == [list(expected) for expected in where]
    assert (await ask(cluster, "drain", "gpu-b", "--timeout-s", "5")).exit_code == 0
    assert [drain_state_at(cluster, worker) for worker in (first, second)] == [DrainState.SERVING, DrainState.DRAINED]
    assert (await ask(cluster, "drain", "ip-10-0-3-7", "--timeout-s", "5")).exit_code == 0
    assert drain_state_at(cluster, first) is DrainState.DRAINED
    assert drain_state_at(cluster, old) is DrainState.SERVING
    table = (await ask(cluster, "workers")).stdout
    assert all(word in table for word in ("ip-10-0-3-7", "gpu-a", "gpu-b", "7e1"))


@pytest.mark.slow
async def test_a_link_made_later_hears_it(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> None:
    """A link that is made after a cordon gets the drain state. Otherwise its gateway would assume that the worker
    serves."""
    async with running_cluster(tmp_path / "a") as a:
        worker = await a.add_worker(sim_engine(checkpoint), bundle)
        assert (await ask(a, "cordon", worker.identity.worker_id)).exit_code == 0
        (link,) = a.gateway.hub.links
        link.close("cut by the test")
        await until(lambda: [x for x in a.gateway.hub.links if x is not link] != [], "it has dialed anew")
        await until(lambda: drain_state_at(a, worker) is DrainState.CORDONED, "the new link knows")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("drain", "nobody"), "no worker, node or pod"),
        (("cordon", ""), "name a worker or a node"),
        (("uncordon", "nobody"), "no worker, node or pod"),
    ],
)
@pytest.mark.slow
async def test_who_is_unknown_is_named(cluster: TestCluster, arguments: tuple[str, ...], says: str) -> None:
    """An unknown target is an error with exit code 2. The error says which command lists the names."""
    done = await ask(cluster, *arguments)
    assert done.exit_code == 2
    assert says in done.stderr
    assert "INVALID_FIELD" in done.stderr


def test_a_worker_that_leaves_takes_no_work_again() -> None:
    """Uncordon and cordon do not change the drain of a process that is about to end.

    A new link gets the drain state.
    """
    outbox = Outbox()
    state = DrainStates()
    state.cordon(1.0)
    assert not state.serves
    state.drain(2.0, 10.0, leaving=True)
    state.cordon(3.0)
    assert not state.uncordon(3.0)
    state.attach(outbox, 4.0)
    sent = asyncio.run(outbox.next_message()).standing
    assert (sent.state, sent.stay_ms) == (pb.Standing.STATE_DRAINING, 3000)
    state.mark_drained(9.0)
    assert state.state is DrainState.DRAINED
