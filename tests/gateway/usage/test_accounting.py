"""Usage records. Each sequence that a worker accepted has one record, however its call ends. A sequence that no worker
accepted has none."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from cluster.ledger.store import Ledger
from cluster.ledger.usage.sealed_records import Sealer
from cluster.wire.bundle import Bundle
from cluster.wire.dial import read
from tests.support.accounts import (
    SECRET,
    AccountedWorker,
    Switch,
    accounting_cluster,
    idle_gpu_seconds,
    records,
    start_worker,
)
from tests.support.calls import chat, refused
from tests.support.cluster import TestCluster, running_cluster, sim_engine, until

pytestmark = pytest.mark.slow


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    """Provide a SQLite ledger with its tables."""
    made = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    made.upgrade()
    yield made
    made.close()


async def linked(cluster: TestCluster) -> None:
    """Wait until a worker is linked to this gateway and has granted credit."""
    await until(lambda: any(link.free.sequences for link in cluster.gateway.hub.links), "a worker is linked")


async def settled(cluster: TestCluster, *workers: AccountedWorker) -> None:
    """Wait until every record is in the database and is acknowledged to the worker."""
    accounting = cluster.gateway.dispatch.accounting
    assert accounting is not None
    await until(lambda: len(accounting.accounts) == 0, "every account is closed")
    await until(lambda: accounting.statistics().pending == 0, "every record is in the database")
    await until(
        lambda: all(w.end.statistics().unacked_usage == 0 for w in workers), "workers have their acknowledgements"
    )


async def test_every_end_has_its_record(tmp_path: Path, checkpoint: Path, bundle: Bundle, ledger: Ledger) -> None:
    """Every sequence has one usage record with its delivered and generated tokens. This holds for sequences that
    finish, end at a stop string, are cancelled, pass their deadline or fail in the engine, and for each sequence of a
    call with several outputs."""
    async with accounting_cluster(tmp_path / "g", ledger.usage.insert) as cluster:
        engine = sim_engine(checkpoint, decode_ms=2)
        worker = await start_worker(engine, bundle, [cluster.gateway.endpoints["link"]])
        await linked(cluster)
        stub = cluster.stub

        answer = await stub.Chat(chat("one", max_tokens=7, ignore_eos=True))
        assert answer.usage.completion_tokens == 7
        whole = answer.choices[0].message.content
        stopped = await stub.Chat(chat("one", max_tokens=7, ignore_eos=True, stop=[whole[3:6]]))
        await stub.Chat(chat("three", max_tokens=5, n=3, ignore_eos=True))
        stream = stub.StreamChat(chat("cut", max_tokens=2000, ignore_eos=True))
        await read(stream)
        await read(stream)
        stream.cancel()
        late = await refused(stub.Chat(chat("late", max_tokens=2000, ignore_eos=True), timeout=1.0))
        assert late.code is grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: engine.load().running == 0, "the late one has left the engine")
        engine.faults.arm("step", "nan", 0)  # at every attempt
        await refused(stub.Chat(chat("nan", max_tokens=50, ignore_eos=True)))
        await settled(cluster, worker)

        found = records(ledger)
        assert sorted(one.outcome for one in found) == [
            "cancelled", "deadline_exceeded", "internal", "ok", "ok", "ok", "ok", "ok",
        ]  # fmt: skip
        accepted = {opened.record_id: usage for opened, usage in worker.witness.accepted(Sealer([SECRET]))}
        assert sorted(accepted) == sorted(one.record_id for one in found)
        assert not any(one.delivered_unknown for one in found)
        for one in found:
            assert one.generated_tokens == accepted[one.record_id].generated_tokens
            assert one.completion_tokens <= one.generated_tokens
            assert one.request_id
            assert one.version == "v1"
            where = (one.worker, one.pod, one.node, one.gateway)
            known = worker.identity
            assert where == (known.worker_id, known.pod, known.host, cluster.gateway.hub.gateway_id)
        plain, stopping, *three, cut, deadline, _failed = sorted(found, key=lambda one: one.opened_at_s)
        assert (plain.completion_tokens, plain.generated_tokens) == (7, 7)
        assert stopping.completion_tokens == stopped.usage.completion_tokens
        assert stopping.completion_tokens < 7
        assert sorted((one.segment, one.completion_tokens) for one in three) == [(0, 5), (1, 5), (2, 5)]
        assert sorted(one.prompt_tokens > 0 for one in three) == [False, False, True], "a prompt is counted once"
        assert 0 < cut.completion_tokens <= cut.generated_tokens < 2000
        assert deadline.completion_tokens == 0, "nothing of a unary answer was delivered"
        assert deadline.generated_tokens > 5
        await worker.stop()


async def test_what_no_worker_accepted_has_no_record(
    tmp_path: Path, checkpoint: Path, bundle: Bundle, ledger: Ledger
) -> None:
    """A call has no record if the engine refuses the call, if the call ends in the queue, or if the call is invalid."""
    async with accounting_cluster(tmp_path / "g", ledger.usage.insert) as cluster:
        waiting = cluster.stub.Chat(chat(max_tokens=2), timeout=0.2)
        await refused(waiting)
        engine = sim_engine(checkpoint, decode_ms=1)
        worker = await start_worker(engine, bundle, [cluster.gateway.endpoints["link"]])
        await linked(cluster)
        engine.faults.arm("submit", "refuse")
        assert (await refused(cluster.stub.Chat(chat()))).reason == "INVALID_FIELD"
        await refused(cluster.stub.Chat(chat(top_p=7.0)))
        await cluster.stub.Chat(chat(max_tokens=2, ignore_eos=True))
        await settled(cluster, worker)
        assert [one.completion_tokens for one in records(ledger)] == [2]
        await worker.stop()


async def test_a_retried_call_has_one_record(tmp_path: Path, checkpoint: Path, bundle: Bundle, ledger: Ledger) -> None:
    """If a call loses its worker before the first token and is retried, the ledger has one record of the call. Both
    workers have the call under the same record id."""
    async with accounting_cluster(tmp_path / "g", ledger.usage.insert) as cluster:
        first = await start_worker(sim_engine(checkpoint, decode_ms=2000), bundle, [cluster.gateway.endpoints["link"]])
        await linked(cluster)
        call = asyncio.ensure_future(cluster.stub.Chat(chat(max_tokens=6, ignore_eos=True)))
        await until(lambda: first.end.statistics().running == 1, "the first worker has it")
        cluster.gateway.hub.links[0].close("cut by the test")
        await until(lambda: bool(first.witness.seen), "the first worker has dropped it")
        await first.end.drain(0)
        second = await start_worker(sim_engine(checkpoint, decode_ms=1), bundle, [cluster.gateway.endpoints["link"]])
        answer = await asyncio.wait_for(call, 60)
        assert answer.usage.completion_tokens == 6
        await settled(cluster, first, second)
        (one,) = records(ledger)
        assert (one.outcome, one.completion_tokens, one.delivered_unknown) == ("ok", 6, False)
        assert (
            len({opened.record_id for w in (first, second) for opened, _ in w.witness.accepted(Sealer([SECRET]))}) == 1
        )
        await second.stop()
        await first.stop(0)


async def test_counts_wait_while_the_database_is_away(
    tmp_path: Path, checkpoint: Path, bundle: Bundle, ledger: Ledger
) -> None:
    """Calls are served while the database is down. The worker keeps the counts of the calls until the database has
    them."""
    switch = Switch(ledger.usage.insert)
    async with accounting_cluster(tmp_path / "g", switch.insert) as cluster:
        worker = await start_worker(sim_engine(checkpoint, decode_ms=1), bundle, [cluster.gateway.endpoints["link"]])
        await linked(cluster)
        switch.away = True
        for number in range(5):
            labels = {"team": f"t{number}"}
            await cluster.stub.Chat(chat(f"{number}", max_tokens=3, ignore_eos=True, metadata=labels))
        wrong = await refused(cluster.stub.Chat(chat(metadata={"team": "x" * 300})))
        assert wrong.fields == ["metadata.team"]
        accounting = cluster.gateway.dispatch.accounting
        assert accounting is not None
        await until(lambda: accounting.statistics().pending == 5, "the spool has them")
        assert worker.end.statistics().unacked_usage == 5
        assert records(ledger) == []
        switch.away = False
        await settled(cluster, worker)
        found = [(one.completion_tokens, dict(one.labels)) for one in records(ledger)]
        assert found == [(3, {"team": f"t{number}"}) for number in range(5)]
        await worker.stop()


@pytest.mark.slow
async def test_a_lost_gateways_call_counts_what_a_lost_worker_had_made(
    tmp_path: Path, checkpoint: Path, bundle: Bundle, ledger: Ledger
) -> None:
    """If a call loses its first worker and then its gateway, the report of its second worker includes every token that
    the caller has read."""
    gone = Switch(ledger.usage.insert)
    gone.away = True
    async with (
        accounting_cluster(tmp_path / "b", ledger.usage.insert) as other,
        accounting_cluster(tmp_path / "a", gone.insert) as lost,
    ):
        links = [lost.gateway.endpoints["link"], other.gateway.endpoints["link"]]
        first = await start_worker(sim_engine(checkpoint, decode_ms=2), bundle, links[:1])
        await linked(lost)
        call = lost.stub.StreamChat(chat("running", max_tokens=2000, ignore_eos=True))
        chunks = [await read(call) for _ in range(40)]
        await first.stop(0)
        second = await start_worker(sim_engine(checkpoint, decode_ms=2), bundle, links)
        chunks += [await read(call) for _ in range(10)]
        await linked(other)
        lost.gateway.hub.links[0].close("as if its host were gone")
        await until(lambda: second.end.statistics().running == 0, "the worker has dropped it")
        await lost.gateway.ports.links.stop(0)
        await settled(other, second)
        (one,) = records(ledger)
        assert one.delivered_unknown
        assert one.generated_tokens >= one.completion_tokens >= sum(bool(chunk.choices) for chunk in chunks) > 40
        await second.stop()


@pytest.mark.slow
async def test_a_lost_gateways_calls_are_told_to_another(
    tmp_path: Path, checkpoint: Path, bundle: Bundle, ledger: Ledger
) -> None:
    """If a lost gateway had not written its records to the database, another gateway writes them as estimates. If the
    lost gateway's disk returns, its exact records replace the estimates, and no record is stored twice."""
    gone = Switch(ledger.usage.insert)
    gone.away = True
    async with accounting_cluster(tmp_path / "b", ledger.usage.insert) as other:
        async with accounting_cluster(tmp_path / "a", gone.insert) as lost:
            worker = await start_worker(
                sim_engine(checkpoint, decode_ms=2),
                bundle,
                [lost.gateway.endpoints["link"], other.gateway.endpoints["link"]],
            )
            await linked(lost)
            await lost.stub.Chat(chat("ended", max_tokens=4, ignore_eos=True))
            stream = lost.stub.StreamChat(chat("running", max_tokens=2000, ignore_eos=True))
            for _ in range(3):
                await read(stream)
            lost.gateway.hub.links[0].close("as if its host were gone")
            await until(lambda: worker.end.statistics().running == 0, "the worker has dropped it")
            await lost.gateway.ports.links.stop(0)
            await settled(other, worker)
            ended, running = records(ledger)
            assert (ended.completion_tokens, ended.delivered_unknown) == (4, True)
            assert running.delivered_unknown
            assert running.generated_tokens >= running.completion_tokens >= 2
        again = Switch(ledger.usage.insert)
        async with accounting_cluster(tmp_path / "a", again.insert) as back:
            accounting = back.gateway.dispatch.accounting
            assert accounting is not None
            await until(lambda: accounting.statistics().pending == 0, "its spool is replayed")
        exact = records(ledger)
        assert [one.record_id for one in exact] == [ended.record_id, running.record_id]
        assert not any(one.delivered_unknown for one in exact)
        assert exact[0].request_id == ended.request_id
        assert exact[1].outcome == "cancelled", "its gateway was stopped while it waited to be resumed"
        await worker.stop()


@pytest.mark.slow
async def test_gpu_seconds_of_calls_and_idle_are_the_replicas_lifetime(
    tmp_path: Path, checkpoint: Path, bundle: Bundle, ledger: Ledger
) -> None:
    """For a replica with 4 GPUs, the GPU seconds of all tenants and of idle time add up to 4 times the replica's
    lifetime, within 1 %. Idle time is recorded under the tenant `_idle`."""
    async with accounting_cluster(tmp_path / "g", ledger.usage.insert) as cluster:
        engine = sim_engine(checkpoint, decode_ms=5)
        worker = await start_worker(engine, bundle, [cluster.gateway.endpoints["link"]], gpus=4)
        began = time.monotonic()
        await linked(cluster)
        for burst in range(3):
            answers = [
                cluster.stub.Chat(chat(f"{burst} {i}", max_tokens=20 + 10 * i, ignore_eos=True)) for i in range(6)
            ]
            await asyncio.gather(*answers)
            idle = len([one for one in worker.witness.seen if one.idle_id])
            await until(lambda idle=idle: len([x for x in worker.witness.seen if x.idle_id]) > idle, "some idle time")  # type: ignore[misc]
        assert await worker.end.drain(5)
        lifetime_s = (
            worker.witness.told_at - began
        )  # time of its last idle record, after which the worker waits for an acknowledgement
        await settled(cluster, worker)
        calls = sum(one.gpu_seconds for one in records(ledger))
        idle_s = idle_gpu_seconds(ledger)
        assert calls > 0.1 * lifetime_s * 4
        assert idle_s > 0
        assert calls + idle_s == pytest.approx(lifetime_s * 4, rel=0.01)
        assert {one.gpu for one in records(ledger)} == {"H100"}
        await worker.stop(0)


@pytest.mark.slow
async def test_a_short_call_is_charged_its_own_steps(
    tmp_path: Path, checkpoint: Path, bundle: Bundle, ledger: Ledger
) -> None:
    """A call with a single token is charged for the step that computed the token, not for the idle time before."""
    async with accounting_cluster(tmp_path / "g", ledger.usage.insert) as cluster:
        engine = sim_engine(checkpoint, decode_ms=20)
        worker = await start_worker(engine, bundle, [cluster.gateway.endpoints["link"]], gpus=1)
        await linked(cluster)
        took = []
        for tokens in (1, 2, 1):
            seen = len(worker.witness.seen)
            rested = lambda seen=seen: any(usage.idle_id for usage in worker.witness.seen[seen:])  # noqa: E731
            await until(rested, "it has rested")
            began = time.monotonic()
            await cluster.stub.Chat(chat(f"with {tokens}", max_tokens=tokens, ignore_eos=True))
            took.append(time.monotonic() - began)
        await worker.end.drain(5)
        await settled(cluster, worker)
        charged = sorted((one.completion_tokens, one.gpu_seconds) for one in records(ledger))
        assert [tokens for tokens, _ in charged] == [1, 1, 2]
        assert all(0 < gpu_s <= max(took) for _, gpu_s in charged)
        await worker.stop(0)


def test_a_gateway_without_a_ledger_imports_none() -> None:
    """A gateway without `auth` imports no modules for accounts or databases."""
    program = "import sys; import cluster.gateway.server; print(*sys.modules)"
    imported = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"cluster.gateway.usage.accounting", "cluster.ledger.store", "sqlalchemy"} & set(imported)


async def test_without_accounts_nothing_is_kept(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> None:
    """A gateway without accounts seals no records, and its workers keep no records."""
    async with running_cluster(tmp_path) as cluster:
        worker = await start_worker(sim_engine(checkpoint), bundle, [cluster.gateway.endpoints["link"]], gpus=1)
        await linked(cluster)
        await cluster.stub.Chat(chat(max_tokens=3, ignore_eos=True))
        await cluster.until_idle()
        await worker.stop()
        assert worker.witness.seen == []
